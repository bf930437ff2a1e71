"""What a move of disks is to do: which disks, to which images, what stands against it, and the record of that."""

from __future__ import annotations

import time
from collections.abc import Collection

from limosa.errors import Conflict, InvalidInput, PreflightRefused, StateError
from limosa.host.own_disks import OwnDisks
from limosa.host.parts import Parts
from limosa.host.storage import Storage
from limosa.host.vms import HostedVm
from limosa.migration import chains, disks
from limosa.migration.journal import new_identity
from limosa.model.base import MigrationId, Model, Name
from limosa.model.finding import Finding, Severity
from limosa.model.migration import Migration, Outcome, Phase, Progress, Side
from limosa.model.storage import DiskFacts, DiskPlan, Location
from limosa.model.vm import Disk, DiskName
from limosa.wire.api import DiskMoveRequest


class Record(Model, frozen=True, forbid_unknown_fields=False):
    """What a move of disks was about to do, kept as long as it is not done (``ID.disks.json``)."""

    migration: MigrationId
    vm: Name
    plans: tuple[DiskPlan, ...]
    #: the disks as they were, by name
    old: dict[DiskName, Disk]
    keep: bool
    #: the VM's; empty in a record of a daemon that did not write it
    uuid: str = ""


async def plan(parts: Parts, hosted: HostedVm, request: DiskMoveRequest) -> tuple[Record, tuple[Finding, ...]]:
    """What is to be done, and what there is to say of it. Nothing is made.

    Raises :class:`InvalidInput`, :class:`Conflict`, :class:`PreflightRefused`, :class:`StateError`, and
    :class:`limosa.errors.NotFound` if there is no such location.
    """
    moved = _chosen(hosted, request, parts.storage)
    facts = {fact.name: fact for fact in await OwnDisks(parts, hosted).facts(moved)}
    locations = {one.name: one for one in await parts.storage.locations()}
    location = locations.get(request.location)
    if location is None:
        parts.storage.places.path(request.location)  # says which there are
        raise StateError(f"location '{request.location}' no longer exists", host=parts.name)
    tag = new_identity()
    seen = {one.name for one in locations.values() if one.shared}
    plans = tuple(_plan_of(hosted, facts[disk.name], location, tag, request, seen) for disk in moved)
    against = [finding for fact in facts.values() for finding in disks.against_copying(fact)]
    if not request.keep:
        against += [finding for fact in facts.values() for finding in disks.against_leaving(fact)]
    against += disks.against_form(location, request.format, thick=request.thick)
    against += disks.space(plans, {location.name: location}, parts.name)
    if any(finding.severity is Severity.ERROR for finding in against):
        raise PreflightRefused(tuple(against), vm=hosted.config.name, host=parts.name)
    record = Record(
        migration=tag,
        vm=hosted.config.name,
        plans=plans,
        old={disk.name: disk for disk in moved},
        keep=request.keep,
        uuid=hosted.config.uuid,
    )
    return record, tuple(against)


def first_view(record: Record, host: str, findings: tuple[Finding, ...] = ()) -> Migration:
    """The move as it is shown while it waits."""
    return Migration(
        id=record.migration,
        vm=record.vm,
        source=host,
        destination=host,
        side=Side.SOURCE,
        transport="local",
        phase=Phase.WAITING,
        outcome=Outcome.UNDER_WAY,
        progress=Progress(),
        accepted_at=time.time(),
        disks=record.plans,
        findings=findings,
    )


def _plan_of(
    hosted: HostedVm, fact: DiskFacts, location: Location, tag: str, request: DiskMoveRequest, seen: Collection[str]
) -> DiskPlan:
    """What lies below a disk is on this host already, and stays below it where the new image can be above anything.

    ``seen``: locations that other hosts see, too. They must not see the disk without what lies below it.
    """
    whole = disks.copied(hosted.config.name, fact, location, tag, request.format, thick=request.thick)
    left_behind = location.name in seen and any(file.location not in seen for file in fact.below)
    if not fact.below or left_behind or request.chain == "flatten" or whole.thick or whole.format != "qcow2":
        return whole
    return chains.above(whole, fact, fact.below[0], sent=False)


def _chosen(hosted: HostedVm, request: DiskMoveRequest, storage: Storage) -> list[Disk]:
    """The disks to move: those named, else all that are not there yet.

    Raises :class:`InvalidInput`, :class:`limosa.errors.NotFound` (no such location) and :class:`Conflict`.
    """
    config = hosted.config
    storage.places.path(request.location)
    by_name = {disk.name: disk for disk in config.disks}
    if unknown := [name for name in request.disks if name not in by_name]:
        raise InvalidInput(
            f"VM '{config.name}' has no disk '{unknown[0]}'", todo=f"its disks are {', '.join(by_name) or 'none'}"
        )
    wanted = [by_name[name] for name in dict.fromkeys(request.disks)] or [
        disk for disk in config.disks if not disk.read_only and storage.places.of(disk.path) != request.location
    ]
    if fixed := [disk.name for disk in wanted if disk.read_only]:
        raise InvalidInput(f"disk {fixed[0]} of VM '{config.name}' is read-only", why="read-only disks are not moved")
    if not wanted:
        has_any = any(not disk.read_only for disk in config.disks)
        those = f"all disks of VM '{config.name}' are already in location '{request.location}'"
        raise Conflict(those if has_any else f"VM '{config.name}' has no disk that could be moved", vm=config.name)
    return wanted
