"""A random campaign: moves back and forth while daemons and QEMUs are killed and the network is cut at any moment.

It goes where the tests of every step do not: between two steps, and several faults in one move. A failure names its
seed; LIMOSA_TEST_SEED repeats it (as far as time repeats), LIMOSA_TEST_ROUNDS makes it longer.
"""

from __future__ import annotations

import os
import random
import secrets
import signal
import time
from collections.abc import Iterator

import pytest

from harness.hosts import settled, tiny, wait_until
from harness.labs import LabHost, set_links
from limosa.errors import LimosaError
from limosa.lab import daemons, lifecycle
from limosa.model.vm import VmState

pytestmark = [pytest.mark.qemu, pytest.mark.lab, pytest.mark.long]

ROUNDS = int(os.environ.get("LIMOSA_TEST_ROUNDS", "60"))
SEED = int(os.environ.get("LIMOSA_TEST_SEED", str(secrets.randbits(32))))
#: A move of the tiny VM takes about half a second.
SPAN_S = 0.8


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[LabHost]]:
    lab = lifecycle.plan(f"t{secrets.token_hex(3)}", hosts=2, nics=1, speed_mbit_per_s=0)
    try:
        lifecycle.up(lab)
        yield [LabHost(lab, name) for name in lab.host_names]
    finally:
        lifecycle.down(lab.name)


def kill_daemon(host: LabHost) -> None:
    host.kill()


def kill_qemu(host: LabHost) -> None:
    for pid in host.qemus():
        os.kill(pid, signal.SIGKILL)


def cut(host: LabHost) -> None:
    set_links(host, "down")


FAULTS = (kill_daemon, kill_daemon, kill_qemu, cut)


def heal(hosts: list[LabHost]) -> None:
    """The administrator comes: cables in, daemons started. What was moving settles by itself."""
    for host in hosts:
        set_links(host, "up")
        if daemons.pid_of(host.lab, host.name) is None:
            host.start()


def running(hosts: list[LabHost]) -> list[LabHost]:
    found = []
    for host in hosts:
        view = host.vm("vm")
        if view is not None and view.state is VmState.RUNNING:
            found.append(host)
    return found


def owners(hosts: list[LabHost]) -> list[LabHost]:
    return [host for host in hosts if host.vm("vm") is not None]


def test_at_most_one_runs_and_everything_settles(hosts: list[LabHost]) -> None:
    chance = random.Random(SEED)
    hosts[0].create(tiny("vm"))
    for number in range(ROUNDS):
        told = one_round(hosts, chance)
        message = f"round {number} of seed {SEED}: {told}"
        try:
            wait_until(lambda: settled(hosts), "every move has ended")
        except AssertionError as error:
            raise AssertionError(f"{error}; {message}; {unsettled(hosts)}") from error
        wait_until(lambda: len(owners(hosts)) == 1, f"one host has the VM; {message}")
        owner = owners(hosts)[0]
        view = owner.show("vm")
        assert view.state in (VmState.RUNNING, VmState.CRASHED), message
        wait_until(lambda: sum(len(host.qemus()) for host in hosts) == len(running(hosts)), f"no orphans; {message}")
        if view.state is VmState.CRASHED:
            assert "kill_qemu" in told, message
            owner.clean()
            owner.create(tiny("vm"))


def unsettled(hosts: list[LabHost]) -> list[str]:
    """The last two lines of each host's newest journals, for the message of a failure."""
    newest = [max((host.state / "migrations").glob("*.jsonl"), key=lambda path: path.stat().st_mtime) for host in hosts]
    return [f"{path.name}: {path.read_text().splitlines()[-2:]}" for path in newest]


def one_round(hosts: list[LabHost], chance: random.Random) -> str:
    """A move with one to three faults at any moment; tells what was done."""
    source = owners(hosts)[0]
    other = next(host for host in hosts if host is not source)
    told = [f"{source.name} to {other.name}"]
    try:
        source.move("vm", other.name)
    except LimosaError as error:
        told.append(f"refused: {error}")
    for _ in range(chance.randint(1, 3)):
        pause, fault, host = chance.uniform(0, SPAN_S), chance.choice(FAULTS), chance.choice(hosts)
        # No hope is in this pause: any moment is as good as any other.
        time.sleep(pause)
        fault(host)
        told.append(f"{fault.__name__} {host.name} after {pause:.3f} s")
    heal(hosts)
    assert len(running(hosts)) <= 1, told
    return ", ".join(told)
