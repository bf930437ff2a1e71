"""Whoever comes to a listener is asked who they are, and nobody who keeps silent keeps the one out who is expected."""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

#: So many callers are asked at once, of whom the source takes a moment: those who keep silent have to go.
HALF_OPEN = 64
#: After the kernel would not give a caller: no descriptor is left, or that caller has gone again.
_AGAIN_AFTER_S = 1.0


class Lobby:
    """Where callers are asked who they are, each by itself, so that one who keeps silent delays nobody.

    Of too many the one goes who has waited longest, of those from the address from which most wait: whoever calls again
    and again and says nothing sends away only his own. ``admit`` is given each connection for which ``ask`` is true; it
    may raise ``OSError``.
    """

    def __init__(
        self, ask: Callable[[socket.socket], Coroutine[Any, Any, bool]], admit: Callable[[socket.socket], None]
    ) -> None:
        self._ask = ask
        self._admit = admit
        #: callers' addresses, longest waiting first
        self._asking: dict[asyncio.Task[bool], str] = {}

    async def serve(self, listener: socket.socket) -> None:
        """Ask whoever comes to a listener, until cancelled. Raises ``OSError`` if it is closed."""
        while True:
            self._enter(await next_caller(listener))

    async def close(self) -> None:
        """Send away who waits. Nobody must serve any more."""
        self.send_away()
        while self._asking:
            await asyncio.wait(self._asking)

    def send_away(self) -> None:
        """Send away who waits, soon."""
        for asking in self._asking:
            asking.cancel()

    def _enter(self, caller: socket.socket) -> None:
        caller.setblocking(False)
        asking = asyncio.ensure_future(self._ask(caller))
        self._asking[asking] = _origin(caller)
        asking.add_done_callback(partial(self._decide, caller))
        if len(self._asking) > HALF_OPEN:
            ((most, _),) = Counter(self._asking.values()).most_common(1)
            oldest = next(asking for asking, origin in self._asking.items() if origin == most)
            del self._asking[oldest]
            oldest.cancel()

    def _decide(self, caller: socket.socket, asked: asyncio.Task[bool]) -> None:
        self._asking.pop(asked, None)
        if not asked.cancelled() and asked.exception() is None and asked.result():
            self._admit(caller)
        else:
            caller.close()


async def next_caller(listener: socket.socket) -> socket.socket:
    """Wait for somebody to come to a listener, also while no descriptor is left. Raises ``OSError`` if it is closed."""
    while True:
        try:
            caller, _ = await asyncio.get_running_loop().sock_accept(listener)
        except OSError:
            if listener.fileno() == -1:
                raise
            await asyncio.sleep(_AGAIN_AFTER_S)
        else:
            return caller


def _origin(caller: socket.socket) -> str:
    """The address of a caller; empty if it has gone again."""
    try:
        return str(caller.getpeername()[0])
    except OSError:
        return ""
