"""Several moves at once: the limits of both hosts, the line, settings that are changed while moves are under way."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from harness.commands import limosa
from harness.hosts import wait_until
from harness.labs import LabHost, running_lab
from harness.steering import BRAKE, change, follow, looking, remove, settings, slow
from limosa.model.migration import Migration, Outcome, Phase
from limosa.model.vm import VmState
from limosa.wire import api, endpoints

pytestmark = [pytest.mark.qemu, pytest.mark.lab]

NAMES = ("vm1", "vm2", "vm3", "vm4")


@pytest.fixture(scope="module")
def lab() -> Iterator[list[LabHost]]:
    with running_lab() as made:
        yield made


@pytest.fixture
def hosts(lab: list[LabHost]) -> Iterator[list[LabHost]]:
    """Two hosts with four VMs on the first, which move slowly for as long as the brake is on."""
    source = lab[0]
    for name in NAMES:
        source.create(slow(name))
    with settings(source, BRAKE):
        yield lab
        change(source, {"bandwidth_mbit_per_s": 0})
        wait_until(lambda: not under_way(source), "every move has ended")
    for host in lab:
        remove(host, *[name for name in NAMES if host.vm(name) is not None])


def migrations(host: LabHost) -> list[Migration]:
    """The newest move of each VM, in the order in which they were accepted: one consistent look."""
    newest = {view.vm: view for view in reversed(host.client.call(endpoints.LIST_MIGRATIONS).migrations)}
    return sorted(newest.values(), key=lambda view: view.accepted_at)


def under_way(host: LabHost) -> list[Migration]:
    return [view for view in migrations(host) if view.outcome is Outcome.UNDER_WAY]


def leaving(look: list[Migration]) -> list[str]:
    """The VMs that have a slot at the source."""
    return [view.vm for view in look if view.outcome is Outcome.UNDER_WAY and view.phase is not Phase.WAITING]


def landing(look: list[Migration]) -> list[str]:
    """The VMs that have a slot at the destination too; they ask for it in their build-up and give it back first."""
    return [view.vm for view in look if view.phase in (Phase.COPY, Phase.SYNCHRONISE, Phase.SWITCHOVER)]


@contextmanager
def watched(host: LabHost) -> Iterator[list[list[Migration]]]:
    """Looks at all moves of a host, as many as there is time for, during the block."""
    looks: list[list[Migration]] = []
    with host.client as client:

        def look() -> None:
            found = client.call(endpoints.LIST_MIGRATIONS).migrations
            looks.append(sorted(found, key=lambda view: view.accepted_at))

        with looking(look):
            yield looks


@pytest.mark.parametrize(("outgoing", "incoming"), [(2, 4), (1, 4), (4, 2), (4, 1)])
def test_limits_hold_at_every_moment_and_all_arrive(hosts: list[LabHost], outgoing: int, incoming: int) -> None:
    source, destination = hosts
    change(source, {"bandwidth_mbit_per_s": 0})
    limits = settings(source, {"max_outgoing": outgoing}), settings(destination, {"max_incoming": incoming})
    with limits[0], limits[1], watched(source) as looks:
        said = limosa(source, "move", "--all", "--to", destination.name, "--json")
    assert said.code == 0
    assert sorted(view["vm"] for view in said.objects) == sorted(NAMES)
    assert all(view["outcome"] == "completed" for view in said.objects)
    assert max(len(leaving(look)) for look in looks) <= outgoing
    assert max(len(landing(look)) for look in looks) == min(outgoing, incoming)
    assert [destination.show(name).state for name in NAMES] == [VmState.RUNNING] * 4
    assert source.bystanders() == []


def test_the_line_is_shown_and_kept(hosts: list[LabHost]) -> None:
    source, destination = hosts
    with settings(source, {"max_outgoing": 1}):
        ids = [source.move(name, destination.name).id for name in NAMES]
        follow(source, ids[0], lambda view: view.phase is Phase.COPY)
        assert [(view.vm, view.place) for view in migrations(source)] == [
            ("vm1", None),
            ("vm2", 1),
            ("vm3", 2),
            ("vm4", 3),
        ]
        status = source.client.call(endpoints.HOST), destination.client.call(endpoints.HOST)
        assert [(host.outgoing, host.incoming) for host in status] == [(1, 0), (0, 1)]
        waits = migrations(source)[2]
        assert (waits.phase, waits.total_s) == (Phase.WAITING, None)
        assert (waits.progress.note, waits.place) == ("waits for other moves of this host", 2)
        # One in the middle leaves the line; those behind move up.
        said = limosa(source, "migration", "cancel", "vm3", "--json")
        assert (said.code, said.object["outcome"], said.object["total_s"]) == (0, "cancelled", 0)
        assert [view.place for view in migrations(source)] == [None, 1, None, 2]
        assert source.show("vm3").state is VmState.RUNNING
        with watched(source) as looks:
            change(source, {"bandwidth_mbit_per_s": 0})
            outcomes = [source.outcome(ids[number]).outcome for number in (0, 1, 3)]
        assert outcomes == [Outcome.COMPLETED] * 3
        order = list(dict.fromkeys(name for look in looks for name in leaving(look)))
        assert order == ["vm1", "vm2", "vm4"]
    assert source.show("vm3").state is VmState.RUNNING
    assert destination.vm("vm3") is None


def test_who_waits_in_line_moves_by_the_settings_there_are_then(hosts: list[LabHost]) -> None:
    source, destination = hosts
    with settings(source, {"max_outgoing": 1, "transport": "tcp"}):
        first, second = [source.move(name, destination.name).id for name in NAMES[:2]]
        follow(source, first, lambda view: view.phase is Phase.COPY)
        change(source, {"transport": "multichannel"})
        change(source, {"bandwidth_mbit_per_s": 0})
        assert [source.outcome(one).transport for one in (first, second)] == ["tcp", "multichannel"]


def test_a_changed_limit_works_at_once(hosts: list[LabHost]) -> None:
    source, destination = hosts
    with settings(source, {"max_outgoing": 1}), settings(destination, {"max_incoming": 3}):
        ids = [source.move(name, destination.name).id for name in NAMES]
        follow(source, ids[0], lambda view: view.phase is Phase.COPY)
        assert leaving(migrations(source)) == ["vm1"]
        for more, migration in enumerate(ids[1:3], start=2):
            change(source, {"max_outgoing": more})
            follow(source, migration, lambda view: view.phase is Phase.COPY)
        change(source, {"max_outgoing": 4})
        # The fourth has its slot here and waits for one over there.
        waits = follow(source, ids[3], lambda view: f"host '{destination.name}'" in view.progress.note)
        assert (waits.phase, waits.place) == (Phase.WAITING, 1)
        assert destination.client.call(endpoints.HOST).incoming == 3
        # A lower limit holds back the next one and leaves alone those that move.
        change(destination, {"max_incoming": 1})
        source.client.call(endpoints.CANCEL_MIGRATION, migration=ids[0])
        wait_until(lambda: destination.client.call(endpoints.HOST).incoming == 2, "the slot was given back")
        assert leaving(migrations(source)) == ["vm2", "vm3"]
        change(destination, {"max_incoming": 3})
        follow(source, ids[3], lambda view: view.phase is Phase.COPY)


def test_a_changed_cap_works_at_once_and_is_shared(hosts: list[LabHost]) -> None:
    source, destination = hosts
    ids = [source.move(name, destination.name).id for name in NAMES[:2]]
    for migration in ids:
        follow(source, migration, lambda view: view.phase is Phase.COPY)
    change(source, {"bandwidth_mbit_per_s": 32})
    for migration in ids:
        assert follow(source, migration, lambda view: rate(view) > 12).outcome is Outcome.UNDER_WAY
        assert rate(source.client.call(endpoints.SHOW_MIGRATION, migration=migration)) < 20, "half of the cap"
    source.client.call(endpoints.CANCEL_MIGRATION, migration=ids[0])
    follow(source, ids[1], lambda view: rate(view) > 24)
    change(source, {"bandwidth_mbit_per_s": 0})
    assert source.outcome(ids[1]).outcome is Outcome.COMPLETED


def test_a_network_has_its_cap_whoever_uses_it(hosts: list[LabHost]) -> None:
    source, destination = hosts
    migration = source.move(NAMES[0], destination.name).id
    follow(source, migration, lambda view: view.phase is Phase.COPY)
    network = {"network_bandwidth_mbit_per_s": {"10.78.0.0/24": 24}, "bandwidth_mbit_per_s": 0}
    change(source, network)
    follow(source, migration, lambda view: 12 < rate(view) < 28)
    assert limosa(source, "migration", "limit", NAMES[0], "8").code == 0
    follow(source, migration, lambda view: rate(view) < 12)
    change(source, {"network_bandwidth_mbit_per_s": {}})
    assert limosa(source, "migration", "limit", NAMES[0], "0").code == 0
    assert source.outcome(migration).outcome is Outcome.COMPLETED
    refused = limosa(source, "migration", "limit", migration, "8", "--json")
    assert (refused.code, refused.object["error"]["code"]) == (5, "conflict")


def rate(view: Migration) -> float:
    """Mbit/s."""
    return view.progress.rate_bytes_per_s * 8 / 1e6


def test_the_cap_of_one_move_is_its_own(hosts: list[LabHost]) -> None:
    source, destination = hosts
    change(source, {"bandwidth_mbit_per_s": 0})
    request = api.MoveRequest(vm="vm1", destination=destination.name, options=api.MoveOptions(bandwidth_mbit_per_s=8))
    slowed = source.client.call(endpoints.MOVE, request).id
    follow(source, slowed, lambda view: view.progress.rate_bytes_per_s > 0)
    assert source.outcome(source.move("vm2", destination.name).id).outcome is Outcome.COMPLETED
    now = source.client.call(endpoints.SHOW_MIGRATION, migration=slowed)
    assert (now.phase, rate(now) < 12) == (Phase.COPY, True), (
        "the other one was not slowed, and its end changed nothing"
    )
    source.client.call(endpoints.CANCEL_MIGRATION, migration=slowed)


def test_a_qemu_that_hangs_keeps_no_other_move_waiting(hosts: list[LabHost]) -> None:
    source, destination = hosts
    hanging = source.move("vm1", destination.name).id
    follow(source, hanging, lambda view: view.phase is Phase.COPY)
    with stopped(source, "vm1"):
        capped = source.move("vm2", destination.name).id
        follow(source, capped, lambda view: view.phase is Phase.COPY)
        assert limosa(source, "migration", "limit", "vm2", "8").code == 0
        change(source, {"bandwidth_mbit_per_s": 0})
        assert limosa(source, "migration", "limit", "vm2", "0").code == 0
        assert source.outcome(capped).outcome is Outcome.COMPLETED
        assert source.client.call(endpoints.SHOW_MIGRATION, migration=hanging).phase is Phase.COPY
    assert source.outcome(hanging).outcome is Outcome.COMPLETED


@contextmanager
def stopped(host: LabHost, vm: str) -> Iterator[None]:
    """Its QEMU does nothing during the block."""
    pid = host.show(vm).pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_an_invalid_change_changes_nothing(hosts: list[LabHost]) -> None:
    source, destination = hosts
    migration = source.move("vm1", destination.name).id
    follow(source, migration, lambda view: view.phase is Phase.COPY)
    page = source.state / "settings.toml"
    before = page.read_bytes()
    for changes in (
        ["max_outgoing=0"],
        ["max_outgoing=4", "bandwidth_mbit_per_s=-1"],
        ["bandwidth_mbit_per_s=0", "no_such_setting=1"],
        ["bandwidth_mbit_per_s=0", "convergence.first_downtime_ms=500"],
        ["migration_ports=50000,40000"],
        ["migration_networks=10.0.0.300/24"],
    ):
        said = limosa(source, "host", "settings", *changes, "--json")
        assert (said.code, said.object["error"]["code"]) == (2, "invalid-input"), changes
    assert page.read_bytes() == before
    now = source.client.call(endpoints.SETTINGS).settings
    assert (now.max_outgoing, now.bandwidth_mbit_per_s) == (2, 1)
    assert source.client.call(endpoints.SHOW_MIGRATION, migration=migration).outcome is Outcome.UNDER_WAY
