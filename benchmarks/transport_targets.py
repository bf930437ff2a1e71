"""What transports are to reach, and rows that say whether they did. Pure: measurements in, rows out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import msgspec

from benchmarks.measurements import Compared, Cut, Drained, Streamed, Trip
from benchmarks.rows import Figure, Row, row

FASTER_THAN_PLAIN = 3.2
OTHERS_KEEP = 0.97
OF_BEST = 1.1
OF_EQUAL_NICS, OF_UNEQUAL_NICS = 95.0, 90.0
FEWER_BYTES = 5.0
FASTER_THAN_VIRSH = 4.0
OF_DIRECT = 0.6
STALL_S = 1.0

GIB = 1024**3
#: What moves the guests of a drain, as its rows call it.
COMPRESSED, PLAIN, ZSTD = "limosa, compression", "limosa, tcp", "multifd-zstd"
SEQUENCE, PARALLEL = "virsh in sequence", "virsh in parallel"
DIRECT, DIRECT_TLS = "direct TCP", "direct TLS, by Python"
RELAYS, RELAYS_TLS = "relays", "relays with TLS"
#: What ``auto`` may choose between where there is one NIC.
FIXED = ("tcp", "compression")

#: Link, load, guest.
Cell = tuple[str, str, str]


WALL = Figure[Trip]("wall time", "s", lambda trip: trip.wall_s)
TRANSFER = Figure[Trip]("transfer time", "s", lambda trip: trip.transfer_s)
BLACKOUT = Figure[Trip]("blackout", "ms", lambda trip: trip.blackout_ms)
CPU = Figure[Trip]("processor time", "s", lambda trip: trip.cpu_s)
WIRE = Figure[Trip]("bytes on the wire", "MB", lambda trip: trip.wire_bytes / 1e6)
OTHERS = Figure[Trip]("other VMs' work", "steps/ms", lambda trip: trip.others_per_s)
SPEED = Figure[Trip]("speed of the transfer", "Mbit/s", lambda trip: trip.payload_bytes * 8e-6 / trip.transfer_s)
LINK = Figure[Trip]("calibrated links", "Mbit/s", lambda trip: trip.link_bytes_per_s * 8e-6)

THROUGHPUT = Figure[Streamed]("throughput", "MiB/s", lambda one: one.sent_bytes / 1024**2 / one.wall_s)
CPU_PER_GIB = Figure[Streamed]("processor time", "s/GiB", lambda one: one.cpu_s * GIB / one.sent_bytes)

DRAIN_WALL = Figure[Drained]("wall time", "s", lambda drain: drain.wall_s)
DRAIN_WIRE = Figure[Drained]("bytes on the wire", "MB", lambda drain: drain.wire_bytes / 1e6)
DRAIN_CPU = Figure[Drained]("processor time", "s", lambda drain: drain.cpu_s)

TRIP_FIGURES: tuple[Figure[Trip], ...] = (WALL, TRANSFER, BLACKOUT, CPU, WIRE)


def rows(
    trips: Sequence[Trip],
    streams: Sequence[Streamed] = (),
    drains: Sequence[Drained] = (),
    cuts: Sequence[Cut] = (),
    compared: Sequence[Compared] = (),
) -> list[Row]:
    """All comparisons, of the parts that were measured."""
    return [
        *_compression(of_part(trips, "compression")),
        *_busy(of_part(trips, "busy")),
        *_matrix(of_part(trips, "matrix")),
        *_nics(of_part(trips, "nics")),
        *_cuts(cuts),
        *_drains(drains),
        *_streams(streams),
        *_compared(compared),
    ]


def of_part(trips: Iterable[Trip], part: str) -> list[Trip]:
    """The trips of one part."""
    return [trip for trip in trips if trip.part == part]


def by_transport(trips: Iterable[Trip]) -> dict[str, list[Trip]]:
    """The trips by the transport that was asked for, in the order of the first of each."""
    found: dict[str, list[Trip]] = {}
    for trip in trips:
        found.setdefault(trip.transport, []).append(trip)
    return found


def by_cell(trips: Iterable[Trip], *needed: str) -> dict[Cell, dict[str, list[Trip]]]:
    """The trips by link, load and guest, and by transport; where not all ``needed`` transports are, it says nothing."""
    found: dict[Cell, list[Trip]] = {}
    for trip in trips:
        found.setdefault((trip.link, trip.load, trip.guest), []).append(trip)
    cells = {cell: by_transport(of_cell) for cell, of_cell in found.items()}
    return {cell: of_cell for cell, of_cell in cells.items() if set(needed) <= of_cell.keys()}


def _compression(trips: Sequence[Trip]) -> Iterator[Row]:
    for (link, _, guest), found in by_cell(trips, "compression", "tcp").items():
        ours, plain, zstd = found["compression"], found["tcp"], found.get(ZSTD, [])
        what = f"compression, {guest}, {link}, processors idle"
        fast = WALL.median_of(ours) * FASTER_THAN_PLAIN <= WALL.median_of(plain)
        yield _held(what, WALL, ours, plain, f"at least {FASTER_THAN_PLAIN:g} times faster", fast)
        if zstd:
            fast = WALL.median_of(ours) <= WALL.median_of(zstd)
            yield _held(what, WALL, ours, zstd, "at least as fast", fast)
        for theirs in filter(None, (plain, zstd)):
            for figure in (TRANSFER, WIRE, CPU, BLACKOUT):
                yield _held(what, figure, ours, theirs)


def _busy(trips: Sequence[Trip]) -> Iterator[Row]:
    for (link, _, guest), found in by_cell(trips, "compression", "tcp").items():
        ours, plain = found["compression"], found["tcp"]
        what = f"compression, {guest}, {link}, all processors busy with other VMs' work"
        kept = OTHERS.median_of(ours) >= OTHERS_KEEP * OTHERS.median_of(plain)
        yield _held(what, OTHERS, ours, plain, f"at least {OTHERS_KEEP:.0%} of it", kept)
        fast = WALL.median_of(ours) <= WALL.median_of(plain)
        yield _held(what, WALL, ours, plain, "no slower", fast)
        for figure in (TRANSFER, WIRE, CPU, BLACKOUT):
            yield _held(what, figure, ours, plain)


def _matrix(trips: Sequence[Trip]) -> Iterator[Row]:
    for (link, load, guest), found in by_cell(trips, "auto", *FIXED).items():
        ours = found["auto"]
        best = min((found[transport] for transport in FIXED), key=WALL.median_of)
        met = WALL.median_of(ours) <= OF_BEST * WALL.median_of(best)
        what = f"{WALL.name}, auto, {guest}, {link}, other VMs {load}"
        target = f"within {OF_BEST - 1:.0%} of the best fixed choice"
        yield row(what, WALL.unit, WALL.all_of(ours), best[0].transport, WALL.all_of(best), target, met)


def _nics(trips: Sequence[Trip]) -> Iterator[Row]:
    for (link, _, guest), found in by_cell(trips, "multichannel").items():
        ours, one = found["multichannel"], found.get("tcp", [])
        percent = OF_EQUAL_NICS if ours[0].equal_nics else OF_UNEQUAL_NICS
        met = SPEED.median_of(ours) >= percent / 100 * LINK.median_of(ours)
        what = f"{SPEED.name}, multichannel, {guest}, {link}"
        target = f"at least {percent:g} % of their sum"
        yield row(what, SPEED.unit, SPEED.all_of(ours), LINK.name, LINK.all_of(ours), target, met)
        if not one:
            continue
        yield row(what, SPEED.unit, SPEED.all_of(ours), "one NIC (tcp)", SPEED.all_of(one))
        for figure in (WALL, CPU, BLACKOUT):
            yield _held(f"multichannel, {guest}, {link}", figure, ours, one)


def _cuts(cuts: Sequence[Cut]) -> Iterator[Row]:
    if not cuts:
        return
    what = f"{len(cuts)} moves with a NIC cut on the way, each in turn"
    failed = [float(bool(cut.failed)) for cut in cuts]
    found = row(f"{what}: those that failed", "moves", failed, "allowed", [0.0], "none fails", not any(failed))
    yield msgspec.structs.replace(found, limosa=sum(failed))
    stalls = [cut.stall_s for cut in cuts]
    target = f"at most {STALL_S:g} s, the longest of all"
    found = row(f"{what}: longest stall", "s", stalls, "allowed", [STALL_S], target, max(stalls) <= STALL_S)
    yield msgspec.structs.replace(found, limosa=round(max(stalls), 3), ratio=round(max(stalls) / STALL_S, 4))


def _drains(drains: Sequence[Drained]) -> Iterator[Row]:
    found = {by: [drain for drain in drains if drain.by == by] for by in dict.fromkeys(drain.by for drain in drains)}
    ours = found.pop(COMPRESSED, [])
    if not ours:
        return
    what = f"drain of {ours[0].vms} VMs ({ours[0].guest}) with compression"
    for by, theirs in found.items():
        fewer = faster = None
        if by == PLAIN:
            fewer = DRAIN_WIRE.median_of(ours) * FEWER_BYTES <= DRAIN_WIRE.median_of(theirs)
        if by in (SEQUENCE, PARALLEL):
            faster = DRAIN_WALL.median_of(ours) * FASTER_THAN_VIRSH <= DRAIN_WALL.median_of(theirs)
        yield _drain(what, DRAIN_WIRE, ours, theirs, f"at least {FEWER_BYTES:g} times fewer", fewer)
        yield _drain(what, DRAIN_WALL, ours, theirs, f"at least {FASTER_THAN_VIRSH:g} times faster", faster)
        yield _drain(what, DRAIN_CPU, ours, theirs)


def _drain(
    what: str,
    figure: Figure[Drained],
    ours: Sequence[Drained],
    theirs: Sequence[Drained],
    target: str = "",
    met: bool | None = None,
) -> Row:
    ends = figure.all_of(ours), theirs[0].by, figure.all_of(theirs)
    return row(f"{figure.name}, {what}", figure.unit, *ends, target if met is not None else None, met)


def _streams(streams: Sequence[Streamed]) -> Iterator[Row]:
    found = {by: [one for one in streams if one.by == by] for by in dict.fromkeys(one.by for one in streams)}
    for by, without in ((RELAYS, DIRECT), (RELAYS_TLS, DIRECT_TLS)):
        ours, direct = found.get(by, []), found.get(without, [])
        if not ours or not direct:
            continue
        what = f"{by}, unshaped, incompressible"
        met = THROUGHPUT.median_of(ours) >= OF_DIRECT * THROUGHPUT.median_of(direct)
        target = f"at least {OF_DIRECT:.0%} of it"
        for figure, wanted, reached in ((THROUGHPUT, target, met), (CPU_PER_GIB, None, None)):
            ends = figure.all_of(ours), without, figure.all_of(direct)
            yield row(f"{figure.name}, {what}", figure.unit, *ends, wanted, reached)


def _compared(compared: Sequence[Compared]) -> Iterator[Row]:
    for one in compared:
        way = f"{one.transport} ({one.way})" if one.way != one.transport else one.transport
        what = f"pages of guest memory that differ after a move by {way}, of which {one.changed} changed meanwhile"
        found = row(what, "pages", [one.different], "pages compared", [one.pages], "none", one.different == 0)
        yield found


def _held(
    what: str,
    figure: Figure[Trip],
    ours: Sequence[Trip],
    theirs: Sequence[Trip],
    target: str | None = None,
    met: bool | None = None,
) -> Row:
    baseline = theirs[0].transport
    return row(f"{figure.name}, {what}", figure.unit, figure.all_of(ours), baseline, figure.all_of(theirs), target, met)
