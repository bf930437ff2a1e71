"""Moves whose relays spread the stream over several networks: where Multipath TCP is missing, and over unequal NICs.

Everything is judged by the bytes each path has carried, which the kernel counts, never by time: except for a stall,
which is one.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
from pyroute2 import IPRoute

from harness.commands import limosa
from harness.disks import goes_on, number
from harness.guests import LanClient, address_of, linux, type_in, wait_for_console, wait_until_it_serves
from harness.hosts import wait_until
from harness.labs import (
    RELAYS,
    LabHost,
    break_connections,
    end_relays,
    in_host,
    off_the_network,
    plug,
    reaches,
    running_lab,
    without_address,
)
from harness.steering import follow, looking, settings
from limosa.lab import namespaces
from limosa.model.migration import Migration, Outcome, Phase
from limosa.model.vm import VmState
from limosa.settings.host import Transport
from limosa.wire import api, endpoints

pytestmark = [pytest.mark.qemu, pytest.mark.lab]

MIB = 1024 * 1024
#: Slow enough to be interfered with, and unequal.
SPEEDS = (60, 20)
#: With one that others do without.
THREE_SPEEDS = (60, 20, 20)
#: Its empty pages alone are 18 MB.
BIG_MIB = 4096
#: For a path that has a second less than the others.
BIGGER_MIB = 8192
USED_BYTES = 1 * MIB
#: Nothing ends under it before a test wants it to.
BRAKE = {"bandwidth_mbit_per_s": 4}
#: What the lab's switches and NICs have.
MTU, SEGMENTS = 1500, 65535
#: What the switches do not pass on.
JUMBO = 9000
#: Too little for what TCP sends otherwise.
SHORT = 600
SWITCH = Path("/proc/sys/net/mptcp/enabled")
#: Memory that no compression makes less.
LOAD = {"fill_mib": 8, "random_mib": 8}
#: On which side the cable is pulled out, one time after another.
FLAPS = (0, 1, 0)
#: A stream that stands still for longer has waited for a path that is cut.
STALL_S = 3.0


@pytest.fixture(scope="module")
def lab() -> Iterator[list[LabHost]]:
    with running_lab(2, nics=2, speed_mbit_per_s=SPEEDS, transport="auto") as hosts:
        yield hosts


@pytest.fixture
def hosts(lab: list[LabHost]) -> Iterator[list[LabHost]]:
    yield lab
    for host in lab:
        host.clean()


@pytest.fixture(scope="module")
def wide_lab() -> Iterator[list[LabHost]]:
    with running_lab(2, nics=3, speed_mbit_per_s=THREE_SPEEDS, transport="auto") as hosts:
        yield hosts


@pytest.fixture
def wide(wide_lab: list[LabHost]) -> Iterator[list[LabHost]]:
    """Hosts with three NICs."""
    yield wide_lab
    for host in wide_lab:
        host.clean()
        end_relays(host)


@contextmanager
def without_multipath_tcp(host: LabHost) -> Iterator[None]:
    namespaces.inside(host.namespace, lambda: SWITCH.write_text("0"))
    try:
        yield
    finally:
        namespaces.inside(host.namespace, lambda: SWITCH.write_text("1"))


def big(host: LabHost, memory_mib: int = BIG_MIB) -> None:
    """A VM that takes seconds to move, without a guest that would have to boot."""
    host.create(api.NewVm(name="vm", memory_mib=memory_mib, accelerator="tcg"))


def begin(hosts: list[LabHost], transport: Transport = "multichannel", vm: str = "vm") -> str:
    first, second = hosts
    request = api.MoveRequest(vm=vm, destination=second.name, options=api.MoveOptions(transport=transport))
    return first.client.call(endpoints.MOVE, request).id


def carried(migration: Migration) -> dict[str, int]:
    """Bytes by the source's NIC."""
    assert migration.route is not None
    return {path.nic_here: path.sent_bytes for path in migration.route.paths}


def has_sent(count: int, migration: Migration) -> bool:
    return migration.route is not None and sum(carried(migration).values()) > count


def arrived(hosts: list[LabHost], migration: str, vm: str = "vm") -> Migration:
    ended = hosts[0].outcome(migration)
    assert ended.outcome is Outcome.COMPLETED, ended.fault
    assert ended.route is not None
    assert ended.route.striped
    assert hosts[1].show(vm).state is VmState.RUNNING
    return ended


