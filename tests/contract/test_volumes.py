"""What Limosa relies on when it asks LVM, of the real one and of the pretended one."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.lvm import EXTENT, GROUP, POOL, REAL, FakeLvm, has_a_real_one
from limosa.errors import Conflict, StorageError
from limosa.storage import lvm
from limosa.storage.marks import Mark
from limosa.storage.openers import OpenFiles
from limosa.storage.unfinished import Found
from limosa.storage.volumes import Volumes

NAME = "web1-vda.abcdefabcdef.raw"
real = pytest.mark.skipif(not has_a_real_one(), reason=f"no volume group to use ({REAL})")


@pytest.fixture(params=["fake", pytest.param("real", marks=real)])
def group(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Volumes]:
    if request.param == "fake":
        monkeypatch.setattr(lvm, "PROGRAM", str(FakeLvm(tmp_path).program))
    yield Volumes(GROUP)
    for name in ("other", NAME):
        lvm.remove(GROUP, name)


def create(group: Volumes, size: int, name: str = NAME, *, mark: Mark | None = None) -> str:
    path = f"{group.root}/{name}"
    asyncio.run(group.create(path, "raw", size, blank=False, mark=mark))
    return path


def test_a_volume_takes_whole_extents_and_gives_them_back(group: Volumes) -> None:
    before = group.look("bulk", default=False)
    path = create(group, EXTENT + 1)
    assert group.taken(path) == 2 * EXTENT
    assert group.look("bulk", default=False).free_bytes == before.free_bytes - 2 * EXTENT
    assert (before.unit_bytes, before.kind, before.thin, before.fault) == (EXTENT, "lvm", False, "")
    for _ in range(2):
        group.remove(path)
    assert group.look("bulk", default=False) == before


def test_a_thin_volume_takes_nothing_yet(group: Volumes) -> None:
    thin = Volumes(GROUP, POOL)
    before = thin.look("thin", default=True)
    path = create(thin, 100 * before.total_bytes)
    assert thin.taken(path) == 0
    assert thin.look("thin", default=True) == before
    assert (before.thin, before.default, before.fault, before.source) == (True, True, "", f"{GROUP}/{POOL}")
    assert 0 < before.free_bytes <= before.total_bytes < group.look("bulk", default=False).total_bytes


def test_a_name_is_taken_once(group: Volumes) -> None:
    path = create(group, EXTENT)
    with pytest.raises(StorageError, match="lvcreate failed") as caught:
        create(group, EXTENT)
    assert "already exists" in caught.value.why
    assert group.taken(path) == EXTENT


def test_what_does_not_fit_is_not_made(group: Volumes) -> None:
    with pytest.raises(StorageError) as caught:
        create(group, group.look("bulk", default=False).free_bytes + 1)
    assert "insufficient free space" in caught.value.why
    assert lvm.find(GROUP, NAME) is None


def test_ours_bears_a_tag(group: Volumes) -> None:
    create(group, EXTENT)
    volume = lvm.find(GROUP, NAME)
    assert volume is not None
    assert (volume.lv_tags, volume.lv_layout) == (lvm.TAG, "linear")
    assert volume.lv_kernel_major >= 0


def test_a_group_that_is_none(group: Volumes) -> None:
    fault = Volumes("nogroup").look("bulk", default=False).fault
    assert fault.startswith('Volume group "nogroup" not found')
    assert Volumes(GROUP, "nopool").look("bulk", default=False).fault == "it has no thin pool of that name"
    create(group, EXTENT, "other")
    assert Volumes(GROUP, "other").look("bulk", default=False).fault == "it has no thin pool of that name"


def marked(group: Volumes) -> list[Found]:
    """The volumes that are unfinished copies."""
    return [one for one in group.unfinished.find() if one.mark is not None]


@pytest.mark.parametrize("source", ["", "host_2.lan"])
def test_it_is_an_unfinished_copy_until_it_is_finished(group: Volumes, source: str) -> None:
    began, path = int(time.time()), create(group, EXTENT, mark=Mark(host="host-1.lan", at=0.0, source=source))
    create(group, EXTENT, "other")
    (one,) = marked(group)
    assert one.mark is not None
    assert (one.path, one.size_bytes) == (path, EXTENT)
    assert (one.mark.host, one.mark.source) == ("host-1.lan", source)
    assert began <= one.changed_at <= time.time()
    for _ in range(2):
        group.unfinished.finish(path)
    assert marked(group) == []
    assert not group.unfinished.condemn(path)
    volume = lvm.find(GROUP, NAME)
    assert volume is not None
    assert volume.tags == (lvm.TAG,)


def test_of_a_vm_and_a_removal_one_gets_it(group: Volumes) -> None:
    path = create(group, EXTENT, mark=Mark(host="host1", at=0.0))
    for _ in range(2):
        assert group.unfinished.condemn(path), "a removal that was interrupted goes on"
    (one,) = marked(group)
    with pytest.raises(Conflict, match="being removed"):
        group.unfinished.claim(path)
    group.unfinished.spare(path)
    assert marked(group) == [one]
    group.unfinished.claim(path)
    assert not group.unfinished.condemn(path)


def test_a_tag_is_exchanged_only_for_one_it_has(group: Volumes) -> None:
    create(group, EXTENT)
    lvm.retag(GROUP, NAME, "none", "new")
    lvm.retag(GROUP, "none", lvm.TAG, "new")
    volume = lvm.find(GROUP, NAME)
    assert volume is not None
    assert volume.tags == (lvm.TAG,)


def test_what_is_not_there_is_nobodys(group: Volumes) -> None:
    path = f"{group.root}/{NAME}"
    group.unfinished.claim(path)
    group.unfinished.finish(path)
    assert not group.unfinished.condemn(path)
    assert group.unfinished.user(path, OpenFiles()) == ""
    with pytest.raises(StorageError, match="lvs failed"):
        list(Volumes("nogroup").unfinished.find())


def test_a_volume_with_a_snapshot_stays(group: Volumes) -> None:
    path = create(group, EXTENT, mark=Mark(host="host1", at=0.0))
    words = ["--snapshot", "--size", f"{EXTENT}b", "--name", "other", f"{GROUP}/{NAME}"]
    subprocess.run([lvm.PROGRAM, "lvcreate", "--yes", *words], check=True, env={"LC_ALL": "C"})
    for remove in (group.remove, group.unfinished.remove):
        with pytest.raises(StorageError, match="is not removed") as caught:
            remove(path)
        assert caught.value.why == group.unfinished.user(path, OpenFiles()) == "LVM would remove its snapshots, too"
    assert {volume.lv_name for volume in lvm.volumes(GROUP)} >= {NAME, "other"}
    group.remove(f"{group.root}/other")
    group.remove(path)
    assert lvm.find(GROUP, NAME) is None


@real
def test_a_real_one_that_is_in_use_is_known_and_stays() -> None:
    group = Volumes(GROUP, POOL)
    path = create(group, EXTENT, mark=Mark(host="host1", at=0.0))
    try:
        assert group.unfinished.user(path, OpenFiles()) == ""
        assert lvm.path_of(path) == lvm.path_of(str(Path(path).resolve())) == path
        with open(path, "rb"):
            assert group.unfinished.user(path, OpenFiles()) == "somebody has it open"
            with pytest.raises(StorageError, match="lvremove failed"):
                group.unfinished.remove(path)
        # A thin snapshot of it does not need it.
        subprocess.run([lvm.PROGRAM, "lvcreate", "-qq", "--type", "thin", "--name", "other", path], check=True)
        assert group.unfinished.user(path, OpenFiles()) == ""
        subprocess.run([lvm.PROGRAM, "lvchange", "-qq", "--activate", "n", path], check=True)
        assert "it has no device" in group.unfinished.user(path, OpenFiles())
        assert lvm.path_of(path) == ""
    finally:
        group.unfinished.remove(path)
    assert marked(group) == []
    group.remove(f"{group.root}/other")
