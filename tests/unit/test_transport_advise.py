"""What is said about a host's network: each thing that is set wrongly has its finding, and a good host has none."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from limosa.host.api import Handlers
from limosa.model.network import Carried, HostNetwork, HostNic, NicAddress
from limosa.settings.host import HostSettings
from limosa.transport.advise import advise, between
from limosa.transport.choice import Ends, choose
from limosa.wire import api


def nic(name: str, *addresses: str, **more: Any) -> HostNic:
    own = tuple(NicAddress(address=address, prefix=24) for address in addresses)
    values = {"index": 2, "kind": "physical", "up": True, "carrier": True, "mtu": 1500, "speed_mbit_per_s": 1000}
    return HostNic(name=name, addresses=own, **{**values, **more})


LO = nic("lo", "127.0.0.1", kind="loopback", speed_mbit_per_s=None)
ONE, TWO = nic("eth0", "10.0.1.1"), nic("eth1", "10.0.2.1")
GOOD = HostNetwork(nics=(LO, ONE, TWO), mptcp=True, allowed=("10.0.1.0/24", "10.0.2.0/24"))


def bond(mode: str, policy: str, kind: str = "bond") -> tuple[HostNic, ...]:
    members = (nic("eth0", master="bond0"), nic("eth1", master="bond0", rdma="mlx5_0"))
    made = nic("bond0", "10.0.1.1", kind=kind, bond_mode=mode, hash_policy=policy, members=("eth0", "eth1"))
    return (*members, made)


def below_a_bridge(nics: tuple[HostNic, ...]) -> tuple[HostNic, ...]:
    """The same with the address on a bridge that the last is in."""
    *others, last = nics
    switch = nic("br0", "10.0.1.1", kind="bridge", members=(last.name,))
    return (switch, *others, msgspec.structs.replace(last, addresses=(), master="br0"))


def codes(*, post_copy: bool = False, **changes: Any) -> set[str]:
    _, findings = advise("host1", msgspec.structs.replace(GOOD, **changes), post_copy=post_copy)
    assert all(finding.todo for finding in findings)
    return {finding.code for finding in findings}


def test_a_good_host_is_told_nothing_but_its_transport() -> None:
    route, findings = advise("host1", GOOD, post_copy=False)
    assert (route.transport, findings) == ("compression", ())
    assert "; 2 NICs together have 2000 Mbit/s; one stream for each network, because" in route.why
    route, findings = advise("host1", GOOD, post_copy=True)
    assert (route.transport, findings) == ("multichannel", ())


def test_a_host_with_a_cap_is_told_what_moves_do_under_it() -> None:
    route, _ = advise("host1", GOOD, post_copy=False, capped=True)
    assert (route.transport, "the cap on bandwidth" in route.why) == ("multichannel", True)
    device = nic("eth0", "10.0.1.1", rdma="mlx5_0")
    clear = HostNetwork(nics=(device,), mptcp=True, encrypt=False)
    assert [advise("host1", clear, post_copy=True, capped=capped)[0].transport for capped in (False, True)] == [
        "rdma",
        "tcp",
    ]


def test_the_transport_that_suits_follows_from_what_networks_carried() -> None:
    def of(*found: tuple[str, str, int]) -> str:
        carried = tuple(Carried(here=here, there=there, mbit_per_s=rate) for here, there, rate in found)
        return advise("host1", msgspec.structs.replace(GOOD, carried=carried), post_copy=True)[0].why

    assert "2 NICs together have 2000 Mbit/s" in of()
    assert "a NIC of 1000 Mbit/s would wait for the others" in of(("10.0.2.1", "10.0.2.7", 100))
    # To some hosts it is slow, and not to all; and what was routed elsewhere says nothing of this network.
    assert "2 NICs together have 2000 Mbit/s" in of(("10.0.2.1", "10.0.2.7", 100), ("10.0.2.1", "10.0.2.8", 940))
    assert "2 NICs together have 2000 Mbit/s" in of(("10.0.2.1", "10.9.0.7", 100))


@pytest.mark.parametrize(
    ("settings", "transport"),
    [
        (HostSettings(), "compression"),
        (HostSettings(storage_bandwidth_mbit_per_s=100), "compression"),
        (HostSettings(bandwidth_mbit_per_s=100), "multichannel"),
        (HostSettings(network_bandwidth_mbit_per_s={"10.0.2.0/24": 900}), "multichannel"),
        (HostSettings(network_bandwidth_mbit_per_s={"10.9.0.0/24": 100}), "compression"),
    ],
)
def test_the_settings_that_cap_memory_count(settings: HostSettings, transport: str) -> None:
    async def network() -> HostNetwork:
        return msgspec.structs.replace(GOOD, caps_mbit_per_s=settings.network_bandwidth_mbit_per_s)

    inspector = SimpleNamespace(network=network, certificate_until=lambda: time.time() + 86400, listen=("10.0.1.1",))
    parts = SimpleNamespace(name="host1", page=SimpleNamespace(now=settings), inspector=inspector)
    handlers = Handlers(cast(Any, SimpleNamespace(parts=parts)))
    advice = asyncio.run(handlers.advice(api.Empty(), {}))
    assert advice.transport == transport
    assert {finding.code for finding in advice.findings} == {"certificate-expires", "nic-without-listener"}


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"mptcp": False}, "multipath-off"),
        ({"nics": (LO, ONE, nic("eth1", "10.0.1.2"))}, "nics-on-one-network"),
        ({"allowed": ("10.0.1.0/24", "10.9.0.0/24")}, "network-without-address"),
        ({"nics": (ONE, nic("eth1", "10.0.2.1", carrier=False))}, "no-link"),
        ({"nics": bond("802.3ad", "layer2")}, "bond-hashes-by-host"),
        ({"nics": bond("balance-xor", "layer2+3")}, "bond-hashes-by-host"),
        ({"nics": bond("active-backup", "")}, "bond-uses-one-member"),
        ({"nics": bond("balance-rr", "layer2")}, "bond-reorders"),
        ({"nics": bond("activebackup", "", kind="team")}, "bond-uses-one-member"),
        ({"nics": bond("roundrobin", "", kind="team")}, "bond-reorders"),
        ({"nics": bond("loadbalance", "", kind="team")}, "team-not-understood"),
        ({"nics": bond("", "", kind="team")}, "team-not-understood"),
        ({"nics": (nic("eth0", "10.0.1.1", rdma="mlx5_0"),), "lockable_mib": 8}, "rdma-locks-little"),
        ({"nics": bond("", "", kind="team")}, "team-of-rdma"),
        ({"nics": below_a_bridge(bond("802.3ad", "layer2"))}, "bond-hashes-by-host"),
        ({"nics": below_a_bridge(bond("802.3ad", "layer3+4"))}, "team-of-rdma"),
        ({"carried": (Carried(here="10.0.1.1", there="10.0.1.2", mbit_per_s=94),)}, "network-slower-than-nic"),
        ({"nics": (nic("eth0", "10.0.1.1", speed_mbit_per_s=100),), "post_copy": True}, "slow-for-post-copy"),
    ],
)
def test_each_fault_has_its_finding(changes: dict[str, Any], code: str) -> None:
    assert code in codes(**changes)


def unheard(*listen: str, **changes: Any) -> tuple[str, str]:
    """What is said of NICs on which a daemon with that setting does not listen, and what to do; empty if nothing is."""
    network = msgspec.structs.replace(GOOD, **changes)
    found = [one for one in advise("host1", network, post_copy=False, listen=listen)[1] if "listen" in one.what]
    assert [one.code for one in found] in ([], ["nic-without-listener"])
    return (found[0].what.split(":")[0], found[0].todo.split(",")[0]) if found else ("", "")


def test_nics_on_which_the_daemon_does_not_listen_are_named_with_their_addresses() -> None:
    eth1 = "the daemon does not listen on eth1", "add 10.0.2.1 to 'listen' in host.toml"
    assert unheard("10.0.1.1") == eth1
    assert unheard("10.0.1.1:7500") == eth1
    assert unheard("192.0.2.1") == (
        "the daemon does not listen on eth0 and eth1",
        "add 10.0.1.1 and 10.0.2.1 to 'listen' in host.toml",
    )
    both = nic("eth1", "10.0.2.1", "fd00::1")
    assert unheard("10.0.1.1", nics=(LO, ONE, both), allowed=()) == eth1
    _, (finding,) = advise("host1", GOOD, post_copy=False, listen=("10.0.1.1:7500",))
    assert ", with the same port, and restart the daemon" in finding.todo


@pytest.mark.parametrize(
    "listen", [("10.0.1.1", "10.0.2.1"), ("10.0.1.1:7500", "10.0.2.1:7500"), ("0.0.0.0",), ("host1",), ()], ids=str
)
def test_a_daemon_that_listens_on_all_nics_or_on_none_is_told_nothing_of_that(listen: tuple[str, ...]) -> None:
    assert unheard(*listen) == ("", "")


def test_one_address_of_a_nic_is_enough_and_other_nics_do_not_count() -> None:
    on_one_nic = [nic(f"eth0.{at}", f"10.0.{at}.1", kind="vlan", lower="eth0") for at in (1, 2)]
    assert unheard("10.0.1.1", nics=(LO, *on_one_nic, nic("eth0"))) == ("", "")
    assert unheard("10.0.1.1", nics=(LO, *on_one_nic, nic("eth0")), allowed=("10.0.2.0/24",)) == ("", "")
    assert unheard("10.0.1.1", allowed=("10.0.1.0/24",)) == ("", "")
    assert unheard("::", nics=(nic("eth0", "10.0.1.1", "fe80::1"),), allowed=()) != ("", "")
    assert unheard("::", nics=(nic("eth0", "10.0.1.1", "fd00::1"),), allowed=()) == ("", "")
    inside = nic("docker0", "172.17.0.1", kind="bridge", members=("veth1", "veth2"))
    hanging = [nic(name, master="docker0", kind="veth") for name in inside.members]
    assert unheard("10.0.1.1", nics=(ONE, inside, *hanging), allowed=()) == ("", "")


def test_vlans_on_one_nic_need_no_multipath_tcp() -> None:
    nics = [nic(f"eth0.{at}", f"10.0.{at}.1", kind="vlan", lower="eth0") for at in (1, 2)]
    assert codes(nics=(*nics, nic("eth0")), mptcp=False) == set()


def test_what_is_no_fault_has_none() -> None:
    assert codes(nics=bond("802.3ad", "layer3+4"), allowed=()) == {"team-of-rdma"}
    assert codes(nics=(ONE,), mptcp=False, allowed=()) == set()
    assert codes(carried=(Carried(here="10.0.1.1", there="10.0.1.2", mbit_per_s=940),)) == set()
    assert codes(carried=(Carried(here="10.0.1.1", there="10.0.1.2", mbit_per_s=94, old=True),)) == set()
    assert codes(nics=(nic("eth0", "10.0.1.1", speed_mbit_per_s=100),), allowed=()) == set()
    # A second address of a NIC is no second NIC, and a NIC that may carry nothing is not looked at.
    assert codes(nics=(nic("eth0", "10.0.1.1", "10.0.1.2"),), allowed=()) == set()
    assert codes(nics=(ONE, nic("eth1", "10.0.1.2")), allowed=("10.0.1.1/32",)) == set()


def test_a_host_with_nothing_to_go_by_still_gets_an_answer() -> None:
    route, findings = advise("host1", HostNetwork(), post_copy=True)
    assert (route.transport, findings) == ("tcp", ())
    assert route.why == "this host has no address through which moves may go"


def test_different_mtus_at_the_two_ends_are_found() -> None:
    far = HostNetwork(nics=(nic("eth0", "10.0.1.2", mtu=9000), nic("eth1", "10.0.2.2")), mptcp=True)
    ends = Ends("host1", "host2", GOOD, far, ["10.0.1.2", "10.0.2.2"])
    (finding,) = between(ends, choose(ends, "multichannel"))
    assert finding.code == "mtu-differs"
    assert "9000" in finding.what
