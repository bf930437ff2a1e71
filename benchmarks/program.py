"""What all benchmarks have in common as programs: options, and what is written."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import msgspec

from benchmarks import pages
from benchmarks.pages import Outcome


def arguments(name: str, description: str, rounds: int) -> argparse.Namespace:
    """The options, which are the same for all: ``json``, ``page`` and ``rounds``, by default so many."""
    parser = argparse.ArgumentParser(prog=f"scripts/benchmark {name}", description=description)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the page that is published")
    parser.add_argument("--rounds", type=int, default=rounds, metavar="N", help=f"rounds ({rounds})")
    given = parser.parse_args()
    if given.rounds < 1:
        parser.error("--rounds: at least 1")
    return given


def publish(given: argparse.Namespace, outcome: Outcome, page: str) -> None:
    """Print the rows with a target, and write what was asked for."""
    print(pages.terminal(outcome.rows))
    if given.json is not None:
        given.json.write_bytes(msgspec.json.format(msgspec.json.encode(outcome)) + b"\n")
    if given.page is not None:
        given.page.write_text(page)


def say(text: str) -> None:
    """Tell the person who waits."""
    print(text, file=sys.stderr, flush=True)
