"""What moves are to reach, and rows that say whether they did. Pure: measured moves in, rows out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median

from benchmarks.figures import BLACKOUT, CPU, GAP, NOISE, STALL, TRANSFER, WALL, WIRE, Observed
from benchmarks.rows import Figure, Row, row
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


class Measured(Observed, frozen=True):
    """One move of the busy guest."""

    link: str
    #: limosa, bare or virsh
    system: str
    encrypted: bool
    round: int
    overhead_s: float


class Together(Model, frozen=True):
    """Idle VMs moved at once by one command."""

    link: str
    vms: int
    round: int
    wall_s: float
    wire_bytes: int
    #: the link's nominal speed
    bytes_per_s: float


OVERHEAD = Figure[Measured]("overhead", "s", lambda move: move.overhead_s)

FIGURES: tuple[Figure[Measured], ...] = (WALL, TRANSFER, OVERHEAD, BLACKOUT, GAP, STALL, NOISE, CPU, WIRE)


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
        gap = GAP.median_of(limosa)
        met = gap <= GAP.median_of(bare) + GAP_OVER_BARE_MS
        target = f"at most {GAP_OVER_BARE_MS:g} ms over the bare script's"
        yield _row(link, GAP, "TLS", limosa, "bare script, TLS", bare, target, met)
    for label, ours, theirs in (("TLS", limosa, bare), ("no TLS", plain, bare_plain)):
        if ours and theirs:
            ratio = TRANSFER.median_of(ours) / TRANSFER.median_of(theirs)
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
        ours, theirs = figure.median_of(limosa), figure.median_of(virsh)
        met = ours <= theirs * of_virsh and (limit is None or ours <= limit)
        target = f"at most {of_virsh:g} of virsh's" + (f" and {limit:g} {figure.unit}" if limit is not None else "")
        yield _row(link, figure, "TLS", limosa, "virsh", virsh, target, met)
    for figure in (WALL, TRANSFER, STALL, CPU, WIRE):
        yield _row(link, figure, "TLS", limosa, "virsh", virsh)


def _row(
    link: str,
    figure: Figure[Measured],
    label: str,
    limosa: Sequence[Measured],
    baseline: str,
    theirs: Sequence[Measured],
    target: str | None = None,
    met: bool | None = None,
) -> Row:
    what = f"{figure.name}, {link}, {label}"
    return row(what, figure.unit, figure.all_of(limosa), baseline, figure.all_of(theirs), target, met)


def _together(link: str, runs: Sequence[Together]) -> Row:
    runs = [run for run in runs if run.link == link]
    walls = [run.wall_s for run in runs]
    ideals = [run.wire_bytes / run.bytes_per_s for run in runs]
    allowed = [TOGETHER_OF_LINK * ideal + TOGETHER_MORE_S for ideal in ideals]
    return row(
        f"{runs[0].vms} idle VMs moved at once, wall time, {link}, TLS",
        "s",
        walls,
        "bytes on the wire over the link's speed",
        ideals,
        f"at most {TOGETHER_OF_LINK:g} times that plus {TOGETHER_MORE_S:g} s",
        median(walls) <= median(allowed),
    )
