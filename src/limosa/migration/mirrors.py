"""Copies of a VM's disks while they are made: looking at them, and what to do about one that does not keep up.

For a VM that moves to another host they are begun before memory is sent, keep up with the guest from then on, and end
while the guest stands still before the last of its memory goes. A copy that fails fails the move.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from limosa.errors import LimosaError, MigrationFailed, NotConverging
from limosa.model.storage import DiskAction, DiskPlan, DiskProgress
from limosa.model.units import KIB, MIB
from limosa.qemu.protocol import CopyingProtocol, CopyState, CopyStatistics, MachineProtocol
from limosa.settings.host import ConvergencePolicy
from limosa.transport.channel import SocketChannel
from limosa.wire.peer import StreamCredentials

LOOK_EVERY_S = 0.2
#: How long a copy that is ready may have too much left. For moments it always has: QEMU sleeps while nothing is.
BEHIND_S = 1.0
#: One of which nothing was copied for so long stands still.
STILL_S = 1.0
#: A rate is taken over the looks of so long.
RATE_OVER_S = 2.0
#: A guest whose writes are slowed may write this share of what is copied, and of that again, so often.
SLOWED_TO, MOST_SLOWED = 0.5, 4
#: A ready copy that has kept up for so long lets the guest write faster again, by as much as it was slowed last.
EASE_AFTER_S = 5.0
#: What may always remain: QEMU copies in pieces of up to this (MAX_IO_BYTES in block/mirror.c).
PIECE_BYTES = MIB


@dataclass(frozen=True)
class Keeping:
    """Whether a copy comes nearer to keeping up with its guest; pure.

    ``least`` is the least that ever remained, ``since`` when that was. A copy that has come no nearer for a quarter of
    the patience slows the guest's writes, by up to ``steps``; one that has not for all of it since the last step does
    not end. While nothing of it is copied at all it is not the guest that is too fast: then nobody is slowed, and it is
    given up when the patience is over.

    For one that is ready this begins anew, and again whenever no more is left than may be. It waits less for a step:
    what is left when the guest stops lengthens the blackout. When it has kept up for a while the last step is undone.
    ``excess``, what has gone beyond a cap, slows the guest as if it were left, but holds nothing up: it is there.
    """

    patience_s: float
    since: float
    least: int | None = None
    ready: bool = False
    #: when no more was left than may be
    kept_up: float = 0.0
    #: it is ready, and has had more left for more than a moment
    is_behind: bool = False
    #: when it last did not keep up, or the guest was let write faster again
    unsteady: float = 0.0
    #: steps by which the guest's writes were slowed, and may be
    slowed: int = 0
    steps: int = MOST_SLOWED

    def judge(
        self, now: float, remaining: int, allowed: int | None = None, *, excess: int = 0, stands_still: bool = False
    ) -> tuple[Keeping, str]:
        """The state after a look, and what to do: nothing (empty), ``slow-writes``, ``ease-writes`` or ``give-up``.
        ``allowed``: bytes that may be left of one that is ready; null for one that is not. ``stands_still``: nothing of
        it has been copied lately."""
        keeps_up, remaining = allowed is not None and remaining <= allowed, remaining + excess
        if allowed is not None and (not self.ready or remaining <= allowed):
            unsteady = self.unsteady if self.ready else now
            kept = replace(self, since=now, least=None, ready=True, kept_up=now, unsteady=unsteady, is_behind=False)
            if self.slowed and now - unsteady >= EASE_AFTER_S:
                return replace(kept, slowed=self.slowed - 1, unsteady=now), "ease-writes"
            return kept, ""
        kept_up = now if keeps_up else self.kept_up
        is_behind = self.ready and now - kept_up >= BEHIND_S
        looked = replace(self, kept_up=kept_up, is_behind=is_behind, unsteady=now)
        if self.least is None or remaining < self.least:
            return replace(looked, since=now, least=remaining), ""
        waited = now - self.since
        patience_s = self.patience_s / 4
        may_slow = self.slowed < self.steps and not stands_still
        if may_slow and waited >= (min(BEHIND_S, patience_s) if self.ready else patience_s):
            return replace(looked, since=now, slowed=self.slowed + 1), "slow-writes"
        return looked, "give-up" if not (may_slow or keeps_up) and waited >= self.patience_s else ""


@dataclass(frozen=True)
class Excess:
    """What has gone beyond a cap to which nothing on the way keeps; pure. ``sent``: what had gone in all at a time."""

    at: float
    sent: int
    bytes: float = 0.0

    def after(self, at: float, sent: int, bytes_per_s: int) -> Excess:
        """The state at a later look, since when there was this cap; 0: none."""
        beyond = self.bytes + sent - self.sent - bytes_per_s * (at - self.at)
        return Excess(at, sent, max(0.0, beyond) if bytes_per_s else 0.0)


class Mirrors:
    """The copies of one move. All have begun when they are first looked at. ``policy`` says how far the guest may be
    slowed for them, ``logs`` which logs say more if one fails."""

    def __init__(
        self,
        machine: CopyingProtocol,
        disks: Iterable[str],
        policy: ConvergencePolicy,
        *,
        logs: str = "the logs of both hosts",
    ) -> None:
        self._logs = logs
        self._machine = machine
        self._policy = policy
        new = Keeping(policy.patience_s, time.monotonic(), steps=MOST_SLOWED if policy.slow_writes else 0)
        self._keeping = dict.fromkeys(disks, new)
        #: what the guest may write a second, by disk
        self._writes: dict[str, int] = {}
        #: bytes per second for all together, 0: no cap
        self._cap = 0
        self.latest: Mapping[str, CopyStatistics] = {}
        #: when how much was copied
        self._looks: deque[tuple[float, Mapping[str, CopyStatistics]]] = deque()
        #: all is copied and flushed
        self.whole = False

    async def until_ready(self, show: Callable[[], Awaitable[None]]) -> None:
        """Return when all keep up with the guest; ``show`` is called after each look.

        Raises :class:`MigrationFailed` if one fails, :class:`NotConverging` if one never would.
        """
        changed = asyncio.Event()
        unsubscribe = self._machine.on_event(lambda event: changed.set() if event.name == "JOB_STATUS_CHANGE" else None)
        try:
            while True:
                changed.clear()
                await self.look()
                await show()
                if all(copy.state is CopyState.READY for copy in self.latest.values()):
                    return
                await self._act()
                with suppress(TimeoutError):
                    await asyncio.wait_for(changed.wait(), LOOK_EVERY_S)
        finally:
            unsubscribe()

    async def look(self) -> None:
        """Ask how they stand. Raises :class:`MigrationFailed` if one has failed."""
        copies = await self._machine.copies()
        for disk in self._keeping:
            copy = copies.get(disk)
            if copy is None or copy.error or copy.state is CopyState.ENDED:
                why = (copy.error if copy is not None else "") or "QEMU has ended it"
                raise MigrationFailed(f"disk {disk} could not be copied", why=why, todo=f"see {self._logs}")
        self.latest = {disk: copies[disk] for disk in self._keeping}
        now = time.monotonic()
        while self._looks and self._looks[0][0] < now - RATE_OVER_S:
            self._looks.popleft()
        self._looks.append((now, self.latest))

    async def keep_up(self, within_s: float, cap: int = 0, excess: Mapping[str, int] | None = None) -> None:
        """Look, and see to it that no copy has more left than it copies in ``within_s``: so long the guest would stand
        still for it. All must have been ready. ``cap``: bytes per second that each may send, 0: as much as it can;
        ``excess``: by how much more each has sent. Raises :class:`MigrationFailed` if one has failed,
        :class:`NotConverging` if one falls behind whatever is done."""
        await self.look()
        for disk in self.latest:
            allowed = max(PIECE_BYTES, round(self._rate(disk) * within_s))
            await self._judge(disk, allowed, (excess or {}).get(disk, 0), cap)

    @property
    def behind(self) -> tuple[str, ...]:
        """The disks for whose copies the guest should not stop yet."""
        return tuple(disk for disk, keeping in self._keeping.items() if keeping.is_behind)

    @property
    def unready(self) -> tuple[str, ...]:
        """The disks of which not everything has been copied once, by the last look."""
        ready = {disk for disk, copy in self.latest.items() if copy.state is not CopyState.COPYING}
        return tuple(disk for disk in self._keeping if disk not in ready)

    async def cap(self, bytes_per_s: int) -> None:
        """Cap what all copies together send, also those that are about to begin; 0: no cap."""
        self._cap = bytes_per_s
        for disk in self._keeping:
            await self._machine.cap_copy(disk, self.each)

    async def hurry(self) -> None:
        """Have what the guest has written since copied at once. All must have been ready. Never fails: who looks hears
        how they stand."""
        await asyncio.gather(*(self._machine.hurry_copy(disk) for disk in self._keeping))

    @property
    def each(self) -> int:
        """Bytes per second that each may send, 0: no cap."""
        return self._cap // len(self._keeping)

    async def finish(self) -> None:
        """The guest stands still: make all whole and flush them. Raises :class:`StorageError`."""
        await asyncio.gather(*(self._machine.end_copy(disk) for disk in self._keeping))
        self.latest = {disk: replace(copy, copied_bytes=copy.total_bytes) for disk, copy in self.latest.items()}
        self.whole = True

    def progress(self) -> tuple[DiskProgress, ...]:
        """How far each is, by the last look."""
        return tuple(
            DiskProgress(
                disk=disk,
                copied_bytes=copy.copied_bytes,
                total_bytes=copy.total_bytes,
                ready=copy.state is CopyState.READY,
                slowed=disk in self._writes,
            )
            for disk, copy in self.latest.items()
        )

    async def _act(self) -> None:
        for disk, copy in self.latest.items():
            # As long as QEMU fills the target with zeroes it says that there is nothing to copy (block/mirror.c). How
            # long that takes is the target's own affair, and nothing that its guest could do about.
            if copy.state is CopyState.COPYING and copy.total_bytes:
                await self._judge(disk)

    async def _judge(self, disk: str, allowed: int | None = None, excess: int = 0, cap: int = 0) -> None:
        copy = self.latest[disk]
        remaining = copy.total_bytes - copy.copied_bytes
        still = self._stands_still(disk)
        self._keeping[disk], what = self._keeping[disk].judge(
            time.monotonic(), remaining, allowed, excess=excess, stands_still=still
        )
        if what == "slow-writes":
            now = min(self._rate(disk), self._writes.get(disk, float("inf")), cap or float("inf"))
            await self._slow(disk, max(self._policy.least_write_kib_per_s * KIB, round(now * SLOWED_TO)))
        elif what == "ease-writes":
            await self._slow(disk, round(self._writes[disk] / SLOWED_TO) if self._keeping[disk].slowed else 0)
        elif what == "give-up":
            may_help = "" if self._policy.slow_writes else "; or allow its writes to be slowed: convergence.slow_writes"
            raise NotConverging(
                f"the copy of disk {disk} " + ("does not finish" if allowed is None else "falls behind"),
                why="nothing of it is copied" if still else "the guest writes to it faster than it can be sent",
                todo="see whether what it is copied to answers"
                if still
                else f"move the VM when it is quieter, or over a faster network{may_help}",
            )

    async def _slow(self, disk: str, bytes_per_s: int) -> None:
        """Let the guest write so much a second; 0: as much as it can."""
        if bytes_per_s:
            self._writes[disk] = bytes_per_s
        else:
            self._writes.pop(disk, None)
        await self._machine.slow_writes(disk, bytes_per_s)

    def _stands_still(self, disk: str) -> bool:
        """Whether nothing of a disk has been copied for a second, by the looks there were."""
        at, last = self._looks[-1]
        before = [look for then, look in self._looks if then <= at - STILL_S]
        return bool(before) and last[disk].copied_bytes == before[-1][disk].copied_bytes

    def _rate(self, disk: str) -> float:
        """Bytes of a disk that were copied in a second, by the last looks."""
        (began, first), (ended, last) = self._looks[0], self._looks[-1]
        return (last[disk].copied_bytes - first[disk].copied_bytes) / (ended - began) if ended > began else 0.0


async def send(
    machine: MachineProtocol,
    tag: str,
    plans: Sequence[DiskPlan],
    channels: Sequence[SocketChannel],
    credentials: StreamCredentials | None,
    bytes_per_s: Callable[[], int],
) -> None:
    """Begin to copy disks to a destination, over a channel each. ``bytes_per_s``: the cap of the next, or 0."""
    if credentials is not None:
        await machine.trust_disks(credentials)
    for plan, channel in zip(plans, channels, strict=True):
        whole = plan.action is DiskAction.COPY
        encrypt = credentials is not None
        await machine.copy_to_host(plan.disk, tag, channel.stream, bytes_per_s(), whole=whole, encrypt=encrypt)


async def drop(machine: CopyingProtocol, tag: str, disks: Sequence[str]) -> None:
    """Give up whatever a move has begun to copy; the disks are as they were. May be repeated. Raises the first failure
    when all have been tried."""
    failures: list[LimosaError] = []
    for disk in disks:
        try:
            await machine.drop_copy(disk, tag)
        except LimosaError as error:
            failures.append(error)
    if failures:
        raise failures[0]
