"""What all outcomes have in common: how they are laid out as JSON, as a page, and as a table for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import median
from typing import TypeVar

from benchmarks.rows import Figure, Row
from limosa.model.base import Model

T = TypeVar("T")


class Outcome(Model, frozen=True):
    """A whole run. ``rows`` follow from every single measurement, which a benchmark adds in fields of its own."""

    machine: dict[str, str | int]
    versions: dict[str, str]
    #: bytes per second that plain TCP streams carried over each link before it was used
    calibration: dict[str, float]
    rows: tuple[Row, ...]


def terminal(rows: Iterable[Row]) -> str:
    """The rows with a target, one a line."""
    return "\n".join(
        f"{'met ' if row.met else 'MISSED'}  {row.what}: {row.limosa:g} {row.unit}; "
        f"{row.baseline}: {row.baseline_value:g} {row.unit}; target: {row.target}"
        for row in rows
        if row.target is not None
    )


def head(outcome: Outcome, *, title: str, command: str, file: str, method: str) -> Iterator[str]:
    """Title, machine, versions, links, and how it was measured."""
    machine, versions = outcome.machine, outcome.versions
    yield from (
        f"# {title}",
        "",
        f"Written by `scripts/benchmark {command} --page {file}`; not edited by hand.",
        "",
        f"Machine: {machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB; guests are "
        f"{machine['guests']}, hosts are {machine['hosts']}. Memory that a hypervisor "
        "takes back when it is free was kept where the kernel allows that, and touched before.",
        "",
        "Versions: " + ", ".join(f"{name} {version}".strip() for name, version in _named(versions)) + ".",
        "",
    )
    if outcome.calibration:
        links = "; ".join(f"{name} {rate * 8 / 1e9:.2f} Gbit/s" for name, rate in outcome.calibration.items())
        yield from (f"Links, as plain TCP streams fill them: {links}.", "")
    yield from (
        *method.splitlines(),
        "",
    )


def targets(rows: Iterable[Row]) -> Iterator[str]:
    """The rows with a target, as a table."""
    yield from ("## What was to be reached", "")
    yield "| what | Limosa | baseline | | ratio | target | met |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for row in rows:
        if row.target is not None:
            verdict = "yes" if row.met else "**no**"
            cells = (row.what, _ours(row), row.baseline, _theirs(row), f"{row.ratio:.3g}", row.target, verdict)
            yield f"| {' | '.join(cells)} |"
    yield ""


def others(rows: Iterable[Row]) -> Iterator[str]:
    """The rows without one, as a table."""
    yield from ("## Other comparisons", "")
    yield "| what | Limosa | baseline | | ratio |"
    yield "| --- | --- | --- | --- | --- |"
    for row in rows:
        if row.target is None:
            yield f"| {row.what} | {_ours(row)} | {row.baseline} | {_theirs(row)} | {row.ratio:.3g} |"


def columns(title: str, measured: Mapping[str, Sequence[T]], figures: Iterable[Figure[T]]) -> Iterator[str]:
    """All figures of everything that was measured, side by side by label, as a table."""
    rounds = ", ".join(sorted({str(len(of)) for of in measured.values()}))
    yield from (f"## {title}, {rounds} rounds", "")
    yield f"| | {' | '.join(measured)} |"
    yield f"| --- |{' --- |' * len(measured)}"
    for figure in figures:
        cells = [_cell(figure.all_of(of)) for of in measured.values()]
        yield f"| {figure.name}, {figure.unit} | {' | '.join(cells)} |"
    yield ""


def _cell(values: Sequence[float]) -> str:
    """The median, and in brackets the range."""
    return f"{_number(median(values))} {_span(min(values), max(values))}"


#: How a page calls what takes part; the system's name says by itself what it is.
_NAMES = {"limosa": "Limosa", "qemu": "QEMU", "python": "Python", "system": ""}


def _named(versions: dict[str, str]) -> Iterator[tuple[str, str]]:
    return ((_NAMES.get(name, name), version) for name, version in versions.items())


def _ours(row: Row) -> str:
    return f"{row.limosa:.3g} {row.unit} {_span(*row.spread['limosa'])}"


def _theirs(row: Row) -> str:
    return f"{row.baseline_value:.3g} {row.unit} {_span(*row.spread['baseline'])}"


def _span(least: float, most: float) -> str:
    return f"[{_number(least)}-{_number(most)}]"


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
