"""``limosa storage leftovers`` and ``clean``: images that moves interrupted by a crash left behind."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from limosa.cli.arguments import Commands, absolute, add_command
from limosa.cli.connection import client_of
from limosa.cli.output import clean as safe
from limosa.cli.output import say, say_json, warn
from limosa.errors import Conflict, InvalidInput
from limosa.model.storage import Leftover
from limosa.model.units import format_bytes, format_seconds
from limosa.settings import toml
from limosa.wire import endpoints
from limosa.wire.api import CleanReport, CleanRequest


def register(verbs: Commands[argparse.ArgumentParser]) -> None:
    """Add both verbs to ``storage``."""
    add_command(
        verbs,
        "leftovers",
        "show images left behind by moves that a crash interrupted",
        _leftovers,
        examples=["storage leftovers", "storage leftovers --json"],
        notes="Lists images whose name a move chose and that no VM and no move of the host uses, each with the\n"
        "proof that nobody uses it, or with what makes that uncertain. Other hosts that see an image are asked\n"
        "too: those in the setting 'peers', and those that VMs have moved from or to.",
    )
    clean = add_command(
        verbs,
        "clean",
        "remove images that moves left behind and that are certain to be unused",
        _clean,
        examples=["storage clean", "storage clean /srv/fast/web1-vda.a1b2c3d4e5f6.qcow2", "storage clean --yes"],
        notes="Removes the images that 'limosa storage leftovers' says may be removed, or only those given. Each\n"
        "proof is repeated just before the image is removed; an image that is no longer certain stays.",
    )
    clean.add_argument("paths", metavar="IMAGE", nargs="*", help="only this image, by its path on the host")
    clean.add_argument("--yes", action="store_true", help="do not ask")


def _leftovers(arguments: argparse.Namespace) -> int:
    with client_of(arguments) as client:
        found = client.call(endpoints.LEFTOVERS).leftovers
    if arguments.json:
        for one in found:
            say_json(one)
        return 0
    for one in found:
        _show(one)
    removable = [one for one in found if not one.doubts]
    if removable:
        say(f"{_count(removable)} may be removed: limosa storage clean")
    else:
        say("there is no image that may be removed")
    return 0


def _show(one: Leftover) -> None:
    say(f"{one.path}")
    age = format_seconds(max(0.0, time.time() - one.changed_at))
    say(f"  {format_bytes(one.size_bytes)}, last written {age} ago")
    maker = f" on host '{one.host}'" if one.host else ""
    kind = f"disk {one.disk} of VM '{one.vm}'" if one.vm else "a backing file"
    origin = f" from host '{one.source}'" if one.source else ""
    say(f"  {kind}, named by move {one.migration}{maker}{origin}")
    say("  stays, because it is not certain to be unused:" if one.doubts else "  may be removed:")
    for reason in one.doubts or one.proof:
        say(f"    - {reason}")


def _clean(arguments: argparse.Namespace) -> int:
    paths = [absolute(path) for path in arguments.paths]
    request = toml.convert({"paths": paths}, CleanRequest, where="the request")
    with client_of(arguments) as client:
        if not arguments.yes:
            found = client.call(endpoints.LEFTOVERS).leftovers
            chosen = [one for one in found if (one.path in paths if paths else not one.doubts)]
            if (chosen or not paths) and not _agreed(chosen, as_json=arguments.json):
                return 0
            # What has come since was not agreed to; what is named and not there the host refuses.
            request = CleanRequest(paths=tuple(paths or [one.path for one in chosen]))
        report = client.call(endpoints.CLEAN, request)
    if arguments.json:
        say_json(report)
    else:
        _say_report(report)
    return Conflict.exit_code if report.kept else 0


def _agreed(chosen: Sequence[Leftover], *, as_json: bool) -> bool:
    """Whether a person says that they are to be removed. Raises :class:`InvalidInput` if nobody can be asked."""
    if not chosen:
        if as_json:
            say_json(CleanReport(removed=(), kept=()))
        else:
            say("there is no image that may be removed")
        return False
    if as_json or not sys.stdin.isatty():
        raise InvalidInput(
            "cannot ask whether to remove images",
            why="this is not an interactive terminal, or --json was given",
            todo="give --yes",
        )
    for one in chosen:
        _show(one)
    try:
        answer = input(f"Remove {safe(_count(chosen))}? [y/N] ")
    except EOFError:
        answer = ""
    if answer.strip().lower() not in ("y", "yes"):
        say("nothing removed")
        return False
    return True


def _say_report(report: CleanReport) -> None:
    for one in report.removed:
        say(f"{one.path} removed")
    for one in report.kept:
        warn(f"{one.path} stays: {'; '.join(one.doubts)}")
    freed = sum(one.size_bytes for one in report.removed)
    say(f"{format_bytes(freed)} freed")


def _count(images: Sequence[Leftover]) -> str:
    size = format_bytes(sum(one.size_bytes for one in images))
    return f"{len(images)} image{'s' if len(images) != 1 else ''} ({size})"
