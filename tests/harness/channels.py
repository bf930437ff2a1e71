"""A stream that nobody looks into."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Sequence

from limosa.transport.channel import SocketChannel, Used


class BareChannel:
    """The base of :class:`limosa.transport.channel.SocketChannel` for tests; ``stream`` is theirs."""

    stream: socket.socket
    connections: Sequence[SocketChannel] = ()

    def set_short(self, short: bool, pace: float) -> None:
        pass

    def pace(self, bytes_per_s: int) -> bool:
        return True

    def spread_over(self, ways: Iterable[tuple[str, str]]) -> None:
        pass

    def used(self) -> tuple[Used, ...]:
        return ()

    async def compressed(self) -> None:
        pass

    async def fault(self) -> None:
        pass

    def close(self) -> None:
        pass
