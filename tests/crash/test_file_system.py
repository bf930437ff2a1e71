"""A guest keeps files on an ext4 file system, its disk moves, and something dies: the file system is sound, and has
every file the guest was told is durable; a guest that starts again finds that, too.

The steps are those of ``test_acknowledged_writes`` and ``test_killed_disk_moves``, which say more of what is to be.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from test_acknowledged_writes import CUTS, broken_move, owners
from test_every_step_of_disks import plans
from test_killed_disk_moves import begin
from test_killed_disk_moves import plans as plans_on_one_host

from harness.disks import Listener, goes_on
from harness.files import assert_keeps_files, keeping_files, sound_when_stopped
from harness.guests import LanClient, console_log, wait_until_it_serves
from harness.hosts import wait_until
from harness.images import add_location
from harness.labs import LabHost, running_lab
from harness.steering import looking
from limosa.model.vm import VmState
from limosa.wire import endpoints

pytestmark = [pytest.mark.qemu, pytest.mark.lab, pytest.mark.long]


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[LabHost]]:
    with running_lab() as made:
        for host in made:
            add_location(host, "fast")
        yield made


@pytest.fixture(scope="module")
def client(hosts: list[LabHost]) -> LanClient:
    """A client of a guest ``web`` on the first host."""
    return keeping_files(hosts[0])


@pytest.mark.parametrize("plan", [plan for plan in (*(plan for plan, _ in plans()), *CUTS) if ":after:" in plan])
def test_it_moves_to_another_host(hosts: list[LabHost], client: LanClient, plan: str) -> None:
    owner, last = broken_move(hosts, client, plan)
    wait_until(lambda: owner.show("web").state in (VmState.RUNNING, VmState.CRASHED), "it runs, or has crashed")
    assert_goes_on(owner, client, last)


@pytest.mark.parametrize("plan", [plan for plan in plans_on_one_host() if ":after:" in plan])
def test_it_moves_to_another_location(hosts: list[LabHost], client: LanClient, plan: str) -> None:
    (host,) = owners(hosts)
    host.restart({"LIMOSA_TEST_BREAK": f"host:{plan}"})
    listener = Listener(client)
    where = "images" if "/fast/" in host.show("web").config.disks[0].path else "fast"
    with looking(listener.ask):
        begin(host, where)
        if plan.endswith(":qemu"):
            wait_until(lambda: host.show("web").migration is None, "the move has ended")
        else:
            host.wait_for_death()
    host.start()
    wait_until(lambda: not list((host.state / "migrations").glob("*.disks.json")), "nothing is left to do")
    assert_goes_on(host, client, listener.last)


def assert_goes_on(host: LabHost, client: LanClient, last: int) -> None:
    """The guest goes on, or is started again, and nothing is lost."""
    if host.show("web").state is VmState.CRASHED:
        sound_when_stopped(host, "web", last)
        host.client.call(endpoints.START_VM, vm="web")
        wait_until_it_serves(client)
    goes_on(client)
    assert_keeps_files(host, "web", last)
    assert "LIMOSA LOST" not in console_log(host, "web")
