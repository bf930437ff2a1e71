"""What a move does when the guest writes faster than its memory can be sent: each step of the policy, up to the last.

The guest rewrites 16 MiB as fast as it can, and far faster than the cap lets through. No move shows, or plans for, a
blackout over its budget.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from harness.commands import limosa
from harness.guests import LanClient, address_of
from harness.labs import RELAYS, LabHost, plug, running_lab, set_links
from harness.post_copy import (
    BUDGET_MS,
    POLICY,
    daemons_die_in_post_copy,
    has_arrived,
    is_possible,
    made_possible,
    start_writer,
)
from harness.steering import change, follow, settings, views
from limosa.model.migration import Migration, Outcome, Phase
from limosa.model.vm import VmState
from limosa.wire import endpoints

pytestmark = [pytest.mark.qemu, pytest.mark.lab]


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[LabHost]]:
    """Two hosts with a guest ``web`` on the first that writes all the time."""
    with running_lab() as made:
        start_writer(made[0])
        for host in made:
            change(host, POLICY)
        yield made


@pytest.fixture
def client(hosts: list[LabHost]) -> LanClient:
    return LanClient(hosts[0].lab, address_of(1))


def within_budget(seen: list[Migration]) -> bool:
    """Whether no view showed a plan for a longer blackout than the budget, and some showed one at all."""
    limits = [view.progress.downtime_limit_ms for view in seen if view.progress.downtime_limit_ms is not None]
    return bool(limits) and max(limits) <= BUDGET_MS


def test_without_further_means_the_move_ends_with_the_reason(hosts: list[LabHost], client: LanClient) -> None:
    source, destination = hosts
    with client.talking() as conversation:
        said = limosa(source, "move", "web", "--to", destination.name)
        conversation.wait_for_more()
        assert source.show("web").state is VmState.RUNNING
        assert client.sees_it_run()
    assert conversation.faults == []
    assert said.code == 8
    assert "does not converge: the guest writes " in said.error
    assert "the network carries " in said.error
    assert "to do: allow a longer blackout (--blackout-budget), post-copy" in said.error
    assert "code: not-converging" in said.error


def test_auto_converge_slows_the_guest_and_lets_it_go_after_a_cancel(hosts: list[LabHost], client: LanClient) -> None:
    source, destination = hosts
    with settings(source, {"convergence.auto_converge": True, "convergence.max_throttle_percent": 99}):
        migration = source.move("web", destination.name).id
        view = follow(source, migration, lambda view: view.progress.throttle_percent > 10)
        assert "its processors are slowed by up to " in view.progress.note
        source.client.call(endpoints.CANCEL_MIGRATION, migration=migration)
    assert client.sees_it_run()
    change(source, {"convergence.auto_converge": False})
    seen = follow(source, source.move("web", destination.name).id, lambda view: view.progress.iteration > 2)
    assert seen.progress.throttle_percent <= 1, "nothing is left of the throttle"
    source.client.call(endpoints.CANCEL_MIGRATION, migration=seen.id)


#: QEMU looks every 5 s what the guest has written, if it may slow it, and waits if it has not sent it since the last.
LOOKED_S = 11.0


@contextmanager
def unplugged(host: LabHost) -> Iterator[None]:
    """Without the cables of its migration NICs."""
    for nic in host.lab.nic_names:
        plug(host, nic, in_=False)
    try:
        yield
    finally:
        for nic in host.lab.nic_names:
            plug(host, nic, in_=True)


def test_a_guest_does_not_wait_for_a_dead_network(hosts: list[LabHost], client: LanClient) -> None:
    source, destination = hosts
    with settings(source, {"convergence.auto_converge": True, "convergence.patience_s": 60}):
        migration = source.move("web", destination.name).id
        follow(source, migration, lambda view: view.progress.iteration > 1)
        with unplugged(destination), client.talking() as conversation:
            conversation.go_on_for(LOOKED_S)
            view = source.client.call(endpoints.SHOW_MIGRATION, migration=migration)
            assert "no memory has been sent for " in view.progress.note
            source.client.call(endpoints.CANCEL_MIGRATION, migration=migration)
            conversation.go_on_for(LOOKED_S)
    assert source.show("web").state is VmState.RUNNING
    assert conversation.faults == []
    assert conversation.longest_gap_s < 2


@pytest.mark.long
def test_a_guest_that_may_be_slowed_does_not_wait_for_it_for_long(hosts: list[LabHost], client: LanClient) -> None:
    source, destination = hosts
    with settings(source, {"convergence.auto_converge": True, "convergence.patience_s": 60}):
        migration = source.move("web", destination.name).id
        follow(source, migration, lambda view: view.progress.throttle_percent > 10)
        with unplugged(destination), client.talking() as conversation:
            ended = source.outcome(migration)
            conversation.go_on_for(LOOKED_S)
    assert ended.fault is not None
    assert (ended.outcome, ended.fault.code) == (Outcome.FAILED, "migration-failed")
    assert source.show("web").state is VmState.RUNNING
    assert conversation.faults == []
    assert conversation.longest_gap_s < 10


@pytest.mark.long
def test_auto_converge_brings_it_to_its_end(hosts: list[LabHost], client: LanClient) -> None:
    source, destination = sorted(hosts, key=lambda host: host.vm("web") is None)
    patient = {"convergence.patience_s": 60, "convergence.max_throttle_percent": 99}
    with settings(source, {"convergence.auto_converge": True, **patient}):
        seen = list(views(source, source.move("web", destination.name).id))
    assert seen[-1].outcome is Outcome.COMPLETED, seen[-1].fault
    assert within_budget(seen)
    assert max(view.progress.throttle_percent for view in seen) > 10
    assert client.sees_it_run()


def test_where_post_copy_is_not_possible_it_is_warned_of_and_left_out(hosts: list[LabHost]) -> None:
    source, destination = hosts
    if is_possible():
        pytest.skip("QEMU's user may use userfaultfd on this machine")
    with settings(source, {"convergence.post_copy": True}):
        found = limosa(source, "check", "web", "--to", destination.name, "--json").object
        assert found["possible"]
        assert [(one["code"], one["severity"]) for one in found["findings"]] == [("post-copy-not-possible", "warning")]
        seen = list(views(source, source.move("web", destination.name).id))
    last = seen[-1]
    assert (last.outcome, last.phase) == (Outcome.FAILED, Phase.SYNCHRONISE)
    assert last.fault is not None
    assert last.fault.code == "not-converging"
    assert [finding.code for finding in last.findings] == ["post-copy-not-possible"]
    assert within_budget(seen)
    assert any(f"a blackout of up to {BUDGET_MS} ms is planned" in view.progress.note for view in seen)


@pytest.fixture(scope="module")
def userfaultfd(hosts: list[LabHost]) -> Iterator[None]:
    """From the first test that needs it on."""
    with made_possible(hosts):
        yield


def test_post_copy_brings_it_to_its_end(hosts: list[LabHost], client: LanClient, userfaultfd: None) -> None:
    source, destination = sorted(hosts, key=lambda host: host.vm("web") is None)
    with client.talking() as conversation, settings(source, {"convergence.post_copy": True}):
        seen = list(views(source, source.move("web", destination.name).id))
        conversation.wait_for_more()
    last = seen[-1]
    assert last.outcome is Outcome.COMPLETED, last.fault
    notes = [view.progress.note for view in seen]
    assert any("it continues at the destination, its memory follows" in note for note in notes)
    assert any("the guest runs at the destination, the rest of its memory follows" in note for note in notes)
    assert within_budget(seen)
    assert last.progress.transferred_bytes > max(view.progress.transferred_bytes for view in seen[:-3])
    source.wait_until_bare(but=RELAYS)
    assert destination.show("web").state is VmState.RUNNING
    assert conversation.faults == []


@pytest.mark.long
def test_a_post_copy_whose_network_was_cut_goes_on_when_it_is_back(
    hosts: list[LabHost], client: LanClient, userfaultfd: None
) -> None:
    source, destination = sorted(hosts, key=lambda host: host.vm("web") is None)
    with settings(source, {"convergence.post_copy": True, "bandwidth_mbit_per_s": 40}):
        migration = source.move("web", destination.name).id
        follow(source, migration, lambda view: view.phase is Phase.TEAR_DOWN)
        set_links(destination, "down")
        try:
            follow(source, migration, lambda view: "waits for the rest of its memory" in view.progress.note)
        finally:
            set_links(destination, "up")
        last = source.outcome(migration)
    assert last.outcome is Outcome.COMPLETED, last.fault
    assert destination.show("web").state is VmState.RUNNING
    assert client.sees_it_run()
    source.wait_until_bare(but=RELAYS)


def test_a_post_copy_goes_on_though_both_daemons_die(
    hosts: list[LabHost], client: LanClient, userfaultfd: None
) -> None:
    source, destination = sorted(hosts, key=lambda host: host.vm("web") is None)
    daemons_die_in_post_copy(source, destination, [source, destination])
    has_arrived(hosts, source, destination, client)
