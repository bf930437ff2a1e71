"""The VMs of a host, as far as no QEMU is needed: leases that an earlier daemon has left."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from test_preflight import VM

from limosa.errors import Conflict
from limosa.host import restarting
from limosa.host.files import Files
from limosa.host.folders import Folders
from limosa.host.leasing import Leasing
from limosa.host.restarting import Restarting
from limosa.host.vms import Vms
from limosa.model.vm import Disk, VmConfig
from limosa.storage import leases


@pytest.fixture
def config(tmp_path: Path) -> VmConfig:
    """A VM whose disk has a lease."""
    image = tmp_path / "web1.qcow2"
    image.touch()
    files = Files(tmp_path / "state", tmp_path / "run")
    files.make()
    made = msgspec.structs.replace(VM, disks=(Disk(name="vda", path=str(image), format="qcow2"),))
    files.vm(made.name).mkdir()
    Folders(files).keep(made)
    leases.change(
        str(image), lambda _: leases.Lease(epoch=1, host="host1", boot="boot", machine="machine", vm=made.uuid)
    )
    return made


def daemon(tmp_path: Path) -> Vms:
    """One that has just started, where no QEMU runs."""

    async def attach(_: VmConfig) -> None:
        return None

    leasing = Leasing("host1", "boot", "machine", lambda _: False)
    launcher = SimpleNamespace(leasing=leasing, records=SimpleNamespace(attach=attach))
    return Vms("host1", Files(tmp_path / "state", tmp_path / "run"), cast(Any, launcher))


async def give_back(vms: Vms) -> None:
    """As a daemon that starts does."""
    await Restarting(vms, vms._leasing, vms._records).give_back_leases()


def holder(config: VmConfig) -> str:
    return leases.read(config.disks[0].path).host


@pytest.mark.parametrize("migration", [None, "abcdefabcdef"])
def test_a_daemon_gives_back_what_an_earlier_one_did_not(
    tmp_path: Path, config: VmConfig, migration: str | None
) -> None:
    async def scenario() -> None:
        vms = daemon(tmp_path)
        await vms.load()
        vms.get(config.name).migration = migration
        await give_back(vms)

    asyncio.run(scenario())
    assert holder(config) == ("host1" if migration else "")


def test_it_does_not_wait_for_a_share_that_hangs(
    tmp_path: Path, config: VmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, change = threading.Event(), leases.change

    def hangs(*arguments: Any) -> leases.Lease:
        answers.wait()
        return change(*arguments)

    monkeypatch.setattr(leases, "change", hangs)
    monkeypatch.setattr(restarting, "LEASES_WITHIN_S", 0.01)

    async def scenario() -> None:
        vms = daemon(tmp_path)
        await vms.load()
        await give_back(vms)
        hosted = vms.get(config.name)
        with pytest.raises(Conflict):
            vms.check_idle(hosted)
        answers.set()
        async with hosted.lock:
            pass

    asyncio.run(scenario())
    assert holder(config) == ""


def test_who_deletes_a_vm_that_runs_is_told_to_stop_it(tmp_path: Path, config: VmConfig) -> None:
    async def scenario() -> None:
        vms = daemon(tmp_path)
        await vms.load()
        vms.get(config.name).machine = cast(Any, SimpleNamespace())
        with pytest.raises(Conflict) as caught:
            await vms.delete(vms.get(config.name))
        assert caught.value.todo == f"limosa vm stop {config.name}"

    asyncio.run(scenario())


def test_a_vm_that_is_deleted_leaves_no_lease(tmp_path: Path, config: VmConfig) -> None:
    async def scenario() -> None:
        vms = daemon(tmp_path)
        await vms.load()
        await vms.delete(vms.get(config.name))
        assert vms.all() == []

    asyncio.run(scenario())
    assert holder(config) == ""
