"""A guest that is nothing but memory and a habit of writing to it."""

from __future__ import annotations

PAGE_BYTES = 4096


class FakeGuest:
    """Pages whose contents are a number that grows with each write; written one after another, round and round."""

    def __init__(self, memory_bytes: int, dirty_rate_bytes_per_s: float = 0.0) -> None:
        self.pages = [0] * (memory_bytes // PAGE_BYTES)
        self.dirty_rate_bytes_per_s = dirty_rate_bytes_per_s
        #: pages written since the last :meth:`take_dirty`
        self._dirty: set[int] = set()
        self._next = 0
        #: pages it should have written by now and has not, less than one
        self._owed = 0.0

    def run(self, seconds: float, throttle_percent: int = 0) -> None:
        """Let it run, slowed by ``throttle_percent``."""
        self._owed += self.dirty_rate_bytes_per_s * (1 - throttle_percent / 100) * seconds / PAGE_BYTES
        for _ in range(int(self._owed)):
            self.pages[self._next] += 1
            self._dirty.add(self._next)
            self._next = (self._next + 1) % len(self.pages)
        self._owed %= 1

    @property
    def dirty_bytes(self) -> int:
        """How much it wrote since the last :meth:`take_dirty`."""
        return len(self._dirty) * PAGE_BYTES

    def take_dirty(self) -> list[int]:
        """The pages written since the last call."""
        taken, self._dirty = sorted(self._dirty), set()
        return taken
