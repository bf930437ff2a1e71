"""The convergence policy: steps in order, finitely many, and none while there is progress."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from limosa.migration.convergence import (
    SILENT_S,
    Action,
    BeginAnew,
    Convergence,
    GiveUp,
    Hold,
    RaiseDowntimeLimit,
    StartPostCopy,
    Throttle,
    Wait,
)
from limosa.qemu.protocol import MigrationState, MigrationStatistics
from limosa.settings.host import ConvergencePolicy

MIB = 1024 * 1024
POLICY = ConvergencePolicy(first_downtime_ms=4, blackout_budget_ms=60, patience_s=30)


#: seconds, and what QEMU says then
Look = tuple[float, MigrationStatistics]


def look(at: float, remaining: int, *, iteration: int = 5, transferred: int | None = None) -> Look:
    """``transferred``: null for what is sent of memory again and again."""
    return at, MigrationStatistics(
        state=MigrationState.ACTIVE,
        iteration=iteration,
        transferred_bytes=round(at * 100 * MIB) if transferred is None else transferred,
        remaining_bytes=remaining,
        rate_bytes_per_s=100 * MIB,
        dirty_rate_bytes_per_s=50 * MIB,
    )


def run(policy: ConvergencePolicy, looks: list[Look], *, slows: bool = True) -> list[Action]:
    state = Convergence.begin(policy, slows=slows)
    actions: list[Action] = []
    for one in looks:
        state, action = state.judge(*one)
        if not isinstance(action, Wait):
            actions.append(action)
    return actions


def stalled(seconds: int, remaining: int = 50 * MIB) -> list[Look]:
    return [look(tick / 5, remaining) for tick in range(seconds * 5)]


def test_falling_remainder_is_left_alone() -> None:
    looks = [look(tick / 5, int(500 * MIB * 0.85**tick)) for tick in range(40)]
    assert run(POLICY, looks) == []


def test_a_limit_that_is_needed_and_within_the_budget_is_set_at_once() -> None:
    # 2 MiB at 100 MiB/s need 20 ms; with a margin of a quarter, 25 ms.
    first = run(POLICY, stalled(1, remaining=2 * MIB))[0]
    assert isinstance(first, RaiseDowntimeLimit)
    assert first.milliseconds == 25


def test_steps_come_in_order_and_end() -> None:
    policy = ConvergencePolicy(first_downtime_ms=4, blackout_budget_ms=60, post_copy=True, patience_s=30)
    kinds = [type(action) for action in run(policy, stalled(60))]
    assert kinds[:6] == [RaiseDowntimeLimit, Throttle, Throttle, Throttle, Throttle, StartPostCopy]


def test_a_guest_that_cannot_be_slowed_in_this_try_has_another() -> None:
    actions = run(POLICY, stalled(4), slows=False)
    assert [type(action) for action in actions[:2]] == [RaiseDowntimeLimit, BeginAnew]


def test_post_copy_is_rather_taken_than_another_try() -> None:
    policy = ConvergencePolicy(post_copy=True)
    kinds = [type(action) for action in run(policy, stalled(4), slows=False)]
    assert kinds[:2] == [RaiseDowntimeLimit, StartPostCopy]


def test_a_guest_that_may_not_be_slowed_has_no_other_try() -> None:
    policy = ConvergencePolicy(auto_converge=False, patience_s=10)
    assert not any(isinstance(action, BeginAnew) for action in run(policy, stalled(60), slows=False))


@pytest.mark.parametrize("iteration", [1, 5])
def test_nothing_is_done_to_a_guest_while_nothing_is_sent(iteration: int) -> None:
    state = Convergence.begin(POLICY)
    for tick in range(round(5 * POLICY.patience_s)):
        state, action = state.judge(*look(tick / 5, 50 * MIB, iteration=iteration, transferred=7))
        assert isinstance(action, Wait) or tick / 5 < SILENT_S
    assert isinstance(action, Wait)
    assert action.note == "no memory has been sent for 30 s"
    state, action = state.judge(*look(POLICY.patience_s, 50 * MIB, iteration=iteration, transferred=7))
    assert isinstance(action, GiveUp)
    assert action.is_silent


def test_the_budget_is_never_exceeded() -> None:
    for action in run(POLICY, stalled(60)):
        if isinstance(action, RaiseDowntimeLimit):
            assert action.milliseconds <= POLICY.blackout_budget_ms


def test_without_further_steps_it_gives_up_with_the_reason() -> None:
    policy = ConvergencePolicy(auto_converge=False, patience_s=10)
    last = run(policy, stalled(60))[-1]
    assert isinstance(last, GiveUp)
    assert "the guest writes 50.0 MiB/s" in last.why


def test_a_first_pass_that_stands_still_gives_up_too() -> None:
    looks = [look(tick, 500 * MIB, iteration=1, transferred=7) for tick in range(200)]
    assert isinstance(run(POLICY, looks)[-1], GiveUp)


def test_a_slow_first_pass_is_left_alone() -> None:
    looks = [look(tick, 500 * MIB, iteration=1, transferred=tick) for tick in range(2000)]
    assert run(POLICY, looks) == []


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=300), st.booleans(), st.booleans())
def test_no_guest_makes_it_loop_for_ever(remainders: list[int], auto_converge: bool, post_copy: bool) -> None:
    policy = ConvergencePolicy(auto_converge=auto_converge, post_copy=post_copy, patience_s=20)
    looks = [look(tick, remaining) for tick, remaining in enumerate(remainders)]
    at, last = looks[-1]
    sent = 0 if post_copy else None  # what is sent in post-copy is progress
    looks += [look(at + tick, last.remaining_bytes, transferred=sent) for tick in range(1, 60)]
    actions = run(policy, looks)
    assert isinstance(actions[-1], GiveUp)
    assert sum(isinstance(action, StartPostCopy) for action in actions) <= 1


def test_a_guest_that_should_not_stop_yet_is_held_and_that_is_no_stall() -> None:
    state, _ = Convergence.begin(POLICY).judge(*look(0, 50 * MIB))
    held = [Hold("a disk"), *[Wait("a disk")] * 9]
    for at, expected in enumerate(held):
        state, action = state.hold(100.0 * at, "a disk")
        assert action == expected
    state, action = state.judge(*look(900.2, 50 * MIB))
    assert isinstance(action, RaiseDowntimeLimit)
    assert action.milliseconds == POLICY.first_downtime_ms
    _, action = state.judge(*look(900.4, 50 * MIB))
    assert isinstance(action, Wait)
