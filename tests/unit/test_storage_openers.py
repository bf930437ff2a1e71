"""Keeping QEMUs from writing an image, by the lock they know."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from limosa.errors import StorageError
from limosa.storage import openers


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
