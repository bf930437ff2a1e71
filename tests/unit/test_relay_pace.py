"""What is learned about carrier and worker."""

from __future__ import annotations

import pytest

from limosa.transport.relay.pace import Condensing, Line, Pace, Patience, Throttle

MB = 1_000_000


def test_known_pages_are_looked_for_where_the_line_is_slow_and_wherever_they_are_many() -> None:
    condensing = Condensing()
    assert not condensing.pays(None)
    for _ in range(20):
        condensing.note(MB, MB, 0.0003)
    assert condensing.pays(120 * MB)
    assert not condensing.pays(1200 * MB)
    for _ in range(20):
        condensing.note(MB, MB // 5, 0.0003)
    assert condensing.remainder == pytest.approx(0.2, rel=0.01)
    assert condensing.pays(1200 * MB)


def test_a_line_that_is_kept_busy_is_measured() -> None:
    line = Line()
    for tick in range(40):
        sent = tick * 2 * MB + MB
        line.note(tick * 0.02, sent, MB, MB // 2)
    assert line.rate == pytest.approx(100 * MB)
    assert line.busy_for_s() == pytest.approx(0.005)
    assert line.carries(0.01) == pytest.approx(MB)


def test_a_line_that_waits_for_us_is_not_slow() -> None:
    line = Line()
    line.note(0, MB, MB, MB)
    line.note(0.01, MB, 0, 0)
    fast = line.rate
    for tick in range(1, 50):
        line.note(tick * 0.05, MB + tick * 1000, 0, 0)
    assert line.rate == fast == pytest.approx(100 * MB)
    assert line.busy_for_s() == 0


def test_a_line_that_becomes_slow_is_noticed() -> None:
    line = Line()
    sent = 0
    for tick in range(100):
        sent += 2 * MB if tick < 50 else MB // 10
        line.note(tick * 0.02, sent, MB, MB)
    assert line.rate == pytest.approx(5 * MB, rel=0.01)


def test_a_worker_that_is_held_up_is_expected_to_take_longer_but_not_for_ever() -> None:
    pace = Pace()
    for _ in range(50):
        pace.note(MB, MB // 4, 0.008, 0.004)
    assert pace.seconds_per_byte == pytest.approx(8e-9, rel=0.01)
    for _ in range(50):
        pace.note(MB, MB // 4, 10, 0.004)
    assert pace.seconds_per_byte == pytest.approx(16e-9, rel=0.01)
    assert pace.remainder == pytest.approx(0.25, rel=0.01)


def test_a_small_chunk_and_a_worker_that_was_held_up_do_not_make_it_seem_slow_for_ever() -> None:
    pace = Pace()
    pace.note(1000, 1000, 0.010, 0.010)
    assert pace.seconds_per_byte < 1 / 50e6
    for _ in range(50):
        pace.note(MB, MB, 10, 10)
    assert pace.seconds_per_byte == pytest.approx(4 / 50e6, rel=0.01)


def test_what_did_not_compress_is_still_tried() -> None:
    pace = Pace()
    for _ in range(50):
        pace.note(MB, MB, 0.004, 0.004)
    assert pace.remainder == 0.75


def test_a_worker_that_is_late_is_left_alone_longer_each_time() -> None:
    patience = Patience()
    pauses = []
    for turn in range(9):
        now = turn * 10.0
        patience.late(now)
        pauses.append(next(ms for ms in range(1001) if patience.allows(now + ms / 1000 + 1e-6)))
    assert pauses == [2, 4, 8, 16, 32, 50, 50, 50, 50]
    assert not patience.trusts


def test_a_worker_that_found_a_free_processor_is_forgiven() -> None:
    patience = Patience()
    for _ in range(3):
        patience.late(0.0)
    assert not patience.allows(0.0)
    assert not patience.trusts
    patience.served(0.002, 0.0019)
    assert patience.allows(0.0)
    assert patience.trusts


def test_a_worker_that_had_to_wait_for_others_is_not() -> None:
    patience = Patience()
    patience.late(0.0)
    patience.served(0.010, 0.0019)
    assert not patience.allows(0.001)


def test_what_is_throttled_is_taken_at_its_rate_in_portions() -> None:
    throttle = Throttle()
    assert (throttle.room(0.0), throttle.wait_s(0.0)) == (None, 0.0)
    throttle.set(10.0, MB)
    taken, now = 0, 10.0
    while now < 20.0:
        now += throttle.wait_s(now)
        room = throttle.room(now)
        assert room == MB // 20
        throttle.take(now, room)
        taken += room
    assert taken == pytest.approx(10 * MB, abs=room)
    throttle.set(now, 0)
    assert (throttle.room(now), throttle.wait_s(now)) == (None, 0.0)


def test_a_throttle_that_had_nothing_to_take_lets_no_more_through_for_it() -> None:
    throttle = Throttle()
    throttle.set(0.0, MB)
    throttle.take(100.0, MB)
    assert throttle.room(100.0) == 0
    assert throttle.wait_s(100.0) == pytest.approx(1.0)
    throttle.set(100.5, 2 * MB)  # another cap holds at once
    assert throttle.wait_s(100.5) == 0.0
