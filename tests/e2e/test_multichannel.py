"""Moves over several NICs at once by Multipath TCP: what each carries, and what happens when NICs are cut, come, or
change their names.

Everything is judged by the bytes each path has carried, which the kernel counts, never by time.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness.commands import limosa
from harness.hosts import runners, settled, wait_until
from harness.labs import LabHost, in_host, plug, reaches, running_lab, without_address
from harness.steering import follow, remove, settings
from limosa.lab import daemons, namespaces
from limosa.model.migration import Migration, Outcome, Phase
from limosa.model.vm import VmState
from limosa.network.mptcp import FLAG_SIGNAL, Endpoint, Limits, PathManager
from limosa.settings.host import Transport
from limosa.wire import api, endpoints

pytestmark = [pytest.mark.qemu, pytest.mark.lab]

MIB = 1024 * 1024
#: Slow enough to be interfered with; named empty pages alone are 18 MB of a 4 GiB guest.
SLOW_MBIT_PER_S = 40
BIG_MIB = 4096
#: A disk that takes long enough to be copied for a cable to be pulled meanwhile.
DISK_MIB, DISK_MBIT_PER_S = 16, 24
#: What a path must have carried to be called used: more than chance and retransmissions.
USED_BYTES = 1 * MIB


@pytest.fixture(scope="module")
def lab() -> Iterator[list[LabHost]]:
    # What is encrypted relays spread themselves.
    speeds = SLOW_MBIT_PER_S, SLOW_MBIT_PER_S
    with running_lab(2, nics=2, speed_mbit_per_s=speeds, transport="auto", encrypt=False) as hosts:
        yield hosts


@pytest.fixture
def hosts(lab: list[LabHost]) -> Iterator[list[LabHost]]:
    yield lab
    for host in lab:
        host.clean()


def with_disk(host: LabHost, name: str = "vm") -> Path:
    """A VM with a disk that takes seconds to be copied. Returns its image."""
    image = host.state / "images" / f"{name}.raw"
    disk = api.NewDisk(path=str(image), size_mib=DISK_MIB, format="raw")
    host.client.call(endpoints.CREATE_VM, api.NewVm(name=name, memory_mib=256, accelerator="tcg", disks=(disk,)))
    with image.open("r+b") as file:
        file.write(random.Random(1).randbytes(DISK_MIB * MIB))
    host.client.call(endpoints.START_VM, vm=name)
    return image


def big(host: LabHost) -> None:
    """A VM that takes seconds to move, without a guest that would have to boot."""
    host.create(api.NewVm(name="vm", memory_mib=BIG_MIB, accelerator="tcg"))


def begin(hosts: list[LabHost], transport: Transport = "multichannel", vm: str = "vm") -> str:
    first, second = hosts
    options = api.MoveOptions(transport=transport)
    return first.client.call(endpoints.MOVE, api.MoveRequest(vm=vm, destination=second.name, options=options)).id


def carried(migration: Migration) -> dict[str, int]:
    """Bytes by the source's NIC."""
    assert migration.route is not None
    return {path.nic_here: path.sent_bytes for path in migration.route.paths}


def has_sent(count: int) -> Callable[[Migration], bool]:
    return lambda view: view.route is not None and sum(carried(view).values()) > count


def arrived(hosts: list[LabHost], migration: str) -> Migration:
    """How the move ended: with the VM on the second host, and nothing set in either kernel any more."""
    ended = hosts[0].outcome(migration)
    assert ended.outcome is Outcome.COMPLETED, ended.fault
    assert hosts[1].show("vm").state is VmState.RUNNING
    wait_until(lambda: all(is_clean(host) for host in hosts), "nothing is left in the kernels")
    return ended


def kernel(host: LabHost) -> tuple[tuple[Endpoint, ...], Limits]:
    """What is set in the host's path manager."""

    async def look() -> tuple[tuple[Endpoint, ...], Limits]:
        manager = PathManager()
        return await manager.endpoints(), await manager.limits()

    return namespaces.inside(host.namespace, lambda: asyncio.run(look()))


