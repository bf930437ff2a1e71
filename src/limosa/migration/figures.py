"""What is shown of a move while its streams run: how far it is, which way it goes, and how much went there; and when
its guest was resumed, by the clock here.
"""

from __future__ import annotations

import time

import msgspec

from limosa.migration import progress
from limosa.migration.disks import copies
from limosa.migration.examination import Examined
from limosa.migration.home import Home
from limosa.migration.paths import Paths
from limosa.migration.progress import Bar
from limosa.migration.report import Report
from limosa.migration.steering import Steering
from limosa.model.migration import Progress
from limosa.model.storage import DiskProgress
from limosa.model.units import MIB
from limosa.qemu.protocol import MigrationStatistics
from limosa.transport.channel import Channel, SocketChannel
from limosa.transport.shares import Kind


class Figures:
    """Fills the report of one move, whatever it tries, from looks that others take. Where the way has changed, the host
    hears of it, too, because others may use more or less of a network then."""

    def __init__(self, report: Report, home: Home) -> None:
        self._report = report
        self._home = home
        self._paths: Paths | None = None
        #: what files below disks were sent by counts on, though it is closed
        self._layers_channel: tuple[SocketChannel, ...] = ()
        #: bytes of files below disks
        self._layers_sent = 0
        #: bytes that were sent for each disk that is copied
        self._copies_sent: list[int | None] = []
        #: at any time a cap was kept, so that what the networks carried says nothing of them
        self._was_capped = False

    def expect(self, examined: Examined, memory_mib: int) -> None:
        """Give disks and what lies below them their share of the bar."""
        expected = sum(plan.expected_bytes for plan in copies(examined.disks))
        expected += sum(plan.expected_bytes for plan in examined.layers)
        if expected:
            self._report.bar = self._report.bar.with_disks(expected, memory_mib * MIB)

    def paths_of(self, examined: Examined, *channels: Channel) -> Paths:
        """The paths that are shown from now on: what these channels carry, and what files below disks have taken."""
        channels = (*self._layers_channel, *channels)
        self._paths = Paths(examined.route, examined.ends, channels, examined.blocked)
        return self._paths

    def layers_went(self, channel: SocketChannel, sent_bytes: int) -> None:
        """All files below disks were sent."""
        self._layers_channel, self._layers_sent = (channel,), sent_bytes

    async def show_copies(self, steering: Steering) -> None:
        """Show how far the copies of disks are, by the last look at them."""
        self._report.bar, shown = progress.of_disks(
            self._report.bar,
            self._report.now.progress,
            await self._copies(steering),
            time.monotonic(),
            before=self._layers_sent,
        )
        await self._show(shown)

    async def show_memory(self, bar: Bar, look: MigrationStatistics, steering: Steering, note: str) -> None:
        """Show how far memory is. ``bar`` has the look in it, ``note`` says what is waited for."""
        shown = progress.progress(bar, look, limit_ms=steering.downtime_limit_ms, note=note)
        shown = await self._with_copies(shown, steering)
        shown = msgspec.structs.replace(shown, note=_joined(note, progress.slows_writes(shown.disks)))
        await self._show(shown, look.transferred_bytes)

    async def show_last(self, look: MigrationStatistics, steering: Steering | None) -> None:
        """Show what QEMU says when its migration has ended."""
        shown = progress.progress(self._report.bar, look, limit_ms=0, note="")
        self._report.change(
            progress=await self._with_copies(shown, steering) if steering is not None else shown,
            transfer_s=look.total_s,
            qemu_downtime_ms=look.downtime_ms,
            route=await self._paths.look(look.transferred_bytes) if self._paths is not None else self._report.now.route,
        )

    def learn(self) -> None:
        """Have the host remember how fast the networks were, as far as that could be seen."""
        if self._paths is not None and not self._was_capped:
            self._home.learn(self._paths.carried())

    async def _show(self, shown: Progress, by_rdma: int = 0) -> None:
        assert self._paths is not None
        known, route = self._paths.addresses, await self._paths.look(by_rdma)
        shown = msgspec.structs.replace(shown, note=_joined(self._report.aside, shown.note))
        self._report.change(progress=shown, route=route)
        self._was_capped = self._was_capped or any(self._home.bandwidth(kind) for kind in Kind)
        if self._paths.addresses != known:
            await self._home.sending()

    async def _copies(self, steering: Steering) -> tuple[DiskProgress, ...]:
        """How far the copies of disks are, and how much was sent for them until their channels were closed."""
        if steering.mirrors is None:
            return ()
        if steering.disk_channels:
            self._copies_sent = [await _sent(channel) for channel in steering.disk_channels]
        shown = zip(steering.mirrors.progress(), self._copies_sent, strict=False)
        return tuple(msgspec.structs.replace(copy, sent_bytes=sent) for copy, sent in shown)

    async def _with_copies(self, shown: Progress, steering: Steering) -> Progress:
        if steering.mirrors is None:
            return shown
        copied = await self._copies(steering)
        sent = shown.transferred_bytes + progress.sent(copied) + self._layers_sent
        return msgspec.structs.replace(shown, transferred_bytes=sent, disks=copied)


def by_our_clock(resumed_at: float, after_s: float | None, said_at: float, heard_at: float) -> float:
    """When the guest was resumed, which was ``resumed_at`` by the clock there, by the clock here: as it was said, if it
    may be right; else the middle of what is possible.

    The word for it was given at ``said_at`` and answered at ``heard_at``; ``after_s``: how long after it had arrived
    there the guest was resumed. So the way there and back bounds the error.
    """
    earliest = said_at + min(max(after_s or 0.0, 0.0), heard_at - said_at)
    return resumed_at if earliest <= resumed_at <= heard_at else (earliest + heard_at) / 2


def _joined(*notes: str) -> str:
    return "; ".join(filter(None, notes))


async def _sent(channel: Channel) -> int | None:
    """Bytes that a channel has sent, before compression; None if nobody counts them."""
    if (compressed := await channel.compressed()) is not None:
        return compressed.raw_bytes
    used = channel.used()
    return sum(one.sent_bytes for one in used) if used else None
