"""Places for simultaneous moves, first come first served.

The limit is read again at each chance, so that a changed setting works at once: a higher one lets those in line
begin, a lower one holds back the next without touching those that move.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable


class Slots:
    """A line in front of a limited number of places."""

    def __init__(self, limit: Callable[[], int]) -> None:
        self._limit = limit
        self.taken = 0
        self._line: OrderedDict[asyncio.Future[None], Callable[[int], None]] = OrderedDict()

    @property
    def is_full(self) -> bool:
        """Whether who comes now has to wait."""
        return bool(self._line) or self.taken >= self._limit()

    async def acquire(self, in_line: Callable[[int], None]) -> None:
        """Take a place. While there is none, ``in_line`` is told the place in line, from 1, whenever it changes, and 0
        when the wait is over.

        Cancelling leaves the line.
        """
        if not self.is_full:
            self.taken += 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._line[turn] = in_line
        in_line(len(self._line))
        try:
            await turn
            in_line(0)
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.release()
            else:
                self._line.pop(turn, None)
                self._tell()
            raise

    def release(self) -> None:
        """Give a place back."""
        self.taken -= 1
        self.admit()

    def admit(self) -> None:
        """Let in those for whom there is room now. Call it too when the limit was raised."""
        admitted = False
        while self._line and self.taken < self._limit():
            turn, _ = self._line.popitem(last=False)
            if not turn.done():
                turn.set_result(None)
                self.taken += 1
                admitted = True
        if admitted:
            self._tell()

    def _tell(self) -> None:
        for place, in_line in enumerate(self._line.values(), start=1):
            in_line(place)


class Place:
    """One place of its own, which may be given back for a while."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self._is_taken = False

    async def take(self, in_line: Callable[[int], None]) -> None:
        """As :meth:`Slots.acquire`; at once if it is taken."""
        if not self._is_taken:
            await self._slots.acquire(in_line)
            self._is_taken = True

    def give_back(self) -> None:
        """Let another have it. May be repeated."""
        if self._is_taken:
            self._is_taken = False
            self._slots.release()
