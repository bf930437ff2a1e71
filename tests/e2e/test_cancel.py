"""A move is cancelled in each of its phases: at once, and as if it had never been begun.

Nothing is left to chance: the cap on bandwidth is the brake that holds a move in its copy, a guest that writes faster
than the cap holds it in its synchronisation, another move holds it in line, and a QEMU program that waits for a word
holds it in its build-up.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import msgspec
import pytest

from harness.commands import limosa
from harness.guests import LanClient, address_of, linux, wait_for_console
from harness.hosts import tiny, wait_until
from harness.labs import LabHost, running_lab
from harness.steering import BRAKE, follow, remove, settings, slow
from limosa.errors import OutcomeUnknown
from limosa.model.migration import Outcome, Phase, Side
from limosa.model.vm import VmState
from limosa.settings import toml
from limosa.settings.daemon import DaemonSettings
from limosa.wire import endpoints

pytestmark = [pytest.mark.qemu, pytest.mark.lab]

CANCEL_WITHIN_S = 2.0
#: The guest writes faster, so it never comes to the end of its synchronisation.
TREADMILL = {"bandwidth_mbit_per_s": 160, "convergence.auto_converge": False}
LOAD = {"fill_mib": 16, "random_mib": 16, "rewrite_mib_per_s": 100}
#: As long as there is a pipe in its place, a QEMU that is to receive a VM waits for a line in it. It must not fork,
#: or the child would hold what QEMU was given.
PATIENT_QEMU = """\
#!/bin/sh
case "$*" in
    *guest=*"-incoming defer"*) [ ! -p {pipe} ] || read -r _ <{pipe} ;;
