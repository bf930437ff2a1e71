"""What NICs a host has, from the kernel's answers, also of kinds this machine lacks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from pyroute2 import IPRoute
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

from limosa.lab import namespaces
from limosa.model.network import HostNetwork, HostNic, NicAddress
from limosa.network import teams
from limosa.network.nics import IFA_F_TENTATIVE, Answers, describe, emulated, gather, rdma_devices


def parsed(kind: type[Any], **fields: Any) -> Any:
    """A message as the kernel would send it: made, encoded, and decoded again."""
    made = kind()
    for name, value in fields.items():
        made[name] = value
    made.encode()
    message = kind(made.data)
    message.decode()
    return message


def link(index: int, name: str, *, kind: str = "", data: Any = None, flags: int = 1, **more: Any) -> Any:
    attributes: list[Any] = [("IFLA_IFNAME", name), ("IFLA_MTU", 1500)]
    attributes += [(f"IFLA_{key.upper()}", value) for key, value in more.items()]
    if kind:
        info: list[Any] = [("IFLA_INFO_KIND", kind)]
        attributes.append(("IFLA_LINKINFO", {"attrs": info + ([("IFLA_INFO_DATA", data)] if data else [])}))
    return parsed(ifinfmsg, index=index, flags=flags, attrs=attributes)


def address(index: int, text: str, flags: int = 0) -> Any:
    attributes = [("IFA_LOCAL", text), ("IFA_ADDRESS", text)]
    return parsed(ifaddrmsg, family=2, prefixlen=24, index=index, flags=flags, attrs=attributes)


def one(nics: tuple[HostNic, ...], name: str) -> HostNic:
    return next(nic for nic in nics if nic.name == name)


@pytest.mark.parametrize(
    ("mode", "policy", "words"), [(4, 1, ("802.3ad", "layer3+4")), (0, 0, ("balance-rr", "layer2")), (99, 99, ("", ""))]
)
def test_a_bond_has_mode_policy_and_members(mode: int, policy: int, words: tuple[str, str]) -> None:
    data = {"attrs": [("IFLA_BOND_MODE", mode), ("IFLA_BOND_XMIT_HASH_POLICY", policy)]}
    links = [link(2, "eth0", master=4), link(3, "eth1", master=4), link(4, "bond0", kind="bond", data=data)]
    nics = describe(Answers(links, [address(4, "10.0.0.1")], speeds={"bond0": 20_000}))
    bond = one(nics, "bond0")
    assert (bond.kind, bond.bond_mode, bond.hash_policy) == ("bond", *words)
    assert bond.members == ("eth0", "eth1")
    assert bond.addresses == (NicAddress(address="10.0.0.1", prefix=24),)
    assert bond.speed_mbit_per_s == 20_000
    assert [one(nics, name).master for name in bond.members] == ["bond0", "bond0"]
    assert one(nics, "eth0").kind == "physical"


@pytest.mark.parametrize(
    ("mode", "speeds", "together"),
    [
        (4, {"eth0": 100, "eth1": 100, "bond0": 2000}, 200),  # shaped members: the kernel adds up what ethtool says
        (2, {"eth0": 1000, "eth1": 1000}, 2000),
        (2, {"eth0": 1000}, None),  # of one it is not known
        (1, {"eth0": 1000, "eth1": 1000, "bond0": 1000}, 1000),  # active-backup uses one
    ],
)
def test_a_bond_that_uses_all_members_has_their_speed(mode: int, speeds: dict[str, int], together: int | None) -> None:
    data = {"attrs": [("IFLA_BOND_MODE", mode)]}
    links = [
        link(2, "eth0", master=5),
        link(3, "eth1", master=5),
        link(4, "eth2", master=5, carrier=0),
        link(5, "bond0", kind="bond", data=data),
    ]
    assert one(describe(Answers(links, speeds=speeds)), "bond0").speed_mbit_per_s == together


def test_a_vlan_says_what_it_is_on_and_is_no_faster() -> None:
    links = [
        link(2, "eth0"),
        link(3, "eth0.20", kind="vlan", link=2),
        link(4, "veth0", kind="veth", link=2),  # its other end
        link(5, "mac0", kind="macvlan", link=2, link_netnsid=0),  # another namespace's second NIC
        link(6, "mac1", kind="macvlan", link=99),  # a NIC of which nothing is known
        link(7, "br0", kind="bridge"),
        link(8, "eth0.30", kind="vlan", link=2, master=7),
    ]
    speeds = {"eth0": 100, "eth0.20": 1000, "veth0": 10_000, "br0": 1000, "eth0.30": 50}
    nics = {nic.name: nic for nic in describe(Answers(links, speeds=speeds))}
    assert {name: nic.lower for name, nic in nics.items() if nic.lower} == {"eth0.20": "eth0", "eth0.30": "eth0"}
    shown = {name: nic.speed_mbit_per_s for name, nic in nics.items()}
    assert shown == {"eth0": 100, "eth0.20": 100, "veth0": 10_000, "mac0": None, "mac1": None, "br0": 50, "eth0.30": 50}


def test_a_bridge_above_a_team_has_what_the_team_uses() -> None:
    links = [
        link(2, "eth0", master=4),
        link(3, "eth1", master=4),
        link(4, "team0", kind="team", master=5),
        link(5, "br0", kind="bridge"),
    ]
    speeds = {"eth0": 1000, "eth1": 1000, "team0": 2000, "br0": 2000}
    nics = describe(Answers(links, speeds=speeds, team_modes={4: "activebackup"}))
    assert one(nics, "br0").speed_mbit_per_s == 1000


@pytest.mark.lab
def test_what_lies_below_is_told_by_the_kernel() -> None:
    """Of what this machine has, which may be neither bonds nor VLANs: a macvlan, and a bridge above it."""

    def inside() -> HostNetwork:
        with IPRoute() as netlink:

            def add(name: str, **more: Any) -> int:
                netlink.link("add", ifname=name, **more)
                return int(netlink.link_lookup(ifname=name)[0])

            out = add("out", kind="veth", peer="wall")
            switch = add("br0", kind="bridge")
            for member in (add("mac0", kind="macvlan", link=out), add("container", kind="veth", peer="inside")):
                netlink.link("set", index=member, master=switch)
            return HostNetwork(nics=gather(netlink))

    name = f"limosa-nics-{os.getpid()}"
    namespaces.create(name)
    try:
        network = namespaces.inside(name, inside)
    finally:
        namespaces.remove(name)
    ways_down = {nic.name: [below.name for below in network.down_from(nic)] for nic in network.nics}
    assert ways_down["br0"] == ["br0", "mac0", "out"]
    assert (ways_down["out"], ways_down["wall"]) == (["out"], ["wall"]), "the ends of a pair are not below each other"


def test_a_team_is_told_from_a_bond() -> None:
    team = one(describe(Answers([link(2, "eth0", master=3), link(3, "team0", kind="team")])), "team0")
    assert (team.kind, team.members, team.bond_mode) == ("team", ("eth0",), "")


def option(name: str, kind: int, value: bytes) -> tuple[str, Any]:
    parts = [("NAME", name), ("TYPE", kind), ("DATA", value)]
    return "TEAM_ATTR_ITEM_OPTION", {"attrs": [(f"TEAM_ATTR_OPTION_{part}", what) for part, what in parts]}


def test_the_mode_of_a_team_is_among_its_options_however_many_messages_they_take() -> None:
    others = [option("notify_peers_count", 3, bytes(4)), option("enabled", 6, b"")]
    answers = [
        parsed(teams.TeamMessage, cmd=2, version=1, attrs=[("TEAM_ATTR_LIST_OPTION", {"attrs": options})])
        for options in (others, [option("user_linkup", 6, b""), option("mode", 5, b"activebackup\0")])
    ]
    assert teams.mode_of(answers) == "activebackup"
    assert teams.mode_of(answers[:1]) == ""
    assert teams.mode_of([parsed(teams.TeamMessage, cmd=2, version=1)]) == ""


@pytest.mark.parametrize(("mode", "together"), [("activebackup", 1000), ("loadbalance", 2000), ("", 2000)])
def test_a_team_is_as_fast_as_the_members_it_uses(mode: str, together: int) -> None:
    links = [link(2, "eth0", master=4), link(3, "eth1", master=4), link(4, "team0", kind="team")]
    speeds = {"eth0": 1000, "eth1": 1000, "team0": 2000}
    team = one(describe(Answers(links, speeds=speeds, team_modes={4: mode})), "team0")
    assert (team.bond_mode, team.speed_mbit_per_s) == (mode, together)


def test_a_team_of_which_the_kernel_says_nothing_has_no_mode() -> None:
    assert teams.modes([2_000_000_000]) == {}


def test_down_and_unplugged_are_told_apart() -> None:
    links = [link(2, "up"), link(3, "unplugged", carrier=0), link(4, "down", flags=0, carrier=0)]
    nics = describe(Answers(links))
    assert [(nic.up, nic.carrier) for nic in nics] == [(True, True), (True, False), (False, False)]


def test_an_address_that_cannot_be_used_yet_is_none() -> None:
    (nic,) = describe(Answers([link(2, "eth0")], [address(2, "10.0.0.1", IFA_F_TENTATIVE), address(2, "10.0.0.2")]))
    assert [own.address for own in nic.addresses] == ["10.0.0.2"]


def test_rdma_devices_are_known_by_their_nics(tmp_path: Path) -> None:
    entries = tmp_path / "mlx5_0" / "ports" / "1" / "gid_attrs" / "ndevs"
    entries.mkdir(parents=True)
    (entries / "0").write_text("eth0\n")
    (entries / "1").mkdir()  # cannot be read, as an empty entry of the kernel's
    assert rdma_devices(tmp_path) == {"eth0": "mlx5_0"}
    assert rdma_devices(tmp_path / "none") == {}
    (nic,) = describe(Answers([link(2, "eth0")], rdma={"eth0": "mlx5_0"}))
    assert (nic.rdma, nic.rdma_emulated) == ("mlx5_0", False)


def test_rdma_devices_of_the_kernel_are_told_from_hardware(tmp_path: Path) -> None:
    for name, place in (("mlx5_0", "pci0000:00/0000:00:01.0"), ("rxe0", "virtual")):
        (tmp_path / "devices" / place / name).mkdir(parents=True)
        (tmp_path / name).symlink_to(tmp_path / "devices" / place / name)
    assert emulated(tmp_path, ["mlx5_0", "rxe0"]) == {"rxe0"}
    (nic,) = describe(Answers([link(2, "eth0")], rdma={"eth0": "rxe0"}, emulated={"rxe0"}))
    assert nic.rdma_emulated
