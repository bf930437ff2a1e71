"""An event loop in a thread of its own, for tests that talk over TLS step by step and whose pings are to be answered
between the steps. All of a connection stays in that one thread: two that read and write one ``SSLSocket`` at once can
hang it for ever, which is why ``websockets.sync`` will not do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from threading import Thread
from typing import Any, TypeVar

T = TypeVar("T")


class Background:
    """The loop. Used as a context manager, which ends it."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever)

    def __enter__(self) -> Background:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """What it returns or raises, over there."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    @contextmanager
    def open(self, manager: AbstractAsyncContextManager[T]) -> Iterator[T]:
        """Enter and leave it over there, around the block here."""
        opened = self.run(_enter(manager))
        try:
            yield opened
        finally:
            self.run(_leave(manager))


async def _enter(manager: AbstractAsyncContextManager[T]) -> T:
    return await manager.__aenter__()


async def _leave(manager: AbstractAsyncContextManager[Any]) -> None:
    await manager.__aexit__(None, None, None)
