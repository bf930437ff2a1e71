"""Moves whose session of the two daemons breaks while memory is copied: the first of two NICs, which also carries the
session, dies; or no link is up for some seconds; or a daemon stands still. That costs time, and not the move."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec
import pytest

from harness.hosts import wait_until
from harness.labs import LabHost, in_host, plug, reaches, running_lab, set_links
from harness.steering import change, follow, settings
from limosa.host.calling import PING_EVERY_S, PONG_WITHIN_S
from limosa.lab import daemons
from limosa.lab.plan import SWITCH
from limosa.model.migration import Migration, Outcome
from limosa.model.vm import VmState
from limosa.settings import toml
from limosa.settings.daemon import DaemonSettings
from limosa.settings.host import Transport
from limosa.wire import api, endpoints

pytestmark = [pytest.mark.qemu, pytest.mark.lab]

MIB = 1024 * 1024
SPEED_MBIT_PER_S = 100
#: Its empty pages alone are 18 MB.
BIG_MIB = 4096
#: Nothing ends under it before a test wants it to.
BRAKE = {"bandwidth_mbit_per_s": 4}
CUT = "mig0"
BROKE = "the session with host 'host2' broke; connecting again"
#: Just too short for the source to notice. The destination mostly does: TCP sends a ping again after 3 s, when it gives
#: up waiting.
FLAP_S = 2.4
#: Until a ping of the other host's has been unanswered for too long.
STILL_S = PING_EVERY_S + PONG_WITHIN_S + 1.0


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


def begin(hosts: list[LabHost], transport: Transport) -> Migration:
    """A move whose memory flows."""
    first, second = hosts
    first.create(api.NewVm(name="vm", memory_mib=BIG_MIB, accelerator="tcg"))
    options = api.MoveOptions(transport=transport)
    request = api.MoveRequest(vm="vm", destination=second.name, options=options)
    begun = first.client.call(endpoints.MOVE, request)
    return follow(first, begun.id, lambda view: view.progress.transferred_bytes > MIB)


def goes_on(hosts: list[LabHost], before: Migration) -> None:
    """Wait until memory flows again and the session has a connection."""
    first, second = hosts
    sent = before.progress.transferred_bytes + 2 * MIB
    follow(
        first, before.id, lambda view: view.progress.transferred_bytes > sent and not notes("connecting again")(view)
    )
    assert second.show("vm").state is VmState.INCOMING


def arrives(hosts: list[LabHost], migration: str) -> None:
    first, second = hosts
    ended = first.outcome(migration)
    assert ended.outcome is Outcome.COMPLETED, ended.fault
    assert second.show("vm").state is VmState.RUNNING
    assert first.vm("vm") is None


@contextmanager
def without_links(host: LabHost) -> Iterator[None]:
    """No link of a host is up during the block, so that it has no way to any other: to call one fails at once."""

    def set_all(state: str) -> None:
        set_links(host, state)
        in_host(host, lambda netlink, index: netlink.link("set", index=index, state=state), SWITCH)

    set_all("down")
    try:
        yield
    finally:
        set_all("up")


@contextmanager
def standing_still(host: LabHost) -> Iterator[None]:
    """A host's daemon does nothing during the block. Its QEMUs and relays go on."""
    pid = daemons.pid_of(host.lab, host.name)
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def notes(words: str) -> Callable[[Migration], bool]:
    return lambda view: words in view.progress.note


@pytest.mark.parametrize("side", ["source", pytest.param("destination", marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "striped", [True, pytest.param(False, marks=pytest.mark.long)], ids=["relays", "multipath-tcp"]
)
def test_a_move_outlives_the_nic_of_its_session(hosts: list[LabHost], side: str, striped: bool) -> None:
    first, second = hosts
    cut = first if side == "source" else second
    for host in hosts:
        change(host, {"encrypt": striped})  # what is encrypted relays spread
    try:
        with settings(first, BRAKE):
            view = begin(hosts, "multichannel")
            assert view.route is not None
            assert (view.route.striped, len(view.route.paths)) == (striped, 2)
            plug(cut, CUT, in_=False)
            follow(first, view.id, notes(BROKE))
            follow(first, view.id, lambda view: not notes("connecting again")(view))
            assert second.show("vm").state is VmState.INCOMING
        arrives(hosts, view.id)
    finally:
        plug(cut, CUT, in_=True)
        there = second.lab.migration_addresses(second.name)[0]
        wait_until(lambda: reaches(first, there), "the cable is in again")


@pytest.mark.parametrize("transport", ["tcp", pytest.param("multichannel", marks=pytest.mark.long)])
def test_a_move_outlives_a_flap_of_all_links(hosts: list[LabHost], transport: Transport) -> None:
    first, _ = hosts
    with settings(first, BRAKE):
        view = begin(hosts, transport)
        with without_links(first):
            time.sleep(FLAP_S)
        goes_on(hosts, view)
    arrives(hosts, view.id)


@pytest.mark.parametrize("transport", ["tcp", pytest.param("multichannel", marks=pytest.mark.long)])
def test_a_move_outlives_that_no_link_is_up_when_its_session_breaks(hosts: list[LabHost], transport: Transport) -> None:
    first, _ = hosts
    with settings(first, BRAKE):
        view = begin(hosts, transport)
        with without_links(first):
            follow(first, view.id, notes(BROKE))
            time.sleep(1.0)  # in which no call can succeed
        goes_on(hosts, view)
    arrives(hosts, view.id)


@pytest.mark.parametrize("side", ["source", pytest.param("destination", marks=pytest.mark.long)])
def test_a_move_outlives_that_a_daemon_stands_still(hosts: list[LabHost], side: str) -> None:
    first, second = hosts
    with settings(first, BRAKE):
        view = begin(hosts, "tcp")
        with standing_still(first if side == "source" else second):
            time.sleep(STILL_S)
        goes_on(hosts, view)
    arrives(hosts, view.id)
