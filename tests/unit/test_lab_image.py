"""The guest's command line and the packing of its initramfs."""

from __future__ import annotations

import lzma
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from limosa.errors import InvalidInput
from limosa.lab.image import command_line
from limosa.lab.initramfs import Archive, modules_with_dependencies


def test_a_guest_without_wishes_is_told_its_name_only() -> None:
    words = [word for word in command_line().split() if word.startswith("limosa.")]
    assert words == ["limosa.name=guest"]


def test_what_is_wished_is_said_in_the_words_init_reads() -> None:
    line = command_line(
        name="web1",
        address="10.77.0.101/24",
        gateway="10.77.0.1",
        fill_mib=600,
        random_mib=200,
        rewrite_mib_per_s=20,
        disk="vda",
        write_mib_per_s=5,
    )
    line += command_line(files="vda")
    said = {word.partition("=")[0] for word in line.split() if word.startswith("limosa.")}
    init = files("limosa.lab").joinpath("guest", "init").read_text()
    assert {word for word in said if f"{word}=*)" not in init} == set()
    assert "limosa.ip=10.77.0.101/24" in line


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "web 1"},
        {"name": "a\nb"},
        {"address": "10.77.0.300/24"},
        {"gateway": "x"},
        {"disk": "vda init=/bin/sh"},
        {"disk": "../mem"},
        {"random_mib": 1},
        {"fill_mib": 10, "random_mib": 11},
        {"fill_mib": 600, "rewrite_mib_per_s": 1},
        {"fill_mib": 600, "random_mib": 600, "rewrite_mib_per_s": 201},
        {"rewrite_mib_per_s": -1},
        {"write_mib_per_s": 1},
        {"disk": "vda", "write_mib_per_s": 101},
        {"files": "vda/"},
        {"disk": "vda", "files": "vdb"},
    ],
)
def test_what_the_guest_cannot_do_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput):
        command_line(**wrong)


def unpack(archive: bytes) -> dict[str, tuple[int, bytes]]:
    """Mode and content by path, read as the kernel reads it (buffer-format.rst)."""
    entries: dict[str, tuple[int, bytes]] = {}
    place = 0
    while True:
        assert archive[place : place + 6] == b"070701"
        fields = [int(archive[place + 6 + 8 * i : place + 14 + 8 * i], 16) for i in range(13)]
        name_end = place + 110 + fields[11]
        name = archive[place + 110 : name_end - 1].decode()
        start = -(-name_end // 4) * 4
        place = -(-(start + fields[6]) // 4) * 4
        if name == "TRAILER!!!":
            assert place == len(archive)
            return entries
        entries[name] = (fields[1], archive[start : start + fields[6]])


def test_an_archive_reads_back() -> None:
    archive = Archive()
    archive.folder("bin")
    archive.file("bin/odd", b"12345", executable=True)
    archive.file("bin/empty", b"")
    archive.link("bin/sh", "odd")
    assert unpack(archive.finish()) == {
        "bin": (0o040755, b""),
        "bin/odd": (0o100755, b"12345"),
        "bin/empty": (0o100644, b""),
        "bin/sh": (0o120777, b"odd"),
    }


def test_modules_come_after_what_they_need_and_missing_ones_are_left_out(tmp_path: Path) -> None:
    net, bus = tmp_path / "drivers" / "net", tmp_path / "drivers" / "virtio"
    for folder in (net, bus):
        folder.mkdir(parents=True)
    (net / "virtio_net.ko").write_bytes(b"ELF\0depends=net-failover,virtio_ring\0name=virtio_net\0")
    (net / "net_failover.ko.xz").write_bytes(lzma.compress(b"ELF\0depends=\0"))
    (bus / "virtio_ring.ko").write_bytes(b"ELF\0depends=virtio\0")
    (bus / "virtio.ko").write_bytes(b"ELF\0depends=\0")
    loaded = modules_with_dependencies(tmp_path, ["virtio-net", "virtio_ring", "built_in"])
    assert list(loaded) == ["net_failover", "virtio", "virtio_ring", "virtio_net"]
    assert loaded["net_failover"] == b"ELF\0depends=\0"
