"""``limosa storage``: locations for disk images, and moving disks between them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import get_args

import msgspec

from limosa.cli import leftovers
from limosa.cli.arguments import Commands, absolute, add_command, add_noun
from limosa.cli.connection import client_of, name_there
from limosa.cli.display import display_for, say_summary
from limosa.cli.follow import exit_code, follow
from limosa.cli.output import report, say, say_findings, say_json, say_table
from limosa.cli.routes import say_disks
from limosa.client.host import HostClient
from limosa.errors import Conflict, InvalidInput, NotFound, from_fault
from limosa.model.migration import Migration
from limosa.model.storage import OWN_LOCATION, Chain, Location, LocationKind, Sighting
from limosa.model.units import format_bytes
from limosa.settings import toml
from limosa.wire import endpoints
from limosa.wire.api import DiskMoveRequest, ReleaseRequest, SettingsChange, SightingList

#: As people read them.
KINDS: dict[LocationKind, str] = {"folder": "folder", "lvm": "LVM"}


def register(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add ``storage`` and its verbs."""
    verbs = add_noun(commands, "storage", "locations for disk images: list, add, remove; move disks; leftovers")
    add_command(
        verbs,
        "list",
        "list the host's locations",
        _list,
        examples=["storage list", "storage list --json"],
        also=["ls"],
    )
    show = add_command(verbs, "show", "show one location", _show, examples=["storage show fast"])
    add = add_command(
        verbs,
        "add",
        "name a folder or an LVM volume group as a location",
        _add,
        examples=[
            "storage add fast /srv/fast",
            "storage add store /mnt/store --shared --default",
            "storage add bulk --lvm vg0/thin",
        ],
        notes="A folder on a network share is recognised as shared automatically. Give --shared where several\n"
        "hosts see the same files in some other way, and add the folder on each under the same name.\n"
        "In a volume group each image is a logical volume, in raw format.",
    )
    add.add_argument(
        "--shared", action="store_true", help="other hosts see the same files in their location of this name"
    )
    add.add_argument("--default", action="store_true", help="new images go here unless another location is given")
    remove = add_command(
        verbs,
        "remove",
        "remove a location from the settings; its images stay",
        _remove,
        examples=["storage remove fast"],
    )
    for parser in (show, add, remove):
        parser.add_argument("name", metavar="NAME", help="the location's name")
    add.add_argument("path", metavar="FOLDER", nargs="?", help="an existing folder of the host")
    add.add_argument(
        "--lvm", metavar="GROUP[/POOL]", help="instead of a folder, a volume group of the host, or a thin pool in one"
    )
    move = add_command(
        verbs,
        "move",
        "move disks of a VM, running or not, to another location of its host",
        _move,
        examples=[
            "storage move web1 --to fast",
            "storage move web1 --disk vda --to bulk --format raw",
            "storage move db1 --to fast --keep --bandwidth 500",
        ],
        notes="Moves all disks that are not there yet, or only those given with --disk. The old images are deleted\n"
        "once the new ones are in use. 'limosa migration cancel' stops it: the VM keeps the disks it has.\n"
        "A VM that is not running cannot be started, deleted or moved until the move has ended.",
    )
    move.add_argument("vm", metavar="VM")
    move.add_argument("--to", metavar="LOCATION", required=True, help="a location of the host")
    move.add_argument("--disk", metavar="DISK", dest="disks", action="append", help="only this disk; may be repeated")
    move.add_argument("--format", choices=("qcow2", "raw"), help="convert to this format")
    move.add_argument("--thick", action="store_true", help="allocate all the space at once")
    move.add_argument(
        "--chain",
        choices=get_args(Chain),
        default="keep",
        help="keep (default) leaves backing files where they are; flatten merges each disk into one image (always with "
        "--thick, --format raw, into a volume group, and into a shared location from one that is not)",
    )
    move.add_argument("--keep", action="store_true", help="keep the old images")
    move.add_argument("--bandwidth", metavar="MBIT/S", type=int, help="cap for this move, 0: none")
    move.add_argument("--detach", action="store_true", help="return as soon as the move is accepted")
    release = add_command(
        verbs,
        "release",
        "release the lease that a dead host holds on a shared image",
        _release,
        examples=["storage release /mnt/vms/web1.qcow2 --from alpha"],
        notes="First make sure that the host is switched off, or runs no VM on the image: Limosa cannot check this.\n"
        "Two QEMUs that write to one image destroy it. A host that comes back releases its images automatically.",
    )
    release.add_argument("image", metavar="IMAGE", help="the image, by its path on this host")
    release.add_argument("--from", metavar="HOST", dest="dead", required=True, help="the host that is dead")
    leftovers.register(verbs)


