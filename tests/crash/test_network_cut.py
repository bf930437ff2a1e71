"""The network between two hosts is cut at every step of both journals, and healed later.

While it is cut at most one copy runs. After it is healed exactly one runs, settled by the daemons alone. Where the
source cannot know whether it was heard, the VM is paused there and the move says so, also if the destination runs it; a
person can resolve it either way.
"""

from __future__ import annotations

import secrets
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.hosts import settled, tiny, wait_until
from harness.labs import LabHost, set_links
from limosa.errors import Conflict
from limosa.lab import lifecycle
from limosa.lab.plan import UPLINK, Lab
from limosa.model.migration import Outcome, Side
from limosa.model.vm import VmState
from limosa.wire import api, endpoints

pytestmark = [pytest.mark.qemu, pytest.mark.lab]

DAEMON = [sys.executable, str(Path(__file__).parents[1] / "harness" / "daemon.py")]
STEPS = [
    *(("source", step) for step in ("preparing", "migrating", "handing-over", "confirmed")),
    *(("destination", step) for step in ("reserved", "continuing")),
    pytest.param("destination", "owned", marks=pytest.mark.long),
]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """Two hosts whose daemons cut their own network when told to."""
    lab = lifecycle.plan(f"t{secrets.token_hex(3)}", hosts=2, nics=1, speed_mbit_per_s=0)
    try:
        lifecycle.up(lab, daemon=DAEMON)
        yield lab
    finally:
        lifecycle.down(lab.name)


@pytest.fixture
def hosts(lab: Lab) -> Iterator[list[LabHost]]:
    made = [LabHost(lab, name) for name in lab.host_names]
    yield made
    for host in made:
        set_links(host, "up")
        host.start()
    for host in made:
        host.clean()


def states(hosts: list[LabHost]) -> list[VmState | None]:
    views = [host.vm("vm") for host in hosts]
    return [view.state if view is not None else None for view in views]


def begin(hosts: list[LabHost], side: str, step: str, moment: str) -> str:
    """Start a VM on the first host and a move that cuts the network at the step; returns the migration."""
    first, second = hosts
    broken = first if side == "source" else second
    links = ",".join((UPLINK, *broken.lab.nic_names))
    broken.restart({"LIMOSA_TEST_BREAK": f"{side}:{step}:{moment}:network", "LIMOSA_TEST_LINKS": links})
    first.create(tiny("vm"))
    return first.move("vm", "host2").id


@pytest.mark.parametrize("moment", [pytest.param("before", marks=pytest.mark.long), "after"])
@pytest.mark.parametrize(("side", "step"), STEPS)
def test_one_runs_after_the_cut_is_healed(hosts: list[LabHost], side: str, step: str, moment: str) -> None:
    first, second = hosts
    begin(hosts, side, step, moment)
    broken = first if side == "source" else second
    wait_until(broken.is_cut, "the network is cut")
    wait_until(lambda: quiet(hosts), "both sides noticed")
    assert states(hosts).count(VmState.RUNNING) <= 1
    set_links(broken, "up")
    wait_until(lambda: settled(hosts), "every move has ended")
    wait_until(lambda: states(hosts).count(VmState.RUNNING) == 1, "one copy runs")
    assert sorted(map(str, states(hosts))) == ["None", "running"]
    assert sum(len(host.qemus()) for host in hosts) == 1


def quiet(hosts: list[LabHost]) -> bool:
    """Whether neither host has a session with the other any more: the source has ended or shows that it asks."""
    migrations = hosts[0].client.call(endpoints.LIST_MIGRATIONS).migrations
    under_way = [migration for migration in migrations if migration.outcome is Outcome.UNDER_WAY]
    return not under_way


@pytest.mark.parametrize("owner", [Side.SOURCE, pytest.param(Side.DESTINATION, marks=pytest.mark.long)])
def test_a_person_resolves_what_nobody_can_know(hosts: list[LabHost], owner: Side) -> None:
    first, second = hosts
    migration = begin(hosts, "source", "handing-over", "after")
    wait_until(
        lambda: first.client.call(endpoints.SHOW_MIGRATION, migration=migration).outcome is Outcome.UNRESOLVED,
        "it is shown as unresolved",
    )
    assert states(hosts) == [VmState.PAUSED, VmState.INCOMING]
    view = first.client.call(endpoints.SHOW_MIGRATION, migration=migration)
    assert view.fault is not None
    assert view.fault.code == "owner-unknown"
    assert migration in view.fault.todo
    wait_until(
        lambda: second.client.call(endpoints.SHOW_MIGRATION, migration=migration).outcome is Outcome.UNRESOLVED,
        "the destination shows it as unresolved, too",
    )
    held = second.client.call(endpoints.SHOW_MIGRATION, migration=migration).fault
    assert held is not None
    assert (held.code, f"resolve {migration} --owner destination" in held.todo) == ("owner-unknown", True)
    word = api.ResolveRequest(owner=owner)
    decided = first if owner is Side.SOURCE else second

    def is_heeded() -> bool:
        """The destination may hear some seconds after the source that the other is gone."""
        try:
            decided.client.call(endpoints.RESOLVE_MIGRATION, word, migration=migration)
        except Conflict as refusal:
            if decided is first or "try again in some seconds" not in refusal.todo:
                raise
            return False
        return True

    wait_until(is_heeded, "the person is heeded")
    index = 0 if owner is Side.SOURCE else 1
    wait_until(lambda: states(hosts)[index] is VmState.RUNNING, "it runs where the person said")
    assert states(hosts).count(VmState.RUNNING) == 1
    set_links(first, "up")
    wait_until(lambda: settled(hosts), "every move has ended")
    assert states(hosts)[index] is VmState.RUNNING
    assert states(hosts)[1 - index] is None
    assert sum(len(host.qemus()) for host in hosts) == 1
