"""The VMs of this host: what belongs to it, what runs, and what people do with them.

A VM belongs to this host if its folder has a ``vm.toml``. While its QEMU runs, ``process.json`` beside it says how to
find that process again; a daemon that starts takes up what still runs. One act at a time is done to a VM, and none
while it moves.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import time
import uuid
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

from limosa.errors import Conflict, LimosaError, NotFound, StateError
from limosa.host.files import Files, passable
from limosa.host.launching import Launcher
from limosa.model.vm import Accelerator, Vm, VmConfig, VmState
from limosa.qemu.machine import Machine
from limosa.qemu.protocol import Event, RunState
from limosa.settings import toml
from limosa.wire.api import NewVm

#: A VM that crashes sooner than this after its start is not restarted, whatever ``on_crash`` says.
CRASH_LOOP_S = 30.0


@dataclass
class HostedVm:
    """A VM of this host, or one that is landing here."""

    config: VmConfig
    state: VmState
    machine: Machine | None = None
    accelerator: Accelerator | None = None
    started_at: float | None = None
    reason: str = ""
    #: the migration it is in
    migration: str | None = None
    #: its QEMU is being ended, or its guest has shut down: the end of the process is no crash
    ending: bool = False
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def accelerator_in_use(self) -> Accelerator:
        """What the running QEMU uses."""
        assert self.accelerator is not None
        return self.accelerator


class Vms:
    """All of them, by name."""

    def __init__(self, host: str, files: Files, launcher: Launcher) -> None:
        self._host = host
        self._files = files
        self._launcher = launcher
        self._vms: dict[str, HostedVm] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def load(self) -> list[LimosaError]:
        """Read every ``vm.toml`` and take up the QEMUs that still run. Returns what could not be read."""
        faults: list[LimosaError] = []
        for folder in sorted(self._files.vms.iterdir()):
            path = folder / "vm.toml"
            try:
                if path.exists():
                    await self._load(toml.read(path, VmConfig, error=StateError))
            except LimosaError as error:
                faults.append(error)
        return faults

    async def _load(self, config: VmConfig) -> None:
        hosted = HostedVm(config, VmState.STOPPED)
        self._vms[config.name] = hosted
        await self._take_up(hosted, died=VmState.CRASHED)

    async def _take_up(self, hosted: HostedVm, *, died: VmState) -> None:
        """Attach to the VM's QEMU if its ``process.json`` names one that still runs."""
        found = await self._launcher.attach(hosted.config)
        if found is None:
            return
        hosted.accelerator, hosted.started_at = found.accelerator, found.started_at
        if found.machine is None:
            hosted.state, hosted.reason = died, "its QEMU ended while the host daemon was not there"
            return
        self._attach(hosted, found.machine)
        running = await found.machine.status() is RunState.RUNNING
        hosted.state = VmState.RUNNING if running else VmState.PAUSED

    # Looking

    def get(self, name: str) -> HostedVm:
        """The VM of that name. Raises :class:`NotFound`."""
        hosted = self._vms.get(name)
        if hosted is None:
            raise NotFound(
                f"host '{self._host}' has no VM '{name}'", todo="'limosa vm list' shows them", vm=name, host=self._host
            )
        return hosted

    def find(self, name: str) -> HostedVm | None:
        """The VM of that name, or None."""
        return self._vms.get(name)

    def all(self) -> list[HostedVm]:
        """All VMs, by name."""
        return [self._vms[name] for name in sorted(self._vms)]

    def committed_mib(self) -> int:
        """Memory given to VMs that have a QEMU, or are about to."""
        return sum(
            vm.config.memory_mib for vm in self._vms.values() if vm.machine is not None or vm.state is VmState.INCOMING
        )

    def view(self, hosted: HostedVm) -> Vm:
        """A VM as clients see it."""
        machine = hosted.machine
        return Vm(
            config=hosted.config,
            state=hosted.state,
            host=self._host,
            accelerator=hosted.accelerator if machine is not None else None,
            pid=machine.pid if machine is not None else None,
            started_at=hosted.started_at if machine is not None else None,
            vnc_socket=str(self._files.sockets(hosted.config) / "vnc.sock") if machine is not None else None,
            migration=hosted.migration,
            reason=hosted.reason,
        )

    def check_idle(self, hosted: HostedVm) -> None:
        """Raise :class:`Conflict` if the VM is in a migration or an act is being done to it."""
        if hosted.migration is not None or hosted.state is VmState.INCOMING:
            raise Conflict(
                f"VM '{hosted.config.name}' is in migration {hosted.migration}",
                todo="wait for it, or cancel it with 'limosa migration cancel'",
                vm=hosted.config.name,
                host=self._host,
            )
        if hosted.lock.locked():
            raise Conflict(
                f"VM '{hosted.config.name}' is being started or stopped",
                todo="try again in a moment",
                vm=hosted.config.name,
                host=self._host,
            )

    # What people do

    async def create(self, new: NewVm) -> HostedVm:
        """Pin what was left open, check, and make the VM durable. On failure nothing is kept."""
        self._check_free(new.name, new.uuid)
        placeholder = HostedVm(await self._launcher.pin(new, str(uuid.uuid4())), VmState.STOPPED)
        self._check_free(new.name, placeholder.config.uuid)
        self._vms[new.name] = placeholder
        try:
            await self._launcher.make_disks(new, placeholder.config)
            self._make_folder(placeholder.config)
            toml.write(self._files.vm(new.name) / "vm.toml", placeholder.config)
        except BaseException:
            del self._vms[new.name]
            self._remove_folder(placeholder.config)
            raise
        return placeholder

    async def start(self, hosted: HostedVm) -> None:
        """Start a stopped VM. On failure it is stopped and nothing runs."""
        self.check_idle(hosted)
        async with hosted.lock:
            if hosted.machine is not None:
                raise self._wrong_state(hosted, "is started already")
            hosted.accelerator = self._launcher.accelerator(hosted.config)
            self._launcher.check_memory(hosted.config, self.committed_mib())
            machine = await self._launcher.launch(hosted.config, hosted.accelerator, incoming=False)
            self._attach(hosted, machine)
            hosted.started_at = time.time()
            await machine.resume()

    async def stop(self, hosted: HostedVm) -> None:
        """Pull the plug."""
        self.check_idle(hosted)
        async with hosted.lock:
            machine = self._running(hosted)
            hosted.ending = True
            await machine.quit()
            await self._after_end(hosted, machine)

    async def shutdown(self, hosted: HostedVm) -> None:
        """Press the power button; the guest decides what it does."""
        self.check_idle(hosted)
        await self._running(hosted).press_power_button()

    async def pause(self, hosted: HostedVm) -> None:
        """Stop the guest's processors."""
        self.check_idle(hosted)
        await self._running(hosted).pause()

    async def resume(self, hosted: HostedVm) -> None:
        """Let a paused guest go on."""
        self.check_idle(hosted)
        await self._running(hosted).resume_if_stopped()

    def delete(self, hosted: HostedVm) -> None:
        """Forget a stopped VM. Its disks are kept."""
        self.check_idle(hosted)
        if hosted.machine is not None:
            raise self._wrong_state(hosted, "runs")
        self._remove_folder(hosted.config)
        del self._vms[hosted.config.name]

    # What migrations do

    def reserve(self, config: VmConfig, migration: str) -> HostedVm:
        """Hold name, UUID and memory for a VM that is to land. Raises :class:`Conflict`."""
        self._check_free(config.name, config.uuid)
        self._launcher.check_memory(config, self.committed_mib())
        hosted = HostedVm(config, VmState.INCOMING, migration=migration)
        self._vms[config.name] = hosted
        return hosted

    async def launch_incoming(self, hosted: HostedVm, accelerator: Accelerator, carried: dict[str, str]) -> Machine:
        """Start the QEMU of a VM that is to land, waiting for its state."""
        hosted.accelerator = accelerator
        self._make_folder(hosted.config)
        machine = await self._launcher.launch(hosted.config, accelerator, incoming=True, carried=carried)
        self._attach(hosted, machine)
        return machine

    def adopt(self, hosted: HostedVm, *, running: bool) -> None:
        """A VM that landed is this host's from now on, durably."""
        toml.write(self._files.vm(hosted.config.name) / "vm.toml", hosted.config)
        hosted.migration = None
        hosted.started_at = time.time()
        if hosted.machine is None:
            hosted.state, hosted.reason = VmState.CRASHED, "its QEMU ended just after it had landed"
        else:
            hosted.state = VmState.RUNNING if running else VmState.PAUSED

    async def discard(self, hosted: HostedVm) -> None:
        """Kill the QEMU of a VM that will not land, and give everything back."""
        await self._end(hosted)
        self._remove_folder(hosted.config)
        if self._vms.get(hosted.config.name) is hosted:
            del self._vms[hosted.config.name]

    async def forget(self, hosted: HostedVm) -> None:
        """A VM that moved away: end its QEMU, then remove it from this host, durably."""
        hosted.state = VmState.HANDED_OVER
        await self._end(hosted)
        self._remove_folder(hosted.config)
        toml.sync_folder(self._files.vms)
        self._vms.pop(hosted.config.name, None)

    async def crashed(self, hosted: HostedVm) -> None:
        """The VM's QEMU died in a migration; do what ``on_crash`` says."""
        if hosted.config.on_crash == "restart" and hosted.machine is None:
            await self.start(hosted)

    def find_landing(self, config: VmConfig) -> HostedVm | None:
        """The VM that is landing here, if it is this one."""
        hosted = self._vms.get(config.name)
        if hosted is None or hosted.config.uuid != config.uuid or hosted.state is not VmState.INCOMING:
            return None
        return hosted

    async def take_up_landing(self, config: VmConfig, migration: str) -> HostedVm:
        """After a restart: the VM a journal speaks of, whether or not it became ours, with its QEMU if that runs."""
        hosted = self._vms.get(config.name)
        if hosted is None:
            hosted = HostedVm(config, VmState.INCOMING, migration=migration)
            self._vms[config.name] = hosted
            await self._take_up(hosted, died=VmState.INCOMING)
            hosted.state = VmState.INCOMING
        return hosted

    def seed_of(self, config: VmConfig) -> bytes | None:
        """The VM's cloud-init ISO, bit by bit as its guest knows it."""
        path = self._files.vm(config.name) / "seed.iso"
        return path.read_bytes() if config.cloud_init is not None else None

    # Below

    def _attach(self, hosted: HostedVm, machine: Machine) -> None:
        hosted.machine = machine
        hosted.ending = False
        hosted.reason = ""
        machine.on_event(lambda event: self._on_event(hosted, event))
        self._spawn(self._until_gone(hosted, machine))

    def _on_event(self, hosted: HostedVm, event: Event) -> None:
        if event.name == "SHUTDOWN":
            hosted.ending = True
            hosted.reason = "its guest shut down" if event.data.get("guest") else ""
        elif hosted.state is not VmState.INCOMING:
            if event.name == "RESUME":
                hosted.state = VmState.RUNNING
            elif event.name == "STOP":
                hosted.state = VmState.PAUSED

    async def _until_gone(self, hosted: HostedVm, machine: Machine) -> None:
        await machine.gone.wait()
        if hosted.machine is not machine:
            return
        await self._after_end(hosted, machine)
        if hosted.state is VmState.CRASHED and hosted.migration is None and self._may_restart(hosted):
            await self.start(hosted)

    async def _after_end(self, hosted: HostedVm, machine: Machine) -> None:
        """What holds once the process is gone. Idempotent: the watcher and whoever ended it both come here."""
        if hosted.machine is not machine:
            return
        hosted.machine = None
        self._launcher.clean_up(hosted.config)
        if hosted.state is VmState.INCOMING:
            return
        if hosted.ending:
            hosted.state = VmState.STOPPED
        else:
            hosted.state, hosted.reason = VmState.CRASHED, machine.exit_text() or "its QEMU ended"

    def _may_restart(self, hosted: HostedVm) -> bool:
        lived_s = time.time() - (hosted.started_at or 0)
        return hosted.config.on_crash == "restart" and lived_s > CRASH_LOOP_S

    async def _end(self, hosted: HostedVm) -> None:
        machine = hosted.machine
        if machine is not None:
            hosted.ending = True
            await machine.kill()
            await self._after_end(hosted, machine)

    def _running(self, hosted: HostedVm) -> Machine:
        if hosted.machine is None:
            raise self._wrong_state(hosted, f"is {hosted.state}")
        return hosted.machine

    def _wrong_state(self, hosted: HostedVm, what: str) -> Conflict:
        name = hosted.config.name
        return Conflict(f"VM '{name}' {what}", todo=f"see 'limosa vm show {name}'", vm=name, host=self._host)

    def _check_free(self, name: str, identity: str | None) -> None:
        for hosted in self._vms.values():
            if hosted.config.name == name or hosted.config.uuid == identity:
                same = "name" if hosted.config.name == name else "UUID"
                raise Conflict(
                    f"host '{self._host}' has a VM of that {same} already: '{hosted.config.name}'",
                    todo="choose another, or delete that VM",
                    vm=name,
                    host=self._host,
                )

    def _make_folder(self, config: VmConfig) -> None:
        try:
            passable(self._files.vm(config.name))
        except OSError as error:
            raise StateError(
                f"cannot make {self._files.vm(config.name)}", why=error.strerror or str(error), vm=config.name
            ) from error

    def _remove_folder(self, config: VmConfig) -> None:
        folder = self._files.vm(config.name)
        # The file that makes the VM ours goes first and durably: a crash halfway leaves rubbish, not half a VM.
        if (folder / "vm.toml").exists():
            os.unlink(folder / "vm.toml")
            toml.sync_folder(folder)
        shutil.rmtree(folder, ignore_errors=True)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
