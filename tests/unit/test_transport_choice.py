"""Which transport and which NICs a move takes: a pure function of both hosts' facts, with its reason in words."""

from __future__ import annotations

import dataclasses
import ipaddress
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from limosa.model.network import Carried, HostNetwork, HostNic, NicAddress
from limosa.model.route import Route
from limosa.transport.choice import Ends, choose, is_allowed, spread

NETWORKS = ("10.78.0.0/24", "10.79.0.0/24", "10.80.0.0/24")


def nic(number: int, host: int, speed: int | None = 1000, *, carrier: bool = True, network: int = -1) -> HostNic:
    second = 78 + (number if network < 0 else network)
    own = NicAddress(address=f"10.{second}.0.{host}", prefix=24)
    return HostNic(
        name=f"mig{number}",
        index=number + 2,
        kind="physical",
        up=True,
        carrier=carrier,
        mtu=1500,
        speed_mbit_per_s=speed,
        addresses=(own,),
    )


def ends(
    here: list[HostNic],
    there: list[HostNic],
    *,
    mptcp: tuple[bool, bool] = (True, True),
    allowed: bool = True,
    encrypt: bool = False,
) -> Ends:
    networks = NETWORKS if allowed else ()
    near = HostNetwork(nics=tuple(here), mptcp=mptcp[0], allowed=networks, encrypt=encrypt)
    far = HostNetwork(nics=tuple(there), mptcp=mptcp[1], allowed=networks, encrypt=encrypt)
    return Ends("host1", "host2", near, far, [own.address for one in there for own in one.addresses])


def pair(*speeds: int | None) -> Ends:
    return ends([nic(i, 1, s) for i, s in enumerate(speeds)], [nic(i, 2, s) for i, s in enumerate(speeds)])


def nics(route: Route) -> list[str]:
    return [path.nic_here for path in route.paths]


@pytest.mark.parametrize(
    ("speeds", "transport", "words"),
    [
        ((5000,), "tcp", "only NIC"),
        ((2000, 2000), "multichannel", "2 NICs together have 4000 Mbit/s"),
        ((2000, 1000), "multichannel", "3000 Mbit/s; not compressed: a processor does not compress faster than 3000"),
        (
            (2400, 900),
            "multichannel",
            "3300 Mbit/s; one stream for each network, because the NICs are unequal",
        ),
        ((5000, 1000), "tcp", "more than 2 times slower"),
        ((5000, 5000, 1000), "multichannel", "2 NICs together have 10000 Mbit/s"),
        ((10_000, 10_000), "tcp", "does not fill"),
        ((5000, None), "tcp", "speed of mig1 is not known"),
        ((1000, 900, 800), "multichannel", "3 NICs together have 2700"),
    ],
)
def test_auto_takes_all_nics_where_that_is_faster(speeds: tuple[int | None, ...], transport: str, words: str) -> None:
    route = choose(pair(*speeds), "auto")
    assert (route.transport, words in route.why) == (transport, True), route.why


@pytest.mark.parametrize("speeds", [(100,), (2000,), (1000, 1000), (500, 100), (100, 200, 300)])
def test_auto_compresses_what_a_processor_is_faster_at_than_the_nics(speeds: tuple[int, ...]) -> None:
    route, bare = choose(pair(*speeds), "auto"), choose(pair(*speeds), "multichannel")
    assert (route.transport, route.paths, route.striped) == ("compression", bare.paths, bare.striped)
    assert route.why.startswith(f"a processor compresses faster than {sum(speeds)} Mbit/s; ")
    assert not route.alone, "alike VMs share what was sent"


def trunk_is_striped(side: int) -> bool:
    """Whether a compressed move between two hosts is, of which one has its address on a VLAN."""
    nics = [nic(0, 1)], [nic(0, 2)]
    nics[side][:] = vlans(1 + side, 1)
    return choose(ends(*nics), "compression").striped


