"""A guest writes numbers to a disk that moves along, and something dies: whoever owns the VM has every number.

The guest says a number only when its disk has told it that the number is durable. The steps and where the VM is
afterwards are those of ``test_every_step_of_disks``; besides, the network is cut and healed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from test_every_step_of_disks import MOMENTS, STEPS, plans

from harness.disks import Listener, assert_keeps, goes_on, number
from harness.guests import LanClient, wait_until_it_serves
from harness.hosts import settled, wait_until
from harness.images import images, numbering
from harness.labs import LabHost, running_lab, set_links
from harness.qmp import assert_no_copies
from harness.steering import looking
from limosa.errors import LimosaError
from limosa.lab.plan import UPLINK
from limosa.model.vm import VmState
from limosa.wire import endpoints

pytestmark = [pytest.mark.qemu, pytest.mark.lab]

QUICK = {"source:whole:after:daemon", "source:handing-over:after:both"}
CUTS = [f"{step}:{moment}:network" for step in STEPS for moment in MOMENTS if step.startswith("source")]


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[LabHost]]:
    with running_lab() as made:
        yield made


@pytest.fixture(scope="module")
def client(hosts: list[LabHost]) -> LanClient:
    """A client of the guest ``web``, which numbers a disk that only its host sees."""
    return numbering(hosts[0])


def cases() -> Iterator[object]:
    for plan, expected in [*plans(), *((plan, "") for plan in CUTS)]:
        yield pytest.param(plan, expected, id=plan, marks=[] if plan in QUICK else pytest.mark.long)


@pytest.mark.parametrize(("plan", "expected"), list(cases()))
def test_whoever_has_the_vm_has_every_number(hosts: list[LabHost], client: LanClient, plan: str, expected: str) -> None:
    source, _ = sorted(hosts, key=lambda host: host.vm("web") is None)
    owner, last = broken_move(hosts, client, plan)
    view = owner.show("web")
    wait_until(lambda: owner.show("web").state in (VmState.RUNNING, VmState.CRASHED), "it runs, or has crashed")
    if expected:
        there = "alpha" if owner is source else "beta"
        assert f"{owner.show('web').state} at {there}" == expected
    if owner.show("web").state is VmState.RUNNING:
        goes_on(client)
        assert_keeps(owner, "web", number(client))
        assert_no_copies(owner)
    else:
        assert_keeps(owner, "web", last)
        owner.client.call(endpoints.START_VM, vm="web")
        wait_until_it_serves(client)
    wait_until(lambda: [str(path) for path in images(owner)] == [disk.path for disk in view.config.disks], "one image")
    (other,) = [host for host in hosts if host is not owner]
    wait_until(lambda: images(other) == [], "the other host has none")


def broken_move(hosts: list[LabHost], client: LanClient, plan: str) -> tuple[LabHost, int]:
    """Move ``web`` from the host that has it to the other while the plan is carried out.

    The one host that has it when every move has ended, and the last number that the guest said before.
    """
    source, destination = sorted(hosts, key=lambda host: host.vm("web") is None)
    broken = source if plan.startswith("source") else destination
    links = ",".join((UPLINK, *broken.lab.nic_names))
    broken.restart({"LIMOSA_TEST_BREAK": plan, "LIMOSA_TEST_LINKS": links})
    listener = Listener(client)
    with looking(listener.ask):
        with contextlib.suppress(LimosaError):  # the daemon may die before it has answered
            source.move("web", destination.name)
        strike(broken, plan.rpartition(":")[2])
        wait_until(lambda: settled(hosts), "every move has ended")
        wait_until(lambda: len(owners(hosts)) == 1, "one host has it")
    (owner,) = owners(hosts)
    return owner, listener.last


def strike(host: LabHost, victim: str) -> None:
    """Wait until the plan has been carried out, and have its victim come again."""
    if victim in ("daemon", "both"):
        host.wait_for_death()
        host.start()
    elif victim == "network":
        wait_until(host.is_cut, "the network is cut")
        set_links(host, "up")


def owners(hosts: list[LabHost]) -> list[LabHost]:
    return [host for host in hosts if (view := host.vm("web")) is not None and view.state is not VmState.INCOMING]
