"""Logs of VMs are cut while they are being written."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from limosa.host import logs

LINE = b"[ 1234.567890] a guest says something\n"


@pytest.fixture
def vms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(logs, "MOST_BYTES", 100 * len(LINE))
    monkeypatch.setattr(logs, "KEPT_BYTES", 10 * len(LINE) - 1)
    for name in ("quiet", "chatty"):
        (tmp_path / name).mkdir()
    return tmp_path


def test_the_last_whole_lines_of_a_log_that_is_too_large_stay(vms: Path) -> None:
    quiet, chatty = vms / "quiet" / "qemu.log", vms / "chatty" / "qemu.log.old"
    quiet.write_bytes(LINE * 100)
    chatty.write_bytes(b"".join(b"%d %s" % (number, LINE) for number in range(101)))
    logs.cut_all(vms)
    assert quiet.read_bytes() == LINE * 100
    assert chatty.read_bytes() == b"".join(b"%d %s" % (number, LINE) for number in range(92, 101))


def test_a_log_of_one_endless_line_is_cut_as_well(vms: Path) -> None:
    path = vms / "chatty" / "console.log"
    path.write_bytes(b"y" * 101 * len(LINE))
    logs.cut_all(vms)
    assert path.read_bytes() == b"y" * logs.KEPT_BYTES


def test_who_appends_goes_on_at_the_new_end_of_the_same_file(vms: Path) -> None:
    path = vms / "chatty" / "console.log"
    with path.open("ab", buffering=0) as guest:
        guest.write(LINE * 101)
        os.fchmod(guest.fileno(), 0o640)
        logs.cut_all(vms)
        guest.write(b"on\n")
        assert path.read_bytes() == LINE * 9 + b"on\n"
        assert os.fstat(guest.fileno()).st_mode & 0o777 == 0o640


def test_nothing_but_logs_is_touched_and_no_link_is_followed(vms: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = vms / "other"
    seed = vms / "chatty" / "seed.iso"
    for path in (other, seed):
        path.write_bytes(LINE * 101)
    (vms / "chatty" / "console.log").symlink_to(other)
    with caplog.at_level(logging.ERROR):
        logs.cut_all(vms)
    assert other.stat().st_size == seed.stat().st_size == len(LINE) * 101
    assert not caplog.records


def test_a_vm_that_leaves_while_its_folder_is_looked_through_ends_nothing(
    vms: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def glob(folder: Path, pattern: str) -> Iterator[Path]:
        """As it ends then, up to Python 3.12."""
        yield vms / "chatty" / "qemu.log"
        raise FileNotFoundError(2, "No such file or directory", "quiet")

    log = vms / "chatty" / "qemu.log"
    log.write_bytes(LINE * 101)
    monkeypatch.setattr(Path, "glob", glob)
    logs.cut_all(vms)
    assert log.read_bytes() == LINE * 9
    assert "not all logs" in caplog.text
