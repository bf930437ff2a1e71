"""What a daemon finds of the QEMUs of an earlier one, where there is no record."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from test_preflight import VM

from limosa.host.files import Files
from limosa.host.process_records import ProcessRecords
from limosa.qemu import folder, process
from limosa.qemu.arguments import without_guest


@pytest.fixture
def sockets(tmp_path: Path) -> Path:
    """The folder of a VM's sockets."""
    made = files(tmp_path).sockets(VM)
    made.mkdir(parents=True)
    return made


def files(tmp_path: Path) -> Files:
    return Files(tmp_path / "state", tmp_path / "run")


def test_sockets_of_no_qemu_are_removed(tmp_path: Path, sockets: Path) -> None:
    """A daemon has died between forgetting the QEMU and removing its folder."""
    (sockets / "vnc.sock").touch()
    assert asyncio.run(ProcessRecords(files(tmp_path), "boot").attach(VM)) is None
    assert not sockets.exists()


def test_those_of_a_copier_are_left_to_whoever_ends_that(
    tmp_path: Path, sockets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (sockets / folder.QMP).touch()
    copier = without_guest(sockets, 0)[1]
    monkeypatch.setattr(process, "find", lambda argument: (1, 1) if argument == copier else None)
    assert asyncio.run(ProcessRecords(files(tmp_path), "boot").attach(VM)) is None
    assert sockets.exists()
