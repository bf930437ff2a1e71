"""What becomes of each disk when a VM moves to another host; pure.

A disk both hosts see stays where it is. Any other is copied into a new image: in the location that was asked for, else
in the destination's location of the same name as here, else in its default one; it stays thick if it was. One that is
only read is sent as it is, like files below disks, unless the destination has its contents.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath

import msgspec

from limosa.migration.chains import Chains
from limosa.model.base import is_name
from limosa.model.facts import DestinationFacts, VmFacts
from limosa.model.finding import Finding
from limosa.model.storage import BackingFile, Chain, DiskAction, DiskFacts, DiskPlan, LayerPlan, Location
from limosa.model.units import format_bytes
from limosa.model.vm import Disk, DiskFormat, VmConfig
from limosa.storage import layers
from limosa.storage.identity import same_file

#: A qcow2 image's own tables, for each byte of data: 8 bytes for a cluster of 64 KiB, and as much again to count them.
_TABLES = 1 + 2 / 4096
_NAME_MAX = 40
_LVMS_OWN = ("snapshot", "pvmove")
_IMAGE_NAME = re.compile(r"(?P<vm>[^/]+)-(?P<disk>vd[a-z])\.(?P<tag>[a-z0-9]{12})\.(qcow2|raw)")


@dataclass(frozen=True)
class Planned:
    """The plan for every disk and for the files below them that are sent, and what stands against it."""

    disks: tuple[DiskPlan, ...]
    layers: tuple[LayerPlan, ...]
    findings: tuple[Finding, ...]


def to_copy(vm: VmConfig, here: VmFacts, there: DestinationFacts, wishes: Mapping[str, str]) -> tuple[Disk, ...]:
    """The disks that do not stay: the destination does not see them, or they were asked to go elsewhere."""
    return tuple(disk for disk in _leaving(vm, here, there, wishes) if not disk.read_only)


def to_send(vm: VmConfig, here: VmFacts, there: DestinationFacts, wishes: Mapping[str, str]) -> tuple[Disk, ...]:
    """The same of disks that are only read, such as an installer's CD-ROM. They stay here, too: what they hold is
    somebody else's."""
    return tuple(disk for disk in _leaving(vm, here, there, wishes) if disk.read_only)


def _leaving(vm: VmConfig, here: VmFacts, there: DestinationFacts, wishes: Mapping[str, str]) -> Iterator[Disk]:
    ours = {identity.path: identity for identity in here.files}
    theirs = {identity.path: identity for identity in there.files}
    for disk in vm.disks:
        seen = disk.path in ours and disk.path in theirs and same_file(ours[disk.path], theirs[disk.path])
        if disk.path in ours and (disk.name in wishes or not seen):
            yield disk


def image_name(vm: str, disk: str, tag: str, image_format: str) -> str:
    """The name of a new image. ``tag`` is the identity of the move, which makes it one that nobody else has.

    The VM's name is in it for people, and so far as a logical volume may have it too (lvm(8)): at most 128 characters
    with the group's name, of which each hyphen counts twice, and no words that LVM keeps for itself, which all begin
    with an underscore or begin the name.
    """
    known_as = vm[:_NAME_MAX].replace("_", ".")
    return f"{'vm.' if known_as.startswith(_LVMS_OWN) else ''}{known_as}-{disk}.{tag}.{image_format}"


@dataclass(frozen=True)
class Made:
    """What a name says that a move has made. ``vm`` and ``disk`` are null for a file that lies below disks."""

    migration: str
    #: so far as :func:`image_name` keeps it
    vm: str | None = None
    disk: str | None = None


def read_name(name: str) -> Made | None:
    """What :func:`image_name` was given, or :func:`limosa.storage.layers.name`; None if the name is of neither form."""
    match = _IMAGE_NAME.fullmatch(name)
    if match and is_name(match["vm"]):
        return Made(match["tag"], match["vm"], match["disk"])
    tag = layers.read_name(name)
    return Made(tag) if tag else None


def may_lie_above(fact: DiskFacts, there: DestinationFacts, wish: str) -> bool:
    """Whether the copy of a disk can lie above files: in a folder of the destination, and on no logical volume."""
    location = _location(fact.location, _locations(there), wish)
    return location is not None and location.kind == "folder"


