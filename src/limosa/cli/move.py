"""``limosa move`` and ``limosa check``.

The request is sent before anything is loaded that only draws: the move is under way while rich is imported.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from itertools import chain
from typing import get_args

from limosa.cli.arguments import Commands, add_command
from limosa.cli.connection import client_of, name_there
from limosa.cli.display import display_for, say_summary
from limosa.cli.follow import Event, exit_code, follow, follow_all, has_ended
from limosa.cli.output import report, say, say_findings, say_json, warn
from limosa.cli.routes import say_disks, say_expected, say_route
from limosa.errors import InvalidInput, LimosaError, PreflightRefused, from_fault
from limosa.model.migration import Migration
from limosa.model.storage import Chain
from limosa.model.vm import VmState
from limosa.settings import toml
from limosa.settings.host import Transport
from limosa.wire import endpoints
from limosa.wire.api import CheckRequest, MoveRequest


def register(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add ``move`` and ``check``."""
    move = add_command(
        commands,
        "move",
        "move running VMs to another host",
        _move,
        examples=[
            "move web1 --to host2",
            "--host host1 move web1 db1 --to host2",
            "move --all --to host2 --json",
            "move web1 --to host2 --blackout-budget 20 --no-post-copy --detach",
            "move db1 --to host2 --storage vda=fast,vdb=bulk",
        ],
        notes="Preflight, then the move, with a live display. Moves above a host's limits are queued.\n"
        "Ctrl-C ends the display, not the moves: 'limosa migration watch' shows them again and\n"
        "'limosa migration cancel' stops them. With --json, prints one object for each VM when its move\n"
        "has ended (with --detach: begun), or {\"error\": ...}; 'limosa migration watch --json' shows\n"
        "progress.",
    )
    move.add_argument("vms", metavar="VM", nargs="*")
    move.add_argument("--to", metavar="HOST", required=True, help="the destination, a host name or address")
    move.add_argument("--all", action="store_true", help="every running or paused VM of the host")
    move.add_argument("--detach", action="store_true", help="return as soon as the moves are accepted")
    check = add_command(
        commands,
        "check",
        "list everything that would block a move, without moving",
        _check,
        examples=["check web1 --to host2", "check web1 --to host2 --transport compression --json"],
        notes="Exit code 6 if the move would be refused. A move runs the same checks and takes the same options.",
    )
    check.add_argument("vm", metavar="VM")
    check.add_argument("--to", metavar="HOST", required=True, help="the destination, a host name or address")
    for parser in (move, check):
        _add_options(parser)


def _add_options(parser: argparse.ArgumentParser) -> None:
    """How the move is to be."""
    parser.add_argument("--transport", choices=get_args(Transport), help="instead of the host's setting")
    parser.add_argument("--bandwidth", metavar="MBIT/S", type=int, help="cap for this move, 0: none")
    parser.add_argument(
        "--blackout-budget", metavar="MS", type=float, help="the longest blackout the move may plan for"
    )
    parser.add_argument(
        "--post-copy",
        action=argparse.BooleanOptionalAction,
        help="allow post-copy as the last step, which cannot be undone",
    )
    parser.add_argument(
        "--rdma-pin-all",
        action=argparse.BooleanOptionalAction,
        help="with RDMA, lock all of the VM's memory at once on both hosts",
    )
    parser.add_argument("--keep", action="store_true", help="keep the disk images the VM leaves behind")
    parser.add_argument(
        "--storage",
        metavar="DISK=LOCATION,...",
        help="copy disks to these locations of the destination; by default, disks that it does not see are copied to "
        "its location of the same name as here, or else to its default location",
    )
    parser.add_argument(
        "--chain",
        choices=get_args(Chain),
        default="keep",
        help="for copied disks: keep (default) keeps backing files and sends missing ones; flatten merges each disk "
        "into one image (always in a volume group)",
    )


def _check(arguments: argparse.Namespace) -> int:
    destination = name_there(arguments, arguments.to)
    raw = {"vm": arguments.vm, "destination": destination, "options": _options(arguments)}
    request = toml.convert(raw, CheckRequest, where="the request")
    with client_of(arguments) as client:
        found = client.call(endpoints.CHECK, request)
    if arguments.json:
        say_json(found)
    else:
        verdict = "can" if found.possible else "cannot"
        say(f"VM '{found.vm}' {verdict} move from '{found.source}' to '{found.destination}'")
        if found.route is not None:
            say_route(found.route)
        say_disks(found.disks, found.layers)
        if found.possible and found.expected is not None:
            say_expected(found.expected)
        say_findings(found.findings)
    return 0 if found.possible else PreflightRefused.exit_code


