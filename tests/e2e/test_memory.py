"""Memory is moved exactly: the product's own scripts move a Linux that writes all the time, and at every switchover,
between the source's ``completed`` and the destination's ``cont``, the whole RAM of both QEMUs is compared.

A brake on the stream makes sure that pages are sent, written again and sent again before the guest stops.
"""

from __future__ import annotations

import asyncio
import os
import socket
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from pyroute2 import IPRoute

from harness.homes import BareHome
from harness.landings import MemoryLanding
from harness.machines import launch
from harness.relays import SO_MAX_PACING_RATE
from limosa.host.multichannel import Multichannel
from limosa.host.page import Page
from limosa.host.relays import Relays
from limosa.lab import namespaces
from limosa.lab.image import command_line, guest_image
from limosa.migration.destination import Destination
from limosa.migration.home import Terms
from limosa.migration.journal import Header, Journal
from limosa.migration.peer import Dialler, Peer
from limosa.migration.report import Report
from limosa.migration.source import SourceMove
from limosa.model.facts import DestinationFacts, FileIdentity, VmFacts
from limosa.model.migration import Migration, Outcome, Phase, Progress, Side
from limosa.model.network import HostNetwork, HostNic, NicAddress
from limosa.model.route import Compressed, Route
from limosa.model.vm import DirectBoot, VmConfig
from limosa.network.mptcp import PathManager
from limosa.qemu.machine import Machine
from limosa.qemu.protocol import Event, MachineProtocol, MigrationState, RunState
from limosa.settings.host import ConvergencePolicy
from limosa.storage.identity import identify
from limosa.testing.peer import LocalPeer
from limosa.transport import tcp
from limosa.transport.channel import Channel, Doorway
from limosa.transport.relay.carriers import AddressPair
from limosa.transport.relay.frames import VERSION as RELAY_VERSION
from limosa.transport.relay.outbound import Outbound, Seat
from limosa.transport.shares import Kind
from limosa.wire.peer import Prepare, Prepared, RelayPlace, Running

VERSION = (10, 0, 0)
ADDRESS, PORTS = "127.0.0.1", (40000, 41000)
OURS, THEIRS = ("10.78.0.1", "10.79.0.1"), ("10.78.0.2", "10.79.0.2")
MIB = 1024 * 1024
PAGE_BYTES = 4096
MEMORY_MIB = 128
#: The guest writes 60 MiB/s, so that under the brake there is always more to send again.
LOADED_MIB = 16
REWRITE_MIB_PER_S = 60
BRAKE_BYTES_PER_S = 35 * MIB
ENOUGH_PASSES = 4
BOOT_WITHIN_S = 90.0
WRITES_WITHIN_S = 30.0
#: encrypted or not
ROUNDS = (True, False)


@pytest.mark.qemu
def test_memory_is_moved_exactly() -> None:
    with tempfile.TemporaryDirectory(prefix="limosa-") as folder:
        asyncio.run(rounds(Path(folder), Plain()))


@pytest.mark.qemu
@pytest.mark.lab
def test_memory_is_moved_exactly_over_several_paths() -> None:
    namespace = f"limosa-memory-{os.getpid()}"
    namespaces.create(namespace)
    try:
        with tempfile.TemporaryDirectory(prefix="limosa-") as folder:
            namespaces.inside(namespace, lambda: over_several_paths(Path(folder)))
    finally:
        namespaces.remove(namespace)


@pytest.mark.long
@pytest.mark.qemu
@pytest.mark.lab
def test_memory_is_moved_exactly_by_relays_over_several_paths_of_which_one_breaks() -> None:
    namespace = f"limosa-striped-{os.getpid()}"
    namespaces.create(namespace)
    try:
        with tempfile.TemporaryDirectory(prefix="limosa-") as folder:
            namespaces.inside(namespace, lambda: by_relays_over_several_paths(Path(folder)))
    finally:
        namespaces.remove(namespace)


def over_several_paths(folder: Path) -> None:
    two_nics_each()
    asyncio.run(rounds(folder, Several(folder)))


def by_relays_over_several_paths(folder: Path) -> None:
    two_nics_each()
    asyncio.run(rounds(folder, Striped(folder)))


def two_nics_each() -> None:
    """Both ends in one network namespace, whose loopback interface stands for two NICs of each."""
    with IPRoute() as netlink:
        netlink.link("set", index=1, state="up")
        for address in (*OURS, *THEIRS):
            netlink.addr("add", index=1, address=address, prefixlen=24)


@pytest.mark.qemu
def test_memory_is_moved_exactly_through_the_relays() -> None:
    with tempfile.TemporaryDirectory(prefix="limosa-") as folder:
        asyncio.run(through_the_relays(Path(folder)))