def plan(
    vm: VmConfig,
    facts: Sequence[DiskFacts],
    there: DestinationFacts,
    wishes: Mapping[str, str],
    tag: str,
    found: Mapping[str, BackingFile],
    chain: Chain = "keep",
) -> Planned:
    """The plan for every disk.

    ``facts``: of those :func:`to_copy` and :func:`to_send` name, with digests where one :func:`may_lie_above` others or
    is sent; ``found``: what the destination has of the files below them, by digest.
    """
    known = {fact.name: fact for fact in facts}
    locations = _locations(there)
    chains = Chains(found, tag)
    staying = {disk.path for disk in vm.disks if disk.name not in known}
    plans: list[DiskPlan] = []
    findings: list[Finding] = []
    for disk in vm.disks:
        fact = known.get(disk.name)
        if fact is None:
            plans.append(_stays(disk))
            continue
        wish = wishes.get(disk.name, "")
        location = _location(fact.location, locations, wish)
        if disk.read_only and location is not None and location.kind != "folder" and not wish:
            location = next((one for one in there.locations if one.kind == "folder"), None)
        if location is None:
            findings.append(_no_location(disk, wish, there))
            continue
        if disk.read_only:
            findings += _against_sending(disk, location)
            plans.append(chains.bring(fact, location, staying.union(plan_.path for plan_ in plans)))
            continue
        findings += [*against_copying(fact), *_against_thick(disk, location)]
        whole = copied(vm.name, fact, location, tag, thick=disk.thick and not location.thin)
        keeps = chain == "keep" and location.kind == "folder" and not whole.thick
        plans.append(chains.keep(whole, fact, partial(_of_layer, locations, location)) if keeps else whole)
    findings += _unknown_disks(vm, wishes)
    findings += space([*copies(plans), *chains.layers], locations, there.host)
    return Planned(tuple(plans), chains.layers, tuple(findings))


def landed(vm: VmConfig, plans: Iterable[DiskPlan]) -> VmConfig:
    """The VM as it will be at the destination."""
    there = {plan.disk: plan for plan in plans}
    disks = tuple(_landed(disk, there[disk.name]) if disk.name in there else disk for disk in vm.disks)
    return msgspec.structs.replace(vm, disks=disks)


def _landed(disk: Disk, plan: DiskPlan) -> Disk:
    return on_image(disk, plan) if is_work(plan) else msgspec.structs.replace(disk, path=plan.path)


def on_image(disk: Disk, plan: DiskPlan) -> Disk:
    """The disk when it lies on the new image."""
    size = plan.virtual_bytes if plan.device else None
    return msgspec.structs.replace(disk, path=plan.path, format=plan.format, size_bytes=size, thick=plan.thick)


def copies(plans: Iterable[DiskPlan]) -> tuple[DiskPlan, ...]:
    """Those that are work."""
    return tuple(plan for plan in plans if is_work(plan))


def is_work(plan: DiskPlan) -> bool:
    """Whether the disk does not stay where it is."""
    return plan.action is not DiskAction.STAY


def _stays(disk: Disk) -> DiskPlan:
    return DiskPlan(
        disk=disk.name, action=DiskAction.STAY, path=disk.path, format=disk.format, why="both hosts see the same file"
    )


