"""What a guest writes while QEMU begins to copy its disk must be in the copy."""

from __future__ import annotations

import asyncio
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from harness import machines
from limosa.errors import StorageError
from limosa.model.vm import Disk, VmConfig
from limosa.qemu import beginning
from limosa.qemu.machine import Machine
from limosa.qemu.protocol import CopyState, ImageFile, RunState

pytestmark = pytest.mark.qemu

MIB = 1024 * 1024
SIZE_MIB = 128
TAG = "abc"
#: Of an image with these clusters one table says where 2 MiB of the disk are, so this one has very many.
OPTIONS = "cluster_size=4096"
#: How many of them are read a second.
SLOW = 150


class Qemu:
    """A VM with a disk of which QEMU learns slowly where it has data, and a guest that writes on and on."""

    def __init__(self, folder: Path, machine: Machine) -> None:
        self.machine = machine
        self.folder = folder
        self._written = 0
        self._has_written = asyncio.Event()
        self.writing = asyncio.ensure_future(asyncio.sleep(0))
        #: commands of the machine
        self.said: list[str] = []
        #: the guest stands still
        self._stands = False
        #: before this command the guest writes, once
        self.writes_before = ""
        self._say, machine._execute = machine._execute, self._note  # type: ignore[method-assign]

    @classmethod
    async def launch(cls, folder: Path, image: Path) -> Qemu:
        config = VmConfig(
            name="tiny",
            uuid="5c7a2b9e-0f0e-4c06-8a0b-6d4b7b6f2a11",
            memory_mib=32,
            cpus=1,
            machine="q35",
            cpu="x86-64-v2",
            disks=(Disk(name="vda", path=str(image), format="qcow2"),),
        )
        return cls(folder, await machines.launch(folder, config, buffered=[str(image)]))

    async def execute(self, command: str, **words: Any) -> Any:
        return await self._say(command, {key.replace("_", "-"): word for key, word in words.items()})

    async def _note(self, command: str, *words: Any, **named: Any) -> Any:
        """As the guest: from when it is stopped it writes no more."""
        self.said.append(command)
        if command == self.writes_before:
            self.writes_before = ""
            await self.write("write")
        self._stands = command == "stop" or (self._stands and command != "cont")
        return await self._say(command, *words, **named)

    async def reads(self, per_second: int) -> None:
        """Let QEMU read so often a second from the image's file, tables and data."""
        limits = {"iops-read": per_second}
        await self.execute("object-add", qom_type="throttle-group", id="slow", limits=limits)
        await self.execute("blockdev-add", driver="throttle", node_name="slow", throttle_group="slow", file="vda-file")
        image = {"driver": "qcow2", "node-name": "vda", "file": "slow", "discard": "unmap"}
        if (self.folder / "below.qcow2").exists():
            nodes = await self.execute("query-named-block-nodes", flat=True)
            image["backing"] = next(n["node-name"] for n in nodes if n["drv"] == "qcow2" and n["node-name"] != "vda")
        await self.execute("blockdev-reopen", options=[image])

    async def write(self, how: str = "aio_write") -> None:
        """As the guest would, to where nothing is yet, and by default without waiting for it."""
        around, piece = divmod(self._written, SIZE_MIB)
        where = piece * MIB + (1 + around) * 64 * 1024
        self._written += 1
        command = f'qemu-io -d /machine/peripheral/vda-device/virtio-backend "{how} -q -P 9 {where} 4k"'
        await self.execute("human-monitor-command", command_line=command)

    async def write_on(self) -> None:
        """Until :meth:`end_writing`."""
        while not self._has_written.is_set():
            if not self._stands:
                await self.write()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._has_written.wait(), 0.01)

    async def end_writing(self) -> None:
        """May be repeated."""
        self._has_written.set()
        await self.writing


def make(path: Path, *, below: Path | None = None) -> None:
    """A disk with a little data in each MiB."""
    if below is not None:
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", below, f"{SIZE_MIB}M"], check=True)
    create(path, below)
    writes = [word for piece in range(SIZE_MIB) for word in ("-c", f"write -q -P 7 {piece}M 4k")]
    subprocess.run(["qemu-io", "-f", "qcow2", *writes, path], check=True)


def create(path: Path, below: Path | None) -> None:
    above = ["-b", str(below), "-F", "qcow2"] if below is not None else []
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", OPTIONS, *above, str(path), f"{SIZE_MIB}M"]
    subprocess.run(command, check=True)


def assert_alike(*images: Path) -> None:
    subprocess.run(["qemu-img", "compare", "-q", *map(str, images)], check=True)