@pytest.mark.parametrize("side", [0, 1])
def test_one_path_that_is_compressed_can_be_joined_by_one_that_may_come_up(side: int) -> None:
    def striped(speed: int | None, other: HostNic | None) -> bool:
        nics = [nic(0, 1, speed)], [nic(0, 2, speed)]
        nics[side].extend([other] if other is not None else [])
        return choose(ends(*nics), "compression").striped

    unplugged = nic(1, 1 + side, carrier=False)
    link_local = NicAddress(address="fe80::1", prefix=64)
    without_address = msgspec.structs.replace(nic(1, 1 + side), addresses=(link_local,))
    unused = msgspec.structs.replace(unplugged, addresses=())
    switch = msgspec.structs.replace(without_address, kind="bridge")
    member = msgspec.structs.replace(without_address, master="br0")
    assert [striped(1000, other) for other in (unplugged, without_address)] == [True, True]
    assert [striped(1000, other) for other in (None, unused, switch, member)] == [False] * 4
    assert not trunk_is_striped(side), "that a NIC has VLANs on it is what it is there for"
    assert [striped(speed, unplugged) for speed in (2000, 10_000, None)] == [True, False, False]


@pytest.mark.parametrize("speeds", [(2500,), (25_000,), (25_000, 25_000), (5000, 5000), (None,)])
def test_auto_has_relays_encrypt_wherever_it_goes(speeds: tuple[int | None, ...]) -> None:
    here, there = [[nic(at, host, speed) for at, speed in enumerate(speeds)] for host in (1, 2)]
    route, bare = choose(ends(here, there, encrypt=True), "auto"), choose(pair(*speeds), "auto")
    assert bare.transport in ("tcp", "multichannel")
    assert (route.transport, route.paths, route.striped) == ("compression", bare.paths, bare.striped)
    assert route.why.startswith("relays encrypt faster than QEMU; ")
    assert route.alone, "VMs do not wait for one another's relays"


@pytest.mark.parametrize("asked", ["auto", "rdma"])
def test_no_relay_is_taken_where_post_copy_is_allowed_unless_it_is_asked_for(asked: str) -> None:
    here, there = [[nic(at, host) for at in range(2)] for host in (1, 2)]
    allowed = dataclasses.replace(ends(here, there, encrypt=True, mptcp=(True, False)), post_copy=True)
    route = choose(allowed, asked)
    assert (route.transport, route.striped) == ("tcp", False)
    assert "post-copy is allowed, and the guest would be lost with a relay that fails" in route.why
    assert choose(allowed, "compression").is_relayed
    assert choose(allowed, "multichannel").is_relayed


@pytest.mark.parametrize("speeds", [(1000, 1000), (500, 100)])
def test_all_nics_are_taken_without_relays_where_post_copy_is_allowed_and_multipath_tcp_is_on(
    speeds: tuple[int, ...],
) -> None:
    here, there = [[nic(at, host, speed) for at, speed in enumerate(speeds)] for host in (1, 2)]
    known = ends(here, there, encrypt=True)
    assert choose(known, "multichannel").striped
    route = choose(dataclasses.replace(known, post_copy=True), "multichannel")
    assert (route.transport, route.is_relayed, nics(route)) == ("multichannel", False, ["mig0", "mig1"])
    assert choose(dataclasses.replace(known, post_copy=True), "compression").striped


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"capped": True}, "the cap on bandwidth counts what is sent before it is compressed"),
        ({"no_relay": "host 'host2' knows another version of it, or none"}, "host 'host2' knows another version"),
    ],
)
def test_auto_does_not_compress_where_that_gains_nothing_and_says_why(change: dict[str, Any], why: str) -> None:
    route = choose(dataclasses.replace(pair(1000), **change), "auto")
    assert (route.transport, f"; not compressed: {why}" in route.why) == ("tcp", True), route.why
    unknown = choose(pair(None), "auto")
    assert unknown.transport == "tcp"
    assert unknown.why.endswith("; not compressed: the speed of mig0 is not known")


def test_without_multipath_tcp_on_one_side_each_network_has_a_stream_and_it_says_so() -> None:
    here, there = [nic(0, 1), nic(1, 1)], [nic(0, 2), nic(1, 2)]
    for asked in ("auto", "multichannel", "compression"):
        route = choose(ends(here, there, mptcp=(True, False)), asked)
        assert (route.striped, nics(route)) == (True, ["mig0", "mig1"])
        assert route.is_relayed
        assert not route.is_multipath
        if asked != "compression":
            assert "one stream for each network, because Multipath TCP is off on host 'host2'" in route.why
    assert "'host1' and host 'host2'" in choose(ends(here, there, mptcp=(False, False)), "multichannel").why
    assert not choose(ends(here, there), "multichannel").striped


