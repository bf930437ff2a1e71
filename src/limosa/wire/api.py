"""Bodies of the HTTP API that are not nouns of ``model`` already."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta

from limosa.model.base import AbsolutePath, Mac, Model, Name, SwitchName, Uuid, is_clean_path
from limosa.model.finding import Finding
from limosa.model.migration import Migration, Side
from limosa.model.network import HostNetwork
from limosa.model.route import Route
from limosa.model.storage import Chain, DiskPlan, ImageSought, ImageUse, LayerPlan, Leftover, Location, Sighting
from limosa.model.vm import (
    CloudInit,
    CpuModel,
    Cpus,
    DirectBoot,
    DiskBytes,
    DiskFormat,
    DiskName,
    Firmware,
    HostDevice,
    MachineType,
    MemoryMib,
    Rng,
    Vm,
)
from limosa.settings.host import HostSettings, Transport


class Empty(Model, frozen=True):
    """No body."""


class NewDisk(Model, frozen=True, omit_defaults=True):
    """A disk to give to a new VM. The image must exist, unless ``size_mib`` asks for a new one."""

    path: AbsolutePath
    name: DiskName | None = None
    format: DiskFormat | None = None
    read_only: bool = False
    size_mib: Annotated[int, Meta(ge=1, le=64 * 1024 * 1024)] | None = None
    #: of an image that exists: what of it the guest sees
    size_bytes: DiskBytes | None = None
    #: it keeps all its space; a new one takes it at once
    thick: bool = False

    def __post_init__(self) -> None:
        if not is_clean_path(self.path):
            raise ValueError("the path has an empty, '.' or '..' component")
        if self.size_mib is not None and self.size_bytes is not None:
            raise ValueError("size_mib is for a new image, size_bytes for one that exists")


class NewNic(Model, frozen=True):
    """A network card to give to a new VM; without ``mac`` one is made."""

    switch: SwitchName
    mac: Mac | None = None


class NewVm(Model, frozen=True):
    """A VM to create. What is not said is chosen once, at creation, and then fixed in its ``vm.toml``."""

    name: Name
    memory_mib: MemoryMib
    uuid: Uuid | None = None
    cpus: Cpus = 1
    machine: MachineType | None = None
    cpu: CpuModel = "x86-64-v2"
    accelerator: Literal["auto", "kvm", "tcg"] = "auto"
    firmware: Firmware = "bios"
    boot: DirectBoot | None = None
    disks: Annotated[tuple[NewDisk, ...], Meta(max_length=26)] = ()
    nics: Annotated[tuple[NewNic, ...], Meta(max_length=8)] = ()
    cloud_init: CloudInit | None = None
    host_devices: Annotated[tuple[HostDevice, ...], Meta(max_length=8)] = ()
    rng: Rng = False
    on_crash: Literal["stop", "restart"] = "stop"


class VmList(Model, forbid_unknown_fields=False, frozen=True):
    """All VMs of a host, by name."""

    vms: tuple[Vm, ...]


class HostStatus(Model, forbid_unknown_fields=False, frozen=True):
    """A host as it sees itself."""

    name: Name
    limosa: str
    #: oldest and newest version of the peer protocol it speaks
    protocol: tuple[int, int]
    qemu: str
    accelerator: str
    cpus: int
    memory_total_mib: int
    memory_available_mib: int
    switches: tuple[str, ...]
    addresses: tuple[str, ...]
    vms: int
    outgoing: int
    incoming: int
    time: float
    network: HostNetwork = HostNetwork()
    #: the end of its certificate, seconds since the epoch; null if it has none, or does not say
    certificate_until: float | None = None


class Advice(Model, forbid_unknown_fields=False, frozen=True):
    """Which transport suits the NICs of a host, why, and what is misconfigured."""

    name: Name
    transport: str
    why: str
    findings: tuple[Finding, ...]


class MoveOptions(Model, frozen=True):
    """What one move may do otherwise than the host's settings say."""

    transport: Transport | None = None
    bandwidth_mbit_per_s: Annotated[int, Meta(ge=0, le=1_000_000)] | None = None
    blackout_budget_ms: Annotated[float, Meta(ge=1, le=2000)] | None = None
    post_copy: bool | None = None
    rdma_pin_all: bool | None = None
    #: which location of the destination a disk is to be copied to, by the disk's name
    storage: dict[DiskName, Name] = {}
    #: of disks that are copied: whether the files below them stay files below them
    chain: Chain = "keep"
    #: keep the images the VM leaves behind
    keep: bool = False


