"""What all benchmarks have in common as programs: options, and what is written."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec

from benchmarks import pages
from benchmarks.pages import Outcome


def arguments(
    name: str,
    description: str,
    rounds: int | None,
    add_more: Callable[[argparse.ArgumentParser], None] = lambda _: None,
) -> argparse.Namespace:
    """The options: ``json``, ``page`` and ``rounds``, which all have, and those a benchmark adds.

    Without a number of ``rounds`` each part has its own.
    """
    parser = argparse.ArgumentParser(prog=f"scripts/benchmark {name}", description=description)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the page that is published")
    parser.add_argument("--rounds", type=int, default=rounds, metavar="N", help=f"rounds ({rounds or 'by part'})")
    add_more(parser)
    given = parser.parse_args()
    if given.rounds is not None and given.rounds < 1:
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
