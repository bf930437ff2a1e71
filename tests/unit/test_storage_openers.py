"""Who has an image open, and keeping QEMUs from writing it, by the lock they know."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from limosa.errors import StorageError
from limosa.storage import mounts, openers
from limosa.storage.openers import OpenFiles


def qemu(image: Path, command: str, *options: str) -> str:
    """What a QEMU says that opens the image and does this."""
    words = ["qemu-io", *options, "-f", "raw", "-c", command, str(image)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(65536))
    return path


@pytest.mark.qemu
def test_others_may_read_it_and_not_write_it(image: Path) -> None:
    with openers.unwritten(str(image)):
        assert "read 4096/4096" in qemu(image, "read 0 4k", "-r")
        assert "lock" in qemu(image, "write 0 4k")
    assert "wrote 4096/4096" in qemu(image, "write 0 4k")


@pytest.mark.qemu
def test_one_that_writes_it_is_seen(image: Path) -> None:
    words = ["qemu-io", "-f", "raw", str(image)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdin is not None
        assert writer.stdout is not None
        writer.stdin.write(b"write 0 4k\n")
        writer.stdin.flush()
        while b"wrote" not in writer.stdout.readline():
            pass
        with pytest.raises(StorageError, match="is in use"), openers.unwritten(str(image)):
            pass
        writer.stdin.close()


def test_what_is_not_there_cannot_be_kept(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot open"), openers.unwritten(str(tmp_path / "none.raw")):
        pass


@contextmanager
def opened(*paths: Path) -> Iterator[int]:
    """A process that has these open."""
    files = [path.open("rb") for path in paths]
    with subprocess.Popen(["sleep", "60"], pass_fds=[file.fileno() for file in files]) as process:
        for file in files:
            file.close()
        try:
            yield process.pid
        finally:
            process.kill()


def test_of_what_processes_have_open_only_what_may_be_the_image_is_looked_at(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anything else may lie on a share that does not answer."""
    other = image.with_name("other.raw")
    other.touch()
    asked: list[str] = []
    stat = os.stat

    def asks(path: Any, **how: Any) -> os.stat_result:
        if "/fd/" in str(path):
            asked.append(os.readlink(path))
        return stat(path, **how)

    with opened(other, image) as process:
        monkeypatch.setattr(os, "stat", asks)
        assert openers.use_of(image, openers.everywhere()) == f"process {process} has it open"
    assert asked == [str(image)]


@pytest.mark.parametrize(
    ("why", "who"), [(errno.ENOENT, ""), (errno.ESRCH, ""), (errno.EACCES, "process {} has it open")]
)
def test_what_cannot_be_looked_at_may_be_the_image_unless_it_was_closed(
    image: Path, monkeypatch: pytest.MonkeyPatch, why: int, who: str
) -> None:
    def fails(*_: Any, **__: Any) -> os.stat_result:
        raise OSError(why, os.strerror(why))

    with opened(image) as process:
        seen = openers.everywhere()
        monkeypatch.setattr(os, "stat", fails)
        assert openers.use_of(image, seen) == who.format(process)


def test_the_file_of_a_loop_device_is_looked_at_if_it_is_on_the_same_file_system(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = image.with_name("link.raw")
    link.hardlink_to(image)
    assert openers.use_of(image, OpenFiles({}, [("loop7", str(link))])) == "it is the loop device loop7"
    monkeypatch.setattr(mounts, "device_at", lambda path: "0:99" if path == str(link) else "8:1")
    assert openers.use_of(image, OpenFiles({}, [("loop7", str(link))])) == ""
