"""What moves of disks are to reach, and rows that say whether they did. Pure: measurements in, rows out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median

from benchmarks.figures import BLACKOUT, CPU, GAP, NOISE, STALL, TRANSFER, WALL, WIRE, Observed
from benchmarks.rows import Figure, Row, row
from limosa.model.base import Model

FASTER_THAN_VIRSH = 2.5
OF_LINK_PERCENT = 95.0
BLACKOUT_MS = 20.0
BLACKOUT_OF_VIRSH = 1 / 5
OF_CONVERT = 0.9
OF_OVERLAY = 1.1

#: What a row of moves is called by.
LABELS = {
    ("limosa", "tcp"): "Limosa, tcp, TLS",
    ("limosa", "multichannel"): "Limosa, multichannel, TLS",
    ("limosa", "compression"): "Limosa, compression, TLS",
    ("virsh", "tcp"): "virsh (no TLS)",
}


class DiskMeasured(Observed, frozen=True):
    """One move to the other host of the guest with its disk."""

    link: str
    #: limosa or virsh
    system: str
    transport: str
    round: int
    #: what plain TCP streams had carried over the link
    link_bytes_per_s: float


class Copied(Model, frozen=True):
    """One copy of the disk on its host. ``by``: limosa, blockcopy, or a program for images at rest."""

    by: str
    round: int
    wall_s: float


class OverlaySent(Model, frozen=True):
    """One move of a guest whose disk lies above an image that both hosts have."""

    round: int
    wall_s: float
    overlay_bytes: int
    #: by the source over its migration NIC, frames' headers included
    sent_bytes: int
    #: of it memory, by QEMU
    memory_bytes: int


def _of_link(move: DiskMeasured) -> float:
    return 100 * move.wire_bytes / move.link_bytes_per_s


LINK = Figure[DiskMeasured]("link used over the transfer", "%", lambda move: _of_link(move) / move.transfer_s)
LINK_OF_WALL = Figure[DiskMeasured]("link used over the wall time", "%", lambda move: _of_link(move) / move.wall_s)
COPY_WALL = Figure[Copied]("wall time", "s", lambda copy: copy.wall_s)
SENT = Figure[OverlaySent]("bytes sent", "MB", lambda sent: (sent.sent_bytes - sent.memory_bytes) / 1e6)
OVERLAY = Figure[OverlaySent]("its overlay", "MB", lambda sent: sent.overlay_bytes / 1e6)

FIGURES: tuple[Figure[DiskMeasured], ...] = (
    *(WALL, TRANSFER, LINK, LINK_OF_WALL),
    *(BLACKOUT, GAP, STALL, NOISE, CPU, WIRE),
)


def rows(moves: Sequence[DiskMeasured], copies: Sequence[Copied], sent: Sequence[OverlaySent]) -> list[Row]:
    """All comparisons."""
    found: list[Row] = []
    for link in dict.fromkeys(move.link for move in moves):
        found += _rows_of_link(link, [move for move in moves if move.link == link])
    return [*found, *_local(copies), *_overlay(sent)]


def by_label(moves: Sequence[DiskMeasured]) -> dict[str, list[DiskMeasured]]:
    """The moves by who made them, and how."""
    found: dict[str, list[DiskMeasured]] = {}
    for (system, transport), label in LABELS.items():
        if of := [move for move in moves if (move.system, move.transport) == (system, transport)]:
            found[label] = of
    return found


def _rows_of_link(link: str, moves: Sequence[DiskMeasured]) -> Iterable[Row]:
    virsh = [move for move in moves if move.system == "virsh"]
    for transport in dict.fromkeys(move.transport for move in moves if move.system == "limosa"):
        ours = [move for move in moves if (move.system, move.transport) == ("limosa", transport)]
        what = f"{link}, {transport}, TLS"
        yield from _speed(what, ours, virsh) if transport == "compression" else _filled(what, ours)
        yield from _against_virsh(what, ours, virsh)


def _speed(what: str, ours: Sequence[DiskMeasured], virsh: Sequence[DiskMeasured]) -> Iterable[Row]:
    met = WALL.median_of(ours) * FASTER_THAN_VIRSH <= WALL.median_of(virsh)
    target = f"{FASTER_THAN_VIRSH:g} times faster than virsh"
    yield row(f"{WALL.name}, {what}", WALL.unit, WALL.all_of(ours), "virsh", WALL.all_of(virsh), target, met)


def _filled(what: str, ours: Sequence[DiskMeasured]) -> Iterable[Row]:
    met = LINK.median_of(ours) >= OF_LINK_PERCENT
    target = f"at least {OF_LINK_PERCENT:g} % of the link"
    yield row(f"{LINK.name}, {what}", LINK.unit, LINK.all_of(ours), "plain TCP", [100.0], target, met)


def _against_virsh(what: str, ours: Sequence[DiskMeasured], virsh: Sequence[DiskMeasured]) -> Iterable[Row]:
    mine, theirs = BLACKOUT.median_of(ours), BLACKOUT.median_of(virsh)
    met = mine <= BLACKOUT_MS and mine <= BLACKOUT_OF_VIRSH * theirs
    target = f"at most {BLACKOUT_OF_VIRSH:g} of virsh's and {BLACKOUT_MS:g} {BLACKOUT.unit}"
    yield _held(what, BLACKOUT, ours, virsh, target, met)
    for figure in (WALL, LINK_OF_WALL, GAP, STALL, CPU, WIRE):
        yield _held(what, figure, ours, virsh)


def _held(
    what: str,
    figure: Figure[DiskMeasured],
    ours: Sequence[DiskMeasured],
    virsh: Sequence[DiskMeasured],
    target: str | None = None,
    met: bool | None = None,
) -> Row:
    return row(f"{figure.name}, {what}", figure.unit, figure.all_of(ours), "virsh", figure.all_of(virsh), target, met)


def _local(copies: Sequence[Copied]) -> Iterable[Row]:
    ours = [copy for copy in copies if copy.by == "limosa"]
    shares = {
        "blockcopy": (1.0, "at least as fast"),
        "qemu-img convert": (OF_CONVERT, f"{OF_CONVERT:.0%} of its speed"),
    }
    for by in dict.fromkeys(copy.by for copy in copies if copy.by != "limosa"):
        theirs = [copy for copy in copies if copy.by == by]
        share, target = shares.get(by, (None, None))
        met = COPY_WALL.median_of(ours) * share <= COPY_WALL.median_of(theirs) if share is not None else None
        what = f"disk to another folder of its host, {COPY_WALL.name}"
        yield row(what, COPY_WALL.unit, COPY_WALL.all_of(ours), by, COPY_WALL.all_of(theirs), target, met)


def _overlay(sent: Sequence[OverlaySent]) -> Iterable[Row]:
    if sent:
        met = median(SENT.of(one) / OVERLAY.of(one) for one in sent) <= OF_OVERLAY
        what = "disk above an image that both hosts have, bytes sent less memory's"
        target = f"at most {OF_OVERLAY:g} times its overlay"
        yield row(what, SENT.unit, SENT.all_of(sent), OVERLAY.name, OVERLAY.all_of(sent), target, met)