def play(scenario: Callable[[Path], Any]) -> None:
    async def in_time(folder: str) -> None:
        async with asyncio.timeout(60):
            await scenario(Path(folder))

    with tempfile.TemporaryDirectory(prefix="limosa-") as folder:
        asyncio.run(in_time(folder))


async def watches(qemu: Qemu) -> list[str]:
    """The bitmaps with a name that are left."""
    nodes = await qemu.execute("query-named-block-nodes", flat=True)
    return [bitmap["name"] for node in nodes for bitmap in node.get("dirty-bitmaps", []) if bitmap.get("name")]


@asynccontextmanager
async def written(folder: Path, *, whole: bool = True) -> AsyncIterator[tuple[Qemu, ImageFile]]:
    """Such a VM, whose guest writes, and an image for a copy of its disk."""
    below = None if whole else folder / "below.qcow2"
    make(folder / "old.qcow2", below=below)
    create(folder / "new.qcow2", below)
    qemu = await Qemu.launch(folder, folder / "old.qcow2")
    try:
        await qemu.reads(SLOW)
        await qemu.machine.resume()
        qemu.writing = asyncio.ensure_future(qemu.write_on())
        try:
            yield qemu, ImageFile(str(folder / "new.qcow2"), "qcow2", direct=False)
        finally:
            await qemu.end_writing()
    finally:
        await qemu.machine.quit()


async def end(qemu: Qemu) -> None:
    """The copy takes the disk's place when it is ready."""
    while (await qemu.machine.copies())["vda"].state is not CopyState.READY:  # noqa: ASYNC110 - QEMU copies
        await asyncio.sleep(0.05)
    await qemu.end_writing()
    await qemu.machine.settle_copy("vda")
    await qemu.machine.pivot("vda")


async def is_as_before(qemu: Qemu) -> bool:
    nodes = await qemu.execute("query-named-block-nodes", flat=True)
    left = [node["node-name"] for node in nodes if node["node-name"].startswith(f"vda.{TAG}")]
    runs = await qemu.machine.status() is RunState.RUNNING
    return runs and not left and await watches(qemu) == [] and await qemu.machine.copies() == {}


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "above the same"])
def test_what_the_guest_writes_while_a_copy_begins_is_in_it(*, whole: bool) -> None:
    async def scenario(folder: Path) -> None:
        async with written(folder, whole=whole) as (qemu, image):
            await qemu.machine.copy_to_file("vda", TAG, image, 0, whole=whole)
            # QEMU's first look takes half a second, in which it surely wrote.
            assert qemu.said.count("stop") == qemu.said.count("cont") - 1 >= 1
            assert await watches(qemu) == []
            assert await qemu.machine.status() is RunState.RUNNING
            await end(qemu)
        assert_alike(folder / "old.qcow2", folder / "new.qcow2")

    play(scenario)


def test_what_was_in_a_volume_is_not_in_a_copy_that_begins_anew() -> None:
    """QEMU does not make a target zero that ignores discards."""

    async def scenario(folder: Path) -> None:
        make(folder / "old.qcow2")
        (folder / "new.raw").write_bytes(b"\xaa" * SIZE_MIB * MIB)
        qemu = await Qemu.launch(folder, folder / "old.qcow2")
        try:
            await qemu.machine.resume()
            qemu.writes_before = "blockdev-mirror"
            image = ImageFile(str(folder / "new.raw"), "raw", direct=False, thick=True)
            await qemu.machine.copy_to_file("vda", TAG, image, 0, whole=True)
            assert qemu.said.count("blockdev-mirror") == 2
            await end(qemu)
        finally:
            await qemu.machine.quit()
        assert_alike(folder / "old.qcow2", folder / "new.raw")

    play(scenario)


def test_one_whose_guest_writes_all_the_time_is_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beginning, "STOPPED_TRIES", 0)

    async def scenario(folder: Path) -> None:
        async with written(folder) as (qemu, image):
            with pytest.raises(StorageError, match="vda"):
                await qemu.machine.copy_to_file("vda", TAG, image, 0, whole=True)
            assert await is_as_before(qemu)

    play(scenario)


@pytest.mark.parametrize("moment", ["blockdev-mirror", "stop"])
def test_one_that_is_cut_off_while_it_begins_is_given_up(moment: str) -> None:
    async def scenario(folder: Path) -> None:
        async with written(folder) as (qemu, image):
            beginning = asyncio.ensure_future(qemu.machine.copy_to_file("vda", TAG, image, 0, whole=True))
            while moment not in qemu.said:  # noqa: ASYNC110 - nobody says so
                await asyncio.sleep(0)
            beginning.cancel()
            with pytest.raises(asyncio.CancelledError):
                await beginning
            await qemu.machine.drop_copy("vda", TAG)
            assert await is_as_before(qemu)

    play(scenario)
