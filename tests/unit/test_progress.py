"""The bar: it never goes back, and it gets somewhere."""

from __future__ import annotations

import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from limosa.migration.progress import Bar, of_disks, of_layers, progress, remaining_s
from limosa.model.migration import Phase, Progress
from limosa.model.storage import DiskProgress
from limosa.qemu.protocol import MigrationStatistics

PHASES = list(Phase)
TOTAL = 10**9


def look(remaining: int, rate: float = 100.0, dirty: float = 0.0) -> MigrationStatistics:
    return MigrationStatistics(
        remaining_bytes=remaining, total_bytes=TOTAL, rate_bytes_per_s=rate, dirty_rate_bytes_per_s=dirty
    )


@given(st.lists(st.tuples(st.sampled_from(PHASES), st.integers(0, 2 * TOTAL)), max_size=200))
def test_it_never_goes_back_whatever_qemu_says(looks: list[tuple[Phase, int]]) -> None:
    bar = Bar()
    for phase, remaining in looks:
        following = bar.entered(phase).moved(phase, look(remaining))
        assert bar.percent <= following.percent < 100
        bar = following


def test_the_first_pass_fills_most_of_it() -> None:
    bar = Bar().entered(Phase.COPY)
    assert bar.moved(Phase.COPY, look(TOTAL)).percent < 5
    assert 40 < bar.moved(Phase.COPY, look(TOTAL // 2)).percent < 50
    assert bar.moved(Phase.COPY, look(0)).percent == 85


def test_later_passes_go_by_the_least_that_remained() -> None:
    bar = Bar().entered(Phase.SYNCHRONISE).moved(Phase.SYNCHRONISE, look(1000))
    half = bar.moved(Phase.SYNCHRONISE, look(500))
    assert half.moved(Phase.SYNCHRONISE, look(900)).percent == half.percent
    assert 91 < half.percent < 92


def test_empty_pages_count_in_the_first_pass() -> None:
    first = MigrationStatistics(
        remaining_bytes=500, total_bytes=1500, rate_bytes_per_s=1, iteration=1, total_s=10, dirty_rate_bytes_per_s=50
    )
    bar = Bar().moved(Phase.COPY, first)
    assert (bar.pace, remaining_s(first, bar.pace)) == (100.0, 10.0)
    later = dataclasses.replace(first, remaining_bytes=100, total_s=10.5)
    assert bar.moved(Phase.COPY, later).pace == 800.0
    stuck = dataclasses.replace(first, total_s=20.0)
    assert bar.moved(Phase.COPY, stuck).pace == 1.0
    assert bar.moved(Phase.SYNCHRONISE, dataclasses.replace(later, iteration=2)).pace == 1.0
    again = dataclasses.replace(first, remaining_bytes=1400, total_s=0.5)
    assert bar.moved(Phase.COPY, again).pace == 1.0, "it began anew, another way"


def test_remaining_time_is_not_promised_to_a_guest_that_writes_faster() -> None:
    assert remaining_s(look(1000), 100) == 10
    assert remaining_s(look(1000, dirty=50), 100) == 20
    assert remaining_s(look(1000, dirty=100), 100) is None
    assert remaining_s(look(1000, rate=0), 0) is None


def test_what_is_shown_has_no_more_digits_than_mean_something() -> None:
    memory = progress(Bar(), look(10**8, 11169659.574468086, 1.1), limit_ms=0.1 + 0.2, note="")
    bar = Bar().seen(0.0, 0)
    disk = DiskProgress(disk="vda", copied_bytes=1000, total_bytes=10**6)
    _, disks = of_disks(bar, Progress(), [disk], 0.7)
    _, layers = of_layers(bar, Progress(), 1000, 10**6, 0.7)
    assert (memory.rate_bytes_per_s, memory.dirty_rate_bytes_per_s, memory.downtime_limit_ms) == (11169660.0, 1.0, 0.3)
    for shown in (disks, layers):
        assert (shown.rate_bytes_per_s, shown.remaining_s) == (1429.0, 699.3)
