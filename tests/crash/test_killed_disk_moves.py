"""kill -9 at every step of a move of disks within a host: the image the VM's description names holds all it was told.

A guest writes numbers all the time. Whatever dies, afterwards there is one image, the guest goes on with it (or starts
from it), and nothing is left in QEMU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from harness.crashes import disks_of
from harness.disks import Listener, assert_keeps, goes_on, number
from harness.guests import LanClient, wait_until_it_serves
from harness.hosts import wait_until
from harness.images import add_location, images, numbering
from harness.labs import LabHost, running_lab
from harness.qmp import assert_no_copies
from harness.steering import looking
from limosa.errors import LimosaError
from limosa.model.migration import Outcome
from limosa.model.vm import VmState
from limosa.wire import api, endpoints

pytestmark = [pytest.mark.qemu, pytest.mark.lab]

STEPS = ("made", "copied", "settled", "committed", "finalized", "pivoted", "removed")
#: From here on the new image is the VM's.
COMMITTED = {
    "committed:after",
    "finalized:before",
    "finalized:after",
    "pivoted:before",
    "pivoted:after",
    "removed:before",
    "removed:after",
}
#: From here on it becomes that although QEMU is dead, because it has everything.
SETTLED = {"settled:after", "committed:before"}
QUICK = {
    "copied:before:daemon",
    "settled:after:daemon",
    "committed:after:daemon",
    "finalized:before:daemon",
    "pivoted:after:daemon",
    "removed:before:daemon",
}


def plans() -> list[str]:
    return [
        f"{step}:{moment}:{victim}"
        for step in STEPS
        for moment in ("before", "after")
        for victim in ("daemon", "qemu", "both")
    ]


@pytest.fixture(scope="module")
def host() -> Iterator[LabHost]:
    with running_lab(1) as (made,):
        add_location(made, "fast")
        yield made


@pytest.fixture(scope="module")
def client(host: LabHost) -> LanClient:
    """A client of the guest ``web``, which numbers its disk."""
    return numbering(host)


@pytest.mark.parametrize(
    "plan", [pytest.param(plan, marks=[] if plan in QUICK else pytest.mark.long) for plan in plans()]
)
def test_the_named_image_holds_everything(host: LabHost, client: LanClient, plan: str) -> None:
    step, _, victim = plan.rpartition(":")
    if host.show("web").state is not VmState.RUNNING:  # an earlier case has failed
        host.client.call(endpoints.START_VM, vm="web")
        wait_until_it_serves(client)
    (old,) = disks_of(host, "web")
    listener = Listener(client)
    host.restart({"LIMOSA_TEST_BREAK": f"host:{plan}"})
    where = "images" if old.parent.name == "fast" else "fast"
    with looking(listener.ask):
        begin(host, where)
        if victim in ("daemon", "both"):
            host.wait_for_death()
        else:
            wait_until(lambda: host.show("web").migration is None, "the move has ended")
        if victim != "daemon":
            wait_until(lambda: host.qemus() == [], "QEMU has died")
    host.start()
    wait_until(lambda: host.show("web").migration is None, "the move has ended")
    wait_until(lambda: not list((host.state / "migrations").glob("*.disks.json")), "nothing is left to do")
    (image,) = disks_of(host, "web")
    assert (image != old) == (step in COMMITTED or (step in SETTLED and victim == "qemu"))
    assert images(host) == [image]
    if victim == "daemon":
        goes_on(client)
        assert_keeps(host, "web", number(client))
        assert_no_copies(host)
    else:
        assert host.show("web").state is VmState.CRASHED
        assert_keeps(host, "web", listener.last)
        host.client.call(endpoints.START_VM, vm="web")
        wait_until_it_serves(client)
        goes_on(client)


def begin(host: LabHost, where: str) -> None:
    request = api.DiskMoveRequest(vm="web", location=where)
    with contextlib.suppress(LimosaError):  # the daemon may die before it has answered
        begun = host.client.call(endpoints.MOVE_DISKS, request)
        assert begun.outcome is Outcome.UNDER_WAY