async def through_the_relays(folder: Path) -> None:
    relays = Relayed(folder)
    await rounds(folder, relays, ROUNDS[:1])
    assert sum(made.cpu_s for made in relays.made) > 0, "some of it was compressed"


class Plain:
    """How the memory travels: over one TCP connection."""

    transport = "tcp"
    ours: tuple[str, ...] = OURS
    theirs: tuple[str, ...] = (ADDRESS,)
    mptcp = True

    async def seats(self, route: Route, *, encrypt: bool) -> list[RelayPlace]:
        return []

    def on_pass(self, number: int) -> None:
        """The source's QEMU begins a pass."""

    async def connect(self, route: Route, prepared: Prepared) -> Channel:
        return await tcp.connect(prepared.address, prepared.port, prepared.token)

    async def open_door(self, request: Prepare, machine: MachineProtocol) -> Doorway:
        return tcp.TcpDoorway(ADDRESS, PORTS)


class Several(Plain):
    """Over two NICs of each host."""

    transport = "multichannel"
    theirs = THEIRS

    def __init__(self, folder: Path) -> None:
        self._multichannel = Multichannel(PathManager(), folder)

    async def connect(self, route: Route, prepared: Prepared) -> Channel:
        return await self._multichannel.connect(route, prepared)

    async def open_door(self, request: Prepare, machine: MachineProtocol) -> Doorway:
        return await self._multichannel.open_door(request.addresses, PORTS, self._permitted, request.networks)

    async def _permitted(self) -> tuple[str, ...]:
        return THEIRS


class Relayed(Plain):
    """Through relays whose connection is slow enough for there to be time to compress."""

    transport = "compression"

    def __init__(self, folder: Path) -> None:
        self._relays = Relays(Multichannel(PathManager(), folder), Page(folder / "settings.toml"), None)
        self._seat: Seat | None = None
        self.made: list[Compressed] = []

    async def seats(self, route: Route, *, encrypt: bool) -> list[RelayPlace]:
        self._seat = Outbound(self._dial, encrypt=encrypt, several=False, window_log=24, user=None).seat()
        await self._seat.open()
        return [self._seat.place]

    async def connect(self, route: Route, prepared: Prepared) -> Channel:
        assert self._seat is not None
        return await self._seat.connect(prepared)

    async def open_door(self, request: Prepare, machine: MachineProtocol) -> Doorway:
        assert request.relay is not None
        return await self._relays.open_door("here", request.relay, (ADDRESS,), self._permitted, ())

    async def _permitted(self) -> tuple[str, ...]:
        return (ADDRESS,)

    async def _dial(self, prepared: Prepared, way: AddressPair) -> list[tcp.TcpChannel]:
        carriers = [await tcp.connect(prepared.address, prepared.port, prepared.token) for _ in range(2)]
        carriers[0].stream.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, BRAKE_BYTES_PER_S)
        return carriers


class Striped(Plain):
    """By relays over two NICs of each host, without Multipath TCP; the first path breaks in mid-move."""

    transport = "multichannel"
    theirs = THEIRS
    mptcp = False

    def __init__(self, folder: Path) -> None:
        self._relays = Relays(Multichannel(PathManager(), folder), Page(folder / "settings.toml"), None)
        self._sessions = 0
        self._seat: Seat | None = None

    async def seats(self, route: Route, *, encrypt: bool) -> list[RelayPlace]:
        assert route.striped
        self._sessions += 1  # each round has one of its own, in which no path is broken yet
        self._seat = self._relays.seat(f"there {self._sessions}", route, self, encrypt=encrypt)
        await self._seat.open()
        return [self._seat.place]

    async def connect(self, route: Route, prepared: Prepared) -> Channel:
        assert self._seat is not None
        return await self._seat.connect(prepared)

    async def open_door(self, request: Prepare, machine: MachineProtocol) -> Doorway:
        assert request.relay is not None
        return await self._relays.open_door("here", request.relay, request.addresses, self._permitted, ())

    def on_pass(self, number: int) -> None:
        if number == ENOUGH_PASSES // 2:
            assert self._seat is not None
            self._seat._session.carriers.forward[0].stream.shutdown(socket.SHUT_RDWR)

    async def _permitted(self) -> tuple[str, ...]:
        return THEIRS


