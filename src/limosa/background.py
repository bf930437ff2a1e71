"""Work that goes on by itself: asyncio keeps only a weak reference to a task, so somebody has to hold it; what is to be
done with something that nobody waits for any more; and work in a thread, which nobody can stop, so somebody has to wait
for it.

Whatever opens or looks at an image may hang until its share answers, and is done by :func:`in_full` or :func:`apart`:
each has a thread of its own. ``asyncio.to_thread`` has a few for all; if those hang, everybody's work waits.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, ParamSpec, TypeVar, cast

P = ParamSpec("P")
T = TypeVar("T")


class Background:
    """Tasks that nobody awaits, held until they end."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Begin ``work`` as a task of its own."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def cancel(self) -> None:
        """Cancel whatever has not ended."""
        for task in self._tasks:
            task.cancel()

    async def idle(self) -> None:
        """Return when nothing is left, also of what was begun meanwhile."""
        while self._tasks:
            await asyncio.wait(self._tasks)


def then(task: asyncio.Task[T], act: Callable[[T], object]) -> None:
    """Have ``act`` called with what ``task`` gives, once it does. If it fails nobody needs to hear of that any more."""

    def look(done: asyncio.Task[T]) -> None:
        if not done.cancelled() and done.exception() is None:
            act(done.result())

    task.add_done_callback(look)


async def in_full(work: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
    """Do work in a thread of its own, as :func:`apart`. Who is cancelled meanwhile waits for its end: what follows must
    not run beside it."""
    return await to_its_end(apart(work, *arguments, **options))


async def to_its_end(work: Coroutine[Any, Any, T] | asyncio.Future[T]) -> T:
    """Do work of which no half must be left. Who is cancelled meanwhile waits for its end, as in :func:`in_full`."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # nobody is left to hear it
        raise


def apart(work: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> asyncio.Future[T]:
    """Do work that may never end in a thread of its own: none that others wait for, and nobody waits for it when the
    program ends."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def tell(result: T | None, error: Exception | None) -> None:
        if future.done():
            return  # whoever waited was cancelled
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(cast(T, result))

    def run() -> None:
        result, failure = None, None
        try:
            result = work(*arguments, **options)
        except Exception as error:  # noqa: BLE001 - it is raised where the work is waited for
            failure = error
        with suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(tell, result, failure)

    threading.Thread(target=run, daemon=True).start()
    return future
