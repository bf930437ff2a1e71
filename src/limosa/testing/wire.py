"""What lies between fake machines: one clock, one network, and brakes to force the interesting case.

Time is virtual: it passes only while something is sent, in steps, and between two steps everything else gets its turn.
So nothing waits for a real clock, and a test that wants to look at a migration in its middle stops it there
(:meth:`Wire.hold`) instead of hoping to be quick enough.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from limosa.testing.machine import FakeMachine


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
        self._listening: dict[tuple[str, int], FakeMachine] = {}
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

    def listen(self, machine: FakeMachine, address: str, ports: tuple[int, int]) -> int | None:
        """The first free port of the range, now the machine's, or None."""
        first, last = ports
        for port in range(first, last + 1):
            if (address, port) not in self._listening:
                self._listening[address, port] = machine
                return port
        return None

    def find(self, address: str, port: int) -> FakeMachine | None:
        """Who listens there."""
        return self._listening.get((address, port))

    def hang_up(self, machine: FakeMachine) -> None:
        """The machine listens no more."""
        self._listening = {place: other for place, other in self._listening.items() if other is not machine}
