"""Looks at storage that may never answer: a look at a share whose server is gone ends when that comes back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from limosa.background import apart

T = TypeVar("T")


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
