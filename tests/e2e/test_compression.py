"""Moves through the relays that compress: what arrives, what is shared, and what is left when something breaks."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from harness.commands import limosa
from harness.hosts import runners, settled, wait_until
from harness.labs import LabHost, end_relays, relay_processes, running_lab
from harness.steering import follow, remove, settings
from limosa.lab import daemons
from limosa.model.migration import Migration, Outcome, Phase
from limosa.model.route import Compressed
from limosa.transport.relay.outbound import LINGER_S
from limosa.wire import api, endpoints

pytestmark = [pytest.mark.qemu, pytest.mark.lab]

MIB = 1024 * 1024
SLOW_MBIT_PER_S = 100
#: Even its empty pages must be named, in 9 bytes each: 7 MB, which compress well, and all of which may be on its way to
#: a destination that reads nothing.
BIG_MIB = 3072
#: Makes a move last for seven seconds.
BRAKE = {"bandwidth_mbit_per_s": 8}
#: All of these pages are on their way, also when little may be because the guest is about to stop; for five seconds.
FEW_MIB = 256
HARD_BRAKE = {"bandwidth_mbit_per_s": 1}
#: Nothing ends under it before a relay is missed.
LONG_BRAKE = {"bandwidth_mbit_per_s": 2}
CANCEL_WITHIN_S = 2.0


@pytest.fixture(scope="module")
def lab() -> Iterator[list[LabHost]]:
    with running_lab(2, nics=2, speed_mbit_per_s=(SLOW_MBIT_PER_S, SLOW_MBIT_PER_S), transport="auto") as hosts:
        yield hosts


@pytest.fixture
def hosts(lab: list[LabHost]) -> Iterator[list[LabHost]]:
    """Two hosts with two NICs, of which the settings allow one."""
    first = list(lab[0].lab.migration_networks[:1])
    with settings(lab[0], {"migration_networks": first}), settings(lab[1], {"migration_networks": first}):
        yield lab
        for host in lab:
            host.clean()
            end_relays(host)


def big(name: str = "vm", memory_mib: int = BIG_MIB) -> api.NewVm:
    """A VM that takes seconds to move, without a guest that would have to boot."""
    return api.NewVm(name=name, memory_mib=memory_mib, accelerator="tcg")


def begin(hosts: list[LabHost], vm: str = "vm") -> str:
    options = api.MoveOptions(transport="compression")
    request = api.MoveRequest(vm=vm, destination=hosts[1].name, options=options)
    return hosts[0].client.call(endpoints.MOVE, request).id


def arrived(hosts: list[LabHost], migration: str, vm: str = "vm") -> Migration:
    ended = hosts[0].outcome(migration)
    assert ended.outcome is Outcome.COMPLETED, ended.fault
    assert runners(hosts, vm) == ["host2"]
    return ended


def compressed(view: Migration) -> Compressed | None:
    return view.route.compressed if view.route is not None else None


def has_sent(view: Migration) -> bool:
    return (made := compressed(view)) is not None and made.sent_bytes > 0


def relays(host: LabHost) -> list[int]:
    """The relays of a host, without the processes that compress for them."""
    daemon = daemons.pid_of(host.lab, host.name)
    return [pid for pid in relay_processes(host) if parent(pid) == daemon]


def command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


@contextmanager
def under_way(hosts: list[LabHost], memory_mib: int = BIG_MIB, brake: dict[str, int] = BRAKE) -> Iterator[str]:
    """A slow move during the block."""
    hosts[0].create(big(memory_mib=memory_mib))
    with settings(hosts[0], brake):
        migration = begin(hosts)
        follow(hosts[0], migration, has_sent)
        yield migration


def stays(hosts: list[LabHost], *, session: bool = False) -> None:
    """The VM is at the source as if nothing had been, and the destination has nothing of it.

    ``session``: whether the relays are kept for a while.
    """
    wait_until(lambda: settled(hosts), "every journal has come to its end")
    assert runners(hosts, "vm") == ["host1"]
    kept = relay_processes(hosts[1]) if session else []
    wait_until(lambda: hosts[1].processes() == kept, "the destination keeps no other process")
    wait_until(lambda: len(hosts[1].bystanders()) == len(kept), "nor anything else")
    wait_until(lambda: session or relay_processes(hosts[0]) == [], "no relay is left")


def test_a_move_is_compressed_and_says_so(hosts: list[LabHost]) -> None:
    hosts[0].create(big())
    checked = limosa(hosts[0], "check", "vm", "--to", "host2", "--transport", "compression")
    assert "transport: compression (it was asked for)" in checked.out
    ended = arrived(hosts, begin(hosts))
    made = compressed(ended)
    assert ended.transport == "compression"
    assert made is not None
    assert made.raw_bytes >= ended.progress.transferred_bytes
    # How much was compressed depends on who else wants the processors.
    assert made.ratio == round(made.raw_bytes / made.sent_bytes, 3)
    assert made.connections == 2
    shown = limosa(hosts[0], "migration", "show", ended.id).out
    assert "mig0 10.78.0.11 to mig0 10.78.0.12, 100 Mbit/s, " in shown
    assert "processor time to compress, 2 connections" in shown
    assert (
        limosa(hosts[0], "migration", "show", ended.id, "--json").object["route"]["compressed"]["ratio"] == made.ratio
    )


def test_the_relays_use_all_nics_where_that_is_faster(lab: list[LabHost]) -> None:
    lab[0].create(big())
    ended = arrived(lab, begin(lab))
    assert ended.route is not None
    assert [path.nic_here for path in ended.route.paths if path.sent_bytes > 0] == ["mig0", "mig1"]
    made = compressed(ended)
    assert made is not None
    assert made.connections == 4
    for host in lab:
        host.clean()
        end_relays(host)


def test_moves_at_the_same_time_share_one_session(hosts: list[LabHost]) -> None:
    hosts[0].create(big("other"))
    try:
        with under_way(hosts) as first:
            session = [relays(host) for host in hosts]
            second = begin(hosts, "other")
            follow(hosts[0], second, has_sent)
            assert [relays(host) for host in hosts] == session
        arrived(hosts, first)
        arrived(hosts, second, "other")
        assert [relays(host) for host in hosts] == session
        assert [len(pids) for pids in session] == [1, 1]
    finally:
        for host in hosts:
            if host.vm("other") is not None:
                remove(host, "other")
    wait_until(lambda: not any(relay_processes(host) for host in hosts), "they end after the last", LINGER_S + 10)


@pytest.mark.parametrize("side", ["source", "destination"])
def test_when_a_relay_is_killed_the_move_fails_and_names_it(hosts: list[LabHost], side: str) -> None:
    with under_way(hosts) as migration:
        (relay,) = relays(hosts[0] if side == "source" else hosts[1])
        os.kill(relay, signal.SIGKILL)
        ended = hosts[0].outcome(migration)
    assert ended.outcome is Outcome.FAILED
    assert ended.fault is not None
    assert ended.fault.code == "relay-failed", ended.fault
    stays(hosts)
    arrived(hosts, begin(hosts))


def test_a_cancelled_move_never_was(hosts: list[LabHost]) -> None:
    with under_way(hosts) as migration:
        cancels_at_once(hosts, migration)
    stays(hosts, session=True)


def test_a_destination_that_stops_reading_is_cancelled_as_fast(hosts: list[LabHost]) -> None:
    with under_way(hosts, FEW_MIB, HARD_BRAKE) as migration:
        (qemu,) = [pid for pid in hosts[1].qemus() if b"guest=vm" in command(pid)]
        os.kill(qemu, signal.SIGSTOP)
        with settings(hosts[0], {"bandwidth_mbit_per_s": 0}):
            follow(hosts[0], migration, lambda view: view.phase in (Phase.SYNCHRONISE, Phase.SWITCHOVER))
            cancels_at_once(hosts, migration)
    stays(hosts, session=True)


@pytest.mark.parametrize("side", [0, 1], ids=["source", "destination"])
def test_a_move_whose_relay_stands_still_is_cancelled_as_fast(hosts: list[LabHost], side: int) -> None:
    with under_way(hosts) as migration:
        (relay,) = relays(hosts[side])
        os.kill(relay, signal.SIGSTOP)
        cancels_at_once(hosts, migration)
    stays(hosts, session=True)


@pytest.mark.parametrize("side", [0, pytest.param(1, marks=pytest.mark.long)], ids=["source", "destination"])
def test_a_move_ends_with_a_relay_that_stands_still(hosts: list[LabHost], side: int) -> None:
    with under_way(hosts, brake=LONG_BRAKE) as migration:
        (relay,) = relays(hosts[side])
        os.kill(relay, signal.SIGSTOP)
        ended = hosts[0].outcome(migration)
    assert ended.outcome is Outcome.FAILED
    assert ended.fault is not None
    assert ended.fault.code == "relay-failed", ended.fault
    # Of the other host's relay it is known that its connections ended.
    assert side == 1 or "did not answer" in ended.fault.why, ended.fault
    stays(hosts)
    arrived(hosts, begin(hosts))


@pytest.mark.long
def test_a_move_to_a_relay_that_stands_still_is_given_up(hosts: list[LabHost]) -> None:
    with settings(hosts[0], {"convergence.patience_s": 2}), under_way(hosts) as migration:
        (relay,) = relays(hosts[1])
        os.kill(relay, signal.SIGSTOP)
        with settings(hosts[0], {"bandwidth_mbit_per_s": 0}):
            ended = hosts[0].outcome(migration)
    assert ended.outcome is Outcome.FAILED
    assert ended.fault is not None
    # The guest may be stopped before what is on its way is too much to be only that.
    assert ended.fault.code in ("migration-failed", "not-converging"), ended.fault
    stays(hosts, session=True)


def test_a_guest_that_stands_still_for_a_destination_that_stops_reading_runs_on(hosts: list[LabHost]) -> None:
    with under_way(hosts, FEW_MIB, HARD_BRAKE) as migration:
        (qemu,) = [pid for pid in hosts[1].qemus() if b"guest=vm" in command(pid)]
        os.kill(qemu, signal.SIGSTOP)
        with settings(hosts[0], {"bandwidth_mbit_per_s": 0}):
            ended = hosts[0].outcome(migration)
    assert ended.outcome is Outcome.FAILED
    assert ended.fault is not None
    assert (ended.fault.code, "was stopped" in ended.fault.what) == ("migration-failed", True), ended.fault
    stays(hosts, session=True)


def cancels_at_once(hosts: list[LabHost], migration: str) -> None:
    begun = time.monotonic()
    ended = hosts[0].client.call(endpoints.CANCEL_MIGRATION, migration=migration)
    assert time.monotonic() - begun < CANCEL_WITHIN_S
    assert ended.outcome is Outcome.CANCELLED


@pytest.mark.parametrize("side", ["source", "destination"])
def test_a_daemon_that_is_killed_takes_its_relay_with_it(hosts: list[LabHost], side: str) -> None:
    host = hosts[0] if side == "source" else hosts[1]
    with under_way(hosts):
        pid = daemons.pid_of(host.lab, host.name)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: daemons.pid_of(host.lab, host.name) is None, "the daemon is dead")
        wait_until(lambda: relay_processes(host) == [], "and so is its relay")
        host.start()
    stays(hosts)


def test_a_window_that_is_no_power_of_two_is_refused(hosts: list[LabHost]) -> None:
    said = limosa(hosts[0], "host", "settings", "compression_window_mib=300")
    assert said.code == 2
    assert "a power of two" in said.error
    page = hosts[0].client.call(endpoints.SETTINGS).settings
    assert msgspec.to_builtins(page)["compression_window_mib"] == 512
