"""What the benchmark of transports makes of its measurements."""

from __future__ import annotations

import argparse

import msgspec
import pytest

from benchmarks import transport_report
from benchmarks.measurements import Compared, Cut, Drained, Streamed, Trip
from benchmarks.rows import Row
from benchmarks.transport_targets import COMPRESSED, DIRECT, PARALLEL, PLAIN, SEQUENCE, ZSTD, rows
from benchmarks.transports import PARTS, parts
from benchmarks.witness import PAGE_BYTES, PIECE_BYTES, different_pages


def trip(transport: str, *, part: str = "compression", wall_s: float = 8.0, **changes: object) -> Trip:
    """A move over a link of 120 MB/s."""
    usual = Trip(
        part=part,
        link="1 Gbit/s",
        link_bytes_per_s=120_000_000.0,
        equal_nics=True,
        load="idle",
        guest="busy guest",
        system=ZSTD if transport == ZSTD else "limosa",
        transport=transport,
        way=transport,
        round=0,
        wall_s=wall_s,
        transfer_s=wall_s - 0.3,
        blackout_ms=10.0,
        cpu_s=5.0,
        wire_bytes=800_000_000,
        payload_bytes=780_000_000,
        others_per_s=0.0,
    )
    return msgspec.structs.replace(usual, **changes)


def drained(by: str, *, wall_s: float = 40.0, wire_bytes: int = 3_000_000_000) -> Drained:
    return Drained(by=by, guest="Debian guests", vms=8, round=0, wall_s=wall_s, cpu_s=9.0, wire_bytes=wire_bytes)


def cut(*, stall_s: float = 0.4, failed: str = "") -> Cut:
    return Cut(nic="mig0", host="source", round=0, after_percent=30, wall_s=3, stall_s=stall_s, failed=failed)


def find(found: list[Row], words: str, baseline: str = "") -> Row:
    """The row with a target."""
    (row,) = (row for row in found if words in row.what and row.target and row.baseline.startswith(baseline))
    return row


class TestCompression:
    """Against plain TCP and QEMU's own."""

    @pytest.mark.parametrize(("wall_s", "met"), [(2.5, True), (2.51, False)])
    def test_it_is_to_be_much_faster_than_plain(self, wall_s: float, met: bool) -> None:
        found = rows([trip("compression", wall_s=wall_s), trip("tcp", wall_s=8.0)])
        assert find(found, "wall time", "tcp").met is met

    @pytest.mark.parametrize(("wall_s", "met"), [(4.0, True), (4.1, False)])
    def test_and_no_slower_than_qemus(self, wall_s: float, met: bool) -> None:
        found = rows([trip("compression", wall_s=wall_s), trip("tcp"), trip(ZSTD, wall_s=4.0)])
        assert find(found, "wall time", ZSTD).met is met

    def test_each_guest_has_rows_of_its_own(self) -> None:
        ways = ("compression", "tcp")
        found = rows([trip(way, guest=guest) for guest in ("busy guest", "Debian guest") for way in ways])
        assert {row.what.split(", ")[2] for row in found} == {"busy guest", "Debian guest"}


class TestBusy:
    """While other VMs keep all processors busy."""

    @pytest.mark.parametrize(("others", "met"), [(97.0, True), (96.9, False)])
    def test_others_keep_their_speed(self, others: float, met: bool) -> None:
        found = rows(
            [trip("compression", part="busy", others_per_s=others), trip("tcp", part="busy", others_per_s=100)]
        )
        assert find(found, "other VMs' work,").met is met

    @pytest.mark.parametrize(("wall_s", "met"), [(8.0, True), (8.1, False)])
    def test_the_move_is_no_slower(self, wall_s: float, met: bool) -> None:
        found = rows([trip("compression", part="busy", wall_s=wall_s), trip("tcp", part="busy", wall_s=8.0)])
        assert find(found, "wall time").met is met


class TestMatrix:
    """``auto`` in each cell."""

    @pytest.mark.parametrize(("wall_s", "met"), [(4.4, True), (4.5, False)])
    def test_auto_is_held_against_the_best_of_that_cell(self, wall_s: float, met: bool) -> None:
        walls = {"tcp": 8.0, "compression": 4.0, "auto": wall_s}
        found = rows([trip(way, part="matrix", wall_s=wall) for way, wall in walls.items()])
        assert (find(found, "auto").baseline, find(found, "auto").met) == ("compression", met)

    def test_each_load_is_a_cell(self) -> None:
        ways = ("tcp", "compression", "auto")
        found = rows([trip(way, part="matrix", load=load) for load in ("idle", "half", "busy") for way in ways])
        assert len(found) == 3


@pytest.mark.parametrize("part", ["compression", "busy", "matrix", "nics"])
def test_a_part_that_ended_early_says_nothing(part: str) -> None:
    assert rows([trip("tcp", part=part)]) == []


