"""Looks at storage that may never answer: a look at a share whose server is gone ends when that comes back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from limosa.background import apart
from limosa.errors import StorageError

T = TypeVar("T")
#: Says what is looked at from now on.
Step = Callable[[str], None]


@dataclass(frozen=True)
class _Look(Generic[T]):
    began: float
    found: asyncio.Future[T]


class Looks(Generic[T]):
    """One at a time at each thing that is looked at, each in a thread of its own. So what does not answer has one
    thread waiting for it, however many ask, and nobody else's."""

    def __init__(self, within_s: float) -> None:
        self._within_s = within_s
        self._under_way: dict[Hashable, _Look[T]] = {}

    async def look(self, at: Hashable, work: Callable[[], T], *, anew: bool = False) -> T | None:
        """What ``work`` finds, or one like it that is under way, unless ``anew``; None if that does not answer in time.
        Raises what it raises."""
        while anew and at in self._under_way:
            if not await self._ends(self._under_way[at]):
                return None
        if at not in self._under_way:
            begun = self._under_way[at] = _Look(time.monotonic(), apart(work))
            begun.found.add_done_callback(lambda _: self._under_way.pop(at))
        look = self._under_way[at]
        return look.found.result() if await self._ends(look) else None

    async def _ends(self, look: _Look[T]) -> bool:
        await asyncio.wait({look.found}, timeout=max(0.0, look.began + self._within_s - time.monotonic()))
        return look.found.done()


class Walks:
    """Looks at many things, one after the other, in a thread for each walk. It may take long; a step may not.

    What does not answer is not asked again until it does, so that it has one thread waiting for it, however many walks
    would come there.
    """

    def __init__(self, within_s: float) -> None:
        self._within_s = within_s
        #: what does not answer
        self._silent: set[str] = set()

    async def walk(self, work: Callable[[Step], T]) -> T:
        """What ``work`` finds, which says each step. Raises what it raises, and :class:`StorageError` for a step that
        is not done in time; it ends at the next then."""
        walk = _Walk(self._silent)
        found = apart(work, walk.step)
        found.add_done_callback(lambda done: done.exception())  # nobody may be left to hear it
        while not found.done():
            at, since = walk.now
            left_s = since + self._within_s - time.monotonic()
            if left_s <= 0:
                walk.is_given_up = True
                self._silent.add(at)
                found.add_done_callback(partial(self._has_answered, at))
                raise _no_answer(at)
            await asyncio.wait({found}, timeout=left_s)
        return found.result()

    def _has_answered(self, at: str, _: asyncio.Future[Any]) -> None:
        self._silent.discard(at)


class _Walk:
    """One of them, as its thread sees it."""

    def __init__(self, silent: set[str]) -> None:
        self._silent = silent
        #: what is looked at, and since when
        self.now = ("/proc", time.monotonic())
        self.is_given_up = False

    def step(self, at: str) -> None:
        """See :data:`Step`. Raises :class:`StorageError` if that does not answer, or nobody waits for it any more."""
        if self.is_given_up or at in self._silent:
            raise _no_answer(at)
        self.now = (at, time.monotonic())


def _no_answer(at: str) -> StorageError:
    return StorageError(
        f"{at} does not answer", why="so what is stored there is unknown", todo="make sure that its server is up"
    )
