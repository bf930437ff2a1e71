"""What is to be reached, and rows that say whether it was. Pure: measured moves in, rows out.

Every figure is the median over the rounds. A comparison is between systems measured in the same run, turn by turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from limosa.model.base import Model

OVERHEAD_S = 0.3
OVERHEAD_OF_VIRSH = 1 / 8
BLACKOUT_MS = 8.0
BLACKOUT_OF_VIRSH = 1 / 10
GAP_OVER_BARE_MS = 5.0
GAP_OF_VIRSH = 0.4
TRANSFER_OF_BARE = 1.05
TOGETHER_OF_LINK = 1.3
TOGETHER_MORE_S = 1.0


class Measured(Model, frozen=True):
    """One move of the busy guest."""

    link: str
    #: limosa, bare or virsh
    system: str
    encrypted: bool
    round: int
    wall_s: float
    transfer_s: float
    overhead_s: float
    blackout_ms: float
    #: the client's longest gap around the switchover
    gap_ms: float
    #: the client's longest gap in the whole move, and in a second before it
    stall_ms: float
    noise_ms: float
    cpu_s: float
    wire_bytes: int


class Together(Model, frozen=True):
    """Idle VMs moved at once by one command."""

    link: str
    vms: int
    round: int
    wall_s: float
    wire_bytes: int
    #: the link's nominal speed
    bytes_per_s: float


class Row(Model, frozen=True):
    """A comparison. ``target`` is what was to be reached, ``met`` whether it was; null if it is for information."""

    what: str
    limosa: float
    baseline: str
    baseline_value: float
    unit: str
    ratio: float
    target: str | None
    met: bool | None
    rounds: int
    #: smallest and largest figure of Limosa and of the baseline
    spread: dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Figure:
    """Something that was measured of each move."""

    name: str
    unit: str
    of: Callable[[Measured], float]


WALL = Figure("wall time", "s", lambda move: move.wall_s)
TRANSFER = Figure("transfer time", "s", lambda move: move.transfer_s)
OVERHEAD = Figure("overhead", "s", lambda move: move.overhead_s)
BLACKOUT = Figure("blackout", "ms", lambda move: move.blackout_ms)
GAP = Figure("client's gap", "ms", lambda move: move.gap_ms)
STALL = Figure("client's longest stall", "ms", lambda move: move.stall_ms)
NOISE = Figure("client's noise floor", "ms", lambda move: move.noise_ms)
CPU = Figure("processor time", "s", lambda move: move.cpu_s)
WIRE = Figure("bytes on the wire", "MB", lambda move: move.wire_bytes / 1e6)

FIGURES = (WALL, TRANSFER, OVERHEAD, BLACKOUT, GAP, STALL, NOISE, CPU, WIRE)


def rows(moves: Sequence[Measured], together: Sequence[Together]) -> list[Row]:
    """All comparisons, link by link."""
    found: list[Row] = []
    for link in dict.fromkeys(move.link for move in moves):
        found += _rows_of_link(link, [move for move in moves if move.link == link])
    return found + [_together(link, together) for link in dict.fromkeys(run.link for run in together)]


def of_system(moves: Iterable[Measured], system: str, *, encrypted: bool) -> list[Measured]:
    """The moves one system made, with or without TLS."""
    return [move for move in moves if move.system == system and move.encrypted is encrypted]


def _rows_of_link(link: str, moves: Sequence[Measured]) -> Iterable[Row]:
    limosa, plain = (of_system(moves, "limosa", encrypted=tls) for tls in (True, False))
    bare, bare_plain = (of_system(moves, "bare", encrypted=tls) for tls in (True, False))
    virsh = of_system(moves, "virsh", encrypted=False)
    if limosa and virsh:
        yield from _against_virsh(link, limosa, virsh)
    if limosa and bare:
        gap = _median(GAP, limosa)
        met = gap <= _median(GAP, bare) + GAP_OVER_BARE_MS
        target = f"at most {GAP_OVER_BARE_MS:g} ms over the bare script's"
        yield _row(link, GAP, "TLS", limosa, "bare script, TLS", bare, target, met)
    for label, ours, theirs in (("TLS", limosa, bare), ("no TLS", plain, bare_plain)):
        if ours and theirs:
            ratio = _median(TRANSFER, ours) / _median(TRANSFER, theirs)
            target = f"within {TRANSFER_OF_BARE - 1:.0%} of the bare script's"
            yield _row(link, TRANSFER, label, ours, f"bare script, {label}", theirs, target, ratio <= TRANSFER_OF_BARE)
            for figure in (WALL, BLACKOUT, CPU):
                yield _row(link, figure, label, ours, f"bare script, {label}", theirs)


def _against_virsh(link: str, limosa: Sequence[Measured], virsh: Sequence[Measured]) -> Iterable[Row]:
    for figure, of_virsh, limit in (
        (OVERHEAD, OVERHEAD_OF_VIRSH, OVERHEAD_S),
        (BLACKOUT, BLACKOUT_OF_VIRSH, BLACKOUT_MS),
        (GAP, GAP_OF_VIRSH, None),
    ):
        ours, theirs = _median(figure, limosa), _median(figure, virsh)
        met = ours <= theirs * of_virsh and (limit is None or ours <= limit)
        target = f"at most {of_virsh:g} of virsh's" + (f" and {limit:g} {figure.unit}" if limit is not None else "")
        yield _row(link, figure, "TLS", limosa, "virsh", virsh, target, met)
    for figure in (WALL, TRANSFER, STALL, CPU, WIRE):
        yield _row(link, figure, "TLS", limosa, "virsh", virsh)


def _row(
    link: str,
    figure: Figure,
    label: str,
    limosa: Sequence[Measured],
    baseline: str,
    theirs: Sequence[Measured],
    target: str | None = None,
    met: bool | None = None,
) -> Row:
    value, other = _median(figure, limosa), _median(figure, theirs)
    return Row(
        what=f"{figure.name}, {link}, {label}",
        limosa=round(value, 3),
        baseline=baseline,
        baseline_value=round(other, 3),
        unit=figure.unit,
        ratio=_ratio(value, other),
        target=target,
        met=met,
        rounds=len(limosa),
        spread={"limosa": _range(figure, limosa), "baseline": _range(figure, theirs)},
    )


def _together(link: str, runs: Sequence[Together]) -> Row:
    runs = [run for run in runs if run.link == link]
    walls = [run.wall_s for run in runs]
    ideals = [run.wire_bytes / run.bytes_per_s for run in runs]
    allowed = [TOGETHER_OF_LINK * ideal + TOGETHER_MORE_S for ideal in ideals]
    return Row(
        what=f"{runs[0].vms} idle VMs moved at once, wall time, {link}, TLS",
        limosa=round(median(walls), 3),
        baseline="bytes on the wire over the link's speed",
        baseline_value=round(median(ideals), 3),
        unit="s",
        ratio=_ratio(median(walls), median(ideals)),
        target=f"at most {TOGETHER_OF_LINK:g} times that plus {TOGETHER_MORE_S:g} s",
        met=median(walls) <= median(allowed),
        rounds=len(runs),
        spread={"limosa": (round(min(walls), 3), round(max(walls), 3)), "baseline": _ends(ideals)},
    )


def _median(figure: Figure, moves: Sequence[Measured]) -> float:
    return median(figure.of(move) for move in moves)


def _range(figure: Figure, moves: Sequence[Measured]) -> tuple[float, float]:
    return _ends([figure.of(move) for move in moves])


def _ends(values: Sequence[float]) -> tuple[float, float]:
    return round(min(values), 3), round(max(values), 3)


def _ratio(value: float, baseline: float) -> float:
    return round(value / baseline, 4) if baseline else 0.0