@contextmanager
def cut(hosts: list[LabHost], side: int, nic: str) -> Iterator[None]:
    """A cable is out of a NIC during the block; afterwards packets go there again."""
    plug(hosts[side], nic, in_=False)
    try:
        yield
    finally:
        plug(hosts[side], nic, in_=True)
        there = hosts[1].lab.migration_addresses("host2")[int(nic[-1])]
        wait_until(lambda: reaches(hosts[0], there), "the cable is in again")


@contextmanager
def renamed(host: LabHost, nic: str, name: str) -> Iterator[None]:
    """A NIC has another name during the block."""
    in_host(host, lambda netlink, index: netlink.link("set", index=index, ifname=name), nic)
    try:
        yield
    finally:
        in_host(host, lambda netlink, index: netlink.link("set", index=index, ifname=nic), name)


def in_proportion(migration: Migration) -> bool:
    """Whether the slower NIC has carried about a quarter of all."""
    used = carried(migration)
    return 0.15 < used["mig1"] / sum(used.values()) < 0.4


def test_unequal_nics_carry_in_proportion(hosts: list[LabHost]) -> None:
    big(hosts[0])
    striped = "one stream for each network, because the NICs are unequal"
    both = f"2 NICs together have 80 Mbit/s; {striped}"
    for asked, why in (
        ("auto", f"compression (a processor compresses faster than 80 Mbit/s; {both})"),
        ("multichannel", f"multichannel (it was asked for; {striped})"),
    ):
        said = limosa(hosts[0], "check", "vm", "--to", "host2", "--transport", asked).out
        assert f"transport: {why}" in said
    ended = arrived(hosts, begin(hosts))
    assert ended.transport == "multichannel"
    assert ended.route is not None
    assert ended.route.compressed is None
    assert in_proportion(ended), carried(ended)
    assert sum(carried(ended).values()) >= ended.progress.transferred_bytes


def test_a_network_keeps_its_cap_beside_others_and_is_used_in_full_when_that_is_lifted(hosts: list[LabHost]) -> None:
    big(hosts[0], BIGGER_MIB)
    fast = hosts[0].lab.migration_networks[0]
    with settings(hosts[0], {"network_bandwidth_mbit_per_s": {fast: 4}}):
        migration = begin(hosts)
        capped = carried(follow(hosts[0], migration, lambda view: has_sent(6 * USED_BYTES, view)))
    assert capped["mig0"] < capped["mig1"] / 2
    ended = carried(arrived(hosts, migration))
    assert ended["mig0"] - capped["mig0"] > ended["mig1"] - capped["mig1"]


@pytest.mark.parametrize("side", [0, 1], ids=["source", "destination"])
def test_without_multipath_tcp_on_one_side_all_networks_are_used_and_it_says_so(
    hosts: list[LabHost], side: int
) -> None:
    big(hosts[0])
    with without_multipath_tcp(hosts[side]):
        ended = arrived(hosts, begin(hosts))
    assert min(carried(ended).values()) > USED_BYTES, carried(ended)
    why = f"one stream for each network, because Multipath TCP is off on host '{hosts[side].name}'"
    assert why in limosa(hosts[0], "migration", "show", ended.id).out


@pytest.mark.parametrize("side", [0, pytest.param(1, marks=pytest.mark.long)], ids=["source", "destination"])
@pytest.mark.parametrize("nic", ["mig0", "mig1"])
def test_a_nic_that_is_cut_costs_speed_and_not_the_move(hosts: list[LabHost], side: int, nic: str) -> None:
    big(hosts[0])
    migration = begin(hosts)
    before = carried(follow(hosts[0], migration, lambda view: has_sent(4 * USED_BYTES, view)))
    with cut(hosts, side, nic):
        after = carried(arrived(hosts, migration))
    other = {"mig0": "mig1", "mig1": "mig0"}[nic]
    assert after[other] - before[other] > 5 * (after[nic] - before[nic])


def until_carried(host: LabHost, migration: str, nic: str, more: int) -> None:
    """Wait until a NIC has carried so much more."""
    before = carried(follow(host, migration, lambda view: has_sent(0, view)))
    follow(host, migration, lambda view: carried(view)[nic] > before[nic] + more)


