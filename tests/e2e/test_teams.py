"""One move over all members of a bond, in lab VMs: what each member carries, how fast it is, and a plug pulled out.

The links are shaped to so little that they, and not the emulated processors, are what a move waits for. What is
measured is shown with ``pytest -s``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest

from harness.labvm import LabVm
from harness.labvm.hosts import VmHost, running_vm_hosts
from limosa.model.migration import Migration

pytestmark = [pytest.mark.qemu, pytest.mark.labvm, pytest.mark.long]

MIB = 1024 * 1024
MEMORY_MIB, FILLED_MIB = 64, 24
LINK_MBIT_PER_S = 10
MEMBERS = ("eth0", "eth1")
MODES = ("balance-xor", "802.3ad")
AGGREGATED_WITHIN_S = 60
TEAM_MODES = ("loadbalance", "activebackup")
#: What teamd does first. By the kernel's headers (linux/if_team.h), and not by what is tested.
_SET_TEAM_MODE = r"""
import socket, struct, sys
def attribute(kind, value):
    return struct.pack("HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)
def ask(link, family, command, version, attributes):
    message = struct.pack("BBH", command, version, 0) + attributes
    link.send(struct.pack("IHHII", 16 + len(message), family, 5, 1, 0) + message)  # REQUEST | ACK
    return link.recv(65536)
name, mode = sys.argv[1:]
link = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 16)
link.bind((0, 0))
said = ask(link, 16, 3, 1, attribute(2, b"team\0"))[20:]  # CTRL_CMD_GETFAMILY
link.recv(65536)
while struct.unpack_from("HH", said)[1] != 1:
    said = said[struct.unpack_from("H", said)[0] + 3 & ~3 :]
family = struct.unpack_from("H", said, 4)[0]
option = attribute(1, b"mode\0") + attribute(3, b"\x05") + attribute(4, mode.encode() + b"\0")
options = attribute(1 | 0x8000, option)
said = ask(
    link, family, 1, 1, attribute(1, struct.pack("I", socket.if_nametoindex(name))) + attribute(2 | 0x8000, options)
)
while struct.unpack_from("H", said, 4)[0] != 2:
    said = link.recv(65536)
sys.exit(0 if struct.unpack_from("i", said, 16)[0] in (0, -3) else said.hex())  # ESRCH: nobody hears of the change
"""


def wire(vm: LabVm, number: int) -> dict[str, Any]:
    """A bond of both NICs, each shaped."""
    for nic in MEMBERS:
        vm.run(f"tc qdisc add dev {nic} root tbf rate {LINK_MBIT_PER_S}mbit burst 64kb latency 50ms")
    vm.run("ip link add bond0 type bond mode balance-xor miimon 100 xmit_hash_policy layer3+4")
    vm.run(f"ip addr add 10.7.0.{number}/24 dev bond0")
    bond(vm, MODES[0])
    return {"encrypt": False}


def bond(vm: LabVm, mode: str) -> None:
    """Have the bond work so from now on."""
    for nic in MEMBERS:
        vm.run(f"ip link set {nic} down; ip link set {nic} nomaster")
    vm.run(f"ip link set bond0 down; ip link set bond0 type bond mode {mode} xmit_hash_policy layer3+4")
    for nic in MEMBERS:
        vm.run(f"ip link set {nic} master bond0")
    vm.run("ip link set bond0 up")


@pytest.fixture(scope="module")
def lab() -> Iterator[tuple[VmHost, VmHost]]:
    with running_vm_hosts(wire, fill_mib=FILLED_MIB) as hosts:
        hosts[0].create("vm", MEMORY_MIB)
        yield hosts


@pytest.fixture(params=MODES)
def ends(lab: tuple[VmHost, VmHost], request: pytest.FixtureRequest) -> tuple[VmHost, VmHost]:
    """Where the VM is, and the other one, with bonds of that mode."""
    for host in lab:
        bond(host.vm, request.param)
    if request.param == "802.3ad":
        for host in lab:
            agreed = "grep -q 'Number of ports: 2' /proc/net/bonding/bond0"
            host.vm.run(f"for i in $(seq {AGGREGATED_WITHIN_S}); do {agreed} && exit; sleep 1; done; false")
    here, there = lab
    return (here, there) if here.ask("vm", "list") else (there, here)


def moved(source: VmHost, destination: VmHost, *options: str) -> tuple[Migration, dict[str, int]]:
    """Move the VM; its memory must arrive. How it went, and what each member of the source's bond has sent."""
    before, digest = source.sent(*MEMBERS), source.memory(MEMORY_MIB)
    source.begin("vm", destination, *options)
    ended = source.moved()
    after = source.sent(*MEMBERS)
    assert destination.memory(MEMORY_MIB) == digest
    return ended, {nic: after[nic] - before[nic] for nic in MEMBERS}