@pytest.mark.parametrize(
    ("speeds", "striped"), [((500, 500), True), ((1000, 1000), True), ((2000, 2000), False), ((1000, None), False)]
)
def test_relays_that_encrypt_spread_it_themselves_as_far_as_they_carry(
    speeds: tuple[int | None, ...], striped: bool
) -> None:
    here, there = [nic(i, 1, s) for i, s in enumerate(speeds)], [nic(i, 2, s) for i, s in enumerate(speeds)]
    route = choose(ends(here, there, encrypt=True), "multichannel")
    assert (route.transport, route.striped, nics(route)) == ("multichannel", striped, ["mig0", "mig1"])
    assert ("one stream for each network, because the relays that encrypt it" in route.why) is striped
    assert not choose(ends(here, there), "multichannel").striped
    if striped:
        compressed = choose(ends(here, there, encrypt=True), "auto")
        assert (compressed.transport, compressed.striped) == ("compression", True)


def test_a_nic_as_fast_as_relays_is_taken_alone_by_auto() -> None:
    here, there = [nic(0, 1, 3000), nic(1, 1, 3000)], [nic(0, 2, 3000), nic(1, 2, 3000)]
    both = ends(here, there, mptcp=(True, False))
    assert choose(both, "auto").transport == "tcp"
    assert choose(both, "auto").why.startswith("relays do not carry more than a NIC of 3000 Mbit/s, and Multipath TCP")
    assert choose(both, "multichannel").striped


def test_without_multipath_tcp_and_without_relays_it_is_tcp_and_says_so() -> None:
    both = ends([nic(0, 1), nic(1, 1)], [nic(0, 2), nic(1, 2)], mptcp=(True, False))
    old = dataclasses.replace(both, no_relay="host 'host2' knows another version of it, or none")
    for asked in ("auto", "multichannel"):
        route = choose(old, asked)
        assert (route.transport, route.striped, nics(route)) == ("tcp", False, ["mig0"])
        assert "Multipath TCP is off on host 'host2', and relays cannot spread it: host 'host2'" in route.why


def test_without_relays_unequal_nics_are_left_to_the_faster_one() -> None:
    old = dataclasses.replace(pair(500, 100), no_relay="host 'host2' knows another version of it, or none")
    assert (choose(old, "auto").transport, nics(choose(old, "auto"))) == ("tcp", ["mig0"])
    asked = choose(old, "multichannel")
    assert (asked.transport, asked.striped, nics(asked)) == ("multichannel", False, ["mig0", "mig1"])


def test_a_single_network_has_nothing_to_spread_over() -> None:
    route = choose(ends([nic(0, 1)], [nic(0, 2)], mptcp=(False, False)), "multichannel")
    assert (route.transport, route.striped) == ("tcp", False)


def test_a_team_is_left_to_multipath_tcp_which_uses_all_its_members() -> None:
    route = choose(ends([*team(1), nic(3, 1, 100)], [*team(2), nic(3, 2, 100)], allowed=False), "multichannel")
    assert (route.striped, {path.nic_here: path.streams for path in route.paths}) == (False, {"bond0": 4, "mig3": 1})


@pytest.mark.parametrize(
    ("said", "carried", "old", "speed"),
    [
        (None, 90, False, 90),
        (1000, 940, False, 1000),
        (10_000, 940, False, 940),
        (1000, 5000, False, 1000),
        (None, 90, True, 90),
        (10_000, 940, True, 10_000),
    ],
)
def test_a_network_is_as_fast_as_a_move_found_it_lately(said: int | None, carried: int, old: bool, speed: int) -> None:
    known = pair(said)
    measured = Carried(here="10.78.0.1", there="10.78.0.2", mbit_per_s=carried, old=old)
    known = dataclasses.replace(known, here=msgspec.structs.replace(known.here, carried=(measured,)))
    assert [path.speed_mbit_per_s for path in choose(known, "auto").paths] == [speed]


