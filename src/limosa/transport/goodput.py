"""How fast a network really was: what moves have carried over each path, at its best.

A NIC says how fast its cable is, and a virtual one nothing at all. The network behind may be slower: a switch, a leased
line, a provider's limit. Only a second in which the connection always had something under way, and the receiver had
room for more, counts: neither a guest with little to send nor a host that is busy makes its network slow. Nor does a
cable that is pulled: no second counts in which an acknowledgement was overdue.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from limosa.model.network import Carried
from limosa.transport.channel import Used

WINDOW_S = 1.0
#: Share of a window in which data was under way.
BUSY = 0.9


@dataclass(frozen=True)
class _Mark:
    at: float
    sent_bytes: int
    busy_s: float


class Goodput:
    """Of the paths of one move."""

    def __init__(self) -> None:
        self._marks: dict[tuple[str, str], _Mark] = {}
        self._best: dict[tuple[str, str], float] = {}

    def saw(self, at: float, paths: Iterable[Used]) -> None:
        """What each path has carried since the beginning, at ``at`` (seconds of any steady clock)."""
        for path in paths:
            ends, now = (path.here, path.there), _Mark(at, path.sent_bytes, path.busy_s)
            began = self._marks.setdefault(ends, now)
            if path.overdue or not path.alive:
                self._marks[ends] = now
                continue
            seconds = now.at - began.at
            if seconds < WINDOW_S:
                continue
            self._marks[ends] = now
            if now.busy_s - began.busy_s >= BUSY * seconds:
                rate = (now.sent_bytes - began.sent_bytes) / seconds
                self._best[ends] = max(rate, self._best.get(ends, 0.0))

    def best(self) -> tuple[Carried, ...]:
        """The best second of each path that had one."""
        return tuple(
            Carried(here=here, there=there, mbit_per_s=round(8 * rate / 1e6))
            for (here, there), rate in sorted(self._best.items())
        )
