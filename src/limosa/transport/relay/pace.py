"""What the relay knows about its carrier and its worker, learned while it runs. Pure: times come in as numbers.

:class:`Line` measures how fast the carrier drains, so that the queue can tell when it will reach a chunk. Only times
in which there was always something to drain count; while there was not, the carrier is at least as fast as it was fed.

:class:`Condensing` tells whether known pages are to be looked for, which the relay does itself.

:class:`Throttle` keeps what is taken to a rate.

:class:`Pace` remembers what the worker needs for a byte and what is left of it, and :class:`Patience` for how long the
worker is left alone after it was too late: it had no processor time then, because others wanted it.
"""

from __future__ import annotations

_MEASURE_OVER_S = 0.01
#: After so long without a look nobody knows whether there was always something to drain.
_LOOKED_AWAY_S = 0.1
_WEIGHT = 0.3
#: Chunks smaller than this tell less: what they need besides their bytes' time is not small beside it.
_WEIGHTY_BYTES = 256 * 1024
#: No processor is as slow as this; a worker that is was held up, and is to be given another chance.
_SLOWEST_BYTES_PER_S = 50e6
#: A worker that gets less than a quarter of a processor is not planned with, but tried and found late.
_MOST_SLOWED = 4.0
_HOPE = 0.75
#: Of the time the carrier takes, so much may be spent on what may never bring anything.
_INVESTED = 0.1
#: Who had the processor for at least this part of the time did not have to wait for others.
_SERVED = 0.6
#: What is throttled is taken in portions of this much time, of at least so many bytes.
_PORTION_S, _LEAST_PORTION_BYTES = 0.05, 4096
_PATIENCE_FIRST_S = 0.002
_PATIENCE_MOST_S = 0.05


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
        if elapsed > _LOOKED_AWAY_S:
            self._since = (now, drained)
            return
        seen = (drained - self._since[1]) / elapsed
        self._since = (now, drained) if unsent else None
        if self.rate is None or (not unsent and seen > self.rate):
            self.rate = seen
        elif unsent:
            self.rate += _WEIGHT * (seen - self.rate)

    def carries(self, seconds: float) -> int | None:
        """How many bytes it carries in that time; None: not known yet."""
        return int(self.rate * seconds) if self.rate else None

    def busy_for_s(self) -> float:
        """How long the carrier will be busy with what was not sent at the last :meth:`note`."""
        return self._unsent / self.rate if self.rate else 0.0


class Condensing:
    """What leaving out known pages takes and achieves."""

    def __init__(self) -> None:
        #: a careful guess, to begin with
        self._seconds_per_byte = 0.4e-9
        #: what was left of a byte
        self.remainder = 1.0

    def pays(self, rate: float | None) -> bool:
        """Whether a carrier of that rate is slow enough to do it: for what it has brought lately, or for what it may
        bring yet, when another VM is alike."""
        share = max(_INVESTED, 1 - self.remainder)
        return rate is not None and self._seconds_per_byte * rate < share

    def note(self, raw_length: int, length: int, cpu_seconds: float) -> None:
        """It took ``cpu_seconds`` of processor time to make a chunk that much shorter."""
        weight = _WEIGHT * min(1.0, raw_length / _WEIGHTY_BYTES)
        self._seconds_per_byte += weight * (cpu_seconds / raw_length - self._seconds_per_byte)
        self.remainder += weight * (min(1.0, length / raw_length) - self.remainder)


class Throttle:
    """Keeps a stream to a rate, bytes a second; 0: to none. What was taken is waited for before more is."""

    def __init__(self) -> None:
        self._rate = 0
        #: when all that was taken may have been
        self._due = 0.0

    def set(self, now: float, rate: int) -> None:
        """From now on. What was taken before is settled."""
        self._rate, self._due = rate, now

    def room(self, now: float) -> int | None:
        """How much may be taken at once now; None: as much as there is."""
        if self._rate == 0:
            return None
        return max(_LEAST_PORTION_BYTES, int(self._rate * _PORTION_S)) if now >= self._due else 0

    def wait_s(self, now: float) -> float:
        """Until more may be taken."""
        return max(0.0, self._due - now)

    def take(self, now: float, count: int) -> None:
        """So much was taken."""
        if self._rate:
            self._due = max(now, self._due) + count / self._rate


class Pace:
    """What the worker needs and achieves."""

    def __init__(self) -> None:
        #: seconds a byte, with the time in which others had the processor; to begin with a careful guess
        self.seconds_per_byte = 1 / 150e6
        self._remainder = 0.5
        self._alone = 1 / 250e6

    @property
    def remainder(self) -> float:
        """What is left of a byte, to be expected. Hopeful, or what was tried and not worth it would never be tried
        again."""
        return min(self._remainder, _HOPE)

    def note(self, length: int, made_length: int, seconds: float, cpu_seconds: float) -> None:
        """The worker took ``seconds`` for a chunk, ``cpu_seconds`` of it processor time."""
        weight = _WEIGHT * min(1.0, length / _WEIGHTY_BYTES)
        self._alone += weight * (min(cpu_seconds / length, 1 / _SLOWEST_BYTES_PER_S) - self._alone)
        seen = self.seconds_per_byte + weight * (seconds / length - self.seconds_per_byte)
        self.seconds_per_byte = min(seen, _MOST_SLOWED * self._alone)
        self._remainder += weight * (made_length / length - self._remainder)


class Patience:
    """When the worker may be given more, after it came too late."""

    def __init__(self) -> None:
        self._until = 0.0
        self._next = _PATIENCE_FIRST_S

    def allows(self, now: float) -> bool:
        """Whether the worker may be given a chunk."""
        return now >= self._until

    @property
    def trusts(self) -> bool:
        """Whether the worker found a free processor lately, so that it may be waited for."""
        return self._next == _PATIENCE_FIRST_S

    def late(self, now: float) -> None:
        """It was too late: leave it alone, longer each time."""
        self._until = now + self._next
        self._next = min(2 * self._next, _PATIENCE_MOST_S)

    def served(self, seconds: float, cpu_seconds: float) -> None:
        """It took ``seconds`` for a chunk, ``cpu_seconds`` of it processor time: was the processor free for it?

        If it was, what went before does not matter.
        """
        if cpu_seconds >= _SERVED * seconds:
            self._until, self._next = 0.0, _PATIENCE_FIRST_S