def test_the_first_network_wins_over_the_faster_nic_but_the_faster_nic_within_one() -> None:
    assert nics(choose(pair(100, 1000), "tcp")) == ["mig0"]
    far = [nic(0, 2, 100, network=0), nic(1, 3, 1000, network=0)]
    route = choose(ends([nic(0, 1, 1000)], far), "tcp")
    assert route.paths[0].there == "10.78.0.3"
    free = ends([nic(0, 1, 100), nic(1, 1, 1000)], [nic(0, 2, 100), nic(1, 2, 1000)], allowed=False)
    assert nics(choose(free, "tcp")) == ["mig1"]


@pytest.mark.parametrize(
    ("speeds", "asked", "words"),
    [
        ((1000, 25_000), "auto", "one stream does not fill a NIC of 25000 Mbit/s"),
        ((100, 1000), "auto", "a NIC of 1000 Mbit/s would wait for the others, which are more than 2 times slower"),
        ((100, 1000), "tcp", "it was asked for"),
    ],
)
def test_a_slower_network_that_is_preferred_is_said_to_be(speeds: tuple[int, ...], asked: str, words: str) -> None:
    preferred = "; it goes over mig0, whose network host 'host2' prefers"
    without = dataclasses.replace(pair(*speeds), no_relay="host 'host2' knows another version of it, or none")
    route = choose(without, asked)
    assert (route.transport, nics(route)) == ("tcp", ["mig0"])
    assert route.why.startswith(f"{words}{preferred}")
    fastest = msgspec.structs.replace(without.there, allowed=())
    route = choose(dataclasses.replace(without, there=fastest), asked)
    assert (nics(route), preferred in route.why) == (["mig1"], False)


def test_nics_on_one_network_are_one_path() -> None:
    here = [nic(0, 1, network=0), nic(1, 11, network=0)]
    there = [nic(0, 2, network=0), nic(1, 12, network=0)]
    assert len(choose(ends(here, there), "multichannel").paths) == 1


def test_networks_with_caps_are_as_fast_as_those_and_each_gets_a_stream() -> None:
    both = pair(1000, 1000, 1000)
    here = msgspec.structs.replace(both.here, caps_mbit_per_s={"10.78.0.0/24": 900, "10.79.0.0/16": 100})
    capped = dataclasses.replace(both, here=here, capped=True)
    route = choose(capped, "multichannel")
    assert (route.striped, [path.speed_mbit_per_s for path in route.paths]) == (True, [900, 100, 1000])
    assert "because there are caps by network" in route.why
    unknown = dataclasses.replace(pair(None, 1000), here=msgspec.structs.replace(pair(None).here, caps_mbit_per_s={}))
    assert choose(unknown, "tcp").paths[0].speed_mbit_per_s is None
    here = msgspec.structs.replace(unknown.here, caps_mbit_per_s={"10.78.0.0/24": 900})
    assert choose(dataclasses.replace(unknown, here=here), "tcp").paths[0].speed_mbit_per_s == 900


@pytest.mark.parametrize(
    ("speeds", "no_relay", "shares"),
    [
        ((1000, 1000), "", [450, 450, 1000]),
        ((1000, 200), "", [450, 200, 1000]),
        ((None, 1000), "", [450, 450, 1000]),
        ((1000, 1000), "it is switched off", [450, 450, 1000]),
    ],
)
def test_a_cap_that_counts_for_several_networks_is_counted_once(
    speeds: tuple[int | None, ...], no_relay: str, shares: list[int]
) -> None:
    three = pair(*speeds, 1000)
    here = msgspec.structs.replace(three.here, caps_mbit_per_s={"10.78.0.0/15": 900})
    capped = dataclasses.replace(three, here=here, no_relay=no_relay)
    for asked in ("multichannel", "auto"):
        route = choose(capped, asked)
        assert [path.speed_mbit_per_s for path in route.paths] == shares
    assert f"3 NICs together have {sum(shares)} Mbit/s" in route.why


