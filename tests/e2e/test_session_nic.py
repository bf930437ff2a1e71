"""Moves over two NICs of which the first also carries the session of the two daemons, and dies: that costs speed, and
not the move."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import msgspec
import pytest

from harness.hosts import wait_until
from harness.labs import LabHost, plug, reaches, running_lab
from harness.steering import change, follow, settings
from limosa.model.migration import Migration, Outcome
from limosa.model.vm import VmState
from limosa.settings import toml
from limosa.settings.daemon import DaemonSettings
from limosa.wire import api, endpoints

pytestmark = [pytest.mark.qemu, pytest.mark.lab]

MIB = 1024 * 1024
SPEED_MBIT_PER_S = 100
#: Its empty pages alone are 18 MB.
BIG_MIB = 4096
#: Nothing ends under it before a test wants it to.
BRAKE = {"bandwidth_mbit_per_s": 4}
CUT = "mig0"


@pytest.fixture(scope="module")
def lab() -> Iterator[list[LabHost]]:
    """Hosts that call each other over the first of the NICs that carry moves, and listen on all."""
    with running_lab(2, nics=2, speed_mbit_per_s=SPEED_MBIT_PER_S, transport="auto") as hosts:
        for host in hosts:
            path = host.lab.host_state(host.name) / "host.toml"
            daemon = toml.read(path, DaemonSettings)
            toml.write(path, msgspec.structs.replace(daemon, listen=host.lab.addresses(host.name)))
            host.start()
            change(host, {"peers": {other.name: host.lab.migration_addresses(other.name)[0] for other in hosts}})
        yield hosts


@pytest.fixture
def hosts(lab: list[LabHost]) -> Iterator[list[LabHost]]:
    yield lab
    for host in lab:
        host.clean()


def notes(words: str) -> Callable[[Migration], bool]:
    return lambda view: words in view.progress.note


@pytest.mark.parametrize("side", ["source", pytest.param("destination", marks=pytest.mark.long)])
@pytest.mark.parametrize("striped", [True, False], ids=["relays", "multipath-tcp"])
def test_a_move_outlives_the_nic_of_its_session(hosts: list[LabHost], side: str, striped: bool) -> None:
    first, second = hosts
    cut = first if side == "source" else second
    for host in hosts:
        change(host, {"encrypt": striped})  # what is encrypted relays spread
    first.create(api.NewVm(name="vm", memory_mib=BIG_MIB, accelerator="tcg"))
    options = api.MoveOptions(transport="multichannel")
    request = api.MoveRequest(vm="vm", destination=second.name, options=options)
    try:
        with settings(first, BRAKE):
            migration = first.client.call(endpoints.MOVE, request).id
            view = follow(first, migration, lambda view: view.progress.transferred_bytes > MIB)
            assert view.route is not None
            assert (view.route.striped, len(view.route.paths)) == (striped, 2)
            plug(cut, CUT, in_=False)
            follow(first, migration, notes("the session with host 'host2' broke; connecting again"))
            follow(first, migration, lambda view: not notes("connecting again")(view))
            assert second.show("vm").state is VmState.INCOMING
        ended = first.outcome(migration)
    finally:
        plug(cut, CUT, in_=True)
        there = second.lab.migration_addresses(second.name)[0]
        wait_until(lambda: reaches(first, there), "the cable is in again")
    assert ended.outcome is Outcome.COMPLETED, ended.fault
    assert second.show("vm").state is VmState.RUNNING
    assert first.vm("vm") is None
