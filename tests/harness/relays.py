"""Two relays on loopback, with sockets in place of QEMUs."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from limosa.security.stream import make_credentials
from limosa.transport.relay.client import Relay

WINDOW_LOG = 24
#: socket(7), asm-generic/socket.h: what TCP sends on this socket, in bytes a second, also on loopback.
SO_MAX_PACING_RATE = 47


@dataclass
class Pair:
    """A source's and a destination's relay with a session between them."""

    source: Relay
    destination: Relay
    #: if they are held: both ends of the connections, forward and backward for each path
    near: list[socket.socket]
    far: list[socket.socket]
    numbers: list[int] = field(default_factory=list)
    #: lanes the source's has lost
    lost: asyncio.Queue[int] = field(default_factory=asyncio.Queue)

    async def join(self, number: int, near: Sequence[socket.socket], far: Sequence[socket.socket]) -> None:
        """Have a lane join. The sockets stay the caller's."""
        for one in far:
            await self.destination.add_connection(one)
        await self.source.add_lane(number, near)

    async def channel(self) -> tuple[socket.socket, socket.socket]:
        """A new channel: what the source's QEMU would hold, and the destination's. Blocking sockets, to be closed."""
        number = len(self.numbers)
        self.numbers.append(number)
        there = await self.destination.open_channel(number)
        here = await self.source.open_channel(number)
        return here, there


def carriers(*bytes_per_s: int | None) -> tuple[list[socket.socket], list[socket.socket]]:
    """Two connections for each path, of which the first sends at most so fast: their near ends, and the far ones in
    another order. Without a speed, one path as fast as it gets."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near: list[socket.socket] = []
        far: list[socket.socket] = []
        for limit in [each for path in bytes_per_s or (None,) for each in (path, None)]:
            sock = socket.socket()
            if limit is not None:
                sock.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, limit)
            sock.connect(listener.getsockname())
            near.append(sock)
            far.insert(0, listener.accept()[0])
        return near, far


@asynccontextmanager
async def pair(
    *,
    tls: bool = True,
    bytes_per_s: int | Sequence[int | None] | None = None,
    window_log: int = WINDOW_LOG,
    level: int | None = 1,
    user: str | None = None,
    hold: bool = False,
) -> AsyncIterator[Pair]:
    """Two relays; both are gone afterwards. With a list of speeds the session is striped, over as many paths.

    ``hold``: keep duplicates of the connections; neither side sees by itself then that the other has ended.
    """
    server, client = make_credentials() if tls else (None, None)
    striped = isinstance(bytes_per_s, Sequence)
    near, far = carriers(*(bytes_per_s if isinstance(bytes_per_s, Sequence) else [bytes_per_s]))
    source, destination = await asyncio.gather(Relay.start(user=user), Relay.start(user=user))
    relays = Pair(source, destination, near, far[::-1])
    source.on_lane_lost = lambda number, _: relays.lost.put_nowait(number)
    try:
        if striped:
            await destination.await_lanes(credentials=server, window_log=window_log)
            await source.call_lanes(credentials=client, window_log=window_log, level=level)
            for number in range(len(near) // 2):
                await relays.join(number, near[2 * number :][:2], relays.far[2 * number :][:2])
                await asyncio.gather(destination.opened(), source.opened())
        else:
            await asyncio.gather(
                destination.open_receiver(far, credentials=server, window_log=window_log),
                source.open_sender(near, credentials=client, window_log=window_log, level=level),
            )
        for one in () if hold else (*near, *far):
            one.close()
        yield relays
    finally:
        for one in (*near, *far):
            one.close()
        await asyncio.gather(source.end(), destination.end())
