"""What it takes to define a VM and to start its QEMU on this host: disks, taps, seed, firmware, rights.

Everything that one QEMU is given is made here and ends with it: taps live as long as a process holds them, sockets lie
in the VM's run folder. A launch that fails leaves nothing.
"""

from __future__ import annotations

import os
import pwd
import secrets
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, closing, suppress
from pathlib import Path

import msgspec

from limosa.background import apart, in_full
from limosa.errors import Conflict, InvalidInput, QemuError, StorageError
from limosa.host.files import Files
from limosa.host.leasing import Leasing
from limosa.host.memory import available_mib
from limosa.host.page import Page
from limosa.host.process_records import ProcessRecords
from limosa.host.storage import places
from limosa.model.units import MIB
from limosa.model.vm import Accelerator, Disk, Nic, VmConfig
from limosa.network.netlink import Netlink
from limosa.network.taps import open_tap
from limosa.qemu.arguments import Launch
from limosa.qemu.capabilities import QemuCapabilities
from limosa.qemu.copier import Copier
from limosa.qemu.machine import Machine, does_direct_io
from limosa.qemu.protocol import ImageFile
from limosa.settings import toml
from limosa.settings.daemon import DaemonSettings
from limosa.storage import access, chains, images, mounts, seed
from limosa.storage.locations import Locations
from limosa.storage.stores import Store
from limosa.wire.api import NewDisk, NewNic, NewVm

