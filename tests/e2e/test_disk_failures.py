"""A disk that moves along meets trouble: the guest goes on where it was, with everything it was told is durable."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from harness.commands import limosa
from harness.crashes import disks_of
from harness.disks import Listener, assert_keeps, goes_on, number
from harness.guests import LanClient
from harness.hosts import settled, wait_until
from harness.images import images, numbering
from harness.labs import LabHost, running_lab, set_links
from harness.qmp import assert_no_copies
from harness.steering import follow, looking, settings
from limosa.model.migration import Migration, Outcome, Phase
from limosa.wire import endpoints

pytestmark = [pytest.mark.qemu, pytest.mark.lab]

#: The copy of the disk takes minutes.
BRAKE = {"bandwidth_mbit_per_s": 4}
#: A lost session is noticed by its pings; what was begun is undone at once then.
UNDONE_WITHIN_S = 30.0
CANCEL_WITHIN_S = 5.0


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[LabHost]]:
    with running_lab() as made:
        yield made


@pytest.fixture(scope="module")
def client(hosts: list[LabHost]) -> LanClient:
    """A client of the guest ``web``, which numbers a disk only the first host sees."""
    return numbering(hosts[0])


@pytest.fixture(autouse=True)
def as_before(hosts: list[LabHost], client: LanClient) -> Iterator[None]:
    """The guest is on the first host, where it was, and nothing is anywhere else."""
    before = disks_of(hosts[0], "web")
    yield
    goes_on(client)
    assert disks_of(hosts[0], "web") == before
    wait_until(lambda: settled(hosts), "every move has ended")  # type: ignore[arg-type]
    wait_until(lambda: hosts[1].bystanders() == [], "the destination keeps nothing")
    assert images(hosts[0]) == before
    assert images(hosts[1]) == []
    assert_keeps(hosts[0], "web", number(client))
    assert_no_copies(hosts[0])


def copying(view: Migration) -> bool:
    return view.phase is Phase.STORAGE and any(disk.copied_bytes for disk in view.progress.disks)


@contextmanager
def in_the_copy(source: LabHost, destination: LabHost) -> Iterator[str]:
    """A move that copies its disk and will for minutes."""
    with settings(source, BRAKE):
        migration = source.move("web", destination.name).id
        follow(source, migration, copying)
        yield migration


def fails(host: LabHost, migration: str, code: str) -> None:
    """It ends in time, and says why."""
    begun = time.monotonic()
    ended = host.outcome(migration)
    assert time.monotonic() - begun < UNDONE_WITHIN_S
    assert ended.outcome is Outcome.FAILED
    assert ended.fault is not None
    assert ended.fault.code == code, ended.fault


def test_the_network_is_cut(hosts: list[LabHost], client: LanClient) -> None:
    source, destination = hosts
    with in_the_copy(source, destination) as migration:
        set_links(destination, "down")
        try:
            fails(source, migration, "host-unreachable")
            goes_on(client)
        finally:
            set_links(destination, "up")


def test_the_destinations_daemon_dies(hosts: list[LabHost]) -> None:
    source, destination = hosts
    with in_the_copy(source, destination) as migration:
        destination.kill()
        try:
            fails(source, migration, "host-unreachable")
        finally:
            destination.start()


def test_the_destinations_qemu_dies(hosts: list[LabHost]) -> None:
    source, destination = hosts
    with in_the_copy(source, destination) as migration:
        (pid,) = destination.qemus()
        os.kill(pid, signal.SIGKILL)
        fails(source, migration, "destination-lost")


def test_the_destinations_qemu_hangs(hosts: list[LabHost]) -> None:
    source, destination = hosts
    with in_the_copy(source, destination):
        (pid,) = destination.qemus()
        os.kill(pid, signal.SIGSTOP)
        cancels(source)


def test_the_destinations_qemu_hangs_before_it_has_answered(hosts: list[LabHost], client: LanClient) -> None:
    """The source's QEMU waits for the other to greet it. The guest must not wait with it for long."""
    source, destination = hosts
    destination.restart({"LIMOSA_TEST_BREAK": "destination:exported:after:hang"})
    listener = Listener(client)
    migration = source.move("web", destination.name).id
    wait_until(lambda: source.client.call(endpoints.SHOW_MIGRATION, migration=migration).phase is Phase.STORAGE, "it")
    with looking(listener.ask, pause_s=0.05):
        cancels(source)
    destination.start()


def cancels(host: LabHost) -> None:
    begun = time.monotonic()
    said = limosa(host, "migration", "cancel", "web", "--json")
    assert time.monotonic() - begun < CANCEL_WITHIN_S
    assert (said.code, said.object["outcome"]) == (0, "cancelled")