def test_auto_takes_one_nic_where_a_cap_for_all_is_no_more_than_that_carries() -> None:
    def taken(cap: int) -> tuple[str, list[int | None]]:
        both = pair(1000, 1000)
        here = msgspec.structs.replace(both.here, caps_mbit_per_s={"10.78.0.0/15": cap})
        route = choose(dataclasses.replace(both, here=here), "auto")
        assert ("a cap counts for all NICs together, and mig0 carries as much alone" in route.why) is (cap <= 1000)
        return route.transport, [path.speed_mbit_per_s for path in route.paths]

    assert taken(900) == ("tcp", [900])
    assert taken(1000) == ("tcp", [1000])
    assert taken(1400) == ("multichannel", [700, 700])


def test_a_cap_on_a_network_that_is_not_taken_changes_nothing() -> None:
    both = pair(1000)
    capped, elsewhere = [
        dataclasses.replace(both, here=msgspec.structs.replace(both.here, caps_mbit_per_s={network: 500}))
        for network in ("10.78.0.0/24", "10.99.0.0/24")
    ]
    assert choose(capped, "auto").why.endswith(
        "not compressed: the cap on bandwidth counts what is sent before it is compressed"
    )
    assert choose(elsewhere, "auto") == choose(both, "auto")


def test_what_is_blocked_or_unplugged_is_no_path() -> None:
    route = choose(pair(500, 500), "auto", blocked={"10.79.0.2"})
    assert (route.transport, nics(route)) == ("compression", ["mig0"])
    assert route.why.endswith("no working connection to 10.79.0.2")
    unplugged = ends([nic(0, 1), nic(1, 1, carrier=False)], [nic(0, 2), nic(1, 2)])
    assert nics(choose(unplugged, "multichannel")) == ["mig0"]
    assert choose(pair(500, 500), "auto", blocked={"10.78.0.2", "10.79.0.2"}).paths == ()


def test_hosts_without_a_common_network_are_routed() -> None:
    route = choose(ends([nic(0, 1)], [nic(1, 2)]), "auto")
    assert (route.transport, route.paths[0].here, route.paths[0].there) == ("tcp", "", "10.79.0.2")


def test_routing_leads_to_no_network_that_is_not_allowed_here() -> None:
    far = ends([nic(0, 1)], [nic(5, 2)], allowed=False)
    assert choose(far, "auto").paths
    here = msgspec.structs.replace(far.here, allowed=NETWORKS)
    assert choose(dataclasses.replace(far, here=here), "auto").paths == ()


def team(host: int, *, policy: str = "layer3+4", speed: int | None = 4000, links: int = 2) -> list[HostNic]:
    """A bond of two NICs, of which so many have a link."""
    made = msgspec.structs.replace(
        nic(0, host, speed),
        name="bond0",
        kind="bond",
        bond_mode="802.3ad",
        hash_policy=policy,
        members=("mig1", "mig2"),
    )
    members = [nic(number, 0, 2000, carrier=number <= links) for number in (1, 2)]
    return [made, *(msgspec.structs.replace(one, master="bond0", addresses=()) for one in members)]


def test_a_team_that_hashes_ports_gets_several_connections() -> None:
    for here, there in ((team(1), team(2)), (team(1), [nic(0, 2, 4000)]), ([nic(0, 1, 4000)], team(2))):
        route = choose(ends(here, there), "auto")
        assert (route.transport, [path.streams for path in route.paths]) == ("multichannel", [8])
        assert route.why.startswith("8 connections use all members of the team, which has 4000 Mbit/s; not compressed")
    assert choose(ends(team(1), team(2)), "multichannel").paths[0].streams == 8
    assert choose(ends(team(1), team(2)), "tcp").paths[0].streams == 1
    slow = choose(ends(team(1, speed=2000), team(2, speed=2000)), "auto")
    assert (slow.transport, slow.paths[0].streams) == ("compression", 8)


def test_relays_use_all_members_of_a_team() -> None:
    for asked in ("compression", "auto"):
        route = choose(ends(team(1, speed=200), team(2, speed=200)), asked)
        assert (route.transport, route.paths[0].streams) == ("compression", 8)
        assert route.is_multipath
    assert not choose(ends(team(1), team(2)), "tcp").is_multipath