def is_clean(host: LabHost) -> bool:
    return kernel(host) == ((), Limits(2, 0)) and not (host.run / "mptcp.json").exists()


def test_both_nics_carry_the_move_and_nothing_is_left(hosts: list[LabHost]) -> None:
    big(hosts[0])
    checked = limosa(hosts[0], "check", "vm", "--to", "host2")
    why = "a processor compresses faster than 80 Mbit/s; 2 NICs together have 80 Mbit/s"
    assert f"transport: compression ({why})" in checked.out
    ended = arrived(hosts, begin(hosts))
    used = carried(ended)
    assert ended.transport == "multichannel"
    assert min(used.values()) > 0.35 * sum(used.values()), used
    assert sum(used.values()) >= ended.progress.transferred_bytes
    shown = limosa(hosts[0], "migration", "show", ended.id).out
    assert "mig1 10.79.0.11 to mig1 10.79.0.12, 40 Mbit/s, " in shown


@pytest.mark.parametrize("side", ["source", pytest.param("destination", marks=pytest.mark.long)])
@pytest.mark.parametrize("nic", ["mig0", pytest.param("mig1", marks=pytest.mark.long)])
def test_a_nic_that_is_cut_costs_speed_and_not_the_move(hosts: list[LabHost], side: str, nic: str) -> None:
    cut = hosts[0] if side == "source" else hosts[1]
    big(hosts[0])
    migration = begin(hosts)
    follow(hosts[0], migration, has_sent(2 * USED_BYTES))
    plug(cut, nic, in_=False)
    try:
        ended = arrived(hosts, migration)
    finally:
        plug(cut, nic, in_=True)
        there = hosts[1].lab.migration_addresses("host2")[int(nic[-1])]
        wait_until(lambda: reaches(hosts[0], there), "the cable is in again")
    other = {"mig0": "mig1", "mig1": "mig0"}[nic]
    assert carried(ended)[other] > 2 * carried(ended)[nic]
    known = hosts[0].client.call(endpoints.HOST).network.carried
    assert all(2 * path.mbit_per_s > SLOW_MBIT_PER_S for path in known), "a NIC that was cut is not a slow one"


@pytest.mark.parametrize("side", ["source", pytest.param("destination", marks=pytest.mark.long)])
def test_memory_goes_over_another_nic_if_the_first_was_cut_while_disks_were_copied(
    hosts: list[LabHost], side: str
) -> None:
    cut = hosts[0] if side == "source" else hosts[1]
    image = with_disk(hosts[0])
    try:
        with settings(hosts[0], {"storage_bandwidth_mbit_per_s": DISK_MBIT_PER_S}):
            migration = begin(hosts)
            follow(hosts[0], migration, lambda view: any(one.copied_bytes for one in view.progress.disks))
            plug(cut, "mig0", in_=False)
            ended = arrived(hosts, migration)
    finally:
        plug(cut, "mig0", in_=True)
        wait_until(lambda: reaches(hosts[0], hosts[1].lab.migration_addresses("host2")[0]), "the cable is in again")
        hosts[1].clean()
        (hosts[1].state / "images" / image.name).unlink(missing_ok=True)
    assert ended.phases[Phase.STORAGE] > 0
    assert carried(ended)["mig1"] > carried(ended)["mig0"]


@pytest.mark.long
@pytest.mark.parametrize("transport", ["multichannel", "tcp"])
def test_disks_go_over_another_nic_if_the_first_was_cut_while_the_move_waited_in_line(
    hosts: list[LabHost], transport: Transport
) -> None:
    source, destination = hosts
    images = [with_disk(source, name) for name in ("other", "vm")]
    slowly = {"storage_bandwidth_mbit_per_s": DISK_MBIT_PER_S, "max_storage_moves": 1}
    try:
        with settings(source, slowly):
            first = begin(hosts, vm="other")
            follow(source, first, lambda view: any(one.copied_bytes for one in view.progress.disks))
            migration = begin(hosts, transport)
            waits = follow(source, migration, lambda view: view.route is not None and view.place is not None)
            assert waits.route is not None
            assert waits.route.paths[0].nic_here == "mig0"
            plug(source, "mig0", in_=False)
            source.client.call(endpoints.CANCEL_MIGRATION, migration=first)
            ended = arrived(hosts, migration)
    finally:
        plug(source, "mig0", in_=True)
        wait_until(lambda: reaches(source, destination.lab.migration_addresses("host2")[0]), "the cable is in again")
        remove(source, "other")
        for host in hosts:
            host.clean()
            for image in images:
                (host.state / "images" / image.name).unlink(missing_ok=True)
    assert ended.route is not None
    assert {path.nic_here for path in ended.route.paths if path.sent_bytes > USED_BYTES} == {"mig1"}


