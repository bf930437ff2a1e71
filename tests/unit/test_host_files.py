"""Each VM has a folder of its own for its sockets."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from limosa.host.files import Files
from limosa.model.vm import VmConfig
from limosa.qemu.arguments import vnc_argument

FIRST = VmConfig(
    name="web1",
    uuid="00000000-0000-0000-0000-000000000001",
    memory_mib=64,
    cpus=1,
    machine="pc-q35-10.0",
    cpu="x86-64-v2",
)
SECOND = msgspec.structs.replace(FIRST, name="web2", uuid="00000000-0000-0000-0000-000000000002")


@pytest.fixture
def files(tmp_path: Path) -> Files:
    made = Files(tmp_path / "state", tmp_path / "run")
    made.make()
    for config in (FIRST, SECOND):
        made.vm(config.name).mkdir()
    return made


@pytest.fixture
def half(files: Files) -> Iterator[Path]:
    """A folder with half of a UUID in its name, which the first VM's QEMU was started with."""
    folder = files.run / "vm" / "0000000000000000"
    folder.mkdir()
    stands_in = ["sleep", "60", vnc_argument(folder / "vnc.sock")]
    shell = ["/bin/sh", "-c", "echo; read _", *stands_in]
    with subprocess.Popen(shell, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as qemu:
        assert qemu.stdout is not None
        qemu.stdout.readline()  # before that it may have no command line yet
        (files.vm("web1") / "process.json").write_text(json.dumps({"pid": qemu.pid}))
        yield folder
        qemu.kill()


def test_uuids_that_are_counted_name_different_folders(files: Files) -> None:
    assert files.sockets(FIRST) != files.sockets(SECOND)
    assert len(bytes(Path("/run/limosa/vm") / files.sockets(FIRST).name / "console.sock")) < 100


def test_a_qemu_keeps_the_folder_it_was_started_with(files: Files, half: Path) -> None:
    assert files.sockets(FIRST) == half
    assert files.sockets(SECOND) != half


@pytest.mark.parametrize(
    "record", ["", "{}", "[]", "nonsense", '{"pid": "x"}', '{"pid": 0}', "[" * 100_000], ids=range(7)
)
def test_who_has_crashed_does_not_get_the_folder_of_another(files: Files, half: Path, record: str) -> None:
    (files.vm("web2") / "process.json").write_text(record)
    assert files.sockets(SECOND) == files.run / "vm" / "00000000000000000000000000000002"