def _move(arguments: argparse.Namespace) -> int:
    names = _names(arguments)
    if not names:
        warn("no VM runs here; nothing to move")
        return 0
    events = follow_all(names, _mover(arguments))
    latest: dict[str, Event] = {}
    try:
        if arguments.json or arguments.detach:
            latest.update(events)
        else:
            _show(events, names, latest)
    except KeyboardInterrupt:
        ended = {name: event for name, event in latest.items() if has_ended(event)}
        _conclude(arguments, ended)
        if len(ended) < len(names):
            those = "the other moves" if ended else "the moves"
            warn(f"{those} go on; 'limosa migration list' shows them, 'limosa migration cancel' stops one")
        return 130
    return _conclude(arguments, latest)


def _names(arguments: argparse.Namespace) -> list[str]:
    if bool(arguments.vms) == arguments.all:
        raise InvalidInput("name the VMs to move, or give --all", why="exactly one of the two is needed")
    if not arguments.all:
        return list(dict.fromkeys(arguments.vms))
    with client_of(arguments) as client:
        vms = client.call(endpoints.LIST_VMS).vms
    if left := [vm.config.name for vm in vms if vm.state in (VmState.STOPPED, VmState.CRASHED)]:
        warn(f"not moved (not running): {', '.join(left)}")
    return [vm.config.name for vm in vms if vm.state in (VmState.RUNNING, VmState.PAUSED)]


def _mover(arguments: argparse.Namespace) -> Callable[[str], Iterator[Migration]]:
    """What a thread does for each VM: ask for the move and, unless detached, follow it."""
    options, destination = _options(arguments), name_there(arguments, arguments.to)

    def begin(name: str) -> Iterator[Migration]:
        raw = {"vm": name, "destination": destination, "options": options}
        request = toml.convert(raw, MoveRequest, where="the request")
        with client_of(arguments) as client:
            migration = client.call(endpoints.MOVE, request)
            if arguments.detach:
                yield migration
            else:
                yield from follow(client, migration)

    return begin


def _options(arguments: argparse.Namespace) -> dict[str, object]:
    return {
        "bandwidth_mbit_per_s": arguments.bandwidth,
        "blackout_budget_ms": arguments.blackout_budget,
        "post_copy": arguments.post_copy,
        "rdma_pin_all": arguments.rdma_pin_all,
        "keep": arguments.keep,
        "transport": arguments.transport,
        "storage": _storage(arguments.storage),
        "chain": arguments.chain,
    }


def _storage(text: str | None) -> dict[str, str]:
    """Locations by disk, from ``vda=fast,vdb=bulk``. Raises :class:`InvalidInput`."""
    wishes = {}
    for part in (text or "").split(",") if text else ():
        disk, equals, location = part.partition("=")
        if not equals:
            raise InvalidInput(
                f"--storage does not accept '{part}'",
                why="it takes a disk and a location",
                todo="write for example --storage vda=fast",
            )
        wishes[disk.strip()] = location.strip()
    return wishes


def _show(events: Iterator[tuple[str, Event]], names: list[str], latest: dict[str, Event]) -> None:
    """Show events as they come, and keep the latest of each VM."""
    first = next(events)  # every request is on its way before the display is loaded
    with display_for(names) as display:
        for name, event in chain([first], events):
            latest[name] = event
            display.show_event(name, event)


def _conclude(arguments: argparse.Namespace, ended: dict[str, Event]) -> int:
    """Print how each move ended; the exit code is that of the first that went wrong."""
    if not arguments.json:
        moves = [event for event in ended.values() if isinstance(event, Migration)]
        if arguments.detach:
            for move in moves:
                say(f"{move.vm}: {move.source} to {move.destination}, {move.phase.value} ({move.id})")
        else:
            say_summary(moves)
    for event in ended.values():
        _tell(arguments, event)
    return next((code for code in map(exit_code, ended.values()) if code), 0)


def _tell(arguments: argparse.Namespace, event: Event) -> None:
    if isinstance(event, LimosaError):
        report(event, as_json=arguments.json)
    elif arguments.json:
        say_json(event)
    else:
        say_findings(event.findings, to_stderr=True)
        if event.fault is not None:
            report(from_fault(event.fault))