def _list(arguments: argparse.Namespace) -> int:
    with client_of(arguments) as client:
        locations = client.call(endpoints.LOCATIONS).locations
        seen = _seen(client, locations)
    if arguments.json:
        for location in locations:
            say_json(_with_hosts(location, seen))
        return 0
    rows = [
        (
            one.name + (" (default)" if one.default else ""),
            _named(one),
            KINDS[one.kind],
            _space(one.free_bytes, one),
            _space(one.total_bytes, one),
            one.speed or "-",
            _sharers(one, seen),
            one.fault,
        )
        for one in locations
    ]
    say_table(("NAME", "PLACE", "KIND", "FREE", "TOTAL", "SPEED", "SHARED", "NOTE"), rows)
    return 0


def _show(arguments: argparse.Namespace) -> int:
    with client_of(arguments) as client:
        locations = client.call(endpoints.LOCATIONS).locations
        seen = _seen(client, [one for one in locations if one.name == arguments.name])
    location = next((one for one in locations if one.name == arguments.name), None)
    if location is None:
        raise NotFound(f"there is no location '{arguments.name}'", todo="'limosa storage list' shows them")
    if arguments.json:
        say_json(_with_hosts(location, seen))
        return 0
    for key, value in [*_facts(location), *_hosts(location, seen)]:
        say(f"{key + ':':<14} {value}")
    return 0


def _space(count: int, location: Location) -> str:
    return format_bytes(count) if location.total_bytes else "unknown"


def _facts(location: Location) -> list[tuple[str, str]]:
    facts = [
        ("name", location.name),
        ("kind", KINDS[location.kind]),
        *_place(location),
        ("speed", location.speed or "unknown"),
        ("space", f"{_space(location.free_bytes, location)} of {_space(location.total_bytes, location)} free"),
        ("shared", "yes" if location.shared else "no"),
        ("default", "yes" if location.default else "no"),
    ]
    return [*facts, ("fault", location.fault)] if location.fault else facts


def _named(location: Location) -> str:
    return location.source if location.kind == "lvm" else location.path


def _place(location: Location) -> list[tuple[str, str]]:
    if location.kind == "lvm":
        return [("thin pool" if location.thin else "volume group", location.source), ("volumes", location.path)]
    mounted = f"{location.file_system}, {location.source}" if location.file_system else "unknown"
    return [("folder", location.path), ("file system", mounted)]


def _seen(client: HostClient, locations: Sequence[Location]) -> SightingList:
    """Which hosts see them; what is not shared no other host sees, so then it is not asked."""
    if not any(location.shared for location in locations):
        return SightingList(sightings=())
    return client.call(endpoints.SIGHTINGS)


def _of(location: Location, seen: SightingList) -> list[Sighting]:
    return [one for one in seen.sightings if one.location == location.name]


def _sharers(location: Location, seen: SightingList) -> str:
    if not location.shared:
        return "no"
    return f"with {', '.join(one.host for one in found)}" if (found := _of(location, seen)) else "yes"


def _hosts(location: Location, seen: SightingList) -> list[tuple[str, str]]:
    """A line for each host that sees a shared location, and for each that cannot be asked."""
    if not location.shared:
        return []
    facts = [("seen by", f"host '{one.host}', as '{one.as_location}' at {one.path}") for one in _of(location, seen)]
    facts += [("not asked", f"host '{host}': {why}") for host, why in seen.silent.items()]
    return facts or [("seen by", "no known host; name hosts in the setting 'peers'")]


def _with_hosts(location: Location, seen: SightingList) -> dict[str, object]:
    found = {"seen_by": _of(location, seen), "silent": seen.silent if location.shared else {}}
    return {**msgspec.to_builtins(location), **msgspec.to_builtins(found)}