def rate(migration: Migration) -> float:
    """Mbit/s of the whole transfer."""
    assert migration.transfer_s is not None
    return migration.progress.transferred_bytes * 8 / 1e6 / migration.transfer_s


def test_a_move_uses_all_members_and_is_faster_for_it(ends: tuple[VmHost, VmHost]) -> None:
    source, destination = ends
    several, used = moved(source, destination, "--transport", "multichannel")
    print(f"several connections: {rate(several):.1f} Mbit/s, {used}")
    assert min(used.values()) > 0.2 * sum(used.values())
    single, taken = moved(destination, source, "--transport", "tcp")
    print(f"one connection: {rate(single):.1f} Mbit/s, {taken}")
    assert max(taken.values()) > 0.9 * sum(taken.values())
    assert rate(several) > 1.4 * rate(single)


def test_a_plug_that_is_pulled_costs_speed_and_not_the_move(ends: tuple[VmHost, VmHost]) -> None:
    source, destination = ends
    digest, before = source.memory(MEMORY_MIB), source.sent(*MEMBERS)
    source.begin("vm", destination)
    source.until_sent("eth0", before["eth0"] + FILLED_MIB * MIB // 16)
    for host in ends:
        host.vm.plug("eth0", in_=False)
    try:
        cut = source.sent(*MEMBERS)
        ended = source.moved()
        assert ended.transport == "compression", "that is what it chooses by itself"
        after = source.sent(*MEMBERS)
    finally:
        for host in ends:
            host.vm.plug("eth0", in_=True)
    assert destination.memory(MEMORY_MIB) == digest
    assert after["eth0"] == cut["eth0"]
    assert after["eth1"] - cut["eth1"] > FILLED_MIB * MIB // 2
    print(f"a plug pulled: {rate(ended):.1f} Mbit/s, {after['eth1'] - cut['eth1']} bytes afterwards")


def test_a_bond_is_used_also_below_a_bridge_and_a_vlan(lab: tuple[VmHost, VmHost]) -> None:
    for host in lab:
        bond(host.vm, "balance-xor")
        host.vm.run("ip link add bond0.20 link bond0 type vlan id 20; ip link set bond0.20 up")
    bridged, plain = lab
    try:
        bridged.vm.run("ip link add br20 type bridge; ip link set br20 up; ip link set bond0.20 master br20")
        bridged.vm.run("ip addr add 10.7.20.1/24 dev br20")
        plain.vm.run("ip addr add 10.7.20.2/24 dev bond0.20")
        for host in lab:
            host.limosa("host", "settings", "migration_networks", "10.7.20.0/24")
        source, destination = (bridged, plain) if bridged.ask("vm", "list") else (plain, bridged)
        for here, there in ((source, destination), (destination, source)):
            ended, used = moved(here, there, "--transport", "multichannel")
            print(f"below a bridge and a VLAN: {rate(ended):.1f} Mbit/s, {used}")
            assert ended.route is not None
            assert [path.streams for path in ended.route.paths] == [8]
            assert min(used.values()) > 0.2 * sum(used.values())
    finally:
        for host in lab:
            host.limosa("host", "settings", "--reset", "migration_networks")
            host.vm.run("ip link del br20 2>/dev/null || true; ip link del bond0.20")


def test_the_bond_is_shown_and_judged(lab: tuple[VmHost, VmHost]) -> None:
    host = lab[0]
    bond(host.vm, "balance-xor")
    shown = host.limosa("host", "status")
    assert "bond balance-xor layer3+4 of eth0 eth1" in shown
    assert f"{2 * LINK_MBIT_PER_S} Mbit/s" in shown
    (advice,) = host.ask("host", "advise")
    assert "8 connections use all members of the team" in advice["why"]
    host.vm.run("ip link set bond0 type bond xmit_hash_policy layer2")
    (advice,) = host.ask("host", "advise")
    assert "connections use all members" not in advice["why"]
    assert [finding["code"] for finding in advice["findings"]] == ["bond-hashes-by-host"]


def test_the_mode_of_a_team_is_known(lab: tuple[VmHost, VmHost]) -> None:
    host = lab[0]
    try:
        for mode in TEAM_MODES:
            host.vm.run("ip link add team0 type team")
            host.vm.run(sys.executable, "-c", _SET_TEAM_MODE, "team0", mode)
            assert f"team {mode}" in host.limosa("host", "status")
            host.vm.run("ip link del team0")
    finally:
        host.vm.run("ip link del team0 2>/dev/null || true")
