"""Memory is moved exactly: the RAM of both QEMUs is compared at switchover, with a guest that never stops writing."""

from __future__ import annotations

import asyncio
import socket
import tempfile
from pathlib import Path

import pytest

from harness.machines import launch
from limosa.migration.steering import TRICKLE
from limosa.model.vm import Disk, VmConfig
from limosa.qemu.machine import Machine
from limosa.qemu.protocol import Event, StreamParameters
from limosa.security.stream import make_credentials

MEMORY_MIB = 32
#: A boot sector that adds one to the first word of each page from 64 KiB to 576 KiB, for ever.
WRITER = bytes.fromhex(
    "fa"  # cli
    "bb0010"  # bx = 0x1000, the first page's segment
    "8ec3 26ff060000"  # add one to the first word of that page
    "81c30001 81fb0090 72ef"  # the next page, up to segment 0x9000
    "ebea"  # and again
)
FIRST_PAGE, LAST_PAGE = 0x10000, 0x8F000
#: so slow that what the guest writes in a pass takes longer to send than the downtime limit allows
BRAKE_BYTES_PER_S = 3_000_000
ENOUGH_PASSES, MORE_PASSES = 5, 8


@pytest.mark.qemu
@pytest.mark.parametrize("encrypted", [False, True])
def test_memory_is_moved_exactly(encrypted: bool) -> None:
    with tempfile.TemporaryDirectory(prefix="limosa-") as folder:
        asyncio.run(move(Path(folder), encrypted=encrypted))


async def move(folder: Path, *, encrypted: bool) -> None:
    image = folder / "boot.raw"
    image.write_bytes(WRITER.ljust(510, b"\0") + b"\x55\xaa" + bytes(1024 * 1024 - 512))
    source, destination = [
        await launch(folder / name, writer(image), incoming=name == "there") for name in ("here", "there")
    ]
    try:
        async with asyncio.timeout(60):
            await exactly(folder, source, destination, encrypted=encrypted)
    finally:
        await source.kill()
        await destination.kill()


async def exactly(folder: Path, source: Machine, destination: Machine, *, encrypted: bool) -> None:
    server, client = make_credentials() if encrypted else (None, None)
    passes, more, completed = [asyncio.Event() for _ in range(3)]

    def follow(event: Event) -> None:
        if event.name == "MIGRATION_PASS" and event.data["pass"] >= ENOUGH_PASSES:
            passes.set()
        if event.name == "MIGRATION_PASS" and event.data["pass"] >= MORE_PASSES:
            more.set()
        if event.name == "MIGRATION" and event.data["status"] == "completed":
            more.set()
            completed.set()

    source.on_event(follow)
    await source.resume()
    await destination.prepare_incoming(StreamParameters(credentials=server))
    terms = StreamParameters(credentials=client, downtime_limit_ms=1, bandwidth_bytes_per_s=BRAKE_BYTES_PER_S)
    await source.prepare_outgoing(terms)
    await until_it_writes(folder / "memory", source)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        await destination.receive(theirs)
        await source.migrate(ours)
    # Now each page was sent, written again and sent again, several times. With a limit of 0 that goes on.
    await passes.wait()
    await source.set_downtime_limit(0)
    await source.set_bandwidth(TRICKLE)
    await more.wait()
    assert not completed.is_set()
    await source.set_downtime_limit(50)
    await source.set_bandwidth(0)
    await completed.wait()
    here, there = [await memory(folder / "memory", machine) for machine in (source, destination)]
    assert here == there
    before = counters(there)
    await destination.resume()
    assert await later(folder / "memory", destination, before), "the guest does not go on"


def writer(image: Path) -> VmConfig:
    return VmConfig(
        name="writer",
        uuid="5c7a2b9e-0f0e-4c06-8a0b-6d4b7b6f2a11",
        memory_mib=MEMORY_MIB,
        cpus=1,
        machine="q35",
        cpu="x86-64-v2",
        disks=(Disk(name="vda", path=str(image), format="raw"),),
    )


async def memory(path: Path, machine: Machine) -> bytes:
    """The guest's whole RAM, as QEMU sees it."""
    arguments = {"val": 0, "size": MEMORY_MIB * 1024 * 1024, "filename": str(path)}
    await machine._monitor.execute("pmemsave", arguments)
    return path.read_bytes()


def counters(contents: bytes) -> list[bytes]:
    return [contents[page : page + 2] for page in range(FIRST_PAGE, LAST_PAGE + 1, 4096)]


async def until_it_writes(path: Path, machine: Machine) -> None:
    """Wait until the firmware has started the guest."""
    assert await later(path, machine, [bytes(2)] * len(counters(bytes(LAST_PAGE + 4096))))


async def later(path: Path, machine: Machine, before: list[bytes]) -> bool:
    """Whether every page changes within ten seconds."""
    for _ in range(200):
        now = counters(await memory(path, machine))
        if all(new != old for new, old in zip(now, before, strict=True)):
            return True
        await asyncio.sleep(0.05)
    return False
