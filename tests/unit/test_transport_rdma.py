"""When memory goes by RDMA, and why not: facts of both hosts in, words out."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec
import pytest

from limosa.model.network import HostNetwork, HostNic, NicAddress
from limosa.transport.choice import Ends, choose

MEMORY_MIB = 4096


def nic(name: str, *addresses: str, **more: Any) -> HostNic:
    own = tuple(NicAddress(address=address, prefix=24 if "." in address else 64) for address in addresses)
    values = {"index": 2, "kind": "physical", "up": True, "carrier": True, "mtu": 9000, "speed_mbit_per_s": 25_000}
    return HostNic(name=name, addresses=own, **{**values, **more})


def host(number: int, *nics: HostNic, **more: Any) -> HostNetwork:
    usual = (nic("eth0", f"10.0.1.{number}"), nic("eth1", f"10.0.2.{number}", rdma="mlx5_0"))
    values = {"nics": nics or usual, "mptcp": True, "encrypt": False}
    return HostNetwork(**{**values, **more})


def between(here: HostNetwork, there: HostNetwork) -> Ends:
    offered = [own.address for one in there.nics for own in one.addresses]
    return Ends("host1", "host2", here, there, offered, memory_mib=MEMORY_MIB)


def bonded(number: int, *above: HostNic) -> HostNetwork:
    """A host with a bond, which has the address unless that is on what is above it."""
    members = (nic("eth1", master="bond0", rdma="mlx5_0"), nic("eth2", master="bond0", rdma="mlx5_1"))
    own = () if above else (f"10.0.2.{number}",)
    made = nic("bond0", *own, kind="bond", bond_mode="802.3ad", members=("eth1", "eth2"))
    return host(number, *above, made, *members)


#: The kernel says of a VLAN that the device is on it, too.
VLAN = nic("bond0.20", "10.0.2.2", kind="vlan", lower="bond0", rdma="mlx5_0")
BRIDGE = nic("br0", "10.0.2.2", kind="bridge", members=("bond0",))


@pytest.mark.parametrize("asked", ["auto", "rdma"])
def test_where_both_hosts_have_devices_on_one_network_it_is_rdma(asked: str) -> None:
    route = choose(between(host(1), host(2)), asked)
    assert route.transport == "rdma"
    assert [(path.nic_here, path.there) for path in route.paths] == [("eth1", "10.0.2.2")]
    assert route.why == ("it was asked for" if asked == "rdma" else "eth1 and eth1 have RDMA")


@pytest.mark.parametrize(
    ("here", "there", "words"),
    [
        (host(1, nic("eth0", "10.0.1.1")), host(2), "there is no RDMA device on host 'host1'"),
        (host(1), host(2, nic("eth1", "10.0.2.2")), "there is no RDMA device on host 'host2'"),
        (host(1), host(2, encrypt=True), "'encrypt' is on on host 'host2'"),
        (host(1, encrypt=True), host(2, encrypt=True), "on host 'host1' and host 'host2'"),
        (host(1, allowed=("10.0.1.0/24",)), host(2), "no common IPv4 network"),
        (host(1, nic("a", "fd00::1", rdma="r")), host(2, nic("a", "fd00::2", rdma="r")), "no common IPv4 network"),
        (host(1, lockable_mib=8), host(2), "may lock 8 MiB of memory on host 'host1', and the VM has 4096"),
        (host(1), bonded(2), "bond0 on host 'host2' is a team of RDMA NICs"),
        (bonded(1), bonded(2), "bond0 on host 'host1' is a team of RDMA NICs"),
        (host(1), bonded(2, VLAN), "bond0 on host 'host2' is a team of RDMA NICs"),
        (host(1), bonded(2, BRIDGE), "bond0 on host 'host2' is a team of RDMA NICs"),
    ],
)
def test_what_keeps_rdma_away_is_said(here: HostNetwork, there: HostNetwork, words: str) -> None:
    route = choose(between(here, there), "rdma")
    assert route.transport != "rdma"
    assert words in route.why


@pytest.mark.parametrize("asked", ["auto", "rdma"])
def test_what_a_move_has_against_rdma_counts(asked: str) -> None:
    route = choose(dataclasses.replace(between(host(1), host(2)), no_rdma="a cap is set"), asked)
    assert route.transport != "rdma"
    assert route.why.endswith("not rdma: a cap is set")


@pytest.mark.parametrize(("network", "transport"), [("10.0.2.0/24", "tcp"), ("10.0.1.0/24", "rdma")])
def test_a_cap_counts_on_the_network_of_the_device(network: str, transport: str) -> None:
    assert choose(between(host(1, caps_mbit_per_s={network: 20_000}), host(2)), "rdma").transport == transport


def test_auto_speaks_of_rdma_only_where_there_might_be_some() -> None:
    plain = host(1, nic("eth0", "10.0.1.1")), host(2, nic("eth0", "10.0.1.2"))
    assert "rdma" not in choose(between(*plain), "auto").why
    assert "rdma" in choose(between(host(1, encrypt=True), host(2)), "auto").why


def test_a_device_that_the_kernel_emulates_is_used_only_if_asked_for() -> None:
    soft = nic("eth1", "10.0.2.2", rdma="rxe0", rdma_emulated=True)
    assert choose(between(host(1), host(2, soft)), "rdma").transport == "rdma"
    route = choose(between(host(1), host(2, soft)), "auto")
    assert (route.transport, "emulates" in route.why) == ("tcp", True)


def test_a_vlan_of_a_device_is_as_good() -> None:
    below = nic("eth1", rdma="mlx5_0")
    vlan = nic("eth1.20", "10.0.2.2", kind="vlan", lower="eth1", rdma="mlx5_0")
    assert choose(between(host(1), host(2, vlan, below)), "rdma").transport == "rdma"


def test_what_is_blocked_is_not_chosen() -> None:
    blocked = choose(between(host(1), host(2)), "rdma", {"10.0.2.2"})
    assert (blocked.transport, blocked.paths[0].there) == ("tcp", "10.0.1.2")


def test_a_host_may_lock_what_the_vm_has() -> None:
    enough = msgspec.structs.replace(host(1), lockable_mib=MEMORY_MIB)
    assert choose(between(enough, host(2)), "rdma").transport == "rdma"
