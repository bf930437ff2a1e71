"""What becomes of VMs whose QEMU ended or does not answer without anybody having asked for that.

A QEMU that ends under this daemon's eyes is seen to at once. A daemon that starts does all in order: leases are given
back, VMs that died meanwhile are started again where ``on_crash`` says so, silent QEMUs are asked until they answer.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection
from contextlib import suppress

from limosa.background import Background, in_full
from limosa.errors import ImageLeased, LimosaError, StorageError
from limosa.host.leasing import Leasing
from limosa.host.process_records import ProcessRecords
from limosa.host.vms import LEFT, HostedVm, Vms
from limosa.model.vm import VmState

_log = logging.getLogger(__name__)

#: A VM that crashes sooner than this after its start is not restarted, whatever ``on_crash`` says.
CRASH_LOOP_S = 30.0
#: A daemon that starts waits so long for shares with leases of VMs that do not run.
LEASES_WITHIN_S = 5.0
#: Between attempts to take up a QEMU that did not answer.
ASK_EVERY_S = 10.0
#: Between attempts to start a VM whose storage is not there, and how long they go on: after a restart of the host a
#: share may be mounted long after the daemon has come.
TRY_EVERY_S = 5.0
TRY_FOR_S = 600.0


class Restarting:
    """For all VMs of one host."""

    def __init__(self, vms: Vms, leasing: Leasing, records: ProcessRecords) -> None:
        self._vms = vms
        self._leasing = leasing
        self._records = records
        self._background = Background()
        self._giving_back = Background()
        vms.on_end(self._restart)

    def ask_again(self, *, but: Collection[str] = ()) -> None:
        """Take up QEMUs that did not answer as soon as they do, but for those of these VMs.

        To be called when it is known of every move which VMs are its."""
        for hosted in self._vms.all():
            if hosted.fault is not None and hosted.state is not VmState.INCOMING and hosted.config.name not in but:
                self._background.spawn(self._ask_again(hosted))

    async def _ask_again(self, hosted: HostedVm) -> None:
        while hosted.fault is not None and self._is_still_here(hosted):
            await asyncio.sleep(ASK_EVERY_S)
            if hosted.migration is not None or hosted.fault is None:
                continue  # a move asks it, or has done so
            try:
                await self._vms.ask_again(hosted)
            except LimosaError:
                continue
            if hosted.machine is None:
                await self._give_back(hosted)
                await self._restart(hosted)

    async def give_back_leases(self) -> None:
        """Those of VMs that neither run nor move, which an earlier daemon may have had no time to give back. VMs on a
        share that does not answer are busy until it does, and that is not waited for."""
        for hosted in self._vms.all():
            if hosted.machine is None and hosted.migration is None and hosted.fault is None:
                self._giving_back.spawn(self._give_back(hosted))
        with suppress(TimeoutError):
            await asyncio.wait_for(self._giving_back.idle(), LEASES_WITHIN_S)

    async def _give_back(self, hosted: HostedVm) -> None:
        async with hosted.lock:
            await self._leasing.give_back(hosted.config)

    def restart_died(self) -> None:
        """Do what ``on_crash`` says with VMs whose QEMU ended while no daemon was there, as in a crash of the host.

        To be called when migrations have said which VMs are theirs, and leases are being given back; while there is a
        doubt nothing is started."""
        if not self._vms.doubt:
            for hosted in self._vms.all():
                if hosted.died:
                    self._background.spawn(self._restart_died(hosted))

    async def _restart_died(self, hosted: HostedVm) -> None:
        """As soon as it is in no move: one of its disks that cannot be undone may take long."""
        async with hosted.lock:
            pass  # its leases are given back
        while hosted.migration is not None:  # noqa: ASYNC110 - many end one, and it may take hours
            await asyncio.sleep(ASK_EVERY_S)
        if hosted.died and self._is_still_here(hosted):  # and was not deleted meanwhile
            await self._restart(hosted)

    async def _restart(self, hosted: HostedVm) -> None:
        """Start a VM that has crashed, if that is wanted and nobody does it yet; or begin to try, where its storage is
        not there. Never fails: the reason is shown."""
        is_crashed = hosted.state is VmState.CRASHED and hosted.migration is None and not hosted.lock.locked()
        if not is_crashed or hosted.config.on_crash != "restart" or hosted.awaits is not None:
            return
        hosted.died = False
        # Below nothing it says only that the clock is behind, as it may be after a reboot.
        if 0 <= time.time() - (hosted.started_at or 0) <= CRASH_LOOP_S:
            if LEFT not in hosted.reason:  # the end of one in a move may be told twice
                hosted.reason = f"{hosted.reason}; {LEFT}"
            await in_full(self._records.leave_ended, hosted.config)
            return
        error = await self._start(hosted)
        if _may_pass(error):
            _log.warning(
                "VM %s is not restarted yet: %s; tried again every %g s", hosted.config.name, error, TRY_EVERY_S
            )
            hosted.awaits = error
            self._background.spawn(self._try_again(hosted))
        elif error is not None:
            self._give_up(hosted, error)

    async def _try_again(self, hosted: HostedVm) -> None:
        """Until it is started, for as long as nothing but storage stands in the way and no person does anything."""
        until = time.monotonic() + TRY_FOR_S
        while True:
            await asyncio.sleep(TRY_EVERY_S)
            if hosted.awaits is None or not self._is_still_here(hosted):
                return  # a person has started, stopped or deleted it
            if hosted.migration is not None or hosted.lock.locked():
                continue
            error = await self._start(hosted)
            if error is None:
                return
            if not _may_pass(error) or time.monotonic() >= until:
                self._give_up(hosted, error)
                return
            hosted.awaits = error

    async def _start(self, hosted: HostedVm) -> LimosaError | None:
        """Try once. Returns what stands in the way."""
        try:
            await self._vms.start(hosted)
        except LimosaError as error:
            return error
        return None

    def _give_up(self, hosted: HostedVm, error: LimosaError) -> None:
        _log.error("VM %s is not restarted: %s", hosted.config.name, error)
        hosted.awaits = None
        hosted.reason = f"{hosted.reason}; it could not be restarted: {error}"

    def _is_still_here(self, hosted: HostedVm) -> bool:
        return self._vms.find(hosted.config.name) is hosted


def _may_pass(error: LimosaError | None) -> bool:
    """Whether it is of storage that is not mounted yet, or does not answer. A lease that another host holds, a person
    has to free."""
    return isinstance(error, StorageError) and not isinstance(error, ImageLeased)
