"""A guest that keeps files with checksums on an ext4 file system, and what is on its disk: does e2fsck find it sound,
and is every file there as it was written?"""

from __future__ import annotations

import hashlib
import os
import re
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from harness.disks import assert_clean, number, raw_copy
from harness.guests import LanClient, address_of, linux, wait_until_it_serves
from harness.hosts import Host, wait_until
from harness.images import MIB
from harness.labs import LabHost
from limosa.wire import api, endpoints

#: The guest keeps the last ones.
KEPT = 64
SIZE_MIB = 48
_CLUSTER = 64 * 1024
_NAME = re.compile(r"(\d+)\.([0-9a-f]{64})")


def keeping_files(host: LabHost, *more: api.NewDisk) -> LanClient:
    """Start a guest ``web`` that keeps files on its first disk, a raw image only ``host`` sees."""
    image = host.state / "images" / "files.raw"
    with image.open("wb") as stream:
        stream.truncate(SIZE_MIB * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-E", "lazy_itable_init=0", str(image)], check=True)
    disks = (api.NewDisk(path=str(image)), *more)
    host.create(msgspec.structs.replace(linux("web", load={"files": "vda"}), disks=disks))
    client = LanClient(host.lab, address_of(1))
    wait_until_it_serves(client)
    wait_until(lambda: number(client) > 3, "the guest keeps files")
    return client


def assert_keeps_files(host: Host, vm: str, last: int) -> None:
    """The file system on the VM's first disk is sound, and has every file that the guest said was durable, up to number
    ``last``, as it was written. The guest stands meanwhile."""
    host.client.call(endpoints.PAUSE_VM, vm=vm)
    try:
        sound_when_stopped(host, vm, last)
    finally:
        host.client.call(endpoints.RESUME_VM, vm=vm)


def sound_when_stopped(host: Host, vm: str, last: int) -> None:
    """The same of a VM that does not run."""
    disk = host.show(vm).config.disks[0]
    if disk.format == "qcow2":
        assert_clean(Path(disk.path))
    copy = raw_copy(Path(disk.path), disk.format)
    try:
        _assert_sound(copy, last)
    finally:
        copy.unlink()


def _assert_sound(copy: Path, last: int) -> None:
    # What a mount does first: the journal has what was durable and is not in its place yet.
    subprocess.run(["e2fsck", "-E", "journal_only", "-p", str(copy)], check=True, stdout=subprocess.DEVNULL)
    checked = subprocess.run(["e2fsck", "-f", "-n", str(copy)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(["debugfs", "-R", f"rdump / {scratch}", str(copy)], check=True, capture_output=True)
        names = [match for path in Path(scratch).iterdir() if (match := _NAME.fullmatch(path.name))]
        there = {int(name[1]): name for name in names}
        # It may have written more since it said that number, and removed as many.
        assert set(there).issuperset(range(max(1, max(there) - KEPT + 1), last + 1))
        for name in there.values():
            assert hashlib.sha256((Path(scratch) / name[0]).read_bytes()).hexdigest() == name[2], name[0]


def unreadable_image(path: Path) -> Path:
    """A qcow2 image whose second MiB cannot be read: a compressed cluster there is damaged."""
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), f"{4 * MIB}"], check=True)
    writes = ["-c", f"write -P 5 0 {MIB}", "-c", f"write -c -P 7 {MIB} {_CLUSTER}"]
    subprocess.run(["qemu-io", "-f", "qcow2", *writes, str(path)], check=True, stdout=subprocess.DEVNULL)
    return path


@contextmanager
def unreadable(path: Path) -> Iterator[None]:
    """During the block such an image is; a QEMU may have it open."""
    with path.open("r+b", buffering=0) as stream:
        at = _compressed_at(stream.fileno())
        sound = os.pread(stream.fileno(), 16, at)
        os.pwrite(stream.fileno(), b"\xff" * 16, at)
        os.fsync(stream.fileno())
        try:
            yield
        finally:
            os.pwrite(stream.fileno(), sound, at)
            os.fsync(stream.fileno())


def _compressed_at(descriptor: int) -> int:
    """Where the compressed cluster lies in the file (QEMU's docs/interop/qcow2.txt)."""

    def entry(table: int, index: int) -> int:
        (found,) = struct.unpack(">Q", os.pread(descriptor, 8, table + 8 * index))
        return int(found)

    offset = ((1 << 56) - 1) & ~0x1FF
    first_table = entry(40, 0)
    found = entry(entry(first_table, 0) & offset, MIB // _CLUSTER)
    assert found >> 62 & 1, "it is compressed"
    return found & ((1 << 54) - 1)
