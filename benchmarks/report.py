"""The outcome of a run: one JSON object, the page ``docs/benchmarks.md``, and a table for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from statistics import median

from benchmarks.targets import FIGURES, Measured, Row, Together, of_system
from limosa.model.base import Model

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
`virsh migrate --live` with its defaults, turn by turn in one run. Figures are medians, in brackets the range. Where
guests are emulated on the few cores that also carry the copy, ranges are wide.

- *Wall time*: from the start of the command to its end. *Transfer time*: QEMU's own total time. *Overhead*: the
  difference.
- *Blackout*: STOP on the source to RESUME on the destination, by the time stamps of QEMU's events.
- *Client's gap*: a client in another network namespace sends an echo request every millisecond; the longest time
  without an answer around the switchover, less that millisecond. *Longest stall*: the same over the whole move;
  *noise floor*: the same over a second before it.
- *Processor time*: of daemons, both QEMUs (the guest's own work included) and the command.
"""


class Report(Model, frozen=True):
    """A whole run. ``moves`` and ``together`` are every single measurement, ``rows`` follow from them."""

    machine: dict[str, str | int]
    versions: dict[str, str]
    #: bytes per second one TCP stream carried over each link before it was used
    calibration: dict[str, float]
    rows: tuple[Row, ...]
    moves: tuple[Measured, ...]
    together: tuple[Together, ...]


def terminal(report: Report) -> str:
    """The rows with a target, one a line."""
    return "\n".join(
        f"{'met ' if row.met else 'MISSED'}  {row.what}: {row.limosa:g} {row.unit}; "
        f"{row.baseline}: {row.baseline_value:g} {row.unit}; target: {row.target}"
        for row in report.rows
        if row.target is not None
    )


def page(report: Report) -> str:
    """The page that is published."""
    return "\n".join([*_head(report), *_targets(report.rows), *_measured(report), *_other_rows(report.rows), ""])


def _head(report: Report) -> Iterator[str]:
    machine, versions = report.machine, report.versions
    yield from (
        "# Benchmarks",
        "",
        "Written by `scripts/benchmark moves --page docs/benchmarks.md`; not edited by hand.",
        "",
        f"Machine: {machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB; guests are "
        f"{machine['guests']}, hosts are {machine['hosts']}.",
        "",
        f"Versions: Limosa {versions['limosa']}, QEMU {versions['qemu']}, libvirt {versions['libvirt']}, kernel "
        f"{versions['kernel']}, {versions['system']}, Python {versions['python']}.",
        "",
        "Links, as one TCP stream carries them: "
        + "; ".join(f"{name} {rate * 8 / 1e9:.2f} Gbit/s" for name, rate in report.calibration.items())
        + ".",
        "",
        *_METHOD.splitlines(),
        "",
    )


def _targets(rows: Iterable[Row]) -> Iterator[str]:
    yield from ("## What was to be reached", "")
    yield "| what | Limosa | baseline | | ratio | target | met |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for row in rows:
        if row.target is not None:
            verdict = "yes" if row.met else "**no**"
            cells = (row.what, _ours(row), row.baseline, _theirs(row), f"{row.ratio:.3g}", row.target, verdict)
            yield f"| {' | '.join(cells)} |"
    yield ""


def _measured(report: Report) -> Iterator[str]:
    for link in dict.fromkeys(move.link for move in report.moves):
        moves = [move for move in report.moves if move.link == link]
        columns = [(label, of_system(moves, system, encrypted=tls)) for label, system, tls in _SYSTEMS]
        columns = [(label, of) for label, of in columns if of]
        rounds = ", ".join(sorted({str(len(of)) for _, of in columns}))
        yield from (f"## All systems, {link}, {rounds} rounds", "")
        yield f"| | {' | '.join(label for label, _ in columns)} |"
        yield f"| --- |{' --- |' * len(columns)}"
        for figure in FIGURES:
            cells = [_cell([figure.of(move) for move in of]) for _, of in columns]
            yield f"| {figure.name}, {figure.unit} | {' | '.join(cells)} |"
        yield ""


def _other_rows(rows: Iterable[Row]) -> Iterator[str]:
    yield from ("## Other comparisons", "")
    yield "| what | Limosa | baseline | | ratio |"
    yield "| --- | --- | --- | --- | --- |"
    for row in rows:
        if row.target is None:
            yield f"| {row.what} | {_ours(row)} | {row.baseline} | {_theirs(row)} | {row.ratio:.3g} |"


def _ours(row: Row) -> str:
    return f"{row.limosa:.3g} {row.unit} {_span(*row.spread['limosa'])}"


def _theirs(row: Row) -> str:
    return f"{row.baseline_value:.3g} {row.unit} {_span(*row.spread['baseline'])}"


def _cell(values: Sequence[float]) -> str:
    return f"{_number(median(values))} {_span(min(values), max(values))}"


def _span(least: float, most: float) -> str:
    return f"[{_number(least)}-{_number(most)}]"


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
