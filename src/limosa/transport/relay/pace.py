"""What the relay knows about its carrier and its worker, learned while it runs. Pure: times come in as numbers.

:class:`Line` measures how fast the carrier drains, so that the queue can tell when it will reach a chunk. Only times
in which there was always something to drain count; while there was not, the carrier is at least as fast as it was fed.

:class:`Pace` remembers what the worker needs for a byte and what is left of it, and :class:`Patience` for how long the
worker is left alone after it was too late: it had no processor time then, because others wanted it.
"""

from __future__ import annotations

_MEASURE_OVER_S = 0.01
_WEIGHT = 0.3
#: The worker's processor time is what it takes alone; waking it and telling costs a little more.
_MARGIN = 1.3
_PATIENCE_FIRST_S = 0.02
_PATIENCE_MOST_S = 2.0


class Line:
    """How fast a carrier drains, in bytes a second."""

    def __init__(self) -> None:
        self.rate: float | None = None
        self._unsent = 0
        self._since: tuple[float, int] | None = None

    def note(self, now: float, sent: int, unacknowledged: int, unsent: int) -> None:
        """At ``now`` the socket had taken ``sent`` bytes in all; so many of them were not acknowledged or not sent."""
        drained = sent - unacknowledged
        self._unsent = unsent
        if self._since is None or drained < self._since[1]:
            self._since = (now, drained)
            return
        elapsed = now - self._since[0]
        if elapsed < _MEASURE_OVER_S:
            return
        seen = (drained - self._since[1]) / elapsed
        self._since = (now, drained) if unsent else None
        if self.rate is None or (not unsent and seen > self.rate):
            self.rate = seen
        elif unsent:
            self.rate += _WEIGHT * (seen - self.rate)

    def busy_for_s(self) -> float:
        """How long the carrier will be busy with what was not sent at the last :meth:`note`."""
        return self._unsent / self.rate if self.rate else 0.0


class Pace:
    """What the worker needs and achieves."""

    def __init__(self) -> None:
        #: seconds a byte; to begin with a careful guess
        self.seconds_per_byte = _MARGIN / 250e6
        #: raw bytes for one on the carrier
        self.ratio = 2.0

    def note(self, raw_length: int, wire_length: int, seconds: float) -> None:
        """The worker took ``seconds`` of processor time for a chunk."""
        self.seconds_per_byte += _WEIGHT * (_MARGIN * seconds / raw_length - self.seconds_per_byte)
        self.ratio += _WEIGHT * (raw_length / wire_length - self.ratio)


class Patience:
    """When the worker may be given more, after it came too late."""

    def __init__(self) -> None:
        self._until = 0.0
        self._next = _PATIENCE_FIRST_S

    def allows(self, now: float) -> bool:
        """Whether the worker may be given a chunk."""
        return now >= self._until

    def remaining(self, now: float) -> float:
        """Seconds until :meth:`allows`."""
        return max(0.0, self._until - now)

    def late(self, now: float, *, at_least: float = 0.0) -> None:
        """It was too late: leave it alone, longer each time."""
        self._until = now + max(self._next, at_least)
        self._next = min(2 * self._next, _PATIENCE_MOST_S)

    def in_time(self) -> None:
        """It was not."""
        self._next = max(_PATIENCE_FIRST_S, self._next / 2)
