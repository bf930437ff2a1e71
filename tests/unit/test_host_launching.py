"""What a new VM is made of: what was left open is chosen, what was said is kept."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import msgspec
import pytest
from test_preflight import VM

from limosa.host.files import Files
from limosa.host.launching import Launcher
from limosa.model.vm import Disk
from limosa.qemu import folder, process
from limosa.qemu.arguments import without_guest
from limosa.wire.api import NewDisk


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


def test_sockets_of_no_qemu_are_removed(launcher: Launcher) -> None:
    """A daemon has died between forgetting the QEMU and removing its folder."""
    sockets = launcher._files.sockets(VM)
    sockets.mkdir()
    (sockets / "vnc.sock").touch()
    assert asyncio.run(launcher.attach(VM)) is None
    assert not sockets.exists()


def test_those_of_a_copier_are_left_to_whoever_ends_that(launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    sockets = launcher._files.sockets(VM)
    sockets.mkdir()
    (sockets / folder.QMP).touch()
    copier = without_guest(sockets, 0)[1]
    monkeypatch.setattr(process, "find", lambda argument: (1, 1) if argument == copier else None)
    assert asyncio.run(launcher.attach(VM)) is None
    assert sockets.exists()
