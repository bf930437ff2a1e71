"""Disks of a VM that move to another location of this host; ``_Move.run`` reads as the order of it.

::

    waiting      checked, and written down which images will be made
    build-up     they are made
    storage      QEMU copies, and keeps up with what the guest writes
    switchover   the guest's I/O is held back, both images are alike and flushed; ``vm.toml`` names the new ones; QEMU
                 uses them
    tear-down    the old images are deleted, unless they are to be kept

At every moment the images that ``vm.toml`` names hold everything the guest was told is written. So there is nothing to
find out after a crash: what a record names besides those is of no use, and a copy that is settled but not in use yet is
put to use.

The disks of a VM that does not run are copied in the same order by a QEMU without a guest, which lives as long as the
move. Nobody may write them meanwhile: the VM is not started, the daemon holds their leases and QEMU's lock on them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import msgspec

from limosa.background import Background, apart, in_full, to_its_end
from limosa.errors import (
    Cancelled,
    Conflict,
    LimosaError,
    MigrationFailed,
    QemuError,
    QemuGone,
    StateError,
)
from limosa.host import disk_plans
from limosa.host.bandwidth import MBIT_BYTES
from limosa.host.disk_plans import Record
from limosa.host.faults import Obstacle, internal
from limosa.host.launching import Launcher
from limosa.host.own_disks import OwnDisks
from limosa.host.parts import Parts
from limosa.host.slots import Place
from limosa.host.stopped import StoppedDisks, unwritten
from limosa.host.views import CANCEL_WITHIN_S, Views, not_cancelled_yet
from limosa.host.vms import HostedVm
from limosa.migration import disks, progress
from limosa.migration.interruption import restarted, unless
from limosa.migration.mirrors import Mirrors
from limosa.migration.report import Report
from limosa.model import reading
from limosa.model.finding import Finding
from limosa.model.migration import Migration, Outcome, Phase
from limosa.model.storage import DiskAction, DiskPlan
from limosa.model.vm import Disk, VmState
from limosa.qemu.copier import Copier
from limosa.qemu.disks import Disks
from limosa.qemu.machine import does_direct_io
from limosa.qemu.protocol import ImageFile
from limosa.settings import toml
from limosa.settings.host import ConvergencePolicy
from limosa.storage import access, mounts
from limosa.wire.api import DiskMoveRequest

_log = logging.getLogger(__name__)
#: Between attempts to undo a move that could not be, because the disk is full for one.
UNDO_EVERY_S = 2.0
#: States in which disks can move without a QEMU of the VM's.
_OFF = (VmState.STOPPED, VmState.CRASHED)


class DiskMoves:
    """All of this host. Its records lie beside the journals of migrations."""

    def __init__(self, parts: Parts, views: Views, launcher: Launcher) -> None:
        self._parts = parts
        self._host = parts.name
        self._vms = parts.vms
        self._page = parts.page
        self._storage = parts.storage
        self._leasing = parts.leasing
        self._folder = parts.files.migrations
        self._views = views
        self._user = launcher.user
        self.stopped = StoppedDisks(parts, launcher)
        self._active: dict[str, _Move] = {}
        #: new images that QEMU did not put in a disk's place: its guest goes on writing the old one, whatever
        #: ``vm.toml`` says
        self._refused: set[str] = set()
        self._background = Background()

    async def move(self, request: DiskMoveRequest) -> Migration:
        """Accept a move of disks and begin it, or put it in line. Raises :class:`Conflict`, :class:`PreflightRefused`,
        :class:`limosa.errors.NotFound` and :class:`StateError`; nothing is kept then."""
        hosted = self._movable(request.vm)
        config = hosted.config
        record, findings = await disk_plans.plan(self._parts, hosted, request)
        # That takes seconds, in which the VM may go, another get its name, or another move of its disks end.
        if self._movable(request.vm) is not hosted or hosted.config is not config:
            raise Conflict(
                f"VM '{request.vm}' has changed in the meantime", todo="try again", vm=request.vm, host=self._host
            )
        report = Report(disk_plans.first_view(record, self._host, findings), self._views.publish)
        move = _Move(self, hosted, record, report, (request.bandwidth_mbit_per_s or 0) * MBIT_BYTES)
        hosted.migration = record.migration  # in one go with the look above
        return await to_its_end(self._begin(move))

    async def cancel(self, migration: str) -> Migration | None:
        """Cancel a move of disks; None if none of that identity is under way. Raises :class:`Conflict` if it is too
        late, and :class:`OutcomeUnknown` if something does not answer that is needed for it: it is cancelled as soon as
        that does."""
        move = self._active.get(migration)
        if move is None:
            return None
        move.cancel()
        try:
            async with asyncio.timeout(CANCEL_WITHIN_S):
                return await self._views.ended(migration)
        except TimeoutError:
            what = f"the disks of VM '{move.record.vm}'"
            raise not_cancelled_yet(move.report.now, what, "not everything is undone", self._host) from None

    async def limit(self, migration: str, mbit_per_s: int) -> Migration | None:
        """Cap a move of disks; None if none of that identity is under way."""
        move = self._active.get(migration)
        if move is None:
            return None
        await move.limit(mbit_per_s * MBIT_BYTES)
        return move.report.now

    async def recover(self) -> None:
        """Bring to an end what an earlier daemon left, or begin to. What cannot be undone yet keeps its VM locked, as
        does what waits for a share that does not answer. All VMs are locked when this first waits for anything."""
        moves = []
        for path in sorted(self._folder.glob("*.disks.json")):
            try:
                record = reading.decode(path.read_bytes(), Record)
                self._storage.resume(plan.path for plan in record.plans)
                hosted = self._owner(record)
                if hosted is not None:
                    moves.append(self._take_up(hosted, record))
                else:
                    self._give_up(record)
            except (OSError, msgspec.MsgspecError, LimosaError) as error:
                _log.error("the move of disks in %s could not be brought to an end: %s", path, error)
        await asyncio.gather(*map(self._end, moves))

    def not_ended(self) -> set[str] | None:
        """Names of VMs whose disks have moves that are not at their end; None if that cannot be known."""
        try:
            return {reading.decode(path.read_bytes(), Record).vm for path in self._folder.glob("*.disks.json")}
        except (OSError, msgspec.MsgspecError):
            return None

    def _take_up(self, hosted: HostedVm, record: Record) -> _Move:
        move = _Move(self, hosted, record, Report(disk_plans.first_view(record, self._host), self._views.publish), 0)
        hosted.migration = record.migration
        self._active[record.migration] = move
        return move

    async def _end(self, move: _Move) -> None:
        cause = restarted(move.record.vm, self._host)
        if await self._is_undone(move, cause):
            await self._let_go(move)
        else:
            self._background.spawn(self._undo(move, cause))

    def _owner(self, record: Record) -> HostedVm | None:
        """The VM; None if it is this host's no more. Raises :class:`StateError` if nobody can know that now, or what
        the VM uses."""
        hosted = self._vms.find(record.vm)
        if hosted is not None and record.uuid in ("", hosted.config.uuid):
            can_be_known = hosted.fault is None
        else:  # there is none, or another that was given the name meanwhile
            hosted, can_be_known = None, not self._vms.is_unsure
        if not can_be_known:
            raise StateError(f"VM '{record.vm}' is not known", why="so which images it uses is unknown")
        return hosted

    def _give_up(self, record: Record) -> None:
        """Which images the VM used last nobody knows any more, so all stay. An unfinished one is a leftover from now
        on, like those of moves whose records were lost."""
        report = Report(disk_plans.first_view(record, self._host), self._views.publish)
        error = MigrationFailed(
            f"VM '{record.vm}' has gone from host '{self._host}'",
            why="so which images it used is unknown, and all of them are kept",
            todo="'limosa storage leftovers' shows those that the move created",
            vm=record.vm,
            host=self._host,
        )
        report.end(Outcome.FAILED, error.fault())
        for plan in record.plans:
            self._storage.settle(plan.path)
        self.forget(record)
        _log.error("%s", error)

    # How one is conducted

    def _movable(self, name: str) -> HostedVm:
        """The VM, if its disks can be moved now. Raises :class:`limosa.errors.NotFound` and :class:`Conflict`."""
        hosted = self._vms.get(name)
        fitting = _OFF if hosted.machine is None else (VmState.RUNNING, VmState.PAUSED)
        if hosted.state not in fitting:
            raise Conflict(f"VM '{name}' is {hosted.state}", todo="try again in a moment", vm=name, host=self._host)
        self._vms.check_idle(hosted)
        self._vms.check_here(hosted)
        return hosted

    async def _begin(self, move: _Move) -> Migration:
        """Write down what will be made, so that the next daemon knows of the move also if it waits in line until then;
        and begin it. Raises :class:`StateError`; the VM is in no move then."""
        record = move.record
        try:
            await in_full(toml.write_atomically, self._path(record), msgspec.json.encode(record))
        except LimosaError:
            move.hosted.migration = None
            with suppress(OSError):
                self.forget(record)
            raise
        self._active[record.migration] = move
        self._views.publish(move.report.now)
        self._background.spawn(self._conduct(move))
        return move.report.now

    async def _conduct(self, move: _Move) -> None:
        place = Place(self._storage.leaving)
        try:
            try:
                await move.guard(place.take(move.report.line("other moves of disks on this host")))
                await move.run()
            finally:
                place.give_back()  # to undo it copies nothing, and may take long
        except LimosaError as error:
            await self._undo(move, error)
        except Exception as error:  # noqa: BLE001 - a fault of ours must not leave a VM locked
            cause = internal(error, f"move {move.record.migration} of disks", vm=move.record.vm, host=self._host)
            await self._undo(move, cause)
        else:
            move.report.end(Outcome.COMPLETED)
            await self._let_go(move)

    async def _undo(self, move: _Move, cause: LimosaError) -> None:
        """The VM goes on with the disks it had, and stays locked until it does: who stopped and started it before could
        have it start from others. What this daemon cannot undo the next one does."""
        while True:
            if await self._is_undone(move, cause):
                break
            await asyncio.sleep(UNDO_EVERY_S)
        await self._let_go(move)

    async def _is_undone(self, move: _Move, cause: LimosaError) -> bool:
        """Try once."""
        cause.vm, cause.host = cause.vm or move.record.vm, cause.host or self._host
        try:
            await move.end_copier()
            if move.may_be_committed:
                await self._vms.keep_disks(move.hosted)
                move.may_be_committed = False
            moved, left = await self._recover(move.hosted, move.record)
            self.forget(move.record)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is tried again
            move.obstacle.met(error)
            move.report.note(f"it cannot be undone yet: {error}")
            return False
        move.says(left)
        if moved:
            move.report.end(Outcome.COMPLETED)
        else:
            move.report.end(Outcome.CANCELLED if isinstance(cause, Cancelled) else Outcome.FAILED, cause.fault())
        return True

    async def _let_go(self, move: _Move) -> None:
        """The move has ended: the VM is people's again."""
        move.hosted.migration = None
        self._active.pop(move.record.migration, None)
        if move.qemu_ended:
            await self._vms.crashed(move.hosted)

    async def _recover(self, hosted: HostedVm, record: Record) -> tuple[bool, tuple[Finding, ...]]:
        """Undo what is not in use, finish what ``vm.toml`` says is. Returns whether that was so, and what is to be said
        of images that could not be deleted. May be repeated."""
        if hosted.machine is None:
            await self.stopped.end(hosted.config)
        for plan in record.plans:
            if await self._is_refused(hosted, plan):
                await self._put_back(hosted, record.old[plan.disk])
            with suppress(QemuGone):
                await self._end_copy(hosted, record, plan)
        now = {disk.name: disk.path for disk in hosted.config.disks}
        for plan in record.plans:
            if now.get(plan.disk) != plan.path:
                await self._storage.remove(plan.path)
        used = [plan for plan in record.plans if now.get(plan.disk) == plan.path]
        for plan in used:
            self._storage.settle(plan.path)
        old = [record.old[plan.disk].path for plan in used]
        left = await self._leave(hosted, record, [path for path in old if path not in now.values()])
        if hosted.machine is None:
            await self.stopped.give_back(hosted.config, [plan.path for plan in record.plans])
        return all(now.get(plan.disk) == plan.path for plan in record.plans), left

    async def _is_refused(self, hosted: HostedVm, plan: DiskPlan) -> bool:
        """Whether ``vm.toml`` names the new image and QEMU did not take it. Once known it stays so: that QEMU may end
        before the file can be written."""
        if not _is_named(hosted, plan):
            return False
        if hosted.machine is not None:
            with suppress(QemuGone):
                copy = (await hosted.machine.copies()).get(plan.disk)
                if copy is not None and copy.error:
                    self._refused.add(plan.path)
        return plan.path in self._refused

    async def _put_back(self, hosted: HostedVm, old: Disk) -> None:
        as_before = tuple(old if disk.name == old.name else disk for disk in hosted.config.disks)
        await self._vms.change_disks(hosted, as_before)

    async def _end_copy(self, hosted: HostedVm, record: Record, plan: DiskPlan) -> None:
        """Have QEMU use what ``vm.toml`` names."""
        if hosted.machine is None:
            return
        if _is_named(hosted, plan):
            await hosted.machine.pivot(plan.disk)
        else:
            await hosted.machine.drop_copy(plan.disk, record.migration)

    async def _leave(self, hosted: HostedVm, record: Record, old: Sequence[str]) -> tuple[Finding, ...]:
        """The VM has left images. Returns what is to be said of those that could not be deleted."""
        return await OwnDisks(self._parts, hosted).leave(old, keep=record.keep)

    async def make_images(self, hosted: HostedVm, record: Record) -> None:
        """Make them and give them to QEMU's user. Raises :class:`StorageError`."""
        for plan in record.plans:
            await self._storage.make(plan)
            await in_full(access.grant, Path(plan.path), self._user, read_only=False)
        await self._leasing.take(hosted.config, [plan.path for plan in record.plans])

    async def finish(self, record: Record) -> None:
        """The new images are alike with the old. Raises :class:`StorageError`."""
        await self._storage.finish(plan.path for plan in record.plans)

    async def commit(self, move: _Move) -> None:
        """Make the new images the VM's, durably. Raises :class:`StateError`; they are not then, though ``vm.toml`` may
        name them until that is undone."""
        try:
            await self._vms.change_disks(move.hosted, disks.landed(move.hosted.config, move.record.plans).disks)
        except StateError:
            move.may_be_committed = True
            raise

    async def remove_old(self, hosted: HostedVm, record: Record) -> tuple[Finding, ...]:
        """Delete the images the disks had, unless they are to be kept. Returns what is to be said of those that could
        not be."""
        for plan in record.plans:
            self._storage.settle(plan.path)
        left = await self._leave(hosted, record, [record.old[plan.disk].path for plan in record.plans])
        if hosted.machine is None:
            await self.stopped.give_back(hosted.config)
        self.forget(record)
        return left

    def forget(self, record: Record) -> None:
        """Nothing is left to do."""
        self._path(record).unlink(missing_ok=True)

    @property
    def policy(self) -> ConvergencePolicy:
        """How long a copy may come no nearer to its end, and how far a guest may be slowed for it."""
        return self._page.now.convergence

    def _path(self, record: Record) -> Path:
        return self._folder / f"{record.migration}.disks.json"