@pytest.mark.parametrize("side", ["source", "destination"])
def test_a_nic_that_appears_in_mid_move_is_used(hosts: list[LabHost], side: str) -> None:
    big(hosts[0])
    with without_address(hosts[0] if side == "source" else hosts[1], "mig1"):
        migration = begin(hosts)
        view = follow(hosts[0], migration, has_sent(USED_BYTES))
        assert "mig1" not in carried(view)
    assert carried(arrived(hosts, migration))["mig1"] > USED_BYTES


def test_a_nic_that_is_renamed_in_mid_move_goes_on(hosts: list[LabHost]) -> None:
    big(hosts[0])
    migration = begin(hosts)
    follow(hosts[0], migration, has_sent(USED_BYTES))
    in_host(hosts[0], lambda netlink, index: netlink.link("set", index=index, ifname="other"), "mig1")
    try:
        used = carried(arrived(hosts, migration))
    finally:
        in_host(hosts[0], lambda netlink, index: netlink.link("set", index=index, ifname="mig1"), "other")
    assert min(used.values()) > 0.35 * sum(used.values()), used


def test_what_an_administrator_set_is_used_and_stays(hosts: list[LabHost]) -> None:
    theirs = hosts[1].lab.migration_addresses("host2")[1]

    async def set_up() -> None:
        await PathManager().announce(theirs)
        await PathManager().set_limits(Limits(8, 3))

    async def take_away() -> None:
        for one in await PathManager().endpoints():
            await PathManager().withdraw(one)
        await PathManager().set_limits(Limits(2, 0))

    big(hosts[0])
    namespaces.inside(hosts[1].namespace, lambda: asyncio.run(set_up()))
    try:
        before = kernel(hosts[1])
        ended = hosts[0].outcome(begin(hosts))
        wait_until(lambda: not (hosts[1].run / "mptcp.json").exists(), "the move has let go")
        assert kernel(hosts[1]) == before
        assert [(one.address, one.flags) for one in before[0]] == [(theirs, FLAG_SIGNAL)]
    finally:
        namespaces.inside(hosts[1].namespace, lambda: asyncio.run(take_away()))
    assert carried(ended)["mig1"] > USED_BYTES


@pytest.mark.parametrize("side", ["source", "destination"])
def test_a_daemon_that_is_killed_leaves_nothing_for_long(hosts: list[LabHost], side: str) -> None:
    host = hosts[0] if side == "source" else hosts[1]
    big(hosts[0])
    with settings(hosts[0], {"bandwidth_mbit_per_s": 8}):
        migration = begin(hosts)
        follow(hosts[0], migration, has_sent(USED_BYTES // 4))
        assert not is_clean(host)
        pid = daemons.pid_of(host.lab, host.name)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: daemons.pid_of(host.lab, host.name) is None, "the daemon is dead")
        host.start()
    wait_until(lambda: all(is_clean(one) for one in hosts), "nothing is left in the kernels")
    wait_until(lambda: runners(hosts, "vm") == ["host1"], "the VM stays")
    wait_until(lambda: settled(hosts), "every journal has come to its end")


def test_networks_that_are_not_allowed_carry_nothing(hosts: list[LabHost]) -> None:
    big(hosts[0])
    with settings(hosts[0], {"migration_networks": list(hosts[0].lab.migration_networks[:1])}):
        ended = arrived(hosts, begin(hosts))
    assert set(carried(ended)) == {"mig0"}
