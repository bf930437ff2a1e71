"""``scripts/demo``: the play from beginning to end.

Exit code 0 if both moves were completed and the client saw no failure, 1 otherwise, 130 after Ctrl-C. The lab is taken
away in every case.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

from rich.console import Console

from demo import stage
from demo.client import MESSAGE_EVERY_S, REQUEST_EVERY_S, Client, Observed
from demo.outcome import as_json, seen
from demo.picture import TITLE, draw
from demo.stage import DemoFailed
from demo.table import notes, summary
from demo.watch import WatchedMove, move
from limosa.errors import LimosaError
from limosa.model.units import format_seconds

OUTPUT = Path(__file__).parents[1] / "demo-out"
JOURNEY = (("host1", "host2"), ("host2", "host1"))
#: The client is watched this long before, between and after the moves.
QUIET_S = 1.5


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    options = _parse(arguments)
    screen = Console(highlight=False)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    try:
        return perform(screen, options.json, options.picture)
    except KeyboardInterrupt:
        return _failed("interrupted", 130)
    except DemoFailed as failure:
        return _failed(str(failure))
    except LimosaError as error:
        return _failed(f"{error}. {error.todo}".rstrip(". "))
    except OSError as fault:
        return _failed(str(fault))


def perform(screen: Console, json_file: Path | None, picture_file: Path) -> int:
    """Build, boot, move there and back, take away, and show what came of it."""
    if os.geteuid() != 0:
        raise DemoFailed("a lab is made of network namespaces, which only root may make; use sudo")
    began, load = time.monotonic(), os.getloadavg()[0]
    OUTPUT.mkdir(exist_ok=True)
    screen.print(TITLE, style="bold")
    with stage.lab(screen):
        host = stage.boot(screen, OUTPUT)
        play = travel(screen)
    moves = seen(play.moves, play.observed)
    if moves:
        screen.print("\n", summary(moves), "\n", sep="")
        for note in notes(moves, host.accelerator, load, os.cpu_count() or 1):
            screen.print(note, style="dim")
    if moves and play.observed.messages:
        subject = f"{stage.SUBJECT}; QEMU {host.qemu} ({host.accelerator})"
        picture = draw(subject, moves, play.observed, stage.LAB.speeds[0] * 1e6 / 8)
        _write(screen, "picture", picture_file, picture)
    if json_file is not None:
        _write(screen, "JSON", json_file, json.dumps(as_json(host.qemu, moves), indent=2) + "\n")
    screen.print(f"The demo took {format_seconds(time.monotonic() - began)}.")
    return verdict(screen, play)


@dataclass(frozen=True)
class Play:
    """What happened: moves that were completed, what the client saw, and what failed, if anything did."""

    moves: list[WatchedMove]
    observed: Observed
    problem: str


def travel(screen: Console) -> Play:
    """Move the VM to the second host and back while a client asks it. A move that fails is the last one."""
    client = Client((stage.ADDRESS, 80), (stage.ADDRESS, 7), namespace=stage.LAB.client)
    client.start()
    screen.print(
        f"A client asks it {1 / REQUEST_EVERY_S:.0f} times a second over HTTP, on a new connection each time, and"
    )
    screen.print(f"{1 / MESSAGE_EVERY_S:.0f} times a second over one TCP connection that it keeps from now on.")
    moves, problem = [], ""
    try:
        for source, destination in JOURNEY:
            time.sleep(QUIET_S)
            moves.append(move(screen, source, destination))
        time.sleep(QUIET_S)
    except DemoFailed as failure:
        problem = str(failure)
    return Play(moves, client.stop(), problem)


def verdict(screen: Console, play: Play) -> int:
    """The exit code, after saying in words what it means."""
    failures = play.observed.failures
    for failure in failures[:5]:
        _failed(f"the client's request failed: {failure.why}")
    if len(failures) > 5:
        _failed(f"and {len(failures) - 5} more requests")
    if play.problem:
        _failed(play.problem)
    if play.problem or failures:
        return 1
    screen.print("Both moves were completed, and no request failed.", style="bold green")
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/demo", description="Move a running VM to another host and back.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write what was measured as one JSON object")
    parser.add_argument(
        "--picture",
        type=Path,
        metavar="FILE",
        default=OUTPUT / "demo.svg",
        help=f"where the picture goes ({OUTPUT.name}/demo.svg)",
    )
    return parser.parse_args(arguments)


def _write(screen: Console, what: str, file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    screen.print(f"{what}: {os.path.relpath(file)}", soft_wrap=True)


def _failed(words: str, code: int = 1) -> int:
    print(f"demo: {words}", file=sys.stderr)
    return code


def _leave(number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(_failed(f"ended by {signal.Signals(number).name}", 128 + number))


if __name__ == "__main__":
    sys.exit(main())