class TestNics:
    """Several NICs at once."""

    @pytest.mark.parametrize(
        ("equal", "share", "met"),
        [(True, 0.951, True), (True, 0.949, False), (False, 0.901, True), (False, 0.899, False)],
    )
    def test_unequal_ones_may_lose_more(self, equal: bool, share: float, met: bool) -> None:
        moves = [
            trip("multichannel", part="nics", equal_nics=equal, payload_bytes=round(120e6 * 7.7 * share)),
            trip("tcp", part="nics", equal_nics=equal),
        ]
        assert find(rows(moves), "multichannel", "calibrated").met is met

    def test_one_nic_is_told_beside(self) -> None:
        found = rows([trip("multichannel", part="nics"), trip("tcp", part="nics", payload_bytes=390_000_000)])
        assert next(row.ratio for row in found if row.baseline == "one NIC (tcp)") == 2.0


class TestDrains:
    """Many VMs of one image."""

    def test_bytes_are_held_against_plain_and_time_against_virsh(self) -> None:
        others = [drained(by) for by in (PLAIN, SEQUENCE, PARALLEL, ZSTD)]
        found = rows([], drains=[drained(COMPRESSED, wall_s=10.0, wire_bytes=600_000_000), *others])
        assert [(row.baseline, row.unit, row.met) for row in found if row.target] == [
            (PLAIN, "MB", True),
            (SEQUENCE, "s", True),
            (PARALLEL, "s", True),
        ]
        found = rows([], drains=[drained(COMPRESSED, wall_s=10.1, wire_bytes=600_000_001), *others])
        assert [row.met for row in found if row.target] == [False, False, False]


class TestCuts:
    """NICs that are cut."""

    def test_the_longest_stall_of_all_counts(self) -> None:
        found = rows([], cuts=[cut(), cut(stall_s=1.1), cut()])
        stall = find(found, "longest stall")
        assert (stall.limosa, stall.met, stall.rounds) == (1.1, False, 3)
        assert find(found, "failed").met is True

    def test_one_that_fails_is_one_too_many(self) -> None:
        failed = find(rows([], cuts=[cut(), cut(failed="the stream broke"), cut()]), "failed")
        assert (failed.limosa, failed.met) == (1, False)


@pytest.mark.parametrize(("wall_s", "met"), [(1.66, True), (1.67, False)])
def test_relays_are_held_against_plain_tcp(wall_s: float, met: bool) -> None:
    streams = [
        Streamed(by=by, round=0, sent_bytes=1024**3, wall_s=wall, cpu_s=2.0)
        for by, wall in ((DIRECT, 1.0), ("relays", wall_s))
    ]
    found = rows([], streams)
    assert find(found, "relays").met is met
    assert next(row.limosa for row in found if row.unit == "s/GiB") == 2.0


@pytest.mark.parametrize(("different", "met"), [(0, True), (1, False)])
def test_no_page_may_differ(different: int, met: bool) -> None:
    one = Compared(transport="auto", way="multichannel", pages=262144, changed=9, different=different)
    assert find(rows([], compared=[one]), "auto (multichannel)").met is met


def test_different_pages_are_counted() -> None:
    one = bytes(4 * PIECE_BYTES)
    other = bytearray(one)
    assert different_pages(one, bytes(other)) == 0
    for at in (0, 1, PAGE_BYTES, len(one) - 1):
        other[at] = 1
    assert different_pages(one, bytes(other)) == 3


def test_the_page_has_all_parts() -> None:
    trips = (
        *(trip(way) for way in ("tcp", "compression")),
        *(trip(way, part="nics") for way in ("tcp", "multichannel")),
    )
    drains = (drained(COMPRESSED), drained(SEQUENCE))
    machine: dict[str, str | int] = {
        "processor": "P",
        "cores": 2,
        "memory_gib": 24,
        "guests": "emulated",
        "hosts": "ns",
    }
    report = transport_report.Report(
        machine=machine,
        versions={"limosa": "1"},
        calibration={"1 Gbit/s": 1.2e8},
        rows=tuple(rows(trips, drains=drains)),
        trips=trips,
        drains=drains,
    )
    assert "transports --only drain,cuts --page" in transport_report.page(report, ["drain", "cuts"])
    text = transport_report.page(report)
    for title in ("## Compression: busy guest, 1 Gbit/s, other VMs idle", "## Nics: busy guest", "## Drain, 1 rounds"):
        assert title in text


def test_parts_are_chosen_by_name() -> None:
    assert parts("nics,drain") == ["nics", "drain"]
    assert parts(",".join(PARTS)) == list(PARTS)
    with pytest.raises(argparse.ArgumentTypeError, match="no part 'nic'"):
        parts("nic,drain")
