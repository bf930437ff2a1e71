"""Two relays on loopback, with sockets in place of QEMUs."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from limosa.security.stream import make_credentials
from limosa.transport.relay.client import Relay, make_token

WINDOW_LOG = 24
#: socket(7), asm-generic/socket.h: what TCP sends on this socket, in bytes a second, also on loopback.
SO_MAX_PACING_RATE = 47


@dataclass
class Pair:
    """A source's and a destination's relay with a session between them."""

    source: Relay
    destination: Relay
    numbers: list[int] = field(default_factory=list)

    async def channel(self) -> tuple[socket.socket, socket.socket]:
        """A new channel: what the source's QEMU would hold, and the destination's. Blocking sockets, to be closed."""
        number = len(self.numbers)
        self.numbers.append(number)
        there = await self.destination.open_channel(number)
        here = await self.source.open_channel(number)
        return here, there


def connected(listener: socket.socket, bytes_per_s: int | None = None) -> socket.socket:
    """A connection to ``listener``, which sends at most so fast."""
    sock = socket.socket()
    if bytes_per_s is not None:
        sock.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, bytes_per_s)
    sock.connect(listener.getsockname())
    return sock


@asynccontextmanager
async def pair(
    *,
    tls: bool = True,
    bytes_per_s: int | None = None,
    window_log: int = WINDOW_LOG,
    level: int | None = 1,
    user: str | None = None,
) -> AsyncIterator[Pair]:
    """Two relays; both are gone afterwards."""
    server, client = make_credentials() if tls else (None, None)
    token = make_token()
    listener = socket.create_server(("127.0.0.1", 0))
    forward, backward = connected(listener, bytes_per_s), connected(listener)
    source, destination = await asyncio.gather(Relay.start(user=user), Relay.start(user=user))
    try:
        await asyncio.gather(
            destination.open_receiver(listener, token=token, credentials=server, window_log=window_log),
            source.open_sender(forward, backward, token=token, credentials=client, window_log=window_log, level=level),
        )
        yield Pair(source, destination)
    finally:
        await asyncio.gather(source.end(), destination.end())
