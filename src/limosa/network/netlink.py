"""One netlink socket with a thread of its own.

pyroute2 can neither be called inside a running event loop (its blocking half runs a loop itself) nor be awaited under
uvloop (which knows no netlink sockets). So the blocking half lives in one thread, with a loop of its own that is named
explicitly because a daemon may have made uvloop the policy. One request takes about half a millisecond; opening the
socket once instead of per request halves that.

The socket belongs to the network namespace in which the object is first used.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from limosa.errors import NetworkError

Answer = TypeVar("Answer")


class Netlink:
    """Runs blocking netlink work one piece at a time. Close it when done."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="netlink")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._socket: IPRoute | None = None

    async def run(self, work: Callable[[IPRoute], Answer]) -> Answer:
        """The answer of ``work``, which gets the socket and may block.

        Work that has begun is finished even if the caller is cancelled. Raises what ``work`` raises.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, lambda: work(self._open()))

    def close(self) -> None:
        """Finish what was begun and close the socket; the object cannot be used again."""
        self._thread.submit(self._close).result()
        self._thread.shutdown()

    def _open(self) -> IPRoute:
        if self._socket is None:
            self._loop = asyncio.SelectorEventLoop()
            self._socket = IPRoute(use_event_loop=self._loop)
        return self._socket

    def _close(self) -> None:
        if self._socket is None or self._loop is None:
            return
        self._socket.close()
        # The transport closes its file descriptor in a callback of the loop: let it run once more.
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()
        self._socket = None


@contextmanager
def kernel_refusals(what: str, *, todo: str = "") -> Iterator[None]:
    """Turn what the kernel refuses into a :class:`NetworkError` that says ``what`` failed."""
    try:
        yield
    except NetlinkError as fault:
        raise NetworkError(what, why=str(fault.args[1] if len(fault.args) > 1 else fault), todo=todo) from fault
    except OSError as fault:
        raise NetworkError(what, why=fault.strerror or str(fault), todo=todo) from fault


def attribute(message: Any, *path: str) -> Any:
    """The netlink attribute at ``path`` inside nested attributes, or None."""
    for name in path:
        if message is None:
            return None
        message = message.get_attr(name)
    return message