DISK_NAMES = [f"vd{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]


class Launcher:
    """Starts QEMUs on this host."""

    def __init__(
        self,
        daemon: DaemonSettings,
        page: Page,
        files: Files,
        capabilities: QemuCapabilities,
        netlink: Netlink,
        user: str | None,
        leasing: Leasing,
        records: ProcessRecords,
    ) -> None:
        self.leasing = leasing
        self.records = records
        self._daemon = daemon
        self._page = page
        self._files = files
        self._capabilities = capabilities
        self._netlink = netlink
        self.user = user
        #: never a VM's disk, whatever anybody names
        self._own = (*files.own, Path(daemon.certificates))

    # Definitions

    async def pin(self, new: NewVm, identity: str) -> VmConfig:
        """The durable form of a new VM: what was left open is chosen now, once. Raises :class:`InvalidInput`."""
        raw = msgspec.to_builtins(new)
        raw["uuid"] = new.uuid or identity
        raw["machine"] = new.machine or self._capabilities.default_machine
        raw["disks"] = [msgspec.to_builtins(disk) for disk in await self._pin_disks(new)]
        raw["nics"] = [msgspec.to_builtins(_pin_nic(nic)) for nic in new.nics]
        config = toml.convert(raw, VmConfig, where=f"VM '{new.name}'")
        if not self._capabilities.knows_machine(config.machine):
            raise InvalidInput(
                f"QEMU on this host does not know the machine type {config.machine}",
                todo=f"leave it out for {self._capabilities.default_machine}",
                vm=new.name,
            )
        self._check_cpu(config)
        return config

    @asynccontextmanager
    async def new_disks(self, new: NewVm, config: VmConfig) -> AsyncIterator[None]:
        """Create the images that were asked for with a size; remove them again if they, or what follows, fail.

        Raises :class:`StorageError` also if QEMU's user may not open one of the VM's files.
        """
        async with AsyncExitStack() as made:
            for asked, disk in zip(new.disks, config.disks, strict=True):
                if asked.size_mib is not None:
                    store = self._store_of(disk.path)
                    await store.create(disk.path, disk.format, asked.size_mib * MIB, thick=disk.thick)
                    made.push_async_callback(in_full, store.remove, disk.path)
                    await in_full(access.give_new, Path(disk.path), self.user, self._own)
            await apart(self._check_access, config)
            yield
            made.pop_all()

    def accelerator(self, config: VmConfig) -> Accelerator:
        """What the VM will run with. Raises :class:`QemuError` if this host does not offer it."""
        offered = self._capabilities.accelerators
        if config.accelerator == "auto":
            return "kvm" if "kvm" in offered else "tcg"
        if config.accelerator not in offered:
            raise QemuError(
                f"this host does not offer {config.accelerator}",
                todo="load the kvm module, or create the VM with accelerator 'auto'",
                vm=config.name,
            )
        return config.accelerator

    def check_memory(self, config: VmConfig, committed_mib: int) -> None:
        """Raise :class:`Conflict` if the host has no room for the VM."""
        free = available_mib(self._page.now.reserved_memory_mib, committed_mib)
        if free < config.memory_mib:
            raise Conflict(
                f"VM '{config.name}' needs {config.memory_mib} MiB of memory and host '{self._daemon.name}' has {free}",
                todo="stop or move another VM, or give this one less memory",
                vm=config.name,
                host=self._daemon.name,
            )

    async def claim_images(self, config: VmConfig) -> None:
        """Before a QEMU is started: images that were found are a VM's from now on, and no leftovers of a move.

        Raises :class:`Conflict` if one is being removed as such, and :class:`StorageError`, also if a disk's is not
        there: if it came after its lease had been asked for, it would be written without one.
        """
        await apart(_claim_images, config, places(self._page, self._files))

    # Processes

    async def launch(
        self, config: VmConfig, accelerator: Accelerator, *, incoming: bool, carried: dict[str, bytes] | None = None
    ) -> Machine:
        """Start the VM's QEMU, paused. ``carried`` are files that came with it from the source, by name."""
        folder = self._files.vm(config.name)
        if self._files.sockets(config).exists():
            await self.end_copier(config)  # of which nobody has a record
        await in_full(self._grant, config)
        vars_file = await in_full(self._firmware, config, folder)
        seed_file = await in_full(self._seed, config, folder, carried or {})
        unlocked = await apart(_unlocked, config)
        with ExitStack() as held:
            taps = [held.enter_context(closing(await open_tap(self._netlink, nic.switch))) for nic in config.nics]
            run_dir = self._files.sockets(config)

            def make(qmp_fd: int, console_fd: int) -> Launch:
                return Launch(
                    config=config,
                    accelerator=accelerator,
                    incoming=incoming,
                    tap_fds=tuple(tap.fd for tap in taps),
                    qmp_fd=qmp_fd,
                    console_fd=console_fd,
                    console_log=folder / "console.log",
                    vnc_socket=run_dir / "vnc.sock",
                    firmware_code=Path(self._daemon.firmware_code) if vars_file else None,
                    firmware_vars=vars_file,
                    seed=seed_file,
                    unlocked=unlocked,
                )

            program = Path(self._daemon.qemu)
            machine = await Machine.launch(program, make, run_dir, folder / "qemu.log", self.user)
        try:
            await in_full(self.records.remember, config, machine, accelerator, incoming=incoming)
        except BaseException:
            await machine.kill()
            await in_full(self.records.clean_up, config, crashed=False)
            raise
        return machine

    async def launch_copier(self, config: VmConfig) -> Copier:
        """Start a QEMU without a guest that reads the disks of a VM which does not run. Raises as :meth:`launch`."""
        await in_full(self._grant, config)
        opened = await apart(lambda: {disk.name: _image_file(disk) for disk in config.disks})
        log = self._files.vm(config.name) / "qemu-disks.log"
        return await Copier.launch(Path(self._daemon.qemu), opened, self._files.sockets(config), log, self.user)

    async def end_copier(self, config: VmConfig) -> None:
        """End the one of a VM, also one that an earlier daemon started. Raises :class:`QemuError` if the kernel cannot
        end it."""
        await Copier.end_leftover(self._files.sockets(config))

    def _check_access(self, config: VmConfig) -> None:
        """Raise what :meth:`_grant` would. What is not there may be on storage that is mounted later."""
        for path, read_only in _files(config, _known_below):
            if os.path.exists(path):
                access.grant(path, self.user, read_only=read_only, own=self._own, only_look=True)

    def _grant(self, config: VmConfig) -> None:
        for path, read_only in _files(config, _below):
            access.grant(path, self.user, read_only=read_only, own=self._own)

    def _firmware(self, config: VmConfig, folder: Path) -> Path | None:
        if config.firmware != "uefi":
            return None
        own = folder / "nvram.fd"
        if not own.exists():
            try:
                template = Path(self._daemon.firmware_vars).read_bytes()
            except OSError as error:
                raise QemuError(
                    "the UEFI firmware is missing",
                    why=str(error),
                    todo="install the package ovmf",
                    vm=config.name,
                ) from error
            toml.write_atomically(own, template)
        self._give(own)
        return own

    def _seed(self, config: VmConfig, folder: Path, carried: dict[str, bytes]) -> Path | None:
        if config.cloud_init is None:
            return None
        own = folder / "seed.iso"
        if "seed.iso" in carried:
            toml.write_atomically(own, carried["seed.iso"])
        elif not own.exists():
            toml.write_atomically(own, seed.make(config.cloud_init, instance=config.uuid, host_name=config.name))
        self._give(own)
        return own

    def _give(self, path: Path) -> None:
        path.chmod(0o600)
        if self.user is not None:
            entry = pwd.getpwnam(self.user)
            os.chown(path, entry.pw_uid, entry.pw_gid)

    async def _pin_disks(self, new: NewVm) -> list[Disk]:
        free = iter([name for name in DISK_NAMES if name not in {disk.name for disk in new.disks}])
        return [await self._pin_disk(disk, disk.name or next(free)) for disk in new.disks]

    async def _pin_disk(self, disk: NewDisk, name: str) -> Disk:
        pinned = Disk(
            name=name,
            path=disk.path,
            format=disk.format or "qcow2",
            read_only=disk.read_only,
            size_bytes=disk.size_bytes,
            thick=disk.thick,
        )
        if disk.size_mib is None:
            known = disk.format or await images.detect_format(Path(disk.path))
            return msgspec.structs.replace(pinned, format=known)
        if self._store_of(disk.path).kind == "lvm":
            return msgspec.structs.replace(pinned, format=disk.format or "raw", size_bytes=disk.size_mib * MIB)
        return pinned

    def _store_of(self, path: str) -> Store:
        return places(self._page, self._files).store_of(path)

    def _check_cpu(self, config: VmConfig) -> None:
        known, missing = self._capabilities.supports(config.cpu, self.accelerator(config))
        if not known or missing:
            raise InvalidInput(
                f"this host does not offer the CPU model {config.cpu}",
                why=f"it lacks {', '.join(missing)}" if missing else "QEMU does not know it",
                todo="use x86-64-v2",
                vm=config.name,
            )


def qemu_user(wanted: str) -> str | None:
    """The user QEMU runs as: ``wanted`` if we are root, who may choose. None: our own.

    Raises :class:`InvalidInput` if there is no such user: guests must not be root's because of a typing error.
    """
    if os.geteuid() != 0:
        return None
    try:
        entry = pwd.getpwnam(wanted)
    except KeyError:
        raise InvalidInput(
            f"there is no user '{wanted}' for QEMU to run as",
            todo="'scripts/setup --host' makes limosa-qemu, the default; or name another as qemu_user in host.toml: "
            "'root' gives all guests' QEMUs the rights of root",
        ) from None
    return wanted if entry.pw_uid != 0 else None


def _image_file(disk: Disk) -> ImageFile:
    return ImageFile(
        disk.path,
        disk.format,
        direct=does_direct_io(disk.path),
        locks=not mounts.of(disk.path).has_no_locks,
        device=Path(disk.path).is_block_device(),
        size_bytes=disk.size_bytes,
    )


def _unlocked(config: VmConfig) -> frozenset[str]:
    """Images whose locks do not reach other hosts."""
    return frozenset(disk.path for disk in config.disks if mounts.of(disk.path).has_no_locks)


def _pin_nic(nic: NewNic) -> Nic:
    # 52:54:00 is the prefix that QEMU and libvirt use for guests.
    made = "52:54:00:" + ":".join(f"{byte:02x}" for byte in secrets.token_bytes(3))
    return Nic(switch=nic.switch, mac=nic.mac or made)


def _files(config: VmConfig, below: Callable[[Disk], Iterable[str]]) -> Iterator[tuple[Path, bool]]:
    """What QEMU opens for a VM, and whether it only reads that; ``below`` gives what lies below a disk."""
    for disk in config.disks:
        yield Path(disk.path), disk.read_only
        for path in below(disk):
            yield Path(path), True
    for path in config.boot.paths() if config.boot else ():
        yield Path(path), True


def _below(disk: Disk) -> list[str]:
    return [path for path, _ in chains.below(disk.path, disk.format)]


def _known_below(disk: Disk) -> list[str]:
    with suppress(StorageError):  # what cannot be read the launch tells
        return _below(disk)
    return []


def _claim_images(config: VmConfig, locations: Locations) -> None:
    for disk in config.disks:
        access.status_of(Path(disk.path))
        for path in (disk.path, *_known_below(disk)):
            locations.claim(path)
