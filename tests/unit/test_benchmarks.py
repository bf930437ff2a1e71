"""What the benchmark makes of its measurements."""

from __future__ import annotations

import array

import pytest

from benchmarks.gap import Answers
from benchmarks.report import Report, page
from benchmarks.systems.virsh import event_stamps
from benchmarks.targets import Measured, Row, Together, rows


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
    machine = {"processor": "P", "cores": 2, "memory_gib": 24, "guests": "emulated", "hosts": "namespaces"}
    versions = dict.fromkeys(("limosa", "qemu", "libvirt", "kernel", "system", "python"), "1")
    text = page(Report(machine, versions, {"unshaped": 1e9}, tuple(rows(moves, [])), moves, ()))
    assert "| blackout, unshaped, TLS | 70 ms [70-70] | virsh | 70 ms [70-70] | 1 |" in text
    assert text.count("**no**") == 3
