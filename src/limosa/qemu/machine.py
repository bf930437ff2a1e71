"""A running QEMU in domain words.

``launch`` starts one and returns when it answers; ``attach`` takes up one that an earlier daemon left running. Between
the two lies no difference afterwards: everything is asked of QEMU itself, nothing is remembered that a crash could
lose. How it ends is in ``session``, how it takes part in a migration in ``stream``, what becomes of its disks in
``disks``.
"""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import os
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from limosa.background import apart
from limosa.errors import OutcomeUnknown, QemuError, QemuGone
from limosa.qemu import folder, process
from limosa.qemu.arguments import Launch, build, vnc_argument
from limosa.qemu.disks import Disks
from limosa.qemu.monitor import Monitor
from limosa.qemu.process import QemuProcess
from limosa.qemu.protocol import Event, MigrationState, RunState
from limosa.qemu.session import DYING_S, started
from limosa.qemu.stream import Stream

#: From a restarted daemon's call to the answer of a QEMU that runs.
ATTACH_WITHIN_S = 10.0
#: How long QEMU may take to resume a guest whose stream broke; it usually takes milliseconds.
RESUME_WITHIN_S = 5.0


class Machine(Stream, Disks):
    """One QEMU process with its QMP session. Made by :meth:`launch` or :meth:`attach`."""

    def __init__(self, qemu: QemuProcess, monitor: Monitor, run_dir: Path) -> None:
        super().__init__(qemu, monitor, run_dir)
        #: until it is known that no VM state is on its way in, or that it has arrived; see resume()
        self._may_be_incoming = True
        monitor.on_event(self._note_arrival)

    @classmethod
    async def launch(
        cls, program: Path, make: Callable[[int, int], Launch], run_dir: Path, log: Path, user: str | None
    ) -> Machine:
        """Start QEMU; it waits, paused, and answers. ``make`` is given the descriptors of the QMP and console sockets.

        ``run_dir`` is made (its parent must exist), ``log`` receives what QEMU writes, ``user`` is whom it runs as
        (None: as we do). Raises :class:`QemuError` with QEMU's own words; nothing runs and no socket is left then.
        """
        await cls._end_leftover(run_dir)
        async with started(run_dir, log, user, partial(_spawn, program, make, run_dir, log, user)) as (qemu, monitor):
            return cls(qemu, monitor, run_dir)

    @classmethod
    async def attach(cls, run_dir: Path, pid: int, start_time: int) -> Machine:
        """Take up a QEMU that is running already. Raises :class:`QemuGone` if it has ended, :class:`QemuError` if it
        runs but does not answer; it is left as it is then."""
        qemu = QemuProcess.attach(pid, start_time)
        try:
            async with asyncio.timeout(ATTACH_WITHIN_S):
                monitor = await Monitor.connect(run_dir / folder.QMP, f"QEMU ({pid})")
        except (QemuGone, TimeoutError) as error:
            if await qemu.ends(DYING_S):
                raise QemuGone(f"QEMU with pid {pid} has ended", why=qemu.exit_text()) from error
            qemu.release()
            raise QemuError(f"QEMU with pid {pid} does not answer", why=str(error)) from error
        return cls(qemu, monitor, run_dir)

    @classmethod
    async def _end_leftover(cls, run_dir: Path) -> None:
        """End a QEMU that uses ``run_dir`` and that nobody has a record of.

        There is one if the daemon died between starting it and writing down that it had. Its guest never ran: one
        whose guest did is left alone and :class:`QemuError` raised.
        """
        found = process.find(vnc_argument(run_dir / folder.VNC)) if (run_dir / folder.QMP).exists() else None
        if found is None:
            return
        leftover = await cls.attach(run_dir, *found)
        state = await leftover.status()
        if state in (RunState.PRELAUNCH, RunState.INMIGRATE):
            await leftover.kill()
            return
        await leftover.detach()
        raise QemuError(
            f"another QEMU, with pid {leftover.pid}, uses the run folder {run_dir}",
            why=f"nobody has a record of it, and its guest is {state}",
            todo="find out whose it is, and end it by hand",
        )

    async def status(self) -> RunState:
        """QEMU's run state."""
        return RunState((await self._execute("query-status"))["status"])

    async def pause(self) -> None:
        """Stop the guest; no effect if it is stopped."""
        await self._execute("stop")

    async def resume(self) -> float:
        """Let the guest run. Returns since when (seconds since the epoch, by QEMU's RESUME event; now, if it ran).

        Refused with :class:`QemuError` while the state of the VM has not arrived completely: QEMU's ``cont`` would
        then be taken as a standing order and the guest run as soon as it can, whoever owns it by then.
        """
        if self._may_be_incoming and await self.status() is RunState.INMIGRATE:
            raise QemuError("the guest cannot run yet", why="its state has not arrived completely")
        resumed: list[float] = []
        unsubscribe = self.on_event(lambda event: resumed.append(event.at) if event.name == "RESUME" else None)
        try:
            await self._execute("cont")
        except (QemuGone, OutcomeUnknown):
            # QEMU says RESUME before the guest's first instruction (vm_prepare_start in system/cpus.c): if it did, the
            # guest ran, whatever became of it.
            if not resumed:
                raise
        finally:
            unsubscribe()
        return resumed[-1] if resumed else time.time()

    async def resume_if_stopped(self) -> None:
        """Let the guest run unless it does. When a stream broke, QEMU does so itself, a moment after it has said so."""
        resumed = asyncio.Event()
        unsubscribe = self.on_event(lambda event: resumed.set() if event.name == "RESUME" else None)
        try:
            if await self.status() is RunState.FINISH_MIGRATE:
                with suppress(TimeoutError):
                    async with asyncio.timeout(RESUME_WITHIN_S):
                        await resumed.wait()
            if await self.status() is not RunState.RUNNING:
                await self.resume()
        finally:
            unsubscribe()

    async def press_power_button(self) -> None:
        """Ask the guest to shut down (ACPI); what it does is its own affair."""
        await self._execute("system_powerdown")

    async def reset(self) -> None:
        """Begin anew, as with the reset button; a guest that is stopped stays so, and can run again whatever it did."""
        await self._execute("system_reset")

    async def announce(self) -> None:
        """Have switches learn anew where the VM's NICs are: five packets from each in about half a second."""
        await self._execute("announce-self", {"initial": 20, "max": 200, "rounds": 5, "step": 50})

    def _note_arrival(self, event: Event) -> None:
        arrived = event.name == "MIGRATION" and event.data["status"] == MigrationState.COMPLETED
        if arrived or event.name == "RESUME":
            self._may_be_incoming = False