def test_a_team_beside_a_nic_shares_the_connections_there_may_be() -> None:
    route = choose(ends([*team(1), nic(3, 1, 2000)], [*team(2), nic(3, 2, 2000)], allowed=False), "auto")
    assert {path.nic_here: path.streams for path in route.paths} == {"bond0": 4, "mig3": 1}


@pytest.mark.parametrize(
    ("bond", "words"),
    [
        ({"policy": "layer2"}, "only NIC"),
        ({"links": 1}, "only NIC"),
        ({"speed": 20_000}, "does not fill"),
        ({"speed": None}, "not known"),
    ],
)
def test_a_team_from_which_nothing_is_gained_gets_one(bond: dict[str, Any], words: str) -> None:
    route = choose(ends(team(1, **bond), team(2, **bond)), "auto")
    assert (route.transport, words in route.why) == ("tcp", True), route.why


def vlans(host: int, count: int, speed: int = 1000) -> list[HostNic]:
    """So many VLANs, each of a network of its own, and the NIC they are on."""
    made = [
        msgspec.structs.replace(nic(at, host, speed), name=f"eth0.{at}", kind="vlan", lower="eth0")
        for at in range(count)
    ]
    return [*made, msgspec.structs.replace(nic(9, host, speed), name="eth0", addresses=())]


def on_vlan(made: list[HostNic]) -> list[HostNic]:
    """A team that has its address on a VLAN."""
    bond, *members = made
    vlan = msgspec.structs.replace(
        bond, name="bond0.20", kind="vlan", bond_mode="", hash_policy="", members=(), lower="bond0"
    )
    return [vlan, msgspec.structs.replace(bond, addresses=()), *members]


def in_bridge(made: list[HostNic], *others: HostNic) -> list[HostNic]:
    """NICs of which the first is in a bridge, with others, and that has its address."""
    first, *rest = made
    switch = msgspec.structs.replace(
        nic(8, 0, first.speed_mbit_per_s),
        name="br0",
        kind="bridge",
        addresses=first.addresses,
        members=(first.name, *(one.name for one in others)),
    )
    inside = [msgspec.structs.replace(one, master="br0", addresses=()) for one in (first, *others)]
    return [switch, *inside, *rest]


#: A container's end of a pair.
CONTAINER = msgspec.structs.replace(nic(7, 0), name="veth0", kind="veth")


@pytest.mark.parametrize(
    "below",
    [
        on_vlan,
        in_bridge,
        lambda made: in_bridge(made, CONTAINER),
        lambda made: in_bridge(on_vlan(made)),
    ],
)
def test_a_team_counts_also_below_a_vlan_or_a_bridge(below: Callable[[list[HostNic]], list[HostNic]]) -> None:
    for here, there in ((below(team(1)), team(2)), (team(1), below(team(2))), (below(team(1)), below(team(2)))):
        route = choose(ends(here, there), "auto")
        assert (route.transport, [path.streams for path in route.paths]) == ("multichannel", [8]), route.why
    assert choose(ends(below(team(1, policy="layer2")), [nic(0, 2, 4000)]), "auto").paths[0].streams == 1


def test_a_bridge_that_leads_several_ways_is_no_team() -> None:
    route = choose(ends(in_bridge(team(1), nic(7, 0)), [nic(0, 2, 4000)]), "auto")
    assert (route.transport, route.paths[0].streams) == ("tcp", 1)


def test_bridges_that_are_said_to_lie_below_each_other_are_borne() -> None:
    def switch(name: str, member: str) -> HostNic:
        return msgspec.structs.replace(nic(0, 2), name=name, kind="bridge", members=(member,))

    mad = [switch("br0", "br1"), msgspec.structs.replace(switch("br1", "br0"), addresses=())]
    assert choose(ends([nic(0, 1)], mad), "auto").paths


