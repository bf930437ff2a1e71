"""A virtual machine: what it is made of (durable) and what it does at the moment (observed)."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from msgspec import Meta, structs

from limosa.model.base import AbsolutePath, Mac, Model, Name, SwitchName, Uuid, is_clean_path

DiskFormat = Literal["qcow2", "raw"]
Firmware = Literal["bios", "uefi"]
Accelerator = Literal["kvm", "tcg"]

DiskName = Annotated[str, Meta(pattern=r"\Avd[a-z]\Z", description="vda to vdz")]
DiskBytes = Annotated[int, Meta(ge=512, multiple_of=512)]
MachineType = Annotated[str, Meta(pattern=r"\A[a-z0-9][a-z0-9._+-]{0,63}\Z", description="e.g. pc-q35-10.0")]
CpuModel = Annotated[
    str,
    Meta(
        pattern=r"\A[A-Za-z0-9][A-Za-z0-9_.-]{0,63}(,[+-][a-z0-9_.-]{1,32}){0,64}\Z",
        description="a QEMU CPU model with +feature/-feature, or x86-64-v2 / x86-64-v3 for a portable baseline",
    ),
]
MemoryMib = Annotated[int, Meta(ge=16, le=16 * 1024 * 1024, description="guest memory in MiB")]
Cpus = Annotated[int, Meta(ge=1, le=255, description="virtual processors; more need an IOMMU")]
Text = Annotated[str, Meta(max_length=512 * 1024)]


class Disk(Model, frozen=True, omit_defaults=True):
    """One virtio disk of a VM."""

    name: DiskName
    path: AbsolutePath
    format: DiskFormat
    read_only: bool = False
    #: of a block device that is larger than the disk: what of it the guest sees
    size_bytes: DiskBytes | None = None
    #: its image keeps all its space, whatever the guest discards
    thick: bool = False

    def __post_init__(self) -> None:
        if not is_clean_path(self.path):
            raise ValueError("the path has an empty, '.' or '..' component")


class Nic(Model, frozen=True):
    """One virtio network card, plugged into the virtual switch of that name on whichever host the VM is."""

    switch: SwitchName
    mac: Mac


class DirectBoot(Model, frozen=True):
    """Boot a kernel from host files, without firmware or boot loader."""

    kernel: AbsolutePath
    initrd: AbsolutePath | None = None
    command_line: Annotated[str, Meta(pattern=r"\A[\x20-\x7e]*\Z", max_length=4096)] = ""

    def paths(self) -> tuple[str, ...]:
        """The host files that are needed."""
        return (self.kernel,) if self.initrd is None else (self.kernel, self.initrd)


class CloudInit(Model, frozen=True):
    """Contents of a NoCloud seed, shown to the guest as a read-only CD-ROM labelled ``cidata``."""

    user_data: Text
    meta_data: Text = ""
    network_config: Text = ""


class HostDevice(Model, frozen=True):
    """A device of the host handed to the guest. A VM that has one cannot move; preflight says so."""

    kind: Literal["pci", "usb"]
    address: Annotated[
        str,
        Meta(
            pattern=r"\A([0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]|[0-9a-f]{4}:[0-9a-f]{4})\Z",
            description="PCI domain:bus:slot.function or USB vendor:product",
        ),
    ]


Rng = Annotated[bool, Meta(description="a source of random numbers, for guests whose processor has none (rdrand)")]


class VmConfig(Model, frozen=True):
    """The durable form of a VM (``vm.toml``): everything a host needs to run it, with nothing left to defaults.

    The machine type is pinned to a version at creation, because an unversioned one would mean another machine on a
    host with another QEMU.
    """

    name: Name
    uuid: Uuid
    memory_mib: MemoryMib
    cpus: Cpus
    machine: MachineType
    cpu: CpuModel
    accelerator: Literal["auto", "kvm", "tcg"] = "auto"
    firmware: Firmware = "bios"
    boot: DirectBoot | None = None
    disks: Annotated[tuple[Disk, ...], Meta(max_length=26)] = ()
    nics: Annotated[tuple[Nic, ...], Meta(max_length=8)] = ()
    cloud_init: CloudInit | None = None
    host_devices: Annotated[tuple[HostDevice, ...], Meta(max_length=8)] = ()
    rng: Rng = False
    on_crash: Literal["stop", "restart"] = "stop"

    def __post_init__(self) -> None:
        for what, values in (
            ("disk name", [disk.name for disk in self.disks]),
            ("disk path", [disk.path for disk in self.disks]),
            ("MAC address", [nic.mac for nic in self.nics]),
        ):
            if len(set(values)) != len(values):
                raise ValueError(f"the same {what} occurs twice")
        if self.boot is not None and self.firmware == "uefi":
            raise ValueError("direct kernel boot needs firmware = 'bios'")

    def host_files(self) -> tuple[str, ...]:
        """Paths that must be the same files on every host the VM runs on: disks, kernel, initrd."""
        boot = self.boot.paths() if self.boot else ()
        return tuple(disk.path for disk in self.disks) + boot


class VmState(StrEnum):
    """What a VM does at the moment on this host."""

    STOPPED = "stopped"
    RUNNING = "running"
    PAUSED = "paused"
    #: its QEMU ended without being asked to
    CRASHED = "crashed"
    #: a destination's QEMU that waits for, or has, the state of a VM it does not own yet
    INCOMING = "incoming"
    #: stopped at the source because the destination has, or may have, taken it over
    HANDED_OVER = "handed-over"


class Vm(Model, forbid_unknown_fields=False, frozen=True):
    """A VM as its host sees it now. Clients tolerate fields of newer hosts."""

    config: VmConfig
    state: VmState
    host: Name
    accelerator: Accelerator | None = None
    pid: int | None = None
    started_at: float | None = None
    vnc_socket: str | None = None
    migration: str | None = None
    #: why it is in this state, where that needs words
    reason: str = ""
    #: fields of ``config`` whose contents are not for whoever asked, and are empty
    withheld: tuple[str, ...] = ()

    def for_viewers(self) -> Vm:
        """Without what the guest was given in confidence: cloud-init has passwords, tokens and keys."""
        if self.config.cloud_init is None:
            return self
        config = structs.replace(self.config, cloud_init=CloudInit(user_data=""))
        return structs.replace(self, config=config, withheld=("cloud_init",))
