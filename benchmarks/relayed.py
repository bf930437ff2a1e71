"""How fast relays are where nothing is to be gained: random bytes over a link without a limit, and plain TCP beside.

Sender, relays and receiver share the machine, and all their processor time is counted.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

from benchmarks.ground import HOSTS, UNSHAPED, Ground, ground
from benchmarks.measurements import Measurements, Streamed
from benchmarks.program import say
from benchmarks.transport_targets import CPU_PER_GIB, DIRECT, DIRECT_TLS, RELAYS, RELAYS_TLS, THROUGHPUT
from benchmarks.turn import rotated
from limosa.model.units import MIB
from limosa.security.stream import make_credentials
from limosa.security.tls import SERVER_NAME, stream_context
from limosa.transport.relay.client import Relay

#: Sent once in a session, so that nothing of it is found again.
SENT_MIB = 1024
#: As large as Limosa's own by default.
WINDOW_LOG = 29
GROUP = "relayed"

Ends = tuple[socket.socket, socket.socket]


@dataclass(frozen=True)
class _Lane:
    place: Ground
    random: bytes

    def direct(self, *, encrypted: bool) -> float:
        """Returns the wall time, as the others do."""
        with ExitStack() as stack:
            here, there = self._connected()
            if encrypted:
                here, there = _encrypted(here, there)
            stack.enter_context(here)
            stack.enter_context(there)
            return asyncio.run(self._carry(here, there))

    def relayed(self, *, encrypted: bool) -> float:
        return asyncio.run(self._through_relays(encrypted=encrypted))

    async def _through_relays(self, *, encrypted: bool) -> float:
        server, client = make_credentials() if encrypted else (None, None)
        source, destination = await asyncio.gather(Relay.start(), Relay.start())
        try:
            with ExitStack() as stack:
                pairs = [self._connected(), self._connected()]
                for end in (end for pair in pairs for end in pair):
                    stack.enter_context(end)
                await asyncio.gather(
                    destination.open_receiver([there for _, there in pairs], credentials=server, window_log=WINDOW_LOG),
                    source.open_sender([here for here, _ in pairs], credentials=client, window_log=WINDOW_LOG),
                )
                there = stack.enter_context(await destination.open_channel(0))
                here = stack.enter_context(await source.open_channel(0))
                return await self._carry(here, there)
        finally:
            await asyncio.gather(source.end(), destination.end())

    def _connected(self) -> Ends:
        """A connection from the first host to the second: its two ends."""
        address = self.place.migration_address(HOSTS[1])
        with self.place.inside(HOSTS[1], lambda: socket.create_server((address, 0))) as listener:
            name = listener.getsockname()[:2]
            return self.place.inside(HOSTS[0], lambda: socket.create_connection(name)), listener.accept()[0]

    async def _carry(self, here: socket.socket, there: socket.socket) -> float:
        here.setblocking(True)
        there.setblocking(True)
        began = time.monotonic()
        await asyncio.gather(asyncio.to_thread(here.sendall, self.random), asyncio.to_thread(_take, there))
        return time.monotonic() - began


def relay(rounds: int, measured: Measurements) -> None:
    """Turn by turn: plain TCP and relays, both also with TLS."""
    with ground(UNSHAPED) as place:
        lane = _Lane(place, os.urandom(SENT_MIB * MIB))
        ways: dict[str, Callable[[], float]] = {
            DIRECT: lambda: lane.direct(encrypted=False),
            RELAYS: lambda: lane.relayed(encrypted=False),
            DIRECT_TLS: lambda: lane.direct(encrypted=True),
            RELAYS_TLS: lambda: lane.relayed(encrypted=True),
        }
        for number in range(rounds):
            for by in rotated(list(ways), number):
                measured.streams.append(_streamed(place, by, number, ways[by]))


def _streamed(place: Ground, by: str, number: int, way: Callable[[], float]) -> Streamed:
    with place.counted(GROUP):
        cpu_s = place.cpu_s(GROUP)
        wall_s = way()
        cpu_s = place.cpu_s(GROUP) - cpu_s
    one = Streamed(by=by, round=number, sent_bytes=SENT_MIB * MIB, wall_s=wall_s, cpu_s=cpu_s)
    say(f"relay, round {number + 1}: {by}: {THROUGHPUT.of(one):.0f} MiB/s, {CPU_PER_GIB.of(one):.2f} s/GiB")
    return one


def _encrypted(here: socket.socket, there: socket.socket) -> Ends:
    """Both ends after a handshake."""
    server, client = (stream_context(one, server=place == 0) for place, one in enumerate(make_credentials()))
    with ThreadPoolExecutor(1) as other:
        accepted = other.submit(server.wrap_socket, there, server_side=True)
        return client.wrap_socket(here, server_hostname=SERVER_NAME), accepted.result()


def _take(there: socket.socket) -> None:
    """Read all of it."""
    buffer = bytearray(MIB)
    left = SENT_MIB * MIB
    while left:
        if not (count := there.recv_into(buffer)):
            raise ConnectionError("the stream ended early")
        left -= count
