"""Folders as stores: an image that is removed."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from limosa.errors import StorageError
from limosa.storage import mounts
from limosa.storage.mounts import Mount
from limosa.storage.stores import Folder


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(b"data")
    return path


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What is held open while images are removed."""
    opened: list[int] = []
    really = os.open

    def look(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        opened.append(really(path, flags, mode, dir_fd=dir_fd))
        return opened[-1]

    monkeypatch.setattr(os, "open", look)
    return opened


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_nobody_waits_until_its_space_is_freed(image: Path, held: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    before, is_removed, links = open_files(), threading.Event(), []
    close = os.close

    def free(descriptor: int) -> None:
        is_removed.wait()
        links.append(os.fstat(descriptor).st_nlink)
        close(descriptor)

    monkeypatch.setattr(os, "close", free)
    folder = Folder(str(image.parent))
    folder.remove(str(image))
    assert not image.exists()
    assert len(held) == 1
    is_removed.set()
    folder.look("images", default=True)  # who asks for space waits
    assert links == [0]
    assert open_files() == before


def test_on_a_share_none_is_held_open(image: Path, held: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mounts, "find", lambda device: Mount("nfs4", "nas:/vms"))
    Folder(str(image.parent)).remove(str(image))
    assert not image.exists()
    assert held == []


def test_one_that_is_not_there_is_removed(image: Path, held: list[int]) -> None:
    image.unlink()
    Folder(str(image.parent)).remove(str(image))
    assert held == []


def test_one_that_stays_says_why_and_is_not_held(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(1, "Operation not permitted")

    before, others = open_files(), set(threading.enumerate())
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(StorageError, match="cannot delete") as caught:
        Folder(str(image.parent)).remove(str(image))
    assert caught.value.why == "Operation not permitted"
    for thread in set(threading.enumerate()) - others:
        thread.join()
    assert (image.exists(), open_files()) == (True, before)
