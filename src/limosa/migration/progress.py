"""From a look at QEMU to what people see: percent, remaining time; pure.

QEMU has no percent. The first pass over memory fills most of the bar; later passes share what is left by how much of
the way from the first pass's leftover down to nothing has been gone. The bar never goes back, because the least
that ever remained is what counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import msgspec

from limosa.model.migration import Phase, Progress
from limosa.model.storage import DiskProgress
from limosa.qemu.protocol import MigrationStatistics

#: Where each phase begins on the bar, percent. Where disks move along the copy of memory begins later.
BEGINS = {
    Phase.WAITING: 0.0,
    Phase.BUILD_UP: 0.0,
    Phase.STORAGE: 2.0,
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
    #: where the copy of memory begins, percent
    memory_begins: float = BEGINS[Phase.COPY]
    #: when how much of the disks had been copied
    looks: tuple[tuple[float, int], ...] = ()
    #: bytes of guest memory that are done with in a second, by the last look at QEMU
    pace: float = 0.0
    #: what remained then, and the seconds of QEMU's migration
    remained: int | None = None
    remained_at_s: float = 0.0

    def entered(self, phase: Phase) -> Bar:
        """The bar at the beginning of a phase."""
        begin = self.memory_begins if phase is Phase.COPY else BEGINS[phase]
        return replace(self, percent=max(self.percent, begin))

    def with_disks(self, disk_bytes: int, memory_bytes: int) -> Bar:
        """The bar of a move that copies so many bytes of disks first."""
        span = BEGINS[Phase.SYNCHRONISE] - BEGINS[Phase.STORAGE]
        share = disk_bytes / max(1, disk_bytes + memory_bytes)
        return replace(self, memory_begins=BEGINS[Phase.STORAGE] + share * span)

    def copied(self, share: float) -> Bar:
        """The bar when this share of the disks has been copied, 0 to 1."""
        begin = BEGINS[Phase.STORAGE]
        return self._at_least(begin + min(1.0, share) * (self.memory_begins - begin))

    def moved(self, phase: Phase, look: MigrationStatistics) -> Bar:
        """The bar after a look at QEMU."""
        return self._paced(look)._moved(phase, look)

    def _paced(self, look: MigrationStatistics) -> Bar:
        """In the first pass empty pages count, of which hardly anything is sent."""
        remained = self.remained if self.remained is not None else look.total_bytes
        passed, seconds = remained - look.remaining_bytes, look.total_s - self.remained_at_s
        pace = passed / seconds if look.iteration <= 1 and seconds > 0 else 0.0
        pace = max(look.rate_bytes_per_s, pace)
        return replace(self, pace=pace, remained=look.remaining_bytes, remained_at_s=look.total_s)

    def _moved(self, phase: Phase, look: MigrationStatistics) -> Bar:
        if phase is Phase.COPY and look.total_bytes > 0:
            share = 1 - min(1.0, look.remaining_bytes / look.total_bytes)
            return self._at_least(self.memory_begins + share * (BEGINS[Phase.SYNCHRONISE] - self.memory_begins))
        if phase is Phase.SYNCHRONISE:
            leftover = self.leftover or look.remaining_bytes
            least = min(self.least or leftover, look.remaining_bytes)
            share = 1 - least / leftover if leftover else 1.0
            span = BEGINS[Phase.SWITCHOVER] - BEGINS[Phase.SYNCHRONISE]
            return replace(self, leftover=leftover, least=least)._at_least(BEGINS[Phase.SYNCHRONISE] + share * span)
        return self

    def seen(self, at: float, copied: int) -> Bar:
        """Remember how much of the disks was copied at ``at``, seconds; a rate is taken over about two seconds."""
        looks = (*(look for look in self.looks if look[0] > at - 2), (at, copied))
        return replace(self, looks=looks)

    def rate(self, at: float, copied: int) -> float:
        """Bytes per second since the oldest look remembered; 0 if it cannot be told."""
        if not self.looks or at <= self.looks[0][0]:
            return 0.0
        return max(0.0, (copied - self.looks[0][1]) / (at - self.looks[0][0]))

    def _at_least(self, percent: float) -> Bar:
        return replace(self, percent=max(self.percent, min(percent, 99.0)))


def remaining_s(look: MigrationStatistics, pace: float) -> float | None:
    """Seconds until the memory is sent if guest and network go on as now; None if they would never be."""
    gain = pace - look.dirty_rate_bytes_per_s
    if look.rate_bytes_per_s <= 0 or gain <= 0:
        return None
    return look.remaining_bytes / gain


def of_layers(bar: Bar, shown: Progress, sent: int, total: int, at: float) -> tuple[Bar, Progress]:
    """The bar and the progress when so much of what lies below disks was sent; ``total`` is what they and the disks
    are expected to take."""
    bar, rate = bar.copied(sent / total if total else 1.0), bar.rate(at, sent)
    remaining = max(0, total - sent)
    return bar.seen(at, sent), msgspec.structs.replace(
        shown,
        percent=round(bar.percent, 1),
        transferred_bytes=sent,
        remaining_bytes=remaining,
        total_bytes=sent + remaining,
        rate_bytes_per_s=_whole(rate),
        remaining_s=_in_ms(remaining / rate) if rate else None,
        note="sending backing files",
    )


def of_disks(
    bar: Bar, shown: Progress, disks: Sequence[DiskProgress], at: float, *, before: int = 0
) -> tuple[Bar, Progress]:
    """The bar and the progress after a look at copies of disks, at ``at`` seconds of a monotonic clock; ``before``
    bytes of what lies below them were sent before."""
    total = before + sum(disk.total_bytes for disk in disks)
    copied = before + sum(disk.copied_bytes for disk in disks)
    # Nothing to copy is said of a disk that is empty, and of one whose copy has yet to be filled with zeroes.
    bar = bar.copied(copied / total if total else float(all(disk.ready for disk in disks)))
    rate = bar.rate(at, copied)
    return bar.seen(at, copied), msgspec.structs.replace(
        shown,
        percent=round(bar.percent, 1),
        transferred_bytes=before + sent(disks),
        remaining_bytes=total - copied,
        total_bytes=total,
        rate_bytes_per_s=_whole(rate),
        remaining_s=_in_ms((total - copied) / rate) if rate else None,
        disks=tuple(disks),
        note=slows_writes(disk for disk in disks if not disk.ready) or _prepares(disks),
    )


def sent(disks: Iterable[DiskProgress]) -> int:
    """Bytes that were sent for disks; where nobody counts them, those that were copied."""
    return sum(disk.copied_bytes if disk.sent_bytes is None else disk.sent_bytes for disk in disks)


def slows_writes(disks: Iterable[DiskProgress]) -> str:
    """What to say of disks to which the guest's writes are slowed; empty if there is none."""
    slowed = ", ".join(disk.disk for disk in disks if disk.slowed)
    return f"the guest's writes to disk {slowed} are slowed, so that its copy keeps up" if slowed else ""


def _prepares(disks: Iterable[DiskProgress]) -> str:
    """What to say of copies of which nothing is copied yet; empty if there is none."""
    names = ", ".join(disk.disk for disk in disks if not (disk.total_bytes or disk.ready))
    return f"what disk {names} is copied to is filled with zeroes first" if names else ""


def progress(bar: Bar, look: MigrationStatistics, *, limit_ms: float, note: str) -> Progress:
    """The progress to show."""
    left = remaining_s(look, bar.pace)
    return Progress(
        percent=round(bar.percent, 1),
        transferred_bytes=look.transferred_bytes,
        remaining_bytes=look.remaining_bytes,
        total_bytes=look.total_bytes,
        rate_bytes_per_s=_whole(look.rate_bytes_per_s),
        dirty_rate_bytes_per_s=_whole(look.dirty_rate_bytes_per_s),
        iteration=look.iteration,
        remaining_s=_in_ms(left) if left is not None else None,
        downtime_limit_ms=round(limit_ms, 3),
        throttle_percent=look.throttle_percent,
        note=note,
    )


def _whole(rate: float) -> float:
    """As it is shown: no more digits than mean something, here and below."""
    return float(round(rate))


def _in_ms(seconds: float) -> float:
    return round(seconds, 3)
