"""kill -9 at every step of both journals, before and after each is written: of the daemon, of its QEMU, of both.

Real daemons, real QEMUs. Whatever dies, afterwards exactly one host has the VM, the daemons settle the move by
themselves, and nothing is left of it anywhere else.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from harness.crashes import broken_move, clean, nothing_else_is_left, place
from harness.hosts import Host, running_hosts, tiny
from harness.steering import change
from limosa.model.migration import Outcome
from limosa.model.vm import VmState

pytestmark = [pytest.mark.qemu, pytest.mark.lab]

SOURCE_STEPS = ("begin", "preparing", "migrating", "handing-over", "confirmed", "finished")
DESTINATION_STEPS = ("begin", "reserved", "continuing", "owned")
MOMENTS = ("before", "after")
HANDED_OVER = ("handing-over", "confirmed", "finished")
TRANSPORTS = ("tcp", "compression")
#: Shown over relays, which end with their daemon, and in the longer tests also without; the others the other way round.
RELAYED = {
    "source:migrating:after:daemon",
    "source:migrating:after:qemu",
    "source:handing-over:after:both",
    "destination:reserved:after:daemon",
    "destination:continuing:before:daemon",
    "destination:owned:before:daemon",
}


@pytest.fixture(scope="module")
def running() -> Iterator[list[Host]]:
    with running_hosts("alpha", "beta") as made:
        yield made


@pytest.fixture
def hosts(running: list[Host], transport: str) -> list[Host]:
    """The two hosts, between which memory goes by this transport."""
    for host in running:
        change(host, {"transport": transport})
    return running


def plans() -> Iterator[tuple[str, str]]:
    """Every plan, and where the VM must be afterwards: ``running at`` or ``crashed at`` a side."""
    for step in SOURCE_STEPS:
        for moment in MOMENTS:
            for victim in ("daemon", "qemu", "both"):
                if step == "finished" and victim != "daemon":
                    continue  # its QEMU is gone by then
                yield f"source:{step}:{moment}:{victim}", expected_at_source(step, moment, victim)
    for step in DESTINATION_STEPS:
        for moment in MOMENTS:
            for victim in ("daemon", "qemu", "both"):
                if step in ("begin", "reserved") and victim != "daemon":
                    continue  # there is no QEMU yet
                yield f"destination:{step}:{moment}:{victim}", expected_at_destination(step, moment, victim)


def expected_at_source(step: str, moment: str, victim: str) -> str:
    if victim == "daemon" and (step, moment) in (("begin", "after"), ("preparing", "before")):
        return "running at beta"  # the move was accepted and nothing had begun: the next daemon carries it out
    if step == "begin" and victim == "daemon":
        return "running at alpha"
    if step == "begin" or (step == "handing-over" and moment == "before" and victim == "both"):
        # With both gone nobody knows any more that QEMU had completed: a crash where the VM was.
        return "crashed at alpha"
    if step in HANDED_OVER:
        return "running at beta"
    return "running at alpha" if victim == "daemon" else "crashed at alpha"


def expected_at_destination(step: str, moment: str, victim: str) -> str:
    if step in ("begin", "reserved"):
        return "running at alpha"
    if step == "continuing":
        if victim == "daemon":
            return "running at beta"
        # The daemon that lived heard no RESUME and can prove that the guest did not run; a new one only knows what
        # its journal says.
        lost_proof = victim == "both" and moment == "after"
        return "crashed at beta" if lost_proof else "running at alpha"
    return "running at beta" if victim == "daemon" else "crashed at beta"


def cases() -> Iterator[object]:
    for transport in TRANSPORTS:
        for plan, expected in plans():
            is_quick = (transport == "compression") is (plan in RELAYED)
            marks = [] if is_quick else [pytest.mark.long]
            yield pytest.param(transport, plan, expected, id=f"{transport}-{plan}", marks=marks)


@pytest.mark.parametrize(("transport", "plan", "expected"), list(cases()))
def test_one_host_has_the_vm_and_nothing_is_left(hosts: list[Host], plan: str, expected: str) -> None:
    hosts[0].create(tiny("vm"))
    with broken_move(hosts, plan, expected) as owner:
        # It can be operated again: nothing holds it.
        assert owner.show("vm").migration is None


@pytest.mark.parametrize("victim", ["daemon", "qemu", pytest.param("both", marks=pytest.mark.long)])
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("step", ["undoing", "home"])
@pytest.mark.parametrize("transport", ["tcp", pytest.param("compression", marks=pytest.mark.long)])
def test_a_move_is_undone_whose_destination_died(hosts: list[Host], step: str, moment: str, victim: str) -> None:
    alpha, beta = hosts
    alpha.create(tiny("vm"))
    beta.kill()
    beta.start("destination:reserved:after:daemon")
    state = VmState.RUNNING if victim == "daemon" else VmState.CRASHED
    with broken_move(hosts, f"source:{step}:{moment}:{victim}", f"{state} at alpha", away=beta) as owner:
        assert owner.show("vm").migration is None


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_without_a_crash_the_move_completes(hosts: list[Host], transport: str) -> None:
    """The cases above would prove little if the move failed by itself."""
    alpha, _ = hosts
    for host in hosts:
        host.kill()
        host.start()
    alpha.create(tiny("vm"))
    try:
        migration = alpha.outcome(alpha.move("vm", "beta").id)
        assert (migration.outcome, migration.transport) == (Outcome.COMPLETED, transport), migration.fault
        assert place(hosts) == "running at beta"
        assert nothing_else_is_left(hosts)
    finally:
        clean(hosts)
