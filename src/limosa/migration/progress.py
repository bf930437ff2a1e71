"""From a look at QEMU to what people see: percent, remaining time; pure.

QEMU has no percent. The first pass over memory fills most of the bar; later passes share what is left by how much of
the way from the first pass's leftover down to nothing has been gone. The bar never goes back, because the least
that ever remained is what counts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from limosa.model.migration import Phase, Progress
from limosa.qemu.protocol import MigrationStatistics

#: Where each phase begins on the bar, percent.
BEGINS = {
    Phase.WAITING: 0.0,
    Phase.BUILD_UP: 0.0,
    Phase.COPY: 2.0,
    Phase.SYNCHRONISE: 85.0,
    Phase.SWITCHOVER: 98.0,
    Phase.TEAR_DOWN: 99.0,
}


@dataclass(frozen=True)
class Bar:
    """What was shown so far."""

    percent: float = 0.0
    #: what remained when the first pass ended, and the least since
    leftover: int = 0
    least: int = 0

    def entered(self, phase: Phase) -> Bar:
        """The bar at the beginning of a phase."""
        return replace(self, percent=max(self.percent, BEGINS[phase]))

    def moved(self, phase: Phase, look: MigrationStatistics) -> Bar:
        """The bar after a look at QEMU."""
        if phase is Phase.COPY and look.total_bytes > 0:
            share = 1 - min(1.0, look.remaining_bytes / look.total_bytes)
            return self._at_least(BEGINS[Phase.COPY] + share * (BEGINS[Phase.SYNCHRONISE] - BEGINS[Phase.COPY]))
        if phase is Phase.SYNCHRONISE:
            leftover = self.leftover or look.remaining_bytes
            least = min(self.least or leftover, look.remaining_bytes)
            share = 1 - least / leftover if leftover else 1.0
            span = BEGINS[Phase.SWITCHOVER] - BEGINS[Phase.SYNCHRONISE]
            return replace(self, leftover=leftover, least=least)._at_least(BEGINS[Phase.SYNCHRONISE] + share * span)
        return self

    def _at_least(self, percent: float) -> Bar:
        return replace(self, percent=max(self.percent, min(percent, 99.0)))


def remaining_s(look: MigrationStatistics) -> float | None:
    """Seconds until the memory is sent if guest and network go on as now; None if they would never be."""
    gain = look.rate_bytes_per_s - look.dirty_rate_bytes_per_s
    if look.rate_bytes_per_s <= 0 or gain <= 0:
        return None
    return look.remaining_bytes / gain


def progress(bar: Bar, look: MigrationStatistics, *, limit_ms: float, note: str) -> Progress:
    """The progress to show."""
    return Progress(
        percent=round(bar.percent, 1),
        transferred_bytes=look.transferred_bytes,
        remaining_bytes=look.remaining_bytes,
        total_bytes=look.total_bytes,
        rate_bytes_per_s=look.rate_bytes_per_s,
        dirty_rate_bytes_per_s=look.dirty_rate_bytes_per_s,
        iteration=look.iteration,
        remaining_s=remaining_s(look),
        downtime_limit_ms=limit_ms,
        throttle_percent=look.throttle_percent,
        note=note,
    )
