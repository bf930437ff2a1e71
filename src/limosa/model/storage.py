"""Where disks lie and how they move: locations, what there is to know about an image, the plan for each disk."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from msgspec import Meta

from limosa.model.base import AbsolutePath, MigrationId, Model, Name, is_clean_path
from limosa.model.vm import DiskFormat, DiskName

Bytes = Annotated[int, Meta(ge=0)]

#: What becomes of the files below a disk that is copied: they stay files below it, or one new image holds everything.
Chain = Literal["keep", "flatten"]

#: The location every host has: a folder of its state.
OWN_LOCATION = "images"


LocationKind = Literal["folder", "lvm"]

VolumeGroup = Annotated[
    str,
    Meta(
        pattern=r"\A[A-Za-z0-9_][A-Za-z0-9_+.-]{0,62}(/[A-Za-z0-9_][A-Za-z0-9_+.-]{0,62})?\Z",
        description="an LVM volume group, or one of its thin pools: GROUP or GROUP/POOL",
    ),
]


class Place(Model, frozen=True, omit_defaults=True):
    """A location as its administrator names it: a folder, and whether other hosts see the same files below theirs; or
    a volume group of this host."""

    path: AbsolutePath | None = None
    lvm: VolumeGroup | None = None
    shared: bool = False

    def __post_init__(self) -> None:
        if (self.path is None) is (self.lvm is None):
            raise ValueError("a location is a folder (path) or a volume group (lvm)")
        if self.lvm is not None and self.shared:
            raise ValueError("a volume group is one host's: it cannot be shared")
        if self.path is not None and not is_clean_path(self.path):
            raise ValueError("the path has an empty, '.' or '..' component")

    @property
    def root(self) -> str:
        """The folder below which its images have their paths."""
        return self.path or f"/dev/{(self.lvm or '').partition('/')[0]}"


class Location(Model, forbid_unknown_fields=False, frozen=True):
    """A location as its host sees it now. ``fault`` says why it cannot be used, where it cannot."""

    name: Name
    path: str
    #: an image in a folder is a file, one in a volume group (``lvm``) a logical volume, which is raw
    kind: LocationKind = "folder"
    #: of ``lvm``: volumes take space only as they are written
    thin: bool = False
    #: space is given in pieces of this size
    unit_bytes: Annotated[int, Meta(ge=1)] = 1
    #: file system type, and what was mounted: a server and path, or a device; of ``lvm``, the group and pool
    file_system: str = ""
    source: str = ""
    #: on a share: what the folder is called wherever the share is mounted, such as ``nas:/export/vms``
    share: str = ""
    #: other hosts see the same files: the administrator says so, or it is a network file system
    shared: bool = False
    #: new images go here unless another location is asked for
    default: bool = False
    #: ``ssd``, ``disk``, ``network`` or ``memory``; empty if the kernel does not tell
    speed: str = ""
    total_bytes: Bytes = 0
    #: what a new image may take: copies under way have their share taken off
    free_bytes: Bytes = 0
    fault: str = ""

    def lacks(self, count: int) -> bool:
        """Whether so many bytes do not fit. A file system that does not say how large it is has room."""
        return bool(self.fault) or (self.total_bytes > 0 and self.free_bytes < count)


class Sighting(Model, forbid_unknown_fields=False, frozen=True):
    """A location of this host that another host sees, and what that one calls it."""

    location: Name
    host: Name
    #: its location, and the folder of that
    as_location: Name
    path: str


class Leftover(Model, forbid_unknown_fields=False, frozen=True):
    """An image that has the name of one that a move made, and that nothing on its host names.

    It may be removed if ``doubts`` is empty: then it is the unfinished copy of a move that is over, and ``proof`` says
    how that is known. Else it is only shown.
    """

    path: AbsolutePath
    location: Name
    #: whose disk it was to be; null for a file that was to lie below disks
    vm: Name | None
    disk: DiskName | None
    migration: MigrationId
    #: what it takes on its storage
    size_bytes: Bytes
    #: when it was written last, in seconds since the epoch; of a logical volume, when it was made
    changed_at: float
    #: the host whose move made it; empty if it carries no mark
    host: str = ""
    #: the host its VM was to come from, if that is another
    source: str = ""
    proof: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()


class ImageSought(Model, frozen=True):
    """An image on shared storage, as one host describes it to another."""

    migration: MigrationId
    #: the location it is in, if in one, and its path there
    location: Name | None
    name: Annotated[str, Meta(pattern=r"\A[^\x00-\x1f]{1,1024}\Z")]
    #: what its server calls it; empty if it is on no share
    share: Annotated[str, Meta(max_length=4096)] = ""

    def __post_init__(self) -> None:
        if not is_clean_path(f"/{self.name}"):
            raise ValueError("the name has an empty, '.' or '..' component")


class ImageUse(Model, forbid_unknown_fields=False, frozen=True):
    """What a host knows of an image that it was asked about: who uses it there, in words; empty if nobody."""

    use: str
    #: a VM or a move of the host names it
    named: bool = False


class BackingFile(Model, forbid_unknown_fields=False, frozen=True):
    """A file below an overlay; a layer. ``digest`` stands for all that shows through it, see ``storage.chains``; empty
    until it was asked for."""

    path: AbsolutePath
    format: DiskFormat
    size: Bytes
    #: what it takes on its storage
    allocated_bytes: Bytes = 0
    digest: str = ""
    #: where it lies in the location of that name; empty if in none
    location: str = ""
    location_path: str = ""


class DiskFacts(Model, forbid_unknown_fields=False, frozen=True):
    """What is to know about one disk of a VM before it is copied."""

    name: DiskName
    path: str
    format: DiskFormat
    #: what the guest sees
    virtual_bytes: Bytes
    #: what a copy will take: at least what it takes on its storage, more if it is compressed there
    allocated_bytes: Bytes
    #: of it and all below it
    chain_bytes: Bytes = 0
    #: the files below it, the nearest first; if it is only read it is sent as those are, and the first
    below: tuple[BackingFile, ...] = ()
    #: how many snapshots are inside the image
    snapshots: int = 0
    #: how many dirty bitmaps are inside it, as backup programs keep there
    bitmaps: int = 0
    #: name of the location it lies in, if in one
    location: str = ""
    #: who but its VM needs the image, in words, so that it cannot be deleted; empty if nobody
    needed: str = ""


class DiskAction(StrEnum):
    """What becomes of a disk when its VM moves to another host."""

    #: both hosts see the same file, or it is only read and the destination has, or is sent, one with its contents
    STAY = "stay"
    #: it is copied, in one piece
    COPY = "copy"
    #: it is copied without the files below it, which the destination has, or is sent as layers
    COPY_OVERLAY = "copy-overlay"


class DiskPlan(Model, forbid_unknown_fields=False, frozen=True):
    """What becomes of one disk, and what it costs."""

    disk: DiskName
    action: DiskAction
    #: where it is at the destination
    path: str
    format: DiskFormat
    virtual_bytes: Bytes = 0
    #: about what will be sent
    expected_bytes: Bytes = 0
    location: str = ""
    #: all its space is taken at once
    thick: bool = False
    #: it is a block device, which may be larger than the disk
    device: bool = False
    backing: BackingFile | None = None
    #: in words
    why: str = ""
    #: the space it will need where that is not about what will be sent: holes and zeroes of thick disks and volumes
    #: take space, and are not sent
    needed_bytes: Bytes | None = None

    @property
    def space_bytes(self) -> int:
        """The space it will need of its location."""
        return self.expected_bytes if self.needed_bytes is None else self.needed_bytes


class LayerPlan(Model, forbid_unknown_fields=False, frozen=True):
    """A file below disks that the destination does not have and is sent once, however many lie above it."""

    #: its path at the source
    origin: AbsolutePath
    #: as it will be at the destination
    file: BackingFile
    #: the file below it there; null if it is the lowest
    backing: BackingFile | None = None
    #: about what will be sent
    expected_bytes: Bytes = 0
    location: str = ""
    #: in words
    why: str = ""


class DiskProgress(Model, forbid_unknown_fields=False, frozen=True):
    """How far the copy of one disk is. What the guest writes meanwhile adds to ``total_bytes``."""

    disk: DiskName
    copied_bytes: Bytes
    total_bytes: Bytes
    #: of a copy to another host, before compression: holes and zeroes are copied without that; null where nobody counts
    sent_bytes: Bytes | None = None
    ready: bool = False
    #: the guest's writes to it are slowed, because it wrote faster than they were copied
    slowed: bool = False
