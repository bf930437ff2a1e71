"""Moves through the relays that compress: what arrives, what is shared, and what is left when something breaks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from harness.commands import limosa
from harness.labs import LabHost, running_lab
from limosa.model.migration import Migration, Outcome
from limosa.model.vm import VmState
from limosa.wire import api, endpoints

pytestmark = [pytest.mark.qemu, pytest.mark.lab]

MIB = 1024 * 1024
SLOW_MBIT_PER_S = 40
#: Names of empty pages alone are 9 bytes each, and compress well.
BIG_MIB = 4096


@pytest.fixture(scope="module")
def lab() -> Iterator[list[LabHost]]:
    with running_lab(2, speed_mbit_per_s=SLOW_MBIT_PER_S) as hosts:
        yield hosts


@pytest.fixture
def hosts(lab: list[LabHost]) -> Iterator[list[LabHost]]:
    yield lab
    for host in lab:
        host.clean()


def big(host: LabHost) -> None:
    """A VM that takes seconds to move, without a guest that would have to boot."""
    host.create(api.NewVm(name="vm", memory_mib=BIG_MIB, accelerator="tcg"))


def begin(hosts: list[LabHost], vm: str = "vm") -> str:
    options = api.MoveOptions(transport="compression")
    request = api.MoveRequest(vm=vm, destination=hosts[1].name, options=options)
    return hosts[0].client.call(endpoints.MOVE, request).id


def arrived(hosts: list[LabHost], migration: str, vm: str = "vm") -> Migration:
    ended = hosts[0].outcome(migration)
    assert ended.outcome is Outcome.COMPLETED, ended.fault
    view = hosts[1].vm(vm)
    assert view is not None
    assert view.state is VmState.RUNNING
    return ended


def test_a_move_is_compressed_and_says_so(hosts: list[LabHost]) -> None:
    big(hosts[0])
    checked = limosa(hosts[0], "check", "vm", "--to", "host2", "--transport", "compression")
    assert "transport: compression (it was asked for)" in checked.out
    ended = arrived(hosts, begin(hosts))
    assert ended.transport == "compression"
    assert ended.route is not None
    made = ended.route.compressed
    assert made is not None
    assert made.raw_bytes >= ended.progress.transferred_bytes
    print(ended)
