"""Disks on which the lab's guest has written numbers: is everything there that it was told is durable?"""

from __future__ import annotations

import json
import subprocess
from contextlib import suppress
from pathlib import Path

from harness.guests import LanClient
from harness.hosts import Host, wait_until
from limosa.model.vm import VmState
from limosa.wire import endpoints

BLOCK, BLOCKS = 4096, 2048


def assert_sound(image: Path, last: int, image_format: str = "qcow2") -> None:
    """``qemu-img check`` finds nothing wrong, and every number up to ``last`` is in its block, or a later one."""
    if image_format == "qcow2":
        assert_clean(image)
    found = numbers(image, image_format)
    for number in range(max(1, last - BLOCKS + 1), last + 1):
        there = found[number % BLOCKS]
        assert there >= number, f"number {number} was durable and block {number % BLOCKS} has {there}"
        assert there % BLOCKS == number % BLOCKS


def assert_clean(image: Path) -> None:
    """``qemu-img check`` finds nothing wrong with a qcow2 image, which a QEMU may have open."""
    command = ["qemu-img", "check", "-U", "-f", "qcow2", "--output=json", str(image)]
    report = json.loads(subprocess.run(command, capture_output=True, check=False).stdout)
    assert [report.get(key, 0) for key in ("corruptions", "leaks", "check-errors")] == [0, 0, 0], report


def numbers(image: Path, image_format: str = "qcow2") -> list[int]:
    """The number in each block, 0 where none was written."""
    copy = raw_copy(image, image_format)
    try:
        with copy.open("rb") as stream:
            return [_number(stream.read(BLOCK)) for _ in range(BLOCKS)]
    finally:
        copy.unlink()


def raw_copy(image: Path, image_format: str = "qcow2") -> Path:
    """The image as a guest sees it, as a file beside it; a QEMU may have it open."""
    copy = image.with_suffix(".seen")
    subprocess.run(["qemu-img", "convert", "-U", "-f", image_format, "-O", "raw", str(image), str(copy)], check=True)
    return copy


def number(client: LanClient) -> int:
    """The last number the guest says is durable."""
    return int(client.facts()["number"])


def goes_on(client: LanClient) -> None:
    """Wait until the guest has written a few numbers more."""
    before = number(client)
    wait_until(lambda: number(client) > before + 2, "the guest goes on numbering")


class Listener:
    """Asks the guest for its number as often as there is time for, and keeps the last answer."""

    def __init__(self, client: LanClient) -> None:
        self.last = number(client)
        self._client = client

    def ask(self) -> None:
        """Ask once; a guest that has died says nothing."""
        with suppress(OSError, KeyError, ValueError):
            self.last = max(self.last, number(self._client))


def assert_keeps(host: Host, vm: str, last: int) -> None:
    """The image that the VM's description names holds every number up to ``last``. A guest that runs stands meanwhile,
    because an image that is written cannot be judged."""
    view = host.show(vm)
    runs = view.state is VmState.RUNNING
    if runs:
        host.client.call(endpoints.PAUSE_VM, vm=vm)
    try:
        disk = view.config.disks[0]
        assert_sound(Path(disk.path), last, disk.format)
    finally:
        if runs:
            host.client.call(endpoints.RESUME_VM, vm=vm)


def _number(block: bytes) -> int:
    words = block.rstrip(b"\0").decode().split()
    if not words:
        return 0
    word, number = words
    assert word == "limosa"
    return int(number)
