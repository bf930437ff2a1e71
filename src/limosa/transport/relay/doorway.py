"""The door of a striped session: open as long as the session, so that the source may connect a path at any time.

It has one port at several addresses. The source asks for further ones when a path to them has appeared, and gets those
that may carry moves.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence

from limosa.background import Background
from limosa.errors import LimosaError
from limosa.transport import tcp

_log = logging.getLogger(__name__)

#: Connections that nobody has asked for yet.
_MOST_WAITING = 16


class LastingDoorway(tcp.TcpDoorway):
    """The destination's end. ``permitted`` gives the addresses on which a move may arrive, as they are now.

    Raises :class:`NetworkError` if no port of the range is free at all addresses. Belongs to one event loop.
    """

    def __init__(
        self, addresses: Sequence[str], ports: tuple[int, int], permitted: Callable[[], Awaitable[Sequence[str]]]
    ) -> None:
        super().__init__(addresses[0], ports, further=addresses[1:])
        self._at = set(addresses)
        self._port = self.port
        self._permitted = permitted
        self._open = True
        self._came: asyncio.Queue[socket.socket] = asyncio.Queue(_MOST_WAITING)
        self._work = Background()
        self._lobby = self._lobby_for(self._let_in)
        for listener in (self._listener, *self._others):
            self._serve(listener)

    async def caller(self) -> socket.socket:
        """Wait for the next connection of the source, however long. The socket is the caller's."""
        return await self._came.get()

    def announce(self, addresses: Iterable[str]) -> None:
        """See :class:`limosa.transport.channel.Doorway`."""
        if self._open:
            self._work.spawn(self._listen_at(set(addresses)))

    def close(self) -> None:
        """See :class:`limosa.transport.channel.Doorway`."""
        self._open = False
        self._work.cancel()
        self._lobby.send_away()
        super().close()
        while not self._came.empty():
            self._came.get_nowait().close()

    async def _listen_at(self, addresses: set[str]) -> None:
        try:
            permitted = await self._permitted()
        except LimosaError as error:
            _log.error("addresses that have appeared are not used: %s", error)
            return
        # Without waiting: whoever asks twice at once must not have two listeners.
        for address in addresses.intersection(permitted) - self._at:
            with contextlib.suppress(OSError):  # it has gone again, or another has the port there: one path less
                listener = tcp.listen(address, self._port)
                self._at.add(address)
                self._others.append(listener)
                self._serve(listener)

    def _serve(self, listener: socket.socket) -> None:
        self._work.spawn(self._lobby.serve(listener))

    def _let_in(self, caller: socket.socket) -> None:
        if self._open and not self._came.full():
            self._came.put_nowait(caller)
        else:
            caller.close()
