"""Copies of a VM's disks while they are made: looking at them, and what to do about one that does not keep up.

For a VM that moves to another host they are begun before memory is sent, keep up with the guest from then on, and end
while the guest stands still before the last of its memory goes. A copy that fails fails the move.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from limosa.errors import LimosaError, MigrationFailed, NotConverging, QemuError
from limosa.model.storage import DiskAction, DiskPlan, DiskProgress
from limosa.qemu.protocol import CopyingProtocol, CopyState, CopyStatistics, MachineProtocol
from limosa.transport.channel import SocketChannel
from limosa.wire.peer import StreamCredentials

LOOK_EVERY_S = 0.2


@dataclass(frozen=True)
class Keeping:
    """Whether a copy comes nearer to keeping up with its guest; pure.

    ``least`` is the least that ever remained, ``since`` when that was. A copy that has come no nearer for a quarter of
    the patience makes the guest wait for its writes; one that has not for all of it since then does not end.
    """

    patience_s: float
    since: float
    least: int | None = None
    write_blocking: bool = False

    def judge(self, now: float, remaining: int) -> tuple[Keeping, str]:
        """The state after a look, and what to do: nothing (empty), ``block-writes`` or ``give-up``."""
        if self.least is None or remaining < self.least:
            return replace(self, since=now, least=remaining), ""
        waited = now - self.since
        if not self.write_blocking and waited >= self.patience_s / 4:
            return replace(self, since=now, write_blocking=True), "block-writes"
        return self, "give-up" if self.write_blocking and waited >= self.patience_s else ""


class Mirrors:
    """The copies of one move, which have begun."""

    def __init__(self, machine: CopyingProtocol, disks: Iterable[str], patience_s: float) -> None:
        self._machine = machine
        began = time.monotonic()
        self._keeping = {disk: Keeping(patience_s, began) for disk in disks}
        self.latest: Mapping[str, CopyStatistics] = {}

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
                raise MigrationFailed(f"disk {disk} could not be copied", why=why, todo="see the logs of both hosts")
        self.latest = {disk: copies[disk] for disk in self._keeping}

    async def cap(self, bytes_per_s: int) -> None:
        """Cap what all copies together send; 0: no cap."""
        for disk in self._keeping:
            await self._machine.cap_copy(disk, bytes_per_s // len(self._keeping))

    async def finish(self) -> None:
        """The guest stands still: make all whole and flush them. Raises :class:`StorageError`."""
        await asyncio.gather(*(self._machine.end_copy(disk) for disk in self._keeping))

    def progress(self) -> tuple[DiskProgress, ...]:
        """How far each is, by the last look."""
        return tuple(
            DiskProgress(
                disk=disk,
                copied_bytes=copy.copied_bytes,
                total_bytes=copy.total_bytes,
                ready=copy.state is CopyState.READY,
                write_blocking=self._keeping[disk].write_blocking,
            )
            for disk, copy in self.latest.items()
        )

    async def _act(self) -> None:
        now = time.monotonic()
        for disk, copy in self.latest.items():
            if copy.state is not CopyState.COPYING:
                continue
            self._keeping[disk], what = self._keeping[disk].judge(now, copy.total_bytes - copy.copied_bytes)
            if what == "block-writes":
                with suppress(QemuError):  # a QEMU older than 8.2 cannot: then it only waits on
                    await self._machine.block_writes(disk)
            elif what == "give-up":
                raise NotConverging(
                    f"the copy of disk {disk} does not come to its end",
                    why="the guest writes it faster than it can be sent",
                    todo="move the VM when it is quieter, or over a faster network",
                )


async def send(
    machine: MachineProtocol,
    tag: str,
    plans: Sequence[DiskPlan],
    channels: Sequence[SocketChannel],
    credentials: StreamCredentials | None,
    bytes_per_s: int,
) -> None:
    """Begin to copy disks to a destination, over a channel each. ``bytes_per_s``: a cap for each, or 0."""
    if credentials is not None:
        await machine.trust_disks(credentials)
    for plan, channel in zip(plans, channels, strict=True):
        whole = plan.action is DiskAction.COPY
        encrypt = credentials is not None
        await machine.copy_to_host(plan.disk, tag, channel.stream, bytes_per_s, whole=whole, encrypt=encrypt)


async def drop(machine: MachineProtocol, tag: str, disks: Sequence[str]) -> None:
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
