"""kill -9 at every step of a move that takes a disk along: the VM is on one host, with a whole disk, and nothing else.

The disk lies in the source's own folder, so that the destination does not see it and it must be copied. Besides the
steps of the journals there are those of the copy (``harness/daemon.py``).
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest

from harness.crashes import broken_move, clean, disks_of, images, nothing_else_is_left, place
from harness.disks import assert_clean
from harness.hosts import Host, running_hosts, tiny
from harness.qmp import assert_no_copies
from limosa.model.migration import Outcome
from limosa.wire import api, endpoints

pytestmark = [pytest.mark.qemu, pytest.mark.lab]

MOMENTS = ("before", "after")
VICTIMS = ("daemon", "qemu", "both")
SIZE_MIB = 4
#: Where the VM must be afterwards, by who died.
HERE = {"daemon": "running at alpha", "qemu": "crashed at alpha", "both": "crashed at alpha"}
THERE = {"daemon": "running at beta", "qemu": "crashed at beta", "both": "crashed at beta"}
STAYS = dict.fromkeys(VICTIMS, "running at alpha")
EITHER = "running at alpha or running at beta"
LEFT = dict.fromkeys(VICTIMS, "running at beta")
STEPS: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    # step: expected when it is struck before, after
    "source:migrating": (HERE, HERE),
    "source:copied": (HERE, HERE),
    "source:whole": (HERE, HERE),
    # Who kills both before the hand-over is written takes with them all knowledge that QEMU had completed.
    "source:handing-over": (LEFT | {"both": "crashed at alpha"}, LEFT),
    "source:confirmed": (LEFT, LEFT),
    "source:removed": (LEFT, LEFT),
    "source:finished": (LEFT, LEFT),
    "destination:made": (STAYS, STAYS),
    "destination:exported": (STAYS, STAYS),
    # The last memory is under way: whoever is first decides, its end or the source, which sees the session broken.
    "destination:closed": (STAYS | {"daemon": EITHER}, STAYS | {"daemon": EITHER}),
    # The word was given: a daemon that comes again does what it says. A dead QEMU never ran the guest.
    "destination:continuing": (
        STAYS | {"daemon": "running at beta"},
        STAYS | {"daemon": "running at beta", "both": "crashed at beta"},
    ),
    "destination:owned": (THERE, THERE),
}
#: No QEMU is there to be killed yet, or any more.
DAEMON_ONLY = ("source:removed", "source:finished", "destination:made")
QUICK = {
    "source:copied:before:daemon",
    "source:copied:after:qemu",
    "source:whole:before:qemu",
    "source:whole:after:daemon",
    "source:handing-over:after:both",
    "source:removed:before:daemon",
    "destination:made:after:daemon",
    "destination:exported:after:qemu",
    "destination:closed:after:daemon",
    "destination:closed:after:qemu",
    "destination:owned:after:daemon",
}


def plans() -> Iterator[tuple[str, str]]:
    """Every plan, and where the VM must be afterwards."""
    for step, expected in STEPS.items():
        for moment, by_victim in zip(MOMENTS, expected, strict=True):
            for victim in ("daemon",) if step in DAEMON_ONLY else VICTIMS:
                yield f"{step}:{moment}:{victim}", by_victim[victim]


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[Host]]:
    with running_hosts("alpha", "beta") as made:
        yield made


def with_disk(host: Host) -> api.NewVm:
    """A VM with a disk that only ``host`` sees."""
    path = host.state / "images" / "vm.qcow2"
    return msgspec.structs.replace(tiny("vm"), disks=(api.NewDisk(path=str(path), size_mib=SIZE_MIB),))


@pytest.mark.parametrize(
    ("plan", "expected"),
    [pytest.param(*case, id=case[0], marks=[] if case[0] in QUICK else pytest.mark.long) for case in plans()],
)
def test_one_host_has_the_vm_and_its_disk(hosts: list[Host], plan: str, expected: str) -> None:
    hosts[0].create(with_disk(hosts[0]))
    with broken_move(hosts, plan, expected) as owner:
        assert_clean(*disks_of(owner, "vm"))
        if expected.startswith("running"):
            assert_no_copies(owner)
        else:
            owner.client.call(endpoints.START_VM, vm="vm")


def test_without_a_crash_the_disk_moves(hosts: list[Host]) -> None:
    """The cases above would prove little if the move failed by itself."""
    alpha, beta = hosts
    for host in hosts:
        host.kill()
        host.start()
    alpha.create(with_disk(alpha))
    try:
        migration = alpha.outcome(alpha.move("vm", "beta").id)
        assert migration.outcome is Outcome.COMPLETED, migration.fault
        assert [plan.action for plan in migration.disks] == ["copy"]
        assert place(hosts) == "running at beta"
        assert nothing_else_is_left(hosts)
        assert images(beta) == disks_of(beta, "vm")
        assert_clean(*disks_of(beta, "vm"))
    finally:
        clean(hosts)
