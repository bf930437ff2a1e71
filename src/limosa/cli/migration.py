"""``limosa migration``: look at moves, cancel them, say who owns a VM when its hosts cannot know."""

from __future__ import annotations

import argparse
import time
from contextlib import suppress
from functools import partial

from limosa.cli.arguments import Commands, add_command, add_noun
from limosa.cli.connection import client_of
from limosa.cli.display import display_for, in_words, say_summary, stage
from limosa.cli.follow import exit_code, follow
from limosa.cli.output import on_each, report, say, say_json, say_table, warn
from limosa.cli.routes import say_disks, say_route
from limosa.client.host import HostClient
from limosa.errors import Conflict, NotFound, from_fault
from limosa.model.base import is_migration_id
from limosa.model.migration import Migration, Outcome, Side
from limosa.settings import toml
from limosa.wire import endpoints
from limosa.wire.api import LimitRequest, ResolveRequest


def register(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add ``migration`` and its verbs."""
    verbs = add_noun(commands, "migration", "current and past moves: list, watch, cancel, resolve")
    listing = add_command(
        verbs,
        "list",
        "list moves from this host, and unfinished moves to it, newest first",
        _list,
        examples=["migration list", "migration list --under-way", "migration list web1 --json"],
        also=["ls"],
    )
    listing.add_argument("vms", metavar="VM", nargs="*", help="only moves of these VMs")
    listing.add_argument("--under-way", action="store_true", help="only those that have not ended")
    show = add_command(
        verbs, "show", "show one move", _show, examples=["migration show 3f9c0a1b2c3d", "migration show web1"]
    )
    watch = add_command(
        verbs,
        "watch",
        "watch a move until it ends",
        _watch,
        examples=["migration watch web1", "migration watch web1 --json"],
        notes="With --json, prints one object for each change. The exit code is that of the move.",
    )
    cancel = add_command(
        verbs,
        "cancel",
        "cancel moves; the VMs stay at the source, as they were",
        _cancel,
        examples=["migration cancel web1", "migration cancel 3f9c0a1b2c3d 8e2d4c6b0a19"],
        notes="Possible in every phase before the hand-over. If one move cannot be cancelled, the others still\n"
        "are. Exit code 0 only if all were cancelled, 5 if one had completed or handed its VM over, 10 if nobody\n"
        "can know, 11 if QEMU or the destination does not answer yet: then it is cancelled as soon as possible.",
    )
    limit = add_command(
        verbs,
        "limit",
        "cap the bandwidth of a move that is under way",
        _limit,
        examples=["migration limit web1 500", "migration limit 3f9c0a1b2c3d 0"],
        notes="0 removes this move's cap; the host's caps still apply.",
    )
    resolve = add_command(
        verbs,
        "resolve",
        "say who owns a VM when its hosts cannot know",
        _resolve,
        examples=["migration resolve web1 --owner source", "--host host2 migration resolve web1 --owner destination"],
        notes="For a move that is 'unresolved': the VM is paused at the source and may be running at the destination.\n"
        "Make sure the VM cannot run on the other host (switched off, or paused there), then run this on the\n"
        "host that is to have it.",
    )
    for parser in (show, watch, limit, resolve):
        parser.add_argument("migration", metavar="ID|VM", help="the move, or a VM, whose newest move is meant")
    limit.add_argument("bandwidth", metavar="MBIT/S", type=int, help="megabits per second")
    cancel.add_argument("migrations", metavar="ID|VM", nargs="+")
    resolve.add_argument("--owner", required=True, choices=[side.value for side in Side])


def _list(arguments: argparse.Namespace) -> int:
    with client_of(arguments) as client:
        all_migrations = client.call(endpoints.LIST_MIGRATIONS).migrations
    migrations = [one for one in all_migrations if _is_wanted(one, arguments)]
    if arguments.json:
        for migration in migrations:
            say_json(migration)
        return 0
    rows = [
        (
            *(one.id, one.vm, one.source, one.destination, _asked_for(one)),
            *(stage(one), f"{one.progress.percent:.0f} %", _why(one)),
        )
        for one in migrations
    ]
    say_table(("ID", "VM", "SOURCE", "DESTINATION", "ASKED FOR", "STATE", "DONE", "NOTE"), rows)
    return 0


def _is_wanted(migration: Migration, arguments: argparse.Namespace) -> bool:
    if arguments.under_way and migration.outcome not in (Outcome.UNDER_WAY, Outcome.UNRESOLVED):
        return False
    return not arguments.vms or migration.vm in arguments.vms


def _asked_for(migration: Migration) -> str:
    """When the move was asked for, by the clock here."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(migration.accepted_at))


def _why(migration: Migration) -> str:
    return str(from_fault(migration.fault)) if migration.fault else migration.progress.note


def _show(arguments: argparse.Namespace) -> int:
    with client_of(arguments) as client:
        migration = find(client, arguments.migration)
    _tell(arguments, migration)
    return 0


def _watch(arguments: argparse.Namespace) -> int:
    with client_of(arguments) as client:
        latest = find(client, arguments.migration)
        if arguments.json:
            for latest in follow(client, latest):  # noqa: B020 - the iterator is made once, from the first
                say_json(latest)
            return exit_code(latest)
        with display_for([latest.vm]) as display:
            for latest in follow(client, latest):  # noqa: B020 - as above
                display.show(latest)
    say_summary([latest])
    if latest.fault:
        return report(from_fault(latest.fault))
    if exit_code(latest) and latest.progress.note:
        warn(latest.progress.note)
    return exit_code(latest)


def _cancel(arguments: argparse.Namespace) -> int:
    with client_of(arguments) as client:
        return on_each(arguments.migrations, partial(_cancel_one, client, arguments), as_json=arguments.json)


def _cancel_one(client: HostClient, arguments: argparse.Namespace, text: str) -> None:
    migration = client.call(endpoints.CANCEL_MIGRATION, migration=find(client, text).id)
    if migration.outcome is Outcome.COMPLETED:
        raise Conflict(
            f"the move of VM '{migration.vm}' was not cancelled",
            why=f"it had completed by then; the VM is on host '{migration.destination}'",
            todo="move it back",
            vm=migration.vm,
            host=migration.destination,
        )
    if migration.outcome is not Outcome.CANCELLED and migration.fault is not None:
        raise from_fault(migration.fault)
    _tell(arguments, migration)


def _limit(arguments: argparse.Namespace) -> int:
    request = toml.convert({"bandwidth_mbit_per_s": arguments.bandwidth}, LimitRequest, where="the request")
    with client_of(arguments) as client:
        migration = find(client, arguments.migration)
        _tell(arguments, client.call(endpoints.LIMIT_MIGRATION, request, migration=migration.id))
    return 0


def _resolve(arguments: argparse.Namespace) -> int:
    with client_of(arguments) as client:
        migration = find(client, arguments.migration)
        request = ResolveRequest(owner=Side(arguments.owner))
        _tell(arguments, client.call(endpoints.RESOLVE_MIGRATION, request, migration=migration.id))
    return 0


def find(client: HostClient, text: str) -> Migration:
    """The move with that id, or the newest one of the VM of that name. Raises :class:`NotFound`."""
    if is_migration_id(text):
        with suppress(NotFound):
            return client.call(endpoints.SHOW_MIGRATION, migration=text)
    migrations = client.call(endpoints.LIST_MIGRATIONS).migrations
    of_vm = sorted((one for one in migrations if one.vm == text), key=lambda one: one.accepted_at)
    if not of_vm:
        raise NotFound(f"there is no migration '{text}' here", todo="'limosa migration list' shows those there are")
    return of_vm[-1]


def _tell(arguments: argparse.Namespace, migration: Migration) -> None:
    if arguments.json:
        say_json(migration)
        return
    way = f"{migration.source} to {migration.destination}"
    say(f"{migration.vm}: {way}, {stage(migration)}, asked for at {_asked_for(migration)} ({migration.id})")
    say_summary([migration])
    if migration.route is not None:
        say_route(migration.route)
    say_disks(migration.disks, migration.layers)
    if migration.outcome is Outcome.UNDER_WAY:
        say(in_words(migration))
    elif why := _why(migration):
        say(why)