def _add(arguments: argparse.Namespace) -> int:
    if (arguments.path is None) is (arguments.lvm is None):
        raise InvalidInput("a location is a folder or a volume group", todo="give FOLDER or --lvm GROUP")
    path = absolute(arguments.path) if arguments.path is not None else None
    place = {"path": path, "lvm": arguments.lvm, "shared": arguments.shared}
    values: dict[str, object] = {
        f"locations.{arguments.name}": {key: value for key, value in place.items() if value is not None}
    }
    if arguments.default:
        values["default_location"] = arguments.name
    with client_of(arguments) as client:
        known = client.call(endpoints.SETTINGS).settings.locations.get(arguments.name)
        if known is not None and (known.path, known.lvm, known.shared) != (path, arguments.lvm, arguments.shared):
            shared = ", shared" if known.shared else ""
            raise Conflict(
                f"there already is a location '{arguments.name}': {known.path or known.lvm}{shared}",
                todo="choose another name, or change it with 'limosa host settings "
                f"locations.{arguments.name}={f'lvm:{arguments.lvm}' if path is None else 'FOLDER[,shared]'}'",
            )
        client.call(endpoints.CHANGE_SETTINGS, toml.convert({"values": values}, SettingsChange, where="the request"))
        found = next(one for one in client.call(endpoints.LOCATIONS).locations if one.name == arguments.name)
    if arguments.json:
        say_json(found)
    else:
        say(f"location '{found.name}' is {_named(found)}, {_space(found.free_bytes, found)} free")
    return 0


def _remove(arguments: argparse.Namespace) -> int:
    if arguments.name == OWN_LOCATION:
        raise InvalidInput(f"every host has the location '{OWN_LOCATION}'", todo="add another, with --default")
    with client_of(arguments) as client:
        location = next((one for one in client.call(endpoints.LOCATIONS).locations if one.name == arguments.name), None)
        if location is None:
            raise NotFound(f"there is no location '{arguments.name}'", todo="'limosa storage list' shows them")
        if location.default:
            raise Conflict(
                f"location '{arguments.name}' is the default",
                todo="make another the default first: limosa host settings default_location=NAME",
            )
        client.call(endpoints.CHANGE_SETTINGS, SettingsChange(values={f"locations.{arguments.name}": None}))
    if arguments.json:
        say_json({"removed": arguments.name})
    else:
        say(f"location '{arguments.name}' removed; its images stay")
    return 0


def _release(arguments: argparse.Namespace) -> int:
    path = absolute(arguments.image)
    dead = name_there(arguments, arguments.dead)
    request = toml.convert({"image": path, "dead": dead}, ReleaseRequest, where="the request")
    with client_of(arguments) as client:
        client.call(endpoints.RELEASE_IMAGE, request)
    if arguments.json:
        say_json({"released": path, "from": dead})
    else:
        say(f"lease on {path} released; host '{dead}' must not run a VM on it again")
    return 0


def _move(arguments: argparse.Namespace) -> int:
    raw = {
        "vm": arguments.vm,
        "location": arguments.to,
        "disks": arguments.disks or [],
        "format": arguments.format,
        "thick": arguments.thick,
        "chain": arguments.chain,
        "keep": arguments.keep,
        "bandwidth_mbit_per_s": arguments.bandwidth,
    }
    request = toml.convert(raw, DiskMoveRequest, where="the request")
    with client_of(arguments) as client:
        move = client.call(endpoints.MOVE_DISKS, request)
        if not arguments.detach:
            move = _followed(client, move, quietly=arguments.json)
    if arguments.json:
        say_json(move)
    elif arguments.detach:
        say(f"{move.vm}: disks to '{arguments.to}' ({move.id})")
    else:
        say_summary([move])
        say_disks(move.disks)
        say_findings(move.findings, to_stderr=True)
    return report(from_fault(move.fault)) if move.fault and not arguments.json else exit_code(move)


def _followed(client: HostClient, move: Migration, *, quietly: bool) -> Migration:
    """The move when it has ended, shown meanwhile."""
    if quietly:
        return list(follow(client, move))[-1]
    with display_for([move.vm]) as display:
        for latest in follow(client, move):
            display.show(latest)
    return latest
