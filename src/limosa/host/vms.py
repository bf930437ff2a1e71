"""The VMs of this host: what belongs to it, what runs, and what people do with them.

A VM belongs to this host if its folder has a ``vm.toml``. While its QEMU runs, ``process.json`` beside it says how to
find that process again; a daemon that starts takes up what still runs. One act at a time is done to a VM, and none
while it moves.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import msgspec

from limosa.background import Background, in_full
from limosa.errors import Conflict, LimosaError, NotFound, OwnerUnknown, QemuError, from_fault
from limosa.host.files import Files
from limosa.host.folders import Folders
from limosa.host.launching import Launcher
from limosa.model.vm import Accelerator, Disk, Vm, VmConfig, VmState
from limosa.qemu.machine import ATTACH_WITHIN_S, Machine
from limosa.qemu.process import image_in_use
from limosa.qemu.protocol import Event, RunState
from limosa.settings import toml
from limosa.wire.api import NewVm

#: Said of a VM that its daemon, or an earlier one, does not start again whatever ``on_crash`` says.
LEFT = "it is not restarted, because it crashed just after its start"
#: A QEMU that has sent its guest away, or is just doing so: in post-copy it stays so while the guest runs elsewhere.
_SENT = frozenset({RunState.FINISH_MIGRATE, RunState.POSTMIGRATE})


@dataclass
class HostedVm:
    """A VM of this host, or one that is landing here."""

    config: VmConfig
    state: VmState
    machine: Machine | None = None
    accelerator: Accelerator | None = None
    #: None also if it was started on another host
    started_at: float | None = None
    reason: str = ""
    #: the migration it is in
    migration: str | None = None
    #: its QEMU is being ended, or its guest has shut down: the end of the process is no crash
    ending: bool = False
    #: its QEMU runs and cannot be commanded; until that is mended nothing is done to the VM
    fault: LimosaError | None = None
    #: whatever journals say that cannot be read, it has not left: this daemon made it, or has seen its guest here
    is_here: bool = False
    #: how many acts that pause or resume its guest are under way
    steered: int = 0
    #: it is about to have a QEMU, and was given the memory for that
    starting: bool = False
    #: its QEMU ended while no daemon was there, and what ``on_crash`` says has not been done
    died: bool = False
    #: what stands in the way of its restart, while that is tried again and again
    awaits: LimosaError | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    #: held while the end of its QEMU is dealt with
    ended: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def accelerator_in_use(self) -> Accelerator:
        """What the running QEMU uses."""
        assert self.accelerator is not None
        return self.accelerator

    def stayed(self) -> None:
        """A move to another host has ended, and it is certain that the VM is here."""
        self.migration, self.is_here = None, True

    def has_ended(self, migration: str) -> None:
        """A migration has. It may be in another by now."""
        if self.migration == migration:
            self.migration = None

    @property
    def why(self) -> str:
        """Why it is in its state, for people; empty if that needs no words."""
        awaited = f"; it is restarted once this has passed: {self.awaits}" if self.awaits is not None else ""
        return self.reason + awaited

    @property
    def has_memory(self) -> bool:
        """Whether memory was given to it. A QEMU that cannot be commanded has it still."""
        has_qemu = self.machine is not None or self.fault is not None
        return has_qemu or self.starting or self.state is VmState.INCOMING


class Vms:
    """All of them, by name."""

    def __init__(self, host: str, files: Files, launcher: Launcher) -> None:
        self._host = host
        self._files = files
        self._launcher = launcher
        self._leasing = launcher.leasing
        self._records = launcher.records
        self._vms: dict[str, HostedVm] = {}
        self._folders = Folders(files)
        #: why it is not known of every VM here whether it has left; empty if it is
        self.doubt = ""
        self._background = Background()
        self._on_end: list[Callable[[HostedVm], Awaitable[None]]] = []

    def on_end(self, act: Callable[[HostedVm], Awaitable[None]]) -> None:
        """Have ``act`` called with each VM whose QEMU has ended, whatever ended it; if that was in a move, once more
        when the move has ended."""
        self._on_end.append(act)

    async def load(self) -> list[LimosaError]:
        """Read every ``vm.toml`` and take up the QEMUs that still run. Returns what could not be read or taken up."""
        configs = self._folders.read()
        self._vms = {config.name: HostedVm(config, VmState.STOPPED) for config in configs}
        # Side by side: one that does not answer is waited for, and there may be many.
        await asyncio.gather(*map(self._load, self._vms.values()))
        silent = [hosted.fault for hosted in self._vms.values() if hosted.fault is not None]
        return [*self._folders.damaged.values(), *silent]

    async def _load(self, hosted: HostedVm) -> None:
        try:
            await self.take_up(hosted)
        except LimosaError as error:
            hosted.fault, hosted.state, hosted.reason = _kept(error), VmState.CRASHED, str(error)

    async def take_up(self, hosted: HostedVm, *, died: VmState = VmState.CRASHED) -> None:
        """Attach to the QEMU that an earlier daemon started for the VM if it still runs; if it has ended unasked the VM
        is ``died``. Raises :class:`QemuError` if it does not answer."""
        found = await self._records.attach(hosted.config)
        if found is None:
            return
        hosted.accelerator, hosted.started_at = found.accelerator, found.started_at
        if found.machine is None:
            why = LEFT if found.left else "its QEMU ended while the host daemon was not running"
            hosted.state, hosted.reason = died, why
            hosted.died = died is VmState.CRASHED and not found.left
            return
        try:
            async with asyncio.timeout(ATTACH_WITHIN_S):
                status = await found.machine.status()
        except (QemuError, TimeoutError) as error:
            await found.machine.detach()  # QEMU speaks with one at a time, and is asked again
            raise QemuError(f"QEMU with pid {found.machine.pid} does not answer", why=str(error)) from error
        self._attach(hosted, found.machine)
        hosted.state = VmState.RUNNING if status is RunState.RUNNING else VmState.PAUSED
        hosted.is_here = status not in _SENT

    async def ask_again(self, hosted: HostedVm) -> None:
        """Take up a QEMU that did not answer, if it does now or has ended. Raises :class:`QemuError`."""
        await self.take_up(hosted)
        hosted.fault = None

    # Looking

    @property
    def damaged(self) -> Mapping[str, LimosaError]:
        """By name, the VMs whose file cannot be read, and why."""
        return self._folders.damaged

    def get(self, name: str) -> HostedVm:
        """The VM of that name. Raises :class:`NotFound`, or :class:`StateError` if its file is damaged."""
        hosted = self._vms.get(name)
        if hosted is None and name in self._folders.damaged:
            raise from_fault(self._folders.damaged[name].fault())
        if hosted is None:
            raise NotFound(
                f"host '{self._host}' has no VM '{name}'", todo="'limosa vm list' shows them", vm=name, host=self._host
            )
        return hosted

    def find(self, name: str) -> HostedVm | None:
        """The VM of that name, or None."""
        return self._vms.get(name)

    def is_taken(self, name: str) -> bool:
        """Whether there is a VM of that name, be it one whose file is damaged."""
        return name in self._vms or name in self._folders.damaged

    def all(self) -> list[HostedVm]:
        """All VMs, by name."""
        return [self._vms[name] for name in sorted(self._vms)]

    @property
    def is_unsure(self) -> bool:
        """Whether there may be VMs here of which nothing is known, so that it cannot be told what they use."""
        return bool(self._folders.damaged or self.doubt)

    def committed_mib(self) -> int:
        """Memory given to VMs that have a QEMU, or are about to."""
        return sum(vm.config.memory_mib for vm in self._vms.values() if vm.has_memory)

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
            reason=hosted.why,
        )

    def check_idle(self, hosted: HostedVm) -> None:
        """Raise :class:`Conflict` if the VM is in a migration or an act is being done to it.

        Raises what is wrong with the VM if it cannot be commanded at all.
        """
        if hosted.fault is not None:
            raise from_fault(hosted.fault.fault())
        if hosted.migration is not None or hosted.state is VmState.INCOMING:
            raise Conflict(
                f"VM '{hosted.config.name}' is in migration {hosted.migration}",
                todo=f"wait for it, or cancel it at its source: see 'limosa migration show {hosted.migration}'",
                vm=hosted.config.name,
                host=self._host,
            )
        if hosted.lock.locked():
            raise Conflict(
                f"VM '{hosted.config.name}' is being created, started or stopped",
                todo="try again in a moment",
                vm=hosted.config.name,
                host=self._host,
            )

    def check_movable(self, hosted: HostedVm) -> None:
        """As :meth:`check_idle`; also raises :class:`Conflict` while the VM is being paused or resumed: a move has to
        know how it is to arrive."""
        self.check_idle(hosted)
        if hosted.steered:
            raise Conflict(
                f"VM '{hosted.config.name}' is being paused or resumed",
                todo="try again in a moment",
                vm=hosted.config.name,
                host=self._host,
            )

    @contextmanager
    def _steering(self, hosted: HostedVm) -> Iterator[None]:
        """While QEMU is told to stop the guest or to go on. Not under the lock: a QEMU that is silent can be ended."""
        hosted.steered += 1
        try:
            yield
        finally:
            hosted.steered -= 1

    # What people do

    async def create(self, new: NewVm) -> HostedVm:
        """Pin what was left open, check, and make the VM durable. On failure nothing is kept."""
        self._check_free(new.name, new.uuid)
        created = HostedVm(await self._launcher.pin(new, str(uuid.uuid4())), VmState.STOPPED, is_here=True)
        self._check_free(new.name, created.config.uuid)
        self._vms[new.name] = created
        try:
            async with created.lock, self._launcher.new_disks(new, created.config):
                self._make_folder(created.config)
                try:
                    await in_full(self._folders.keep, created.config)
                except BaseException:
                    self._folders.remove(created.config)
                    raise
        except BaseException:
            del self._vms[new.name]
            raise
        return created

    async def start(self, hosted: HostedVm) -> None:
        """Start a stopped VM. On failure it is stopped, nothing runs, and nobody but the caller tries again."""
        self.check_idle(hosted)
        self.check_here(hosted)
        hosted.awaits = None
        async with hosted.lock:
            if hosted.machine is not None:
                raise self._wrong_state(hosted, "is started already")
            hosted.accelerator = self._launcher.accelerator(hosted.config)
            self._launcher.check_memory(hosted.config, self.committed_mib())
            hosted.starting = True
            try:
                machine = await self._launch(hosted, hosted.accelerator)
            finally:
                hosted.starting = False
            hosted.started_at = time.time()
            await machine.resume()

    async def _launch(self, hosted: HostedVm, accelerator: Accelerator) -> Machine:
        await self._launcher.claim_images(hosted.config)
        await self._leasing.take(hosted.config)
        try:
            machine = await self._launcher.launch(hosted.config, accelerator, incoming=False)
        except BaseException as error:
            await asyncio.shield(self._leasing.give_back(hosted.config))
            if isinstance(error, QemuError) and (image := image_in_use(error.why)):
                raise self._in_use(hosted, image) from error
            raise
        self._attach(hosted, machine)
        return machine

    async def stop(self, hosted: HostedVm) -> None:
        """Pull the plug. A VM that is to be restarted as soon as its storage is there is not any more."""
        self.check_idle(hosted)
        async with hosted.lock:
            if hosted.awaits is not None:
                await in_full(self._records.clean_up, hosted.config, crashed=False)
                hosted.state, hosted.reason, hosted.awaits = VmState.STOPPED, "", None
                return
            machine = self._running(hosted)
            hosted.ending = True
            await machine.quit()
            await self._after_end(hosted, machine)

    async def shutdown(self, hosted: HostedVm) -> None:
        """Press the power button; the guest decides what it does."""
        self.check_idle(hosted)
        await self._running(hosted).press_power_button()

    async def reset(self, hosted: HostedVm) -> None:
        """Press the reset button. A guest that is paused stays so."""
        self.check_idle(hosted)
        with self._steering(hosted):
            machine = self._running(hosted)
            if self.doubt and await machine.status() in _SENT:
                raise self._may_be_away(hosted)
            await machine.reset()

    async def pause(self, hosted: HostedVm) -> None:
        """Stop the guest's processors."""
        self.check_idle(hosted)
        with self._steering(hosted):
            await self._running(hosted).pause()

    async def resume(self, hosted: HostedVm) -> None:
        """Let a paused guest go on."""
        self.check_idle(hosted)
        machine = self._running(hosted)
        with self._steering(hosted):
            if self.doubt and await machine.status() in _SENT:
                raise self._may_be_away(hosted)
            await machine.resume_if_stopped()

    async def delete(self, hosted: HostedVm) -> None:
        """Forget a stopped VM. Its disks are kept, and nobody's."""
        self.check_idle(hosted)
        async with hosted.lock:
            if hosted.machine is not None:
                name = hosted.config.name
                raise Conflict(f"VM '{name}' runs", todo=f"limosa vm stop {name}", vm=name, host=self._host)
            await self._leasing.give_back(hosted.config)
            await in_full(self._folders.remove, hosted.config)
            del self._vms[hosted.config.name]

    # What migrations do

    def reserve(self, config: VmConfig, migration: str) -> HostedVm:
        """Hold name, UUID, memory and folder for a VM that is to land.

        Raises :class:`Conflict` or :class:`StateError`; nothing is held then.
        """
        self._check_free(config.name, config.uuid)
        self._launcher.check_memory(config, self.committed_mib())
        self._make_folder(config)
        hosted = HostedVm(config, VmState.INCOMING, migration=migration)
        self._vms[config.name] = hosted
        return hosted

    async def launch_incoming(self, hosted: HostedVm, accelerator: Accelerator, carried: dict[str, bytes]) -> Machine:
        """Start the QEMU of a VM that is to land, waiting for its state."""
        hosted.accelerator = accelerator
        machine = await self._launcher.launch(hosted.config, accelerator, incoming=True, carried=carried)
        self._attach(hosted, machine)
        return machine

    async def adopt(self, hosted: HostedVm, *, running: bool) -> None:
        """A VM that landed is this host's from now on, durably."""
        await in_full(self._folders.keep, hosted.config)
        hosted.is_here = True
        if hosted.machine is None:
            why = hosted.fault or "its QEMU ended just after it had landed"
            hosted.state, hosted.reason = VmState.CRASHED, str(why)
        else:
            hosted.state = VmState.RUNNING if running else VmState.PAUSED

    def landed(self, hosted: HostedVm, migration: str) -> None:
        """The move by which it came has ended. If its QEMU has too, that is seen to from now on."""
        hosted.has_ended(migration)
        if hosted.state is VmState.CRASHED and hosted.fault is None and not hosted.died:
            self._background.spawn(self._tell_of_end(hosted))

    async def discard(self, hosted: HostedVm) -> None:
        """Kill the QEMU of a VM that will not land, and give everything back."""
        await self._end(hosted)
        await in_full(self._folders.remove, hosted.config)
        if self._vms.get(hosted.config.name) is hosted:
            del self._vms[hosted.config.name]

    async def end_handed_over(self, hosted: HostedVm) -> None:
        """End the QEMU of a VM that runs elsewhere now."""
        await self._end(hosted)
        hosted.state = VmState.HANDED_OVER

    async def forget(self, hosted: HostedVm) -> None:
        """A VM that moved away: remove it from this host, durably. Its name stays taken until :meth:`free_name`."""
        await in_full(self._folders.remove, hosted.config)
        await in_full(toml.sync_folder, self._files.vms)

    def hold_name(self, config: VmConfig) -> HostedVm | None:
        """After a restart: keep the name of a VM that moved away taken, though nothing is left of it, until
        :meth:`free_name`. None if another has it."""
        if self.is_taken(config.name):
            return None
        hosted = self._vms[config.name] = HostedVm(config, VmState.HANDED_OVER)
        return hosted

    def free_name(self, hosted: HostedVm) -> None:
        """Nothing of a VM that moved away is left, and nobody will take one that comes back for it."""
        self._vms.pop(hosted.config.name, None)

    async def crashed(self, hosted: HostedVm) -> None:
        """The VM's QEMU died in a move, which has ended."""
        if hosted.machine is not None and hosted.machine.gone.is_set():
            await self._after_end(hosted, hosted.machine)
        await self._tell_of_end(hosted)

    async def change_disks(self, hosted: HostedVm, disks: tuple[Disk, ...]) -> None:
        """The VM uses these images from now on, durably. Raises :class:`StateError`; it does not then, but its file may
        say so until :meth:`keep_disks`."""
        config = msgspec.structs.replace(hosted.config, disks=disks)
        await in_full(self._folders.keep, config)
        hosted.config = config

    async def keep_disks(self, hosted: HostedVm) -> None:
        """After :meth:`change_disks` has failed: the VM uses the images that it did, durably. Raises
        :class:`StateError`."""
        await in_full(self._folders.keep_still, hosted.config)

    def find_landing(self, config: VmConfig, migration: str) -> HostedVm | None:
        """The VM that is landing here by that migration, if it is; by another it is none of its business."""
        hosted = self._vms.get(config.name)
        if hosted is None or hosted.migration != migration or hosted.state is not VmState.INCOMING:
            return None
        return hosted

    async def take_up_landing(self, config: VmConfig, migration: str) -> HostedVm:
        """After a restart: the VM that was landing by that migration, which had not become ours, with its QEMU if that
        runs. Its name is free."""
        hosted = self._vms[config.name] = HostedVm(config, VmState.INCOMING, migration=migration)
        try:
            await self.take_up(hosted, died=VmState.INCOMING)
        except QemuError as error:
            hosted.fault = _kept(error)
        hosted.state = VmState.INCOMING
        return hosted

    def seed_of(self, config: VmConfig) -> bytes | None:
        """The VM's cloud-init ISO, bit by bit as its guest knows it."""
        path = self._files.vm(config.name) / "seed.iso"
        return path.read_bytes() if config.cloud_init is not None else None

    # Below

    def _make_folder(self, config: VmConfig) -> None:
        self._records.forget_ended(config)
        self._folders.make(config)

    def _attach(self, hosted: HostedVm, machine: Machine) -> None:
        hosted.machine = machine
        hosted.ending = False
        hosted.reason = ""
        machine.on_event(lambda event: self._on_event(hosted, event))
        self._background.spawn(self._until_gone(hosted, machine))

    def _on_event(self, hosted: HostedVm, event: Event) -> None:
        if event.name == "SHUTDOWN":
            hosted.ending = True
            hosted.reason = "its guest shut down" if event.data.get("guest") else ""
        elif hosted.state is not VmState.INCOMING:
            if event.name == "RESUME":
                hosted.state, hosted.reason = VmState.RUNNING, ""
                hosted.is_here = True
            elif event.name == "STOP":
                hosted.state = VmState.PAUSED

    async def _until_gone(self, hosted: HostedVm, machine: Machine) -> None:
        await machine.gone.wait()
        if hosted.machine is not machine:
            return
        await self._after_end(hosted, machine)
        await self._tell_of_end(hosted)

    async def _tell_of_end(self, hosted: HostedVm) -> None:
        for act in self._on_end:
            await act(hosted)

    async def _after_end(self, hosted: HostedVm, machine: Machine) -> None:
        """What holds once the process is gone. Idempotent: the watcher and whoever ended it both come here, and go on
        when all of it is done."""
        async with hosted.ended:
            if hosted.machine is machine:
                await self._settle_end(hosted, machine)
                hosted.machine = None  # last of all: it could be started again, and its leases given back after that

    async def _settle_end(self, hosted: HostedVm, machine: Machine) -> None:
        await in_full(self._records.clean_up, hosted.config, crashed=not hosted.ending)
        if hosted.state is VmState.INCOMING:
            return
        if hosted.ending:
            hosted.state = VmState.STOPPED
        else:
            hosted.state, hosted.reason = VmState.CRASHED, machine.exit_text() or "its QEMU ended"
        await self._leasing.give_back(hosted.config)

    async def _end(self, hosted: HostedVm) -> None:
        machine = hosted.machine
        if machine is not None:
            hosted.ending = True
            await machine.kill()
            await self._after_end(hosted, machine)
        elif hosted.fault is not None:
            await self._records.end_silent(hosted.config)

    def _running(self, hosted: HostedVm) -> Machine:
        if hosted.machine is None:
            raise self._wrong_state(hosted, f"is {hosted.state}")
        return hosted.machine

    def _in_use(self, hosted: HostedVm, image: str) -> Conflict:
        """Why a VM is not started one of whose images another process has locked."""
        others = (one for one in self._vms.values() if one is not hosted and one.has_memory)
        user = next((one.config.name for one in others if any(disk.path == image for disk in one.config.disks)), "")
        return Conflict(
            f"VM '{hosted.config.name}' cannot be started: image {image} is in use",
            why=f"VM '{user}' has it as a disk" if user else "a VM of another host, or another program, has it open",
            todo=f"stop '{user}', or give each VM a disk of its own" if user else "stop that",
            vm=hosted.config.name,
            host=self._host,
        )

    def _wrong_state(self, hosted: HostedVm, what: str) -> Conflict:
        name = hosted.config.name
        return Conflict(f"VM '{name}' {what}", todo=f"see 'limosa vm show {name}'", vm=name, host=self._host)

    def check_here(self, hosted: HostedVm) -> None:
        """Raise :class:`OwnerUnknown` if a journal that cannot be read may say that the VM has left."""
        if self.doubt and not hosted.is_here:
            raise self._may_be_away(hosted)

    def _may_be_away(self, hosted: HostedVm) -> OwnerUnknown:
        return OwnerUnknown(
            f"VM '{hosted.config.name}' may have been sent to another host, and run there",
            why=self.doubt,
            todo="see docs/recovery.md; restart the daemon when the journal is fixed or moved away",
            vm=hosted.config.name,
            host=self._host,
        )

    def _check_free(self, name: str, identity: str | None) -> None:
        if name in self._folders.damaged:
            raise Conflict(
                f"host '{self._host}' has a VM of that name already: '{name}'",
                why=str(self._folders.damaged[name]),
                todo="fix its file and restart the daemon, or choose another name",
                vm=name,
                host=self._host,
            )
        for hosted in self._vms.values():
            if hosted.config.name == name or hosted.config.uuid == identity:
                same = "name" if hosted.config.name == name else "UUID"
                raise Conflict(
                    f"host '{self._host}' has a VM of that {same} already: '{hosted.config.name}'",
                    todo="choose another, or delete that VM",
                    vm=name,
                    host=self._host,
                )


def _kept(error: LimosaError) -> LimosaError:
    """The error to keep for long: its traceback would hold on to all that was under way, such as sockets."""
    return from_fault(error.fault())
