"""What a new VM is made of: what was left open is chosen, what was said is kept."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
import test_storage_images
from test_preflight import VM

from limosa.errors import InvalidInput, StorageError
from limosa.host.files import Files
from limosa.host.launching import Launcher, qemu_user
from limosa.model.vm import DirectBoot, Disk
from limosa.settings.host import HostSettings
from limosa.wire.api import NewDisk, NewVm


@pytest.mark.parametrize(
    "disk",
    [
        Disk(name="vdb", path="/dev/vg0/web1.raw", format="raw", size_bytes=1536),
        Disk(name="vda", path="/srv/web1.raw", format="raw", thick=True),
        Disk(name="vda", path="/srv/cd.qcow2", format="qcow2", read_only=True),
    ],
)
def test_a_vm_that_was_shown_can_be_created_again(disk: Disk) -> None:
    asked = msgspec.convert(msgspec.to_builtins(disk), NewDisk)
    assert asyncio.run(object.__new__(Launcher)._pin_disk(asked, disk.name)) == disk


def test_a_new_image_has_one_size() -> None:
    with pytest.raises(msgspec.ValidationError, match="size_mib is for a new image"):
        msgspec.convert({"path": "/srv/a.raw", "size_mib": 1, "size_bytes": 512}, NewDisk)


def test_hosts_that_know_no_thick_disks_understand_the_others() -> None:
    assert "thick" not in json.loads(msgspec.json.encode(VM))["disks"][0]


@pytest.fixture
def launcher(tmp_path: Path) -> Launcher:
    made = object.__new__(Launcher)
    made._files = Files(tmp_path / "state", tmp_path / "run")
    made._files.make()
    return made


open_folder = test_storage_images.open_folder


@test_storage_images.needs_root
@pytest.mark.parametrize("kind", ["new disk", "disk", "disk below", "kernel"])
def test_what_qemu_could_never_open_is_refused_when_the_vm_is_created(
    launcher: Launcher, open_folder: Path, kind: str
) -> None:
    launcher.user, launcher._own = test_storage_images.USER, ()
    launcher._page = cast(Any, SimpleNamespace(now=HostSettings()))
    closed, image, reached = open_folder / "closed", open_folder / "closed" / "a.raw", open_folder / "b.qcow2"
    closed.mkdir(mode=0o700)
    if kind != "new disk":
        image.write_bytes(bytes(65536))
    disk = NewDisk(path=str(image), format="raw", size_mib=1 if kind == "new disk" else None)
    if kind == "disk below":
        over = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(image), "-F", "raw", str(reached)]
        subprocess.run(over, check=True)
        disk = NewDisk(path=str(reached), format="qcow2")
    boot = DirectBoot(kernel=str(image)) if kind == "kernel" else None
    new = NewVm(name="web1", memory_mib=32, disks=(disk,) if boot is None else (), boot=boot)
    config = msgspec.structs.replace(
        VM, disks=tuple(Disk(name="vda", path=one.path, format=one.format or "raw") for one in new.disks), boot=boot
    )
    before = sorted(open_folder.rglob("*"))

    async def create() -> None:
        async with launcher.new_disks(new, config):
            pass

    with pytest.raises(StorageError, match=f"may not enter the folder {closed}") as refused:
        asyncio.run(create())
    assert "setfacl" in refused.value.todo
    assert sorted(open_folder.rglob("*")) == before
    if reached.exists():
        assert reached.stat().st_uid == 0, "nothing is given to anybody before it starts"
    closed.chmod(0o755)
    asyncio.run(create())


def test_a_vm_may_be_created_before_its_storage_is_mounted(launcher: Launcher) -> None:
    launcher.user, launcher._own = None, ()
    new = NewVm(name="web1", memory_mib=32, disks=(NewDisk(path="/nowhere/a.raw", format="raw"),))
    config = msgspec.structs.replace(VM, disks=(Disk(name="vda", path="/nowhere/a.raw", format="raw"),))

    async def create() -> None:
        async with launcher.new_disks(new, config):
            pass

    asyncio.run(create())


def test_no_vm_is_started_over_an_image_that_is_not_there(launcher: Launcher) -> None:
    """It could come when its lease has been asked for already, and be written without one."""
    launcher._page = cast(Any, SimpleNamespace(now=HostSettings()))
    config = msgspec.structs.replace(VM, disks=(Disk(name="vda", path="/nowhere/a.raw", format="raw"),))
    with pytest.raises(StorageError, match="there is no file /nowhere"):
        asyncio.run(launcher.claim_images(config))


class TestTheUserQemuRunsAs:
    @pytest.fixture(autouse=True)
    def root(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "geteuid", lambda: 0)

    def test_must_exist(self) -> None:
        with pytest.raises(InvalidInput, match="there is no user 'limosa-qmu'") as caught:
            qemu_user("limosa-qmu")
        assert "scripts/setup --host" in caught.value.todo

    @pytest.mark.parametrize(("wanted", "user"), [("nobody", "nobody"), ("root", None)])
    def test_is_roots_only_if_that_is_said(self, wanted: str, user: str | None) -> None:
        assert qemu_user(wanted) == user

    def test_is_the_daemons_own_if_that_is_not_root(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
        assert qemu_user("limosa-qmu") is None