@contextmanager
def stalls(host: LabHost, migration: str) -> Iterator[list[float]]:
    """The longest time, in seconds, for which nothing was sent during the block, once that is over."""
    sent: dict[int, float] = {}
    found: list[float] = []
    with host.client as client:

        def look() -> None:
            view = client.call(endpoints.SHOW_MIGRATION, migration=migration)
            if view.outcome is Outcome.UNDER_WAY:
                sent.setdefault(sum(carried(view).values()), time.monotonic())

        with looking(look, pause_s=0.02):
            yield found
            over = time.monotonic()
    moments = [*sent.values(), over]
    found.append(max(after - before for before, after in itertools.pairwise(moments)))


def test_a_link_that_flaps_costs_no_byte_and_no_long_stall(hosts: list[LabHost]) -> None:
    hosts[0].create(linux("vm", memory_mib=96, load=LOAD))
    client = LanClient(hosts[0].lab, address_of(1))
    wait_until_it_serves(client)
    wait_for_console(hosts[0], "vm", "LIMOSA FILLED")
    sums = "md5sum /bin/* /fill/* >/www/"
    type_in(hosts[0], f"{sums}before")
    migration = begin(hosts, "auto")
    until_carried(hosts[0], migration, "mig0", USED_BYTES)
    with client.talking() as conversation:
        with stalls(hosts[0], migration) as longest:
            for side in FLAPS:
                with cut(hosts, side, "mig0"):
                    until_carried(hosts[0], migration, "mig1", 3 * USED_BYTES)
                until_carried(hosts[0], migration, "mig0", USED_BYTES // 2)
        arrived(hosts, migration)
        conversation.wait_for_more()
    assert conversation.faults == []
    assert max(conversation.longest_gap_s, *longest) < STALL_S
    type_in(hosts[1], f"{sums}after")
    assert client.get("/after") == client.get("/before")


@pytest.mark.long
def test_a_nic_whose_cable_is_put_in_again_is_used_again(hosts: list[LabHost]) -> None:
    big(hosts[0])
    migration = begin(hosts)
    before = carried(follow(hosts[0], migration, lambda view: has_sent(2 * USED_BYTES, view)))
    with cut(hosts, 0, "mig0"):
        then = follow(hosts[0], migration, lambda view: carried(view)["mig1"] > before["mig1"] + 2 * USED_BYTES)
    assert carried(arrived(hosts, migration))["mig0"] > carried(then)["mig0"] + 2 * USED_BYTES


@pytest.mark.parametrize("side", [0, 1], ids=["source", "destination"])
def test_a_nic_that_appears_in_mid_move_is_used(wide: list[LabHost], side: int) -> None:
    big(wide[0], BIGGER_MIB)
    with without_address(wide[side], "mig2"):
        migration = begin(wide)
        view = follow(wide[0], migration, lambda view: has_sent(USED_BYTES, view))
        assert set(carried(view)) == {"mig0", "mig1"}
    assert carried(arrived(wide, migration))["mig2"] > USED_BYTES


@pytest.mark.parametrize("side", [pytest.param(0, marks=pytest.mark.long), 1], ids=["source", "destination"])
def test_a_nic_that_appears_is_used_where_there_was_one_before(hosts: list[LabHost], side: int) -> None:
    big(hosts[0], BIGGER_MIB)
    with without_address(hosts[side], "mig1"):
        end_relays(hosts[0])
        migration = begin(hosts, "auto")
        view = follow(hosts[0], migration, lambda view: has_sent(USED_BYTES, view))
        assert (view.transport, set(carried(view))) == ("compression", {"mig0"})
    assert carried(arrived(hosts, migration))["mig1"] > 0


@pytest.mark.long
@pytest.mark.parametrize("side", [0, 1], ids=["source", "destination"])
def test_a_nic_whose_cable_was_out_when_the_move_began_is_used(wide: list[LabHost], side: int) -> None:
    big(wide[0], BIGGER_MIB)
    with cut(wide, side, "mig2"):
        migration = begin(wide)
        view = follow(wide[0], migration, lambda view: has_sent(USED_BYTES, view))
        assert set(carried(view)) == {"mig0", "mig1"}
    assert carried(arrived(wide, migration))["mig2"] > USED_BYTES


def test_a_path_that_was_blocked_when_the_move_began_is_used_when_it_is_open(wide: list[LabHost]) -> None:
    big(wide[0])
    with settings(wide[0], BRAKE):
        with off_the_network(wide[1], "mig2"):
            migration = begin(wide)
            view = follow(wide[0], migration, lambda view: has_sent(0, view))
            assert set(carried(view)) == {"mig0", "mig1"}
            assert view.route is not None
            assert "no working connection to" in view.route.why
        follow(wide[0], migration, lambda view: "mig2" in carried(view))
    assert carried(arrived(wide, migration))["mig2"] > USED_BYTES


@pytest.mark.parametrize("nic", ["mig0", "mig1"])
def test_a_path_whose_connections_break_is_used_again(hosts: list[LabHost], nic: str) -> None:
    big(hosts[0], BIGGER_MIB)
    migration = begin(hosts)
    before = carried(follow(hosts[0], migration, lambda view: has_sent(2 * USED_BYTES, view)))
    break_connections(hosts[0], nic)
    after = carried(arrived(hosts, migration))
    assert after[nic] > before[nic] + USED_BYTES


def test_a_nic_whose_address_goes_and_comes_back_is_used_again(hosts: list[LabHost]) -> None:
    big(hosts[0], BIGGER_MIB)
    migration = begin(hosts)
    before = carried(follow(hosts[0], migration, lambda view: has_sent(2 * USED_BYTES, view)))
    with without_address(hosts[0], "mig1"):
        break_connections(hosts[0], "mig1")
        then = follow(hosts[0], migration, lambda view: carried(view)["mig0"] > before["mig0"] + USED_BYTES)
    assert carried(arrived(hosts, migration))["mig1"] > carried(then)["mig1"] + USED_BYTES


@pytest.mark.parametrize("side", [0, pytest.param(1, marks=pytest.mark.long)], ids=["source", "destination"])
def test_a_nic_that_is_renamed_in_mid_move_goes_on_and_nothing_is_left(hosts: list[LabHost], side: int) -> None:
    big(hosts[0])
    migration = begin(hosts)
    follow(hosts[0], migration, lambda view: has_sent(USED_BYTES, view))
    with renamed(hosts[side], "mig1", "other"):
        ended = arrived(hosts, migration)
        assert in_proportion(ended), carried(ended)
        for host in hosts:
            host.clean()
            host.wait_until_bare()


@contextmanager
def mtus(hosts: list[LabHost], nic: str, sizes: tuple[int, int]) -> Iterator[None]:
    """A NIC of each host sends packets of up to so many bytes during the block, over new connections, and has no device
    that takes more at once, which would pass wherever its pieces do."""

    def change(host: LabHost, size: int, segments: int) -> None:
        values = {"mtu": size, "gso_max_segs": segments}
        in_host(host, lambda netlink, index: netlink.link("set", index=index, **values), nic)

    try:
        for host, size in zip(hosts, sizes, strict=True):
            end_relays(host)
            change(host, size, 1)
        yield
    finally:
        for host in hosts:
            change(host, MTU, SEGMENTS)
            end_relays(host)


@pytest.mark.parametrize(
    "sizes",
    [(JUMBO, MTU), *(pytest.param(sizes, marks=pytest.mark.long) for sizes in ((MTU, 1400), (1400, MTU)))],
    ids=str,
)
def test_different_mtus_are_found_and_both_nics_carry_all_the_same(
    hosts: list[LabHost], sizes: tuple[int, int]
) -> None:
    big(hosts[0])
    with mtus(hosts, "mig0", sizes):
        said = limosa(hosts[0], "check", "vm", "--to", "host2").out
        assert f"mig0 on host 'host1' has an MTU of {sizes[0]}, mig0 on host 'host2' of {sizes[1]}" in said
        ended = arrived(hosts, begin(hosts))
    assert [finding.code for finding in ended.findings] == ["mtu-differs"]
    assert min(carried(ended).values()) > USED_BYTES, carried(ended)


def test_a_switch_that_swallows_long_packets_is_found_and_done_without(hosts: list[LabHost]) -> None:
    big(hosts[0])
    with mtus(hosts, "mig0", (JUMBO, JUMBO)):
        said = limosa(hosts[0], "check", "vm", "--to", "host2").out
        nics = " and ".join(f"mig0 (MTU {JUMBO}) on host '{host.name}'" for host in hosts)
        assert f"long packets do not arrive between {nics}, so the move avoids that path" in said
        ended = hosts[0].outcome(begin(hosts, "auto"))
        assert (ended.outcome, set(carried(ended))) == (Outcome.COMPLETED, {"mig1"}), ended.fault
        assert [finding.code for finding in ended.findings] == ["long-packets-lost"]


def test_a_switch_that_swallows_long_packets_and_is_the_only_one_is_refused(hosts: list[LabHost]) -> None:
    big(hosts[0])
    only = {"migration_networks": list(hosts[0].lab.migration_networks[:1])}
    with mtus(hosts, "mig0", (JUMBO, JUMBO)), settings(hosts[0], only):
        refused = limosa(hosts[0], "move", "vm", "--to", "host2")
    assert refused.code == 6
    assert "long packets do not arrive" in refused.error
    assert "no connection to" not in refused.error


@contextmanager
def short_packets_only(hosts: list[LabHost], nic: str) -> Iterator[None]:
    """The switch swallows long packets from and to a NIC of each host during the block."""

    def change(mtu: int) -> None:
        with IPRoute() as netlink:
            for host in hosts:
                (port,) = netlink.link("get", ifname=f"{nic}-{host.name}")
                netlink.link("set", index=port["index"], mtu=mtu)

    namespaces.inside(hosts[0].lab.wire, lambda: change(SHORT))
    try:
        yield
    finally:
        namespaces.inside(hosts[0].lab.wire, lambda: change(MTU))


def test_a_switch_that_begins_to_swallow_long_packets_costs_speed_and_not_the_move(hosts: list[LabHost]) -> None:
    big(hosts[0])
    with mtus(hosts, "mig0", (MTU, MTU)):
        migration = begin(hosts, "auto")
        before = carried(follow(hosts[0], migration, lambda view: has_sent(2 * USED_BYTES, view)))
        with short_packets_only(hosts, "mig0"):
            after = carried(arrived(hosts, migration))
    assert after["mig1"] - before["mig1"] > 5 * (after["mig0"] - before["mig0"]), (before, after)


@pytest.mark.parametrize("transport", ["auto", pytest.param("tcp", marks=pytest.mark.long)])
def test_a_switch_that_begins_to_swallow_long_packets_and_is_the_only_one_ends_the_move(
    hosts: list[LabHost], transport: Transport
) -> None:
    big(hosts[0])
    only = {"migration_networks": list(hosts[0].lab.migration_networks[:1]), "convergence.patience_s": 1}
    with mtus(hosts, "mig0", (MTU, MTU)), settings(hosts[0], {**only, **BRAKE}):
        migration = begin(hosts, transport)
        follow(hosts[0], migration, lambda view: has_sent(0, view))
        with short_packets_only(hosts, "mig0"):
            ended = hosts[0].outcome(migration)
        assert ended.fault is not None
        assert (ended.outcome, ended.fault.code) == (Outcome.FAILED, "migration-failed"), ended.fault
        assert "no memory could be sent" in ended.fault.why
        assert hosts[0].show("vm").state is VmState.RUNNING
        hosts[1].wait_until_bare(but=RELAYS)


def test_compression_goes_over_all_of_them(hosts: list[LabHost]) -> None:
    big(hosts[0])
    ended = arrived(hosts, begin(hosts, "compression"))
    assert ended.route is not None
    assert ended.route.compressed is not None
    assert ended.route.compressed.connections == 4
    assert min(carried(ended).values()) > 0


@pytest.mark.long
def test_disks_go_over_all_of_them(hosts: list[LabHost]) -> None:
    disk = api.NewDisk(path=str(hosts[0].state / "images" / "vm.qcow2"), size_mib=64)
    hosts[0].create(msgspec.structs.replace(linux("vm", load={"disk": "vda"}), disks=(disk,)))
    client = LanClient(hosts[0].lab, address_of(1))
    wait_until_it_serves(client)
    wait_until(lambda: number(client) > 3, "the guest numbers its disk")
    ended = arrived(hosts, begin(hosts))
    assert ended.phases[Phase.STORAGE] > 0
    assert min(carried(ended).values()) > USED_BYTES, carried(ended)
    goes_on(client)