async def rounds(folder: Path, way: Plain, rounds: Sequence[bool] = ROUNDS) -> None:
    """Boot a guest, then move it from QEMU to QEMU, encrypted and not."""
    image = guest_image()
    # Half of it can be compressed: relays need not send all of it again and again.
    line = command_line(fill_mib=LOADED_MIB, random_mib=LOADED_MIB // 2, rewrite_mib_per_s=REWRITE_MIB_PER_S)
    config = VmConfig(
        name="writer",
        uuid="5c7a2b9e-0f0e-4c06-8a0b-6d4b7b6f2a11",
        memory_mib=MEMORY_MIB,
        cpus=1,
        machine="q35",
        cpu="x86-64-v2",
        boot=DirectBoot(kernel=str(image.kernel), initrd=str(image.initrd), command_line=line),
    )
    machine = await launch(folder / "0", config, incoming=False)
    try:
        await machine.resume()
        async with asyncio.timeout(BOOT_WITHIN_S):
            console = folder / "0" / "console"
            while "LIMOSA REWRITES" not in console.read_text(errors="replace"):  # noqa: ASYNC110 - a file tells nobody
                await asyncio.sleep(0.1)
        await until_it_writes(folder / "ram", machine)
        for number, encrypt in enumerate(rounds, start=1):
            machine = await move(folder / str(number), config, machine, way, encrypt=encrypt)
    finally:
        await machine.kill()


async def memory(machine: MachineProtocol, path: Path) -> bytes:
    """The guest's whole RAM, as QEMU sees it."""
    assert isinstance(machine, Machine)
    await machine._execute("pmemsave", {"val": 0, "size": MEMORY_MIB * MIB, "filename": str(path)})
    contents = path.read_bytes()
    path.unlink()
    return contents


def different_pages(one: bytes, other: bytes) -> list[int]:
    """Numbers of the pages that are not alike."""
    assert len(one) == len(other)
    pages = range(0, len(one), PAGE_BYTES)
    return [at // PAGE_BYTES for at in pages if one[at : at + PAGE_BYTES] != other[at : at + PAGE_BYTES]]


async def until_it_writes(scratch: Path, machine: Machine) -> None:
    """Wait until the guest rewrites its memory, which is to say that more than a MiB changes in a moment."""
    before, now = b"", await memory(machine, scratch)
    async with asyncio.timeout(WRITES_WITHIN_S):
        while not before or len(different_pages(before, now)) * PAGE_BYTES < MIB:
            before, now = now, await memory(machine, scratch)


class Here(BareHome):
    """The source's :class:`limosa.migration.home.Home`."""

    def __init__(self, config: VmConfig, machine: Machine, way: Plain) -> None:
        super().__init__(machine)
        self._config = config
        self._way = way

    async def facts(self) -> VmFacts:
        return VmFacts(
            running=True,
            accelerator="tcg",
            qemu=VERSION,
            files=files_of(self._config),
            live_migration=True,
            encrypt=True,
            post_copy=False,
            network=network(self._way.ours, mptcp=self._way.mptcp),
        )

    async def seats(self, destination: str, route: Route, count: int, *, encrypt: bool) -> list[RelayPlace]:
        return await self._way.seats(route, encrypt=encrypt)

    async def connect(self, route: Route, prepared: Prepared) -> Channel:
        return await self._way.connect(route, prepared)

    def bandwidth(self, kind: Kind) -> int:
        return BRAKE_BYTES_PER_S


class There(MemoryLanding):
    """The destination's :class:`limosa.migration.destination.Landing`."""

    def __init__(self, folder: Path, config: VmConfig, way: Plain) -> None:
        self.machine: Machine | None = None
        self.arrived = asyncio.Event()
        self._folder = folder
        self._config = config
        self._way = way

    def facts(self) -> DestinationFacts:
        return DestinationFacts(
            host="there",
            qemu=VERSION,
            live_migration=True,
            accelerators=("tcg",),
            machine_known=True,
            cpu_known=True,
            cpu_missing=(),
            switches_missing=(),
            memory_available_mib=MEMORY_MIB,
            name_taken=False,
            uuid_taken=False,
            files=files_of(self._config),
            firmware_available=True,
            post_copy_possible=False,
            addresses=self._way.theirs,
            trial_port=0,
            time=0.0,
            relay=RELAY_VERSION,
            network=network(THEIRS, mptcp=self._way.mptcp),
        )

    async def launch(self, request: Prepare) -> MachineProtocol:
        self.machine = await launch(self._folder, request.vm, incoming=True)
        self.machine.on_event(self._on_event)
        return self.machine

    def _on_event(self, event: Event) -> None:
        if event.name == "MIGRATION" and event.data["status"] == MigrationState.COMPLETED:
            self.arrived.set()

    async def open_door(self, request: Prepare, machine: MachineProtocol) -> Doorway:
        return await self._way.open_door(request, machine)

    async def release(self, machine: MachineProtocol | None) -> None:
        if machine is not None:
            await machine.kill()


def network(addresses: tuple[str, ...], *, mptcp: bool) -> HostNetwork:
    """A host that has a NIC for each address, and takes memory encrypted or not."""
    nics = (
        HostNic(
            name=f"mig{number}",
            index=number + 2,
            kind="veth",
            up=True,
            carrier=True,
            mtu=1500,
            addresses=(NicAddress(address=address, prefix=24),),
        )
        for number, address in enumerate(addresses)
    )
    return HostNetwork(nics=tuple(nics), mptcp=mptcp, encrypt=False)


def files_of(config: VmConfig) -> tuple[FileIdentity, ...]:
    found = [identify(path, {}, digest=True) for path in config.host_files()]
    return tuple(identity for identity in found if identity is not None)


class Witness(LocalPeer):
    """Looks at both guests' memory after the source has said that everything is sent and before any of them runs."""

    here = there = b""

    def __init__(self, destination: Destination, landing: There, source: Machine, scratch: Path) -> None:
        super().__init__(destination, landing.facts(), PORTS)
        self._landing = landing
        self._source = source
        self._scratch = scratch

    async def take_over(self) -> Running:
        destination = self._landing.machine
        assert destination is not None
        assert (await self._source.migration()).state is MigrationState.COMPLETED
        await self._landing.arrived.wait()
        assert RunState.RUNNING not in (await self._source.status(), await destination.status())
        self.here, self.there = [await memory(one, self._scratch) for one in (self._source, destination)]
        return await super().take_over()


async def move(folder: Path, config: VmConfig, source: Machine, way: Plain, *, encrypt: bool) -> Machine:
    """Move the VM with the product's scripts and judge what was moved; returns the QEMU it is in now."""
    folder.mkdir()
    scratch = folder / "ram"
    landing = There(folder / "qemu", config, way)
    headers = [header(config, side) for side in Side]
    destination = Destination(Journal.begin(folder, headers[1]), landing, boot="boot")
    witness = Witness(destination, landing, source, scratch)
    views: list[Migration] = []
    terms = Terms(ConvergencePolicy(), way.transport, encrypt)
    report = Report(first_view(), views.append)
    script = SourceMove(
        Journal.begin(folder, headers[0]), source, dialler(witness), Here(config, source, way), terms, report
    )
    passes = released_after(source, ENOUGH_PASSES, way)
    at_first = await memory(source, scratch)
    await script.run()

    assert different_pages(witness.here, witness.there) == []
    assert passes[-1] >= ENOUGH_PASSES, "pages were sent, written and sent again"
    assert different_pages(at_first, witness.here) != [], "the guest wrote meanwhile"
    assert views[-1].progress.transferred_bytes > ENOUGH_PASSES * LOADED_MIB * MIB
    assert views[-1].route is not None
    used = [path.sent_bytes for path in views[-1].route.paths]
    assert len(used) == len(way.theirs)
    assert min(used) > ENOUGH_PASSES * MIB
    if isinstance(way, Relayed):
        assert views[-1].route.compressed is not None
        way.made.append(views[-1].route.compressed)
    await destination.abandoned()  # the session is over, and with it the door
    flipped = bytearray(witness.there)
    flipped[-1] ^= 1
    assert different_pages(witness.here, bytes(flipped)) == [len(flipped) // PAGE_BYTES - 1], "one bit would be found"
    assert landing.machine is not None
    await until_it_writes(scratch, landing.machine)
    return landing.machine


def released_after(source: Machine, enough: int, way: Plain) -> list[int]:
    """Release the brake when the source begins its pass number ``enough``; the passes so far. ``way`` hears of each."""
    passes = [0]
    tasks = set()

    def on_event(event: Event) -> None:
        if event.name == "MIGRATION_PASS":
            passes.append(event.data["pass"])
            way.on_pass(passes[-1])
            if passes[-1] == enough:
                tasks.add(asyncio.ensure_future(source.set_bandwidth(0)))

    source.on_event(on_event)
    return passes


def dialler(peer: Peer) -> Dialler:
    async def dial() -> Peer:
        return peer

    return dial


def header(config: VmConfig, side: Side) -> Header:
    return Header(
        migration="abcdefghijkl",
        side=side,
        vm=config,
        accelerator="tcg",
        source="here",
        destination="there",
        address=ADDRESS,
        accepted_at=time.time(),
        boot="boot",
    )


def first_view() -> Migration:
    return Migration(
        id="abcdefghijkl",
        vm="writer",
        source="here",
        destination="there",
        side=Side.SOURCE,
        transport="tcp",
        phase=Phase.WAITING,
        outcome=Outcome.UNDER_WAY,
        progress=Progress(),
        accepted_at=time.time(),
    )
