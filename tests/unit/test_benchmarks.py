"""What the benchmark makes of its measurements."""

from __future__ import annotations

import array
import os
import signal
import zlib

import pytest

from benchmarks import disk, storage_report, storage_targets
from benchmarks.ending import ended_in_order, undisturbed
from benchmarks.gap import Answers
from benchmarks.pages import terminal
from benchmarks.report import Report, page
from benchmarks.rows import Row
from benchmarks.storage_targets import Copied, DiskMeasured, OverlaySent
from benchmarks.systems.virsh import event_stamps
from benchmarks.targets import Measured, Together, rows
from benchmarks.turn import rotated

MACHINE: dict[str, str | int] = {
    "processor": "P",
    "cores": 2,
    "memory_gib": 24,
    "guests": "emulated",
    "hosts": "namespaces",
}
VERSIONS = dict.fromkeys(("limosa", "qemu", "libvirt", "kernel", "system", "python"), "1")


def measured(system: str, *, encrypted: bool = False, of_virsh: float = 1.0, number: int = 0) -> Measured:
    """A move that takes this share of what ``virsh`` takes, but the same transfer."""
    return Measured(
        link="unshaped",
        system=system,
        encrypted=encrypted,
        round=number,
        wall_s=2.0 + 2.0 * of_virsh,
        transfer_s=2.0,
        overhead_s=2.0 * of_virsh,
        blackout_ms=70.0 * of_virsh,
        gap_ms=150.0 * of_virsh,
        stall_ms=150.0,
        noise_ms=5.0,
        cpu_s=1.0,
        wire_bytes=800_000_000,
    )


def row(found: list[Row], figure: str, baseline: str) -> Row:
    return next(row for row in found if row.what.startswith(figure) and row.baseline == baseline and row.target)


class TestAnswers:
    """The client's gap."""

    answers = Answers(array.array("d", [1.000, 1.001, 1.002, 1.052, 1.053, 1.100]))

    def test_it_is_the_longest_silence_less_the_period(self) -> None:
        assert self.answers.gap_ms(1.0, 1.06) == pytest.approx(49)

    def test_a_silence_counts_if_only_its_edge_is_in_the_window(self) -> None:
        assert self.answers.gap_ms(1.03, 1.04) == pytest.approx(49)
        assert self.answers.gap_ms(1.0525, 1.0528) == pytest.approx(0, abs=0.01)

    def test_no_answer_at_all_is_no_small_gap(self) -> None:
        assert Answers(array.array("d")).gap_ms(1.0, 2.0) == float("inf")


class TestRows:
    """Comparisons with targets."""

    @pytest.mark.parametrize(("of_virsh", "met"), [(0.09, True), (0.11, False)])
    def test_the_blackout_is_held_against_virsh(self, of_virsh: float, met: bool) -> None:
        moves = [measured("limosa", encrypted=True, of_virsh=of_virsh), measured("virsh")]
        assert row(rows(moves, []), "blackout", "virsh").met is met

    def test_the_blackout_has_a_limit_of_its_own(self) -> None:
        slow = measured("virsh", of_virsh=10)
        moves = [measured("limosa", encrypted=True, of_virsh=0.2), slow]
        assert row(rows(moves, []), "blackout", "virsh").met is False

    def test_the_median_counts_and_the_range_is_told(self) -> None:
        ours = [
            measured("limosa", encrypted=True, of_virsh=share, number=n) for n, share in enumerate((0.1, 0.05, 0.9))
        ]
        found = row(rows([*ours, measured("virsh")], []), "overhead", "virsh")
        assert (found.limosa, found.rounds, found.met) == (0.2, 3, True)
        assert found.spread["limosa"] == (0.1, 1.8)

    def test_only_equal_encryption_is_compared_with_the_bare_script(self) -> None:
        moves = [measured("limosa", encrypted=True), measured("bare")]
        assert [found for found in rows(moves, []) if found.baseline.startswith("bare")] == []

    @pytest.mark.parametrize(("wall_s", "met"), [(14.0, True), (14.1, False)])
    def test_many_at_once_are_held_against_the_link(self, wall_s: float, met: bool) -> None:
        run = Together(
            link="1 Gbit/s", vms=8, round=0, wall_s=wall_s, wire_bytes=1_250_000_000, bytes_per_s=125_000_000.0
        )
        assert [found.met for found in rows([], [run])] == [met]


def test_events_of_virsh_are_read_with_qemus_own_time() -> None:
    said = (
        "event STOP at 1700000000.000250 for domain 'virsh': <null>\n"
        'event MIGRATION at 1700000000.100000 for domain \'virsh\': {"status":"completed"}\n'
    )
    assert event_stamps(said, "STOP", "") == [1700000000.00025]
    assert event_stamps(said, "MIGRATION", '"completed"') == [1700000000.1]
    assert event_stamps(said, "MIGRATION", '"failed"') == []


def test_the_page_says_what_was_missed() -> None:
    moves = (measured("limosa", encrypted=True), measured("virsh"))
    text = page(
        Report(
            machine=MACHINE,
            versions=VERSIONS,
            calibration={"unshaped": 1e9},
            rows=tuple(rows(moves, [])),
            moves=moves,
            together=(),
        )
    )
    assert "| blackout, unshaped, TLS | 70 ms [70-70] | virsh | 70 ms [70-70] | 1 |" in text
    assert text.count("**no**") == 3


def with_disk(
    system: str, transport: str = "tcp", *, wall_s: float = 20.0, transfer_s: float = 19.0, blackout_ms: float = 100.0
) -> DiskMeasured:
    """A move of two gigabytes over a link of 108 MB/s, which takes about 19 s at best."""
    return DiskMeasured(
        link="1 Gbit/s",
        system=system,
        transport=transport,
        round=0,
        link_bytes_per_s=108_000_000.0,
        wall_s=wall_s,
        transfer_s=transfer_s,
        blackout_ms=blackout_ms,
        gap_ms=150.0,
        stall_ms=150.0,
        noise_ms=5.0,
        cpu_s=1.0,
        wire_bytes=2_000_000_000,
    )