esac
exec /usr/bin/qemu-system-x86_64 "$@"
"""


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[LabHost]]:
    """Two hosts whose QEMU can be made to wait, and a guest ``web`` on the first that writes all the time."""
    with running_lab() as made:
        for host in made:
            make_patient(host)
        made[0].create(linux("web", load=LOAD))
        wait_for_console(made[0], "web", "LIMOSA REWRITES")
        yield made


@pytest.fixture
def client(hosts: list[LabHost]) -> LanClient:
    return LanClient(hosts[0].lab, address_of(1))


def make_patient(host: LabHost) -> None:
    program = host.folder / "qemu"
    program.write_text(PATIENT_QEMU.format(pipe=pipe_of(host)))
    program.chmod(0o755)
    path = host.folder / "host.toml"
    toml.write(path, msgspec.structs.replace(toml.read(path, DaemonSettings), qemu=str(program)))
    host.start()


def pipe_of(host: LabHost) -> Path:
    return host.folder / "brake"


# One for each phase: moves `web` and holds it there during the block.


@contextmanager
def in_line_at_the_source(source: LabHost, destination: LabHost) -> Iterator[str]:
    with settings(source, {"max_outgoing": 1, **BRAKE}), another_under_way(source, destination):
        migration = source.move("web", destination.name).id
        assert follow(source, migration, lambda view: view.place == 1).phase is Phase.WAITING
        yield migration


@contextmanager
def in_line_at_the_destination(source: LabHost, destination: LabHost) -> Iterator[str]:
    with settings(source, BRAKE), settings(destination, {"max_incoming": 1}), another_under_way(source, destination):
        migration = source.move("web", destination.name).id
        view = follow(source, migration, lambda view: f"host '{destination.name}'" in view.progress.note)
        assert (view.phase, view.place) == (Phase.WAITING, 1)
        yield migration


@contextmanager
def another_under_way(source: LabHost, destination: LabHost) -> Iterator[None]:
    source.create(slow("other"))
    other = source.move("other", destination.name).id
    follow(source, other, lambda view: view.phase is Phase.COPY)
    try:
        yield
    finally:
        source.client.call(endpoints.CANCEL_MIGRATION, migration=other)
        remove(source, "other")


@contextmanager
def in_build_up(source: LabHost, destination: LabHost) -> Iterator[str]:
    pipe = pipe_of(destination)
    os.mkfifo(pipe)
    pipe.chmod(0o644)
    try:
        migration = source.move("web", destination.name).id
        wait_until(lambda: any("process" in found for found in destination.bystanders()), "its QEMU waits")
        assert source.client.call(endpoints.SHOW_MIGRATION, migration=migration).phase is Phase.BUILD_UP
        yield migration
    finally:
        pipe.unlink()


@contextmanager
def in_copy(source: LabHost, destination: LabHost) -> Iterator[str]:
    with settings(source, BRAKE):
        migration = source.move("web", destination.name).id
        view = follow(source, migration, lambda view: view.progress.transferred_bytes > 0)
        assert (view.phase, view.progress.iteration) == (Phase.COPY, 1)
        yield migration


@contextmanager
def in_synchronise(source: LabHost, destination: LabHost) -> Iterator[str]:
    with settings(source, TREADMILL):
        migration = source.move("web", destination.name).id
        view = follow(source, migration, lambda view: view.progress.iteration > 2)
        assert view.phase is Phase.SYNCHRONISE
        yield migration


def landings(host: LabHost) -> list[str]:
    moves = host.client.call(endpoints.LIST_MIGRATIONS).migrations
    return [move.id for move in moves if move.side is Side.DESTINATION and move.outcome is Outcome.UNDER_WAY]


Held = Callable[[LabHost, LabHost], AbstractContextManager[str]]
PHASES: list[Held] = [in_line_at_the_source, in_line_at_the_destination, in_build_up, in_copy, in_synchronise]


@pytest.mark.parametrize("held", PHASES, ids=lambda held: str(held.__name__))
def test_a_cancelled_move_never_was(hosts: list[LabHost], client: LanClient, held: Held) -> None:
    source, destination = sorted(hosts, key=lambda host: host.vm("web") is None)
    with client.talking() as conversation, held(source, destination) as migration:
        begun = time.monotonic()
        said = limosa(source, "migration", "cancel", "web", "--json")
        assert time.monotonic() - begun < CANCEL_WITHIN_S
        assert (said.code, said.object["id"], said.object["outcome"]) == (0, migration, "cancelled")
        conversation.wait_for_more()
        assert client.sees_it_run()
        view = source.show("web")
        assert (view.state, view.migration) == (VmState.RUNNING, None)
        wait_until(lambda: destination.vm("web") is None, "the destination has forgotten it")
        if held not in (in_line_at_the_source, in_line_at_the_destination):
            destination.wait_until_bare()
    destination.wait_until_bare()
    status = destination.client.call(endpoints.HOST)
    assert (status.vms, status.incoming) == (0, 0)
    # And it can be moved, by the same two hosts.
    with client.talking():
        assert source.outcome(source.move("web", destination.name).id).outcome is Outcome.COMPLETED
    assert conversation.faults == []


def test_while_its_qemu_hangs_a_cancel_says_so_and_is_done_afterwards(hosts: list[LabHost], client: LanClient) -> None:
    source, destination = sorted(hosts, key=lambda host: host.vm("web") is None)
    with in_copy(source, destination) as migration:
        (pid,) = source.qemus()
        os.kill(pid, signal.SIGSTOP)
        try:
            begun = time.monotonic()
            with pytest.raises(OutcomeUnknown, match="is not cancelled yet: its QEMU has not answered"):
                source.client.call(endpoints.CANCEL_MIGRATION, migration=migration)
            assert time.monotonic() - begun < CANCEL_WITHIN_S
        finally:
            os.kill(pid, signal.SIGCONT)
        assert source.outcome(migration).outcome is Outcome.CANCELLED
    assert client.sees_it_run()
    destination.wait_until_bare()


def test_a_move_that_is_handed_over_cannot_be_cancelled(hosts: list[LabHost], client: LanClient) -> None:
    """Its destination has the word, and its QEMU there hangs before it lets the guest run."""
    source, destination = sorted(hosts, key=lambda host: host.vm("web") is None)
    destination.restart({"LIMOSA_TEST_BREAK": "destination:continuing:after:hang"})
    migration = source.move("web", destination.name).id
    wait_until(lambda: stopped(destination) != [], "its QEMU hangs")
    begun = time.monotonic()
    said = limosa(source, "migration", "cancel", "web", "--json")
    assert time.monotonic() - begun < CANCEL_WITHIN_S
    assert (said.code, said.object["error"]["code"]) == (5, "conflict")
    assert said.object["error"]["why"] == f"the VM is handed over to host '{destination.name}'"
    for pid in stopped(destination):
        os.kill(pid, signal.SIGCONT)
    assert source.outcome(migration).outcome is Outcome.COMPLETED
    assert client.sees_it_run()
    destination.start()


def stopped(host: LabHost) -> list[int]:
    """Its QEMUs that do nothing because they were sent SIGSTOP."""
    return [pid for pid in host.qemus() if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"]


def test_a_move_that_has_ended_cannot_be_cancelled(hosts: list[LabHost]) -> None:
    source, destination = hosts
    source.create(tiny("quick"))
    migration = source.move("quick", destination.name).id
    assert source.outcome(migration).outcome is Outcome.COMPLETED
    said = limosa(source, "migration", "cancel", migration, "--json")
    assert (said.code, said.object["error"]["code"]) == (5, "conflict")
    said = limosa(source, "migration", "cancel", "nothing", "--json")
    assert (said.code, said.object["error"]["code"]) == (4, "not-found")
    assert destination.show("quick").state is VmState.RUNNING
