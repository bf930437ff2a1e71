"""The outcome of a run of moves, and the page ``docs/benchmarks.md``."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks import pages
from benchmarks.figures import METHOD
from benchmarks.pages import Outcome
from benchmarks.targets import FIGURES, Measured, Together, of_system

_SYSTEMS = (
    ("Limosa, TLS", "limosa", True),
    ("bare script, TLS", "bare", True),
    ("Limosa, no TLS", "limosa", False),
    ("bare script, no TLS", "bare", False),
    ("virsh (no TLS)", "virsh", False),
)


_METHOD = """\
A guest of 1 GiB, of which 600 MiB are filled (one third random) and 20 MiB/s rewritten, is moved back and forth by
Limosa, by a bare QMP script with the same QEMU and the least a safe move needs (the floor), and by
`virsh migrate --live` with its defaults, turn by turn in one run, all over one TCP connection (`--transport tcp`).
Figures are medians, in brackets the range. Where guests are emulated on the few cores that also carry the copy, ranges
are wide.

- *Wall time*: from the start of the command to its end. *Transfer time*: QEMU's own total time. *Overhead*: the
  difference.
"""


class Report(Outcome, frozen=True):
    """A whole run. ``moves`` and ``together`` are every single measurement, ``rows`` follow from them."""

    moves: tuple[Measured, ...]
    together: tuple[Together, ...]


def page(report: Report) -> str:
    """The page that is published."""
    head = pages.head(report, title="Benchmarks", command="moves", file="docs/benchmarks.md", method=_METHOD + METHOD)
    return "\n".join([*head, *pages.targets(report.rows), *_measured(report), *pages.others(report.rows), ""])


def _measured(report: Report) -> Iterator[str]:
    for link in dict.fromkeys(move.link for move in report.moves):
        moves = [move for move in report.moves if move.link == link]
        columns = {label: of_system(moves, system, encrypted=tls) for label, system, tls in _SYSTEMS}
        found = {label: of for label, of in columns.items() if of}
        yield from pages.columns(f"All systems, {link}", found, FIGURES)