async def _spawn(
    program: Path, make: Callable[[int, int], Launch], run_dir: Path, log: Path, user: str | None
) -> QemuProcess:
    with folder.listen(run_dir / folder.QMP) as qmp, folder.listen(run_dir / folder.CONSOLE) as console:
        launch = await apart(_with_disks_looked_at, make(qmp.fileno(), console.fileno()))
        _touch(launch.console_log, process.owner_of(user))
        return await process.spawn(
            [str(program), *build(launch)],
            pass_fds=(qmp.fileno(), console.fileno(), *launch.tap_fds),
            log=log,
            user=user,
            kvm=launch.accelerator == "kvm",
        )


def _with_disks_looked_at(launch: Launch) -> Launch:
    """The launch with what depends on where its disks lie on this host."""
    paths = {disk.path for disk in launch.config.disks}
    return dataclasses.replace(
        launch,
        buffered=launch.buffered | {path for path in paths if not does_direct_io(path)},
        block_devices=launch.block_devices | {path for path in paths if Path(path).is_block_device()},
    )


def does_direct_io(path: str) -> bool:
    """Whether the file system of an image takes ``O_DIRECT`` (some, as older tmpfs, do not)."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC))
    except OSError as error:
        return error.errno != errno.EINVAL
    return True


def _touch(path: Path, owner: tuple[int, int] | None) -> None:
    """Make sure the console's log exists and QEMU may write it."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "ab") as stream:
            if owner is not None:
                os.fchown(stream.fileno(), *owner)
    except OSError as error:
        raise QemuError(f"cannot write the console's log {path}", why=error.strerror or str(error)) from error
