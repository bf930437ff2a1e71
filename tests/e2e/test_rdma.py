"""Moves by RDMA between two hosts with soft-RoCE, in lab VMs: memory arrives, and what fails goes on without RDMA."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.labvm import LabVm
from harness.labvm.hosts import VmHost, running_vm_hosts
from limosa.model.migration import Migration

pytestmark = [pytest.mark.qemu, pytest.mark.labvm, pytest.mark.long]

MIB = 1024 * 1024
MEMORY_MIB, FILLED_MIB = 64, 48
ADD_DEVICE = "rdma link add rxe0 type rxe netdev eth1"
CONTRACT = Path(__file__).parents[1] / "contract" / "test_machine.py"


def wire(vm: LabVm, number: int) -> dict[str, Any]:
    """``eth0`` is for the daemons, and may carry moves if need be; ``eth1`` has the RDMA device."""
    for nic, network in (("eth0", 7), ("eth1", 8)):
        vm.run(f"ip addr add 10.{network}.0.{number}/24 dev {nic}; ip link set {nic} mtu 9000 up")
    vm.run(ADD_DEVICE)
    return {"encrypt": False, "transport": "rdma", "migration_networks": ["10.8.0.0/24", "10.7.0.0/24"]}


@pytest.fixture(scope="module")
def lab() -> Iterator[tuple[VmHost, VmHost]]:
    with running_vm_hosts(wire, fill_mib=FILLED_MIB) as hosts:
        hosts[0].create("vm", MEMORY_MIB)
        yield hosts


@pytest.fixture
def ends(lab: tuple[VmHost, VmHost]) -> tuple[VmHost, VmHost]:
    """Where the VM is, and the other one."""
    here, there = lab
    return (here, there) if here.ask("vm", "list") else (there, here)


def moved(source: VmHost, destination: VmHost, *options: str) -> Migration:
    """Move the VM; its memory must arrive as it was."""
    before = source.memory(MEMORY_MIB)
    source.begin("vm", destination, *options)
    ended = source.moved()
    assert destination.memory(MEMORY_MIB) == before
    return ended


def says_why(ended: Migration, words: str) -> bool:
    """Whether it went otherwise, and says so both in its route and in a finding."""
    assert ended.route is not None
    assert ended.route.transport in ("tcp", "multichannel", "compression")
    told = [finding.what for finding in ended.findings if finding.code == "rdma-not-used"]
    return words in ended.route.why and any(words in what for what in told)


@pytest.mark.parametrize("option", ["--no-rdma-pin-all", "--rdma-pin-all"])
def test_memory_moves_by_rdma(ends: tuple[VmHost, VmHost], option: str) -> None:
    ended = moved(*ends, option)
    assert ended.transport == "rdma"
    assert ended.route is not None
    assert [(path.nic_here, path.nic_there) for path in ended.route.paths] == [("eth1", "eth1")]


def test_encryption_keeps_rdma_away(ends: tuple[VmHost, VmHost]) -> None:
    source, destination = ends
    for host in ends:
        host.limosa("host", "settings", "encrypt=true")
    try:
        (found,) = source.ask("check", "vm", "--to", destination.name)
    finally:
        for host in ends:
            host.limosa("host", "settings", "encrypt=false")
    assert found["route"]["transport"] != "rdma"
    assert f"'encrypt' is on on host '{source.name}' and host '{destination.name}'" in found["route"]["why"]


def test_without_a_device_at_the_destination_it_goes_on_without(ends: tuple[VmHost, VmHost]) -> None:
    source, destination = ends
    destination.vm.run("rdma link del rxe0")
    try:
        ended = moved(source, destination)
    finally:
        destination.vm.run(ADD_DEVICE)
    assert says_why(ended, f"there is no RDMA device on host '{destination.name}'")


def test_a_cable_that_is_cut_in_mid_move_costs_time_and_not_the_move(ends: tuple[VmHost, VmHost]) -> None:
    """QEMU notices after some 19 s; then it begins again over the other network."""
    source, destination = ends
    before = source.memory(MEMORY_MIB)
    so_far = source.sent("eth1")["eth1"]
    source.begin("vm", destination)
    source.until_sent("eth1", so_far + FILLED_MIB * MIB // 8)
    source.vm.plug("eth1", in_=False)
    try:
        ended = source.moved()
    finally:
        source.vm.plug("eth1", in_=True)
    assert says_why(ended, "QEMU")
    assert destination.memory(MEMORY_MIB) == before


def test_a_real_qemu_keeps_the_contract_by_rdma(lab: tuple[VmHost, VmHost]) -> None:
    pytest_ = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CONTRACT), "-k", "rdma and qemu"]
    said = lab[0].vm.run("env", f"PYTHONPATH={':'.join(sys.path)}", "LIMOSA_TEST_RDMA=10.8.0.1", *pytest_)
    assert "3 passed" in said
