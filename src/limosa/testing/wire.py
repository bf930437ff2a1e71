"""What lies between fake machines: one clock, one network, and brakes to force the interesting case.

Time is virtual: it passes only while something is sent, in steps, and between two steps everything else gets its turn.
So nothing waits for a real clock, and a test that wants to look at a migration in its middle stops it there
(:meth:`Wire.hold`) instead of hoping to be quick enough.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import defaultdict
from collections.abc import Iterator
from enum import StrEnum
from typing import TYPE_CHECKING

from limosa.errors import QemuError
from limosa.qemu.protocol import RdmaAddress

if TYPE_CHECKING:
    from limosa.testing.machine import FakeMachine


#: A caller's number, as it is sent over the stream that the machines were given.
_NUMBER_BYTES = 8


class Stage(StrEnum):
    """Moments of a migration at which it can be held or made to fail."""

    #: connected, nothing sent
    SETUP = "setup"
    #: the first pass has begun
    COPY = "copy"
    #: the guest is stopped, the rest is not sent yet
    SWITCHOVER = "switchover"
    #: the destination has everything, the source does not know it
    LOADED = "loaded"


class StreamBroken(Exception):
    """The stream ended; the text is what QEMU would say."""


class Wire:
    """The network, and the clock, of some fake machines."""

    def __init__(self, bandwidth_bytes_per_s: float = 125e6, *, step_s: float = 0.01) -> None:
        self.bandwidth_bytes_per_s = bandwidth_bytes_per_s
        self.step_s = step_s
        #: seconds since the epoch
        self.now = 1_700_000_000.0
        #: makes the next migration that comes to the stage fail with these words
        self.failures: dict[Stage, str] = {}
        #: whether its machines have RDMA devices
        self.has_rdma = False
        self._listening: dict[RdmaAddress, socket.socket] = {}
        self._answers: dict[int, asyncio.Future[FakeMachine]] = {}
        self._held: set[Stage] = set()
        self._released: dict[Stage, asyncio.Event] = defaultdict(asyncio.Event)
        self._reached: dict[Stage, asyncio.Event] = defaultdict(asyncio.Event)
        self._passed = asyncio.Event()

    def hold(self, stage: Stage) -> None:
        """Stop migrations when they come to ``stage``."""
        self._held.add(stage)

    def release(self, stage: Stage) -> None:
        """Let migrations go on from ``stage``, now and from now on."""
        self._held.discard(stage)
        self._released[stage].set()

    async def reached(self, stage: Stage) -> None:
        """Wait until a migration has come to ``stage``."""
        await self._reached[stage].wait()

    async def arrive(self, stage: Stage) -> None:
        """Called by a migration when it comes to ``stage``. Raises :class:`StreamBroken` if it shall fail there."""
        self._reached[stage].set()
        if stage in self._held:
            await self._released[stage].wait()
        if stage in self.failures:
            raise StreamBroken(self.failures.pop(stage))

    async def step(self) -> float:
        """Let a moment pass; returns how long it was."""
        await asyncio.sleep(0)
        self.now += self.step_s
        self._passed.set()
        return self.step_s

    async def passes(self, seconds: float) -> None:
        """Wait until that much time has passed on the wire; for ever, if nothing is sent."""
        until = self.now + seconds
        while self.now < until:
            self._passed.clear()
            await self._passed.wait()

    def listen(self, address: RdmaAddress) -> socket.socket:
        """Where a machine awaits another by RDMA. Raises :class:`QemuError` without devices."""
        if not self.has_rdma:
            raise QemuError("QEMU refused migrate-incoming", why="RDMA ERROR: no RDMA device")
        caller, listener = socket.socketpair()
        self._listening[address] = caller
        return listener

    def dial(self, stream: socket.socket | RdmaAddress) -> socket.socket:
        """A stream of the caller's own to where QEMU was told. Raises :class:`QemuError` if nobody listens there."""
        if not isinstance(stream, RdmaAddress):
            return stream.dup()
        if stream not in self._listening:
            raise QemuError("QEMU refused migrate", why="RDMA ERROR: nobody listens there")
        return self._listening.pop(stream)

    async def call(self, stream: socket.socket) -> FakeMachine:
        """The machine at the other end of a real stream. Raises :class:`StreamBroken` if there will be none."""
        number = len(self._answers)
        self._answers[number] = answer = asyncio.get_running_loop().create_future()
        with _broken_streams():
            stream.setblocking(False)
            await asyncio.get_running_loop().sock_sendall(stream, number.to_bytes(_NUMBER_BYTES))
            hung_up = asyncio.ensure_future(asyncio.get_running_loop().sock_recv(stream, 1))
            try:
                await asyncio.wait({answer, hung_up}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                hung_up.cancel()
            if not answer.done():
                raise StreamBroken("Unable to write to socket: Broken pipe")
            machine: FakeMachine = answer.result()
            return machine

    async def answer(self, machine: FakeMachine, stream: socket.socket) -> None:
        """Wait until the machine at the other end of a real stream calls, and answer for ``machine``.

        Raises :class:`StreamBroken` if something else comes, or nothing any more.
        """
        with _broken_streams():
            stream.setblocking(False)
            said = await asyncio.get_running_loop().sock_recv(stream, _NUMBER_BYTES)
        answer = self._answers.get(int.from_bytes(said)) if len(said) == _NUMBER_BYTES else None
        if answer is None:
            raise StreamBroken("Not a migration stream")
        answer.set_result(machine)


@contextlib.contextmanager
def _broken_streams() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StreamBroken(error.strerror or str(error)) from error