class CheckRequest(Model, frozen=True):
    """Ask the source whether a VM could move."""

    vm: Name
    destination: Annotated[str, Meta(pattern=r"\A[A-Za-z0-9._:\[\]-]{1,255}\Z", description="host name or address")]
    options: MoveOptions = MoveOptions()


class MoveRequest(CheckRequest, frozen=True):
    """Ask the source to move a VM."""


class Expected(Model, forbid_unknown_fields=False, frozen=True):
    """What a move is expected to cost if nothing else uses its way and the guest writes nothing meanwhile."""

    #: of disks, and of files below them
    disk_bytes: int
    #: what the VM has touched of its memory, or all of it where that is not known
    memory_bytes: int
    #: of all paths together, as far as caps allow, on an average of what is sent; null if the speed of a path is not
    #: known, and so not how long it takes
    mbit_per_s: int | None
    seconds: float | None
    #: the blackout that is planned for memory, and the longest the policy may come to plan for; devices add to both
    first_downtime_ms: float
    blackout_budget_ms: float
    #: after that the guest may run at the destination before its memory is there: that is allowed, and possible
    post_copy: bool = False


class CheckReport(Model, forbid_unknown_fields=False, frozen=True):
    """Everything that stands against a move, all at once; ``possible`` if nothing of it is an error."""

    vm: Name
    source: Name
    destination: str
    possible: bool
    findings: tuple[Finding, ...]
    #: the way the move would take; null if the destination could not be asked
    route: Route | None = None
    #: what would become of each disk
    disks: tuple[DiskPlan, ...] = ()
    #: files below them that would be sent too
    layers: tuple[LayerPlan, ...] = ()
    #: null if the destination could not be asked
    expected: Expected | None = None


class DiskMoveRequest(Model, frozen=True):
    """Ask for disks of a VM to be moved to another location of its host; no names: all that are not there."""

    vm: Name
    location: Name
    disks: Annotated[tuple[DiskName, ...], Meta(max_length=26)] = ()
    #: null: as it is
    format: DiskFormat | None = None
    #: take all the space at once
    thick: bool = False
    #: whether the files below an overlay stay below it; not where a format is asked for that has none below, or thick
    chain: Chain = "keep"
    #: keep the old images
    keep: bool = False
    bandwidth_mbit_per_s: Annotated[int, Meta(ge=0, le=1_000_000)] | None = None


class LocationList(Model, forbid_unknown_fields=False, frozen=True):
    """The locations of a host, by name."""

    locations: tuple[Location, ...]


class SightingList(Model, forbid_unknown_fields=False, frozen=True):
    """Which other hosts see which locations; and why some hosts that are known could not be asked, by name."""

    sightings: tuple[Sighting, ...]
    silent: dict[Name, str] = {}


class LeftoverList(Model, forbid_unknown_fields=False, frozen=True):
    """Images with names that moves gave them and that nothing on the host names, by path."""

    leftovers: tuple[Leftover, ...]


class CleanRequest(Model, frozen=True):
    """Remove these images, or with no paths all that may be removed."""

    paths: Annotated[tuple[AbsolutePath, ...], Meta(max_length=4096)] = ()


class CleanReport(Model, forbid_unknown_fields=False, frozen=True):
    """What was removed, and what stayed after all; the doubts of those say why."""

    removed: tuple[Leftover, ...]
    kept: tuple[Leftover, ...] = ()


class ImagesSought(Model, frozen=True):
    """A host asks another about images that both may see."""

    images: Annotated[tuple[ImageSought, ...], Meta(max_length=4096)]


class ImageUses(Model, forbid_unknown_fields=False, frozen=True):
    """The answer to :class:`ImagesSought`, in its order."""

    uses: tuple[ImageUse, ...]


class MigrationList(Model, forbid_unknown_fields=False, frozen=True):
    """Moves of a host, newest first."""

    migrations: tuple[Migration, ...]


class LimitRequest(Model, frozen=True):
    """A cap for a move that is under way; 0: none of its own."""

    bandwidth_mbit_per_s: Annotated[int, Meta(ge=0, le=1_000_000)]


class ReleaseRequest(Model, frozen=True):
    """A person's word: host ``dead`` does not run a VM on the image, and will not."""

    image: AbsolutePath
    dead: Name


class ResolveRequest(Model, frozen=True):
    """A person's word on who owns a VM whose owner nobody can know."""

    owner: Side


class SettingsPage(Model, forbid_unknown_fields=False, frozen=True):
    """The settings of a host."""

    settings: HostSettings


class SettingsChange(Model, frozen=True):
    """New values by field name (``convergence.post_copy`` for nested ones); null puts the default back."""

    values: dict[Annotated[str, Meta(max_length=128)], Any]