class _Move:
    """One move of one VM's disks."""

    def __init__(self, moves: DiskMoves, hosted: HostedVm, record: Record, report: Report, cap: int) -> None:
        self.hosted = hosted
        self._machine = hosted.machine
        #: what copies: the VM's QEMU, or from when it has been started one without a guest
        self._qemu: Disks | None = hosted.machine
        self.record = record
        self.report = report
        self._moves = moves
        #: bytes per second for all disks together, 0: none
        self._cap = cap
        self._copying: Mirrors | None = None
        #: the disks among which the cap is divided
        self._sharing: tuple[str, ...] = tuple(record.old)
        #: the new images are about to be the VM's
        self._is_decided = False
        #: that could not be written, but ``vm.toml`` may name them nevertheless
        self.may_be_committed = False
        self.obstacle = Obstacle(f"the move of disks of VM {record.vm} could not be undone")
        self._cancelled: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run(self) -> None:
        """Move the disks. Raises what went wrong; it is to be undone then."""
        self.report.enter(Phase.BUILD_UP)
        await self.guard(self._moves.make_images(self.hosted, self.record))
        with ExitStack() as held:
            if self._qemu is None:
                await self.guard(self._start_copier(held))
            self.report.enter(Phase.STORAGE)
            await self.guard(self._copy())
            self.report.enter(Phase.SWITCHOVER)
            await self.guard(self._moves.finish(self.record))
            await self._settle()
            await self._put_to_use()
        self.report.enter(Phase.TEAR_DOWN)
        await self.end_copier()
        self.says(await self._moves.remove_old(self.hosted, self.record))

    def says(self, left: tuple[Finding, ...]) -> None:
        """Say what is to be said of images that could not be deleted."""
        if left:
            self.report.change(findings=(*self.report.now.findings, *left))

    @property
    def qemu(self) -> Disks:
        """What copies."""
        assert self._qemu is not None
        return self._qemu

    @property
    def qemu_ended(self) -> bool:
        """Whether the VM had a QEMU, and has lost it during the move. By now it may be known as one that does not
        run."""
        return self._machine is not None and self._machine.gone.is_set()

    async def end_copier(self) -> None:
        """End the QEMU without a guest, if there is one. May be repeated."""
        if isinstance(self._qemu, Copier):
            await self._qemu.quit()

    async def _start_copier(self, held: ExitStack) -> None:
        # To open a file on a share that does not answer takes as long as that does.
        await in_full(held.enter_context, unwritten(self.record.old.values()))
        self._qemu = await self._moves.stopped.start(self.hosted.config, self.record.old.values())

    def cancel(self) -> None:
        """Have it cancelled. Raises :class:`Conflict` if the new images are about to be used."""
        if self._is_decided:
            raise Conflict(f"the disks of VM '{self.record.vm}' have moved already", vm=self.record.vm)
        if not self._cancelled.done():
            self._cancelled.set_result(None)

    async def limit(self, bytes_per_s: int) -> None:
        """Cap all disks together, 0: no cap."""
        self._cap = bytes_per_s
        if self._copying is not None:
            await self._share(self._copying)

    async def _share(self, copying: Mirrors) -> None:
        """Divide the cap among the copies that are not ready: QEMU keeps to none of one that is (``mirror_run``,
        block/mirror.c)."""
        self._sharing = copying.unready
        for disk in self._sharing:
            await self.qemu.cap_copy(disk, self._cap // len(self._sharing))

    async def guard(self, work: Coroutine[Any, Any, None]) -> None:
        """Do ``work`` unless a person cancels or QEMU dies, which raises."""
        gone = self._qemu.gone if self._qemu is not None else asyncio.Event()
        await unless(gone, {self._cancelled}, self._interrupted, work)

    def _interrupted(self) -> None:
        if self._cancelled.done():
            raise Cancelled(f"the move of the disks of VM '{self.record.vm}' was cancelled", vm=self.record.vm)
        raise QemuGone(f"QEMU of VM '{self.record.vm}' ended during the move", why=self.qemu.exit_text())

    async def _copy(self) -> None:
        plans = self.record.plans
        names = [plan.disk for plan in plans]
        copying = self._copying = Mirrors(self.qemu, names, self._moves.policy, logs="the log of this host")
        for plan in plans:
            image = await apart(_image_file, plan, self.record.old[plan.disk])
            whole = plan.action is DiskAction.COPY
            cap = self._cap // len(plans)
            await self.qemu.copy_to_file(plan.disk, self.record.migration, image, cap, whole=whole)
        await self._share(copying)  # the cap may have changed when a copy had its own and was not there yet
        self.report.bar = self.report.bar.with_disks(1, 0)
        await copying.until_ready(lambda: self._look(copying))

    async def _settle(self) -> None:
        """Make both images of each disk alike. A person's cancel is heeded at its end: QEMU 10.0 may crash, and the
        guest with it, where a copy is given up while writes are done in both (``docs/design/009-storage.md``)."""
        for disk in self.record.old:
            with suppress(QemuError):  # a QEMU older than 8.2 cannot; it then settles when the guest pauses to write
                await self.qemu.block_writes(disk)
        await asyncio.gather(*(self.qemu.settle_copy(disk) for disk in self.record.old))
        if self._cancelled.done():
            self._interrupted()

    async def _put_to_use(self) -> None:
        self._is_decided = True
        await self._moves.commit(self)
        for disk in self.record.old:
            await self.qemu.pivot(disk)

    async def _look(self, copying: Mirrors) -> None:
        if self._cap and copying.unready != self._sharing:
            await self._share(copying)
        self._show(copying)

    def _show(self, copying: Mirrors) -> None:
        bar, shown = progress.of_disks(self.report.bar, self.report.now.progress, copying.progress(), time.monotonic())
        self.report.bar = bar
        self.report.change(progress=shown)


def _image_file(plan: DiskPlan, old: Disk) -> ImageFile:
    """The new image of a disk, as QEMU is to open it."""
    return ImageFile(
        plan.path,
        plan.format,
        direct=does_direct_io(plan.path),
        thick=plan.thick,
        locks=not mounts.of(plan.path).has_no_locks,
        device=plan.device,
        size_bytes=plan.virtual_bytes if plan.device else None,
        # A device does not tell where it has nothing but zeroes.
        look_for_zeroes=Path(old.path).is_block_device(),
    )


def _is_named(hosted: HostedVm, plan: DiskPlan) -> bool:
    """Whether the VM's description names the new image."""
    return any(disk.path == plan.path for disk in hosted.config.disks)
