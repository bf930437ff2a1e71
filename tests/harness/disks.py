"""Disks on which the lab's guest has written numbers: is everything there that it was told is durable?"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

BLOCK, BLOCKS = 4096, 2048


def assert_sound(image: Path, last: int, image_format: str = "qcow2") -> None:
    """``qemu-img check`` finds nothing wrong, and every number up to ``last`` is in its block, or a later one."""
    if image_format == "qcow2":
        report = json.loads(subprocess.check_output(["qemu-img", "check", "-f", "qcow2", "--output=json", str(image)]))
        assert [report.get(key, 0) for key in ("corruptions", "leaks", "check-errors")] == [0, 0, 0]
    found = numbers(image, image_format)
    for number in range(max(1, last - BLOCKS + 1), last + 1):
        there = found[number % BLOCKS]
        assert there >= number, f"number {number} was durable and block {number % BLOCKS} has {there}"
        assert there % BLOCKS == number % BLOCKS


def numbers(image: Path, image_format: str = "qcow2") -> list[int]:
    """The number in each block, 0 where none was written."""
    with raw_copy(image, image_format).open("rb") as stream:
        return [_number(stream.read(BLOCK)) for _ in range(BLOCKS)]


def raw_copy(image: Path, image_format: str = "qcow2") -> Path:
    """The image as a guest sees it, as a file beside it."""
    copy = image.with_suffix(".raw")
    subprocess.run(["qemu-img", "convert", "-f", image_format, "-O", "raw", str(image), str(copy)], check=True)
    return copy


def _number(block: bytes) -> int:
    words = block.rstrip(b"\0").decode().split()
    if not words:
        return 0
    word, number = words
    assert word == "limosa"
    return int(number)
