"""A VM moves between hosts of a lab, and nobody notices: its client, the switches, the moves beside it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pyroute2 import IPRoute

from harness.guests import LanClient, address_of, linux, wait_until_it_serves
from harness.hosts import tiny
from harness.labs import RELAYS, LabHost, running_lab
from harness.steering import move, remove
from limosa.lab import namespaces
from limosa.lab.plan import SWITCH, UPLINK
from limosa.model.migration import Outcome, Phase
from limosa.model.vm import VmState
from limosa.wire import api, endpoints

pytestmark = [pytest.mark.qemu, pytest.mark.lab]

Hosts = tuple[LabHost, LabHost]
MAC = "52:54:00:0a:0b:0c"
#: A client that had to wait longer would have been cut off. What a move costs is for the benchmark to say, on a machine
#: that does nothing else.
STALL_S = 3.0


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with running_lab(transport="auto") as (first, second):
        yield first, second


@pytest.fixture(scope="module")
def client(hosts: Hosts) -> LanClient:
    """A client of the guest ``web``, which serves on one of the hosts."""
    hosts[0].create(linux("web"))
    client = LanClient(hosts[0].lab, address_of(1))
    wait_until_it_serves(client)
    return client


def test_a_client_keeps_its_connection_over_moves_back_and_forth(hosts: Hosts, client: LanClient) -> None:
    first, second = hosts
    before = client.uptime()
    with client.talking() as conversation:
        for source, destination in [(first, second), (second, first)] * 2:
            move(source, "web", destination)
            conversation.wait_for_more()
            assert source.vm("web") is None
            assert destination.show("web").state is VmState.RUNNING
    assert conversation.faults == []
    assert conversation.longest_gap_s < STALL_S
    assert client.uptime() > before, "the guest did not restart"


def test_a_move_tells_what_it_was(hosts: Hosts, client: LanClient) -> None:
    first, second = hosts
    begun = first.move("web", "host2")
    views = list(first.client.stream(endpoints.WATCH_MIGRATION, migration=begun.id))
    migration = views[-1]
    assert migration.outcome is Outcome.COMPLETED, migration.fault
    percents = [view.progress.percent for view in views]
    assert percents == sorted(percents)
    assert percents[-1] == 100
    ended = list(migration.phases)
    assert ended == [phase for phase in Phase if phase in migration.phases], "phases come in their order"
    assert {Phase.BUILD_UP, Phase.COPY, Phase.SWITCHOVER, Phase.TEAR_DOWN} <= set(ended)
    worked_s = sum(seconds for phase, seconds in migration.phases.items() if phase != Phase.WAITING)
    assert migration.total_s == pytest.approx(worked_s, rel=0.01)
    assert migration.total_s is not None
    assert migration.blackout_ms is not None
    assert 0 < migration.blackout_ms < 1000 * STALL_S
    assert migration.transfer_s is not None
    assert 0 < migration.transfer_s < migration.total_s
    assert migration.progress.transferred_bytes > 10 * 1024 * 1024
    assert first.client.call(endpoints.SHOW_MIGRATION, migration=begun.id) == migration
    first.wait_until_bare(but=RELAYS)
    move(second, "web", first)


def test_every_switch_has_learned_the_vm_when_it_has_arrived(hosts: Hosts) -> None:
    """There is no guest in this VM: only the announcement can have taught the switches."""
    first, second = hosts
    first.create(api.NewVm(name="mute", memory_mib=32, accelerator="tcg", nics=(api.NewNic(switch="lan", mac=MAC),)))
    try:
        for source, destination in ((first, second), (second, first)):
            move(source, "mute", destination)
            assert port_of(destination.namespace, MAC).startswith("lm"), "the VM's tap"
            assert port_of(source.lab.wire, MAC) == f"{SWITCH}-{destination.name}"
            assert port_of(source.namespace, MAC) == UPLINK
    finally:
        remove(first, "mute")


def port_of(namespace: str, mac: str) -> str:
    """The port behind which the bridge ``lan`` of a namespace knows an address; empty if it does not."""

    def look() -> str:
        with IPRoute() as netlink:
            bridge = netlink.link_lookup(ifname=SWITCH)[0]
            for entry in netlink.fdb("dump"):
                if entry.get("NDA_LLADDR") == mac and entry.get("NDA_MASTER") == bridge:
                    return str(netlink.link("get", index=entry["ifindex"])[0].get("ifname"))
        return ""

    return namespaces.inside(namespace, look)


def test_a_paused_vm_arrives_paused(hosts: Hosts) -> None:
    first, second = hosts
    first.create(tiny("still"))
    first.client.call(endpoints.PAUSE_VM, vm="still")
    migration = move(first, "still", second)
    assert migration.blackout_ms is None, "it did not run, so nothing was interrupted"
    assert second.show("still").state is VmState.PAUSED
    second.client.call(endpoints.RESUME_VM, vm="still")
    assert second.show("still").state is VmState.RUNNING
    remove(second, "still")