class TestStorageRows:
    """Comparisons of moves of disks."""

    def find(self, found: list[Row], words: str, baseline: str) -> Row:
        return next(row for row in found if words in row.what and row.baseline == baseline and row.target)

    @pytest.mark.parametrize(("transfer_s", "met"), [(19.4, True), (19.6, False)])
    def test_the_link_is_to_be_filled(self, transfer_s: float, met: bool) -> None:
        moves = [with_disk("limosa", transfer_s=transfer_s), with_disk("virsh")]
        assert self.find(storage_targets.rows(moves, [], []), "link used", "plain TCP").met is met

    @pytest.mark.parametrize(("wall_s", "met"), [(8.0, True), (8.1, False)])
    def test_compression_is_held_against_virsh(self, wall_s: float, met: bool) -> None:
        moves = [with_disk("limosa", "compression", wall_s=wall_s), with_disk("virsh", wall_s=20.0)]
        assert self.find(storage_targets.rows(moves, [], []), "wall time", "virsh").met is met

    @pytest.mark.parametrize(("ours", "virsh", "met"), [(20.0, 100.0, True), (21.0, 300.0, False), (15.0, 70.0, False)])
    def test_the_blackout_has_two_limits(self, ours: float, virsh: float, met: bool) -> None:
        moves = [with_disk("limosa", blackout_ms=ours), with_disk("virsh", blackout_ms=virsh)]
        assert self.find(storage_targets.rows(moves, [], []), "blackout", "virsh").met is met

    @pytest.mark.parametrize(("by", "wall_s", "met"), [("blockcopy", 4.4, False), ("qemu-img convert", 4.1, True)])
    def test_a_copy_on_one_host_may_be_slower_than_qemu_img_only(self, by: str, wall_s: float, met: bool) -> None:
        copies = [Copied(by="limosa", round=0, wall_s=4.5), Copied(by=by, round=0, wall_s=wall_s)]
        assert self.find(storage_targets.rows([], copies, []), "another folder", by).met is met

    @pytest.mark.parametrize(("sent", "met"), [(320_000_000, True), (321_000_000, False)])
    def test_memory_is_not_held_against_the_overlay(self, sent: int, met: bool) -> None:
        move = OverlaySent(round=0, wall_s=5, overlay_bytes=200_000_000, sent_bytes=sent, memory_bytes=100_000_000)
        assert self.find(storage_targets.rows([], [], [move]), "above", "its overlay").met is met

    def test_the_page_and_the_terminal_have_them(self) -> None:
        moves = (with_disk("limosa"), with_disk("limosa", "compression"), with_disk("virsh"))
        copies = (Copied(by="limosa", round=0, wall_s=4.5), Copied(by="blockcopy", round=0, wall_s=4.5))
        found = storage_targets.rows(moves, copies, [])
        report = storage_report.Report(
            machine=MACHINE,
            versions=VERSIONS | {"libnbd-bin": "1"},
            calibration={"1 Gbit/s": 1e8},
            rows=tuple(found),
            moves=moves,
            copies=copies,
            overlays=(),
        )
        text = storage_report.page(report)
        assert "| | Limosa, tcp, TLS | Limosa, compression, TLS | virsh (no TLS) |" in text
        assert "| wall time, s | 4.5 [4.5-4.5] | 4.5 [4.5-4.5] |" in text
        assert "MISSED  wall time, 1 Gbit/s, compression, TLS: 20 s; virsh: 20 s" in terminal(found)


class TestDisk:
    """What the disks hold."""

    def test_text_compresses_about_four_times_in_any_alphabet(self) -> None:
        text = disk.text_like(1 << 20)
        other = disk.enciphered(text, 1)
        assert other != text
        for one in (text, other):
            assert 3 < len(one) / len(zlib.compress(one, 1)) < 5

    def test_pieces_do_not_repeat_each_other(self) -> None:
        text = disk.text_like(16 * 1024)
        both = disk.enciphered(text, 1) + disk.enciphered(text, 3)
        assert len(zlib.compress(both, 9)) > 1.8 * len(zlib.compress(text, 9))


class TestEnding:
    """Signals that ask for the end."""

    def test_the_first_raises_and_no_other_cuts_the_way_out_short(self) -> None:
        steps: list[str] = []

        def work() -> None:
            with ended_in_order():
                try:
                    os.kill(os.getpid(), signal.SIGTERM)
                    steps.append("went on")
                finally:
                    os.kill(os.getpid(), signal.SIGINT)
                    steps.append("tidied up")

        with pytest.raises(SystemExit) as ended:
            work()
        assert ended.value.code == 128 + signal.SIGTERM
        assert steps == ["tidied up"]

    def test_it_waits_for_what_is_being_taken_away(self) -> None:
        steps: list[str] = []

        def work() -> None:
            with ended_in_order():
                with undisturbed():
                    os.kill(os.getpid(), signal.SIGTERM)
                    steps.append("taken away")
                steps.append("went on")

        with pytest.raises(SystemExit):
            work()
        assert steps == ["taken away"]

    def test_handlers_are_as_before_afterwards(self) -> None:
        before = signal.getsignal(signal.SIGTERM)
        with ended_in_order():
            assert signal.getsignal(signal.SIGTERM) is not before
        assert signal.getsignal(signal.SIGTERM) is before


def test_each_round_begins_with_another_turn() -> None:
    assert [rotated("abc", number)[0] for number in range(4)] == ["a", "b", "c", "a"]
