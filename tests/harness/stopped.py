"""A VM ``web`` that does not run, with a disk of known contents, on a host with a location ``fast``."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from harness.crashes import disks_of, images
from harness.hosts import Host, running_hosts, tiny
from harness.steering import change
from limosa.model.migration import Migration
from limosa.model.vm import DiskFormat, VmState
from limosa.wire import api, endpoints

MIB = 1024 * 1024
#: The data is more than the 16 MiB that QEMU lets through before a cap counts.
SIZE_MIB, DATA_MIB = 64, 40
#: Copying the data takes minutes.
SLOWLY = 1


@contextmanager
def host_with_locations(*names: str) -> Iterator[Host]:
    """A host with locations of these names in its state folder."""
    with running_hosts("alpha") as (host,):
        for name in names:
            folder = host.state / name
            folder.mkdir(mode=0o711)
            folder.chmod(0o711)
            change(host, {f"locations.{name}": {"path": str(folder)}})
        yield host


def make_raw(path: Path) -> bytes:
    """A raw image of which the most is a hole. Returns all of it."""
    contents = os.urandom(DATA_MIB * MIB) + bytes((SIZE_MIB - DATA_MIB) * MIB)
    with path.open("wb") as stream:
        stream.write(contents[: DATA_MIB * MIB])
        stream.truncate(SIZE_MIB * MIB)
    return contents


def create(host: Host, path: Path, name: str = "web") -> None:
    """Create the VM, and do not start it."""
    host.client.call(endpoints.CREATE_VM, msgspec.structs.replace(tiny(name), disks=(api.NewDisk(path=str(path)),)))


def begin(host: Host, where: str, **how: object) -> Migration:
    """Begin to move its disk."""
    request = msgspec.convert({"vm": "web", "location": where, **how}, api.DiskMoveRequest)
    return host.client.call(endpoints.MOVE_DISKS, request)


def contents(image: Path) -> bytes:
    """The image as a guest would see it."""
    image_format: DiskFormat = "qcow2" if image.suffix == ".qcow2" else "raw"
    copy = image.with_suffix(".seen")
    subprocess.run(["qemu-img", "convert", "-f", image_format, "-O", "raw", str(image), str(copy)], check=True)
    try:
        return copy.read_bytes()
    finally:
        copy.unlink()


def assert_one_whole_disk(host: Host, wanted: bytes, *others: Path) -> Path:
    """The VM has its disk whole, it can be started on it, and nothing else is left but ``others``. Returns the disk."""
    (disk,) = disks_of(host, "web")
    assert set(images(host)) == {disk, *others}
    assert not list(host.state.rglob(".*.limosa-*")), "no mark, no lease"
    assert not list((host.state / "migrations").glob("*.disks.json"))
    assert host.qemus() == []
    assert not list((host.run / "vm").iterdir())
    assert contents(disk) == wanted
    host.client.call(endpoints.START_VM, vm="web")
    assert host.show("web").state is VmState.RUNNING
    host.client.call(endpoints.STOP_VM, vm="web")
    return disk
