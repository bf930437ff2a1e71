"""What a daemon keeps of a VM's QEMU for the next one: a record of its process, and how that is found again.

The record (``process.json``) lies in the VM's folder from when its QEMU is started until that has been ended. It stays
if the QEMU has ended by itself or with its machine, and tells the next daemon that the VM has crashed. So it is
durable: after a power cut a VM without one would count as stopped, and not be restarted.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from limosa.background import in_full
from limosa.errors import InvalidInput, QemuGone, StateError
from limosa.host.files import Files
from limosa.model import reading
from limosa.model.base import Model
from limosa.model.vm import Accelerator, VmConfig
from limosa.qemu import process
from limosa.qemu.arguments import vnc_argument
from limosa.qemu.copier import Copier
from limosa.qemu.machine import Machine
from limosa.settings import toml
from limosa.wire.parsing import parse

_log = logging.getLogger(__name__)


class ProcessRecord(Model, frozen=True, forbid_unknown_fields=False):
    """How to find a VM's QEMU again."""

    pid: int
    start_time: int
    boot: str
    accelerator: Accelerator
    #: null: its guest came from another host
    started_at: float | None
    #: it crashed so soon that nobody but a person is to start it again
    left: bool = False


_decoder = reading.decoder(ProcessRecord)


@dataclass(frozen=True)
class Found:
    """A VM's QEMU as an earlier daemon left it; ``machine`` is None if it has ended meanwhile."""

    machine: Machine | None
    accelerator: Accelerator | None = None
    started_at: float | None = None
    #: an earlier daemon saw it crash, and left it so
    left: bool = False


class ProcessRecords:
    """Those of one host's VMs. ``boot`` identifies this run of its kernel."""

    def __init__(self, files: Files, boot: str) -> None:
        self._files = files
        self._boot = boot

    async def attach(self, config: VmConfig) -> Found | None:
        """The QEMU an earlier daemon started for this VM; None if none was running when it ended."""
        try:
            record: ProcessRecord | None = self._read(config)
        except FileNotFoundError:
            # Either none was started, or the daemon died between starting it and writing the record.
            sockets = self._files.sockets(config)
            record = self._seen(config) if sockets.exists() else None
            if record is None:
                # Or it died while it removed the folder; one that a copier uses is removed with that.
                if not Copier.uses(sockets):
                    shutil.rmtree(sockets, ignore_errors=True)
                return None
        except (OSError, InvalidInput) as error:
            _log.error("VM %s: %s", config.name, error)
            record = self._seen(config)
        if record is None:
            return Found(None)
        machine = None
        if record.boot == self._boot:
            try:
                machine = await Machine.attach(self._files.sockets(config), record.pid, record.start_time)
            except QemuGone:
                self.clean_up(config, crashed=True)
        return Found(machine, record.accelerator, record.started_at, record.left)

    async def end_silent(self, config: VmConfig) -> None:
        """Kill a QEMU that answers nobody. Raises :class:`QemuError` if the kernel cannot end it."""
        await process.end(self._argument(config))
        await in_full(self.clean_up, config, crashed=False)

    def remember(self, config: VmConfig, machine: Machine, accelerator: Accelerator, *, incoming: bool) -> None:
        """Keep, durably, how a QEMU that has just been started is found again. Raises :class:`StateError`."""
        record = ProcessRecord(
            pid=machine.pid,
            start_time=machine.process.start_time,
            boot=self._boot,
            accelerator=accelerator,
            started_at=None if incoming else time.time(),
        )
        self._write(config, record)

    def clean_up(self, config: VmConfig, *, crashed: bool) -> None:
        """Forget a QEMU that has ended; but the record of one that crashed stays, to tell the next daemon."""
        path = self._path(config)
        if not crashed:
            path.unlink(missing_ok=True)
            with suppress(OSError):  # the folder is gone, too; or after a power cut it seems to have crashed
                toml.sync_folder(path.parent)
        shutil.rmtree(self._files.sockets(config), ignore_errors=True)

    def leave_ended(self, config: VmConfig) -> None:
        """Have the next daemon, too, leave a VM alone that crashed, if that can be written."""
        with suppress(OSError, InvalidInput, StateError):
            self._write(config, msgspec.structs.replace(self._read(config), left=True))

    def forget_ended(self, config: VmConfig) -> None:
        """Remove the record of a QEMU that has ended, if no VM has it: what is left where a journal was lost."""
        path = self._path(config)
        if path.with_name("vm.toml").exists():
            return
        try:
            record = self._read(config)
        except (OSError, InvalidInput):
            return
        if record.boot != self._boot or process.start_time_of(record.pid) != record.start_time:
            path.unlink(missing_ok=True)

    def _seen(self, config: VmConfig) -> ProcessRecord | None:
        """What the record must have said, if the QEMU it was about still runs: it is known by its run folder."""
        found = process.find(self._argument(config))
        if found is None:
            return None
        pid, start_time = found
        kvm = b"accel=kvm" in Path(f"/proc/{pid}/cmdline").read_bytes()
        booted_at = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
        return ProcessRecord(
            pid=pid,
            start_time=start_time,
            boot=self._boot,
            accelerator="kvm" if kvm else "tcg",
            started_at=booted_at + start_time / os.sysconf("SC_CLK_TCK"),
        )

    def _argument(self, config: VmConfig) -> str:
        """What tells the command line of the VM's QEMU from all others."""
        return vnc_argument(self._files.sockets(config) / "vnc.sock")

    def _path(self, config: VmConfig) -> Path:
        return self._files.process_record(config.name)

    def _read(self, config: VmConfig) -> ProcessRecord:
        """Raises ``OSError`` and :class:`InvalidInput`."""
        path = self._path(config)
        record: ProcessRecord = parse(path.read_bytes(), _decoder, str(path))
        return record

    def _write(self, config: VmConfig, record: ProcessRecord) -> None:
        try:
            toml.write_atomically(self._path(config), msgspec.json.encode(record))
        except StateError as error:
            error.vm = config.name
            raise
