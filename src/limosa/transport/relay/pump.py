"""One thread that waits for many descriptors and does what is due."""

from __future__ import annotations

import os
import select
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import NamedTuple


class Interest(NamedTuple):
    """Call ``act`` when ``descriptor`` can be read (or is broken), or else written."""

    descriptor: int
    act: Callable[[], None]
    writing: bool = False


class Pump:
    """Asks ``interests`` what to wait for, waits, acts, asks again. Descriptors may be closed by this thread only."""

    def __init__(self, interests: Callable[[], Iterable[Interest]]) -> None:
        self._interests = interests
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        #: what is due by then though no descriptor says so; ``interests`` sets it anew each time, None: nothing is
        self.within_s: float | None = None

    def wake(self) -> None:
        """Have the interests asked again; for other threads."""
        os.eventfd_write(self._bell, 1)

    def run(self) -> None:
        """Never returns."""
        while True:
            self._turn()

    def _turn(self) -> None:
        poll = select.poll()
        poll.register(self._bell, select.POLLIN)
        readers: dict[int, Callable[[], None]] = {self._bell: self._silence}
        writers: dict[int, Callable[[], None]] = {}
        for descriptor, act, writing in self._interests():
            (writers if writing else readers)[descriptor] = act
        for descriptor in {**readers, **writers}:  # acted on in this order
            events = (select.POLLIN if descriptor in readers else 0) | (select.POLLOUT if descriptor in writers else 0)
            poll.register(descriptor, events)
        # Rounded up: what is looked at too early is not due yet.
        for descriptor, events in poll.poll(None if self.within_s is None else int(1000 * self.within_s) + 1):
            if descriptor in readers and events & ~select.POLLOUT:
                readers[descriptor]()
            if descriptor in writers and events & ~select.POLLIN:
                writers[descriptor]()

    def _silence(self) -> None:
        with suppress(BlockingIOError):
            os.eventfd_read(self._bell)
