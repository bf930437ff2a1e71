"""A VM with a disk on storage both hosts share moves without a byte of it being copied, and two hosts never write it.

The guest writes numbers on the disk, each durable before the next is written. Who may write the image is
read from QEMU's own lock on it (a read lock of byte 101: the permission WRITE in block/file-posix.c), as the kernel
lists it for each process.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from harness.disks import assert_sound, raw_copy
from harness.guests import LanClient, address_of, linux, wait_until_it_serves
from harness.hosts import wait_until
from harness.labs import LabHost, running_lab
from harness.steering import looking, move, remove
from limosa.errors import Conflict
from limosa.model.vm import VmState
from limosa.wire import api, endpoints

pytestmark = [pytest.mark.qemu, pytest.mark.lab]

WRITE_PERMISSION_BYTE = 101
SIZE_MIB = 64


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[LabHost]]:
    with running_lab() as made:
        yield made


@pytest.fixture(scope="module")
def image(hosts: list[LabHost]) -> Path:
    """The disk of a guest ``web`` that writes numbers on it."""
    folder = hosts[0].lab.state / "shared"
    folder.mkdir(mode=0o755)
    path = folder / "web.qcow2"
    disk = api.NewDisk(path=str(path), size_mib=SIZE_MIB)
    hosts[0].create(msgspec.structs.replace(linux("web", load={"disk": "vda"}), disks=(disk,)))
    return path


def writers(image: Path, processes: list[int]) -> list[int]:
    """Those processes whose QEMU has the permission to write the image at this moment."""
    return [pid for pid in processes if may_write(image, pid)]


def may_write(image: Path, pid: int) -> bool:
    """Whether a process holds QEMU's lock for writers on the image."""
    try:
        descriptors = [path for path in Path(f"/proc/{pid}/fd").iterdir() if is_file(path, image)]
        texts = [Path(f"/proc/{pid}/fdinfo/{path.name}").read_text() for path in descriptors]
    except OSError:
        return False  # it has just ended
    locks = [line.split() for text in texts for line in text.splitlines() if line.startswith("lock:")]
    # lock: 1: OFDLCK ADVISORY READ -1 00:2e:1234 100 101
    return any(int(lock[-2]) <= WRITE_PERMISSION_BYTE <= int(lock[-1]) for lock in locks)


def is_file(descriptor: Path, image: Path) -> bool:
    try:
        return descriptor.stat().st_ino == image.stat().st_ino
    except OSError:
        return False


@contextmanager
def guarded(image: Path, hosts: list[LabHost]) -> Iterator[list[list[int]]]:
    """Looks at who may write the image, as many as there is time for, during the block.

    Processes are asked one after another, so two writers count only if the first still is one after the second was.
    """
    looks: list[list[int]] = []

    def look() -> None:
        found = writers(image, [pid for host in hosts for pid in host.qemus()])
        looks.append(writers(image, found) if len(found) > 1 else found)

    with looking(look, pause_s=0.001):  # leave the processor to those that are looked at
        yield looks


def number(client: LanClient) -> int:
    return int(client.facts()["number"])


def test_the_disk_is_shared_and_never_written_by_two(hosts: list[LabHost], image: Path) -> None:
    client = LanClient(hosts[0].lab, address_of(1))
    wait_until_it_serves(client)
    wait_until(lambda: number(client) > 3, "the guest numbers its disk")
    assert writers(image, hosts[0].qemus()) == hosts[0].qemus(), "the lock can be seen"
    inode, numbers = image.stat().st_ino, [number(client)]
    with guarded(image, hosts) as looks, client.talking() as conversation:
        for source, destination in ((hosts[0], hosts[1]), (hosts[1], hosts[0])):
            move(source, "web", destination)
            numbers.append(number(client))
            wait_until(lambda: number(client) > numbers[-1] + 3, "the guest goes on numbering")
            assert writers(image, destination.qemus()) == destination.qemus()
    assert conversation.faults == []
    assert numbers == sorted(numbers)
    assert max(map(len, looks)) == 1
    assert {pid for look in looks for pid in look} != set(looks[0]), "the writer changed while it was looked at"
    assert image.stat().st_ino == inode


def test_a_second_qemu_is_kept_off_the_disk(hosts: list[LabHost], image: Path) -> None:
    """By QEMU's lock where it works; that two hosts know of each other is not needed for it."""
    first, second = hosts
    thief = api.NewVm(name="thief", memory_mib=32, accelerator="tcg", disks=(api.NewDisk(path=str(image)),))
    second.client.call(endpoints.CREATE_VM, thief)
    with pytest.raises(Conflict, match=r"web\.qcow2 is in use: a VM of another host"):
        second.client.call(endpoints.START_VM, vm="thief")
    assert second.show("thief").state is VmState.STOPPED
    second.client.call(endpoints.DELETE_VM, vm="thief")
    assert image.exists()
    assert first.show("web").state is VmState.RUNNING


def test_the_image_is_sound_and_holds_the_last_number(hosts: list[LabHost], image: Path) -> None:
    client = LanClient(hosts[0].lab, address_of(1))
    last = number(client)
    remove(hosts[0], "web")
    assert_sound(image, last)


def test_a_read_only_disk_moves_too(hosts: list[LabHost], image: Path) -> None:
    first, second = hosts
    copy = raw_copy(image)
    disk = api.NewDisk(path=str(copy), format="raw", read_only=True)
    for host, name in ((first, "reader1"), (second, "reader2")):
        host.create(api.NewVm(name=name, memory_mib=32, accelerator="tcg", disks=(disk,)))
    move(first, "reader1", second)
    assert second.show("reader1").state is VmState.RUNNING
    assert writers(copy, second.qemus()) == []
    remove(second, "reader1", "reader2")
