"""Disks of a VM that does not run move between locations of its host, by a QEMU without a guest."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from harness.crashes import disks_of, images
from harness.hosts import Host, wait_until
from harness.steering import follow
from harness.stopped import DATA_MIB, MIB, SLOWLY, assert_one_whole_disk, begin, create, host_with_locations, make_raw
from limosa.errors import Conflict, LimosaError, PreflightRefused
from limosa.model.migration import Migration, Outcome, Phase
from limosa.wire import api, endpoints
from limosa.wire.endpoints import Endpoint

pytestmark = pytest.mark.qemu


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with host_with_locations("fast") as made:
        yield made


@pytest.fixture
def wanted(host: Host) -> Iterator[bytes]:
    """What the disk of ``web``, in location ``images``, has."""
    image = host.state / "images" / "web.raw"
    made = make_raw(image)
    create(host, image)
    yield made
    wait_until(lambda: idle(host), "no move is left")
    host.client.call(endpoints.DELETE_VM, vm="web")
    for path in images(host):
        path.unlink()


def idle(host: Host) -> bool:
    view = host.vm("web")
    return view is not None and view.migration is None


def copying(view: Migration) -> bool:
    return view.phase is Phase.STORAGE and any(disk.copied_bytes for disk in view.progress.disks)


def fill(path: Path) -> None:
    """Write a file until its file system is full."""
    with suppress(OSError), path.open("wb", buffering=0) as stream:
        while stream.write(bytes(4096)):
            pass


def moved(host: Host, where: str, **how: object) -> Migration:
    migration = host.outcome(begin(host, where, **how).id)
    assert migration.outcome is Outcome.COMPLETED, migration.fault
    return migration


def test_there_in_another_format_and_back(host: Host, wanted: bytes) -> None:
    moved(host, "fast", format="qcow2")
    disk = assert_one_whole_disk(host, wanted)
    assert (disk.parent.name, disk.suffix) == ("fast", ".qcow2")
    assert disk.stat().st_blocks * 512 < (DATA_MIB + 2) * MIB, "holes stay holes"
    moved(host, "images", format="raw", thick=True)
    disk = assert_one_whole_disk(host, wanted)
    assert (disk.parent.name, disk.suffix) == ("images", ".raw")
    assert disk.stat().st_blocks * 512 >= len(wanted)
    with pytest.raises(Conflict):
        begin(host, "images")


def test_the_old_image_can_be_kept(host: Host, wanted: bytes) -> None:
    (old,) = disks_of(host, "web")
    moved(host, "fast", keep=True)
    assert assert_one_whole_disk(host, wanted, old) != old


@pytest.mark.parametrize("chain", ["keep", "flatten"])
def test_an_overlay_stays_one_or_becomes_whole(host: Host, wanted: bytes, chain: str) -> None:
    below = disks_of(host, "web")[0]
    host.client.call(endpoints.DELETE_VM, vm="web")
    overlay = host.state / "images" / "over.qcow2"
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(below), "-F", "raw", str(overlay)]
    subprocess.run(command, check=True)
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 7 1M 64k", str(overlay)], check=True, capture_output=True)
    create(host, overlay)
    moved(host, "fast", chain=chain)
    seen = wanted[:MIB] + b"\7" * 65536 + wanted[MIB + 65536 :]
    disk = assert_one_whole_disk(host, seen, below)
    assert (disk.stat().st_blocks * 512 < MIB) == (chain == "keep")


def test_meanwhile_the_vm_is_not_touched_and_cancelled_it_never_moved(host: Host, wanted: bytes) -> None:
    (old,) = disks_of(host, "web")
    begun = begin(host, "fast", bandwidth_mbit_per_s=SLOWLY)
    view = follow(host, begun.id, copying)
    assert view.progress.disks[0].total_bytes > 0
    (copier,) = host.qemus()
    assert "Seccomp:\t2" in Path(f"/proc/{copier}/status").read_text()
    acts: tuple[Endpoint[Any, Any], ...] = (endpoints.START_VM, endpoints.DELETE_VM)
    for act in acts:
        with pytest.raises(Conflict, match="is in migration"):
            host.client.call(act, vm="web")
    with pytest.raises(Conflict):
        host.client.call(endpoints.MOVE, api.MoveRequest(vm="web", destination="beta"))
    with pytest.raises(Conflict):
        begin(host, "fast")
    writing = subprocess.run(["qemu-io", "-f", "raw", "-c", "write 0 4k", str(old)], capture_output=True, check=False)
    assert b"lock" in writing.stderr, "no other QEMU writes it either"
    assert host.client.call(endpoints.CANCEL_MIGRATION, migration=begun.id).outcome is Outcome.CANCELLED
    assert assert_one_whole_disk(host, wanted) == old


def test_another_cap_counts_at_once(host: Host, wanted: bytes) -> None:
    begun = begin(host, "fast", bandwidth_mbit_per_s=SLOWLY)
    follow(host, begun.id, copying)
    host.client.call(endpoints.LIMIT_MIGRATION, api.LimitRequest(bandwidth_mbit_per_s=0), migration=begun.id)
    assert host.outcome(begun.id).outcome is Outcome.COMPLETED
    assert assert_one_whole_disk(host, wanted).parent.name == "fast"


def test_a_dead_copier_fails_the_move_and_nothing_else(host: Host, wanted: bytes) -> None:
    (old,) = disks_of(host, "web")
    begun = begin(host, "fast", bandwidth_mbit_per_s=SLOWLY)
    follow(host, begun.id, copying)
    os.kill(host.qemus()[0], 9)
    ended = host.outcome(begun.id)
    assert ended.outcome is Outcome.FAILED
    assert assert_one_whole_disk(host, wanted) == old


def test_an_image_others_need_is_not_moved_from_under_them(host: Host, wanted: bytes) -> None:
    (old,) = disks_of(host, "web")
    overlay = host.state / "images" / "child.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(old), "-F", "raw", str(overlay)], check=True)
    for act in (endpoints.START_VM, endpoints.STOP_VM):
        host.client.call(act, vm="web")
        with pytest.raises(PreflightRefused, match="it is the backing file of"):
            begin(host, "fast")
    moved(host, "fast", keep=True)
    assert_one_whole_disk(host, wanted, old, overlay)


def test_an_image_that_is_written_is_not_copied(host: Host, wanted: bytes) -> None:
    (old,) = disks_of(host, "web")
    create(host, old, "other")
    host.client.call(endpoints.START_VM, vm="other")
    try:
        ended = host.outcome(begin(host, "fast", keep=True).id)
        assert (ended.outcome, ended.fault is not None and "is in use" in ended.fault.what) == (Outcome.FAILED, True)
        assert images(host) == [old]
    finally:
        host.client.call(endpoints.STOP_VM, vm="other")
        host.client.call(endpoints.DELETE_VM, vm="other")
    assert assert_one_whole_disk(host, wanted) == old


def test_a_disk_that_fills_up_fails_the_move(host: Host, wanted: bytes, tmp_path: Path) -> None:
    (old,) = disks_of(host, "web")
    small = host.state / "fast"
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m,mode=711", "tmpfs", str(small)], check=True)
    try:
        begun = begin(host, "fast", bandwidth_mbit_per_s=SLOWLY)
        follow(host, begun.id, copying)
        fill(small / "filler")
        host.client.call(endpoints.LIMIT_MIGRATION, api.LimitRequest(bandwidth_mbit_per_s=0), migration=begun.id)
        ended = host.outcome(begun.id)
        assert ended.outcome is Outcome.FAILED
        assert ended.fault is not None
        assert "No space" in ended.fault.why
        with pytest.raises(LimosaError, match=r"room|space"):  # and now it is refused before anything is done
            begin(host, "fast")
        assert [path.name for path in small.iterdir()] == ["filler"]
    finally:
        subprocess.run(["umount", "--lazy", str(small)], check=True)
    assert assert_one_whole_disk(host, wanted) == old