@pytest.mark.parametrize("asked", ["auto", "multichannel", "compression"])
def test_vlans_on_one_nic_are_one_nic(asked: str) -> None:
    apart = [nic(at, 2) for at in range(3)]
    for here, there in ((vlans(1, 3), apart), ([nic(at, 1) for at in range(3)], vlans(2, 3))):
        route = choose(ends(here, there), asked)
        assert (len(route.paths), route.striped, route.alone) == (1, False, False)
    beside = choose(ends([*vlans(1, 2), nic(2, 1)], apart), asked)
    assert nics(beside) == ["eth0.0", "mig2"]
    other = choose(ends(vlans(1, 2), apart), asked, blocked={"10.78.0.2"})
    assert nics(other) == ["eth0.1"]


def test_a_stream_is_not_spread_over_another_vlan_of_a_nic_that_it_uses() -> None:
    both = ends(vlans(1, 2), [nic(0, 2), nic(1, 2)])
    kept = choose(both, "tcp").paths
    assert spread(both, kept, ()) == kept
    apart = ends([nic(0, 1), nic(1, 1)], [nic(0, 2), nic(1, 2)])
    assert len(spread(apart, choose(apart, "tcp").paths, ())) == 2


@st.composite
def hosts(draw: st.DrawFn, number: int) -> list[HostNic]:
    count = draw(st.integers(0, 4))
    return [
        nic(
            place,
            10 * number + place,
            draw(st.none() | st.sampled_from([10, 100, 1000, 25_000])),
            carrier=draw(st.booleans()),
            network=draw(st.integers(0, 3)),
        )
        for place in range(count)
    ]


@given(
    hosts(1),
    hosts(2),
    st.tuples(st.booleans(), st.booleans()),
    st.booleans(),
    st.sampled_from(["auto", "tcp", "multichannel"]),
    st.data(),
)
def test_whatever_the_hosts_have_the_route_is_allowed_open_and_its_own(
    here: list[HostNic],
    there: list[HostNic],
    mptcp: tuple[bool, bool],
    allowed: bool,
    asked: str,
    data: st.DataObject,
) -> None:
    both = ends(here, there, mptcp=mptcp, allowed=allowed)
    blocked = data.draw(st.sets(st.sampled_from(both.offered))) if both.offered else set()
    route = choose(both, asked, blocked)
    assert route.why
    assert route.transport in (("tcp",) if asked == "tcp" else ("tcp", "multichannel", "compression"))
    assert route.transport != "compression" or (asked == "auto" and not both.no_relay)
    assert route.striped or all(mptcp) or len(route.paths) <= 1
    assert not route.striped or route.transport == "compression" or len(route.paths) > 1
    assert bool(route.paths) == any(is_allowed(one, both.here.allowed) for one in set(both.offered) - blocked)
    assert len(route.paths) <= 1 or route.transport != "tcp"
    assert not blocked & {path.there for path in route.paths}
    for ends_of in ("here", "there", "nic_here", "nic_there"):
        values = [getattr(path, ends_of) for path in route.paths]
        assert len(values) == len(set(values))
    for path in route.paths:
        for address in filter(None, (path.here, path.there)):
            assert not allowed or any(ipaddress.ip_address(address) in ipaddress.ip_network(one) for one in NETWORKS)


@pytest.mark.parametrize(
    ("speeds", "nics_used", "why"),
    [
        ((1000,), ["mig0"], "it was asked for"),
        ((2000,), ["mig0"], "it was asked for"),
        ((500, 500), ["mig0", "mig1"], "it was asked for"),
        ((10_000,), ["mig0"], "it was asked for, but a processor does not compress faster than 10000 Mbit/s"),
        ((None,), ["mig0"], "it was asked for, but the speed of mig0 is not known"),
    ],
)
def test_compression_goes_over_what_would_be_taken_without_it(
    speeds: tuple[int | None, ...], nics_used: list[str], why: str
) -> None:
    route = choose(pair(*speeds), "compression")
    assert (route.transport, nics(route), route.why) == ("compression", nics_used, why)


def test_a_destination_without_a_relay_of_our_version_gets_it_uncompressed_and_is_told_why() -> None:
    old = dataclasses.replace(pair(500, 500), no_relay="host 'host2' knows another version of it, or none")
    route = choose(old, "compression")
    assert (route.transport, nics(route)) == ("multichannel", ["mig0", "mig1"])
    assert route.why.startswith(
        "compression is not possible: host 'host2' knows another version of it, or none; 2 NICs"
    )