def copied(
    vm: str,
    fact: DiskFacts,
    location: Location,
    tag: str,
    image_format: DiskFormat | None = None,
    *,
    thick: bool = False,
) -> DiskPlan:
    """The plan for a disk of the VM of that name that is copied in one piece; on a logical volume it becomes raw."""
    device = location.kind == "lvm"
    image_format = "raw" if device else image_format or fact.format
    path = PurePosixPath(location.path) / image_name(vm, fact.name, tag, image_format)
    # A thin volume too: the kernel's thin pools know no WRITE ZEROES, so zeroes are written, and take space, like data.
    takes_all = thick or device
    sent = min(fact.chain_bytes, fact.virtual_bytes)
    needed = fact.virtual_bytes if takes_all else sent
    if image_format == "qcow2":
        needed = round(needed * _TABLES)
    needed = -(-needed // location.unit_bytes) * location.unit_bytes
    return DiskPlan(
        disk=fact.name,
        action=DiskAction.COPY,
        path=str(path),
        format=image_format,
        virtual_bytes=fact.virtual_bytes,
        expected_bytes=sent,
        needed_bytes=needed,
        location=location.name,
        thick=thick,
        device=device,
        why=f"into location '{location.name}'" + (", as a logical volume" if device else ""),
    )


def _locations(there: DestinationFacts) -> dict[str, Location]:
    return {location.name: location for location in there.locations}


def _location(name: str, locations: Mapping[str, Location], wish: str) -> Location | None:
    if wish:
        return locations.get(wish)
    default = next((location for location in locations.values() if location.default), None)
    return locations.get(name, default)


def _of_layer(locations: Mapping[str, Location], of_disk: Location, name: str) -> Location:
    """What lies below a disk goes to the location of the same name as here, too, else where the disk goes; but only
    into a folder, as that is."""
    of_name = locations.get(name, of_disk)
    return of_name if of_name.kind == "folder" else of_disk


def _no_location(disk: Disk, wish: str, there: DestinationFacts) -> Finding:
    names = ", ".join(sorted(location.name for location in there.locations))
    what = f"has no location '{wish}'" if wish else "has no location for new images"
    return Finding.error(
        "location-unknown",
        f"host '{there.host}' {what} for disk {disk.name}",
        f"choose one of its own: {names or 'none'}",
    )


def _against_sending(disk: Disk, location: Location) -> list[Finding]:
    if location.kind == "folder":
        return []
    return [
        Finding.error(
            "form-not-possible",
            f"disk {disk.name} cannot go to location '{location.name}': it is read-only, and sent as a file",
            "choose a location that is a folder",
        )
    ]


def _against_thick(disk: Disk, location: Location) -> list[Finding]:
    if not (disk.thick and location.thin):
        return []
    return [
        Finding.warning(
            "thick-lost",
            f"disk {disk.name} is thick and will be thin: location '{location.name}' is a thin pool",
            "choose another location if it must keep its space even when the guest discards blocks",
        )
    ]


def _unknown_disks(vm: VmConfig, wishes: Mapping[str, str]) -> list[Finding]:
    names = {disk.name for disk in vm.disks}
    return [
        Finding.error(
            "disk-unknown",
            f"the VM has no disk '{name}'",
            f"its disks are {', '.join(sorted(names))}" if names else "leave '--storage' out: it has none at all",
        )
        for name in sorted(wishes.keys() - names)
    ]


def against_copying(fact: DiskFacts) -> list[Finding]:
    """Why a disk cannot be copied, or what of it is lost by that."""
    found = []
    if fact.snapshots:
        found.append(
            Finding.error(
                "disk-snapshots",
                f"disk {fact.name} holds {fact.snapshots} snapshots, which a copy would lose",
                f"see qemu-img snapshot -l {fact.path}; delete them while the VM is stopped, or share the storage",
            )
        )
    if fact.bitmaps:
        found.append(
            Finding.warning(
                "disk-bitmaps",
                f"disk {fact.name} holds {fact.bitmaps} dirty bitmaps, which are not copied",
                "make the next backup a full one, if a backup program uses them",
            )
        )
    return found


def against_leaving(fact: DiskFacts) -> list[Finding]:
    """Why a disk cannot be moved if the image it has is deleted then."""
    if not fact.needed:
        return []
    return [
        Finding.error(
            "image-needed",
            f"{fact.path}, which disk {fact.name} would leave, cannot be deleted: {fact.needed}",
            "keep the old images with --keep; or first end the other use, or start the host that does not answer",
        )
    ]


def not_deleted(image: str, why: str) -> Finding:
    """What is said after a move that has left an image where it is."""
    return Finding.warning(
        "image-left",
        f"{image}, which the VM has left, was not deleted: {why}",
        "delete it yourself once nobody needs it",
    )


def against_form(location: Location, image_format: DiskFormat | None, *, thick: bool) -> list[Finding]:
    """Why images of a location cannot be as they are wanted."""
    impossible = []
    if location.kind == "lvm" and image_format not in (None, "raw"):
        impossible.append(f"in {image_format}: a logical volume is raw")
    if location.thin and thick:
        impossible.append("thick: they lie in a thin pool")
    return [
        Finding.error(
            "form-not-possible",
            f"images of location '{location.name}' cannot be {what}",
            "leave the option out, or choose another location",
        )
        for what in impossible
    ]


def space(plans: Iterable[DiskPlan | LayerPlan], locations: Mapping[str, Location], host: str) -> list[Finding]:
    """Why the locations cannot take what is planned for them."""
    needed: dict[str, int] = {}
    for plan_ in plans:
        count = plan_.space_bytes if isinstance(plan_, DiskPlan) else plan_.expected_bytes
        needed[plan_.location] = needed.get(plan_.location, 0) + count
    found = []
    for name, count in sorted(needed.items()):
        location = locations[name]
        if location.fault:
            found.append(
                Finding.error(
                    "location-unusable",
                    f"location '{name}' of host '{host}' cannot be used: {location.fault}",
                    "fix it, or choose another with --storage",
                )
            )
        elif location.lacks(count):
            found.append(
                Finding.error(
                    "space-short",
                    f"location '{name}' of host '{host}' has {format_bytes(location.free_bytes)} free, "
                    f"the disks need {format_bytes(count)}",
                    "free space there, or choose another location",
                )
            )
    return found
