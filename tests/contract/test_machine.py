"""What everything that moves VMs relies on, asked of the fake machine and of a real QEMU alike."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import socket
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from ipaddress import AddressValueError
from pathlib import Path

import pytest

from harness.machines import launch
from limosa.errors import LimosaError, QemuError, QemuGone, StorageError
from limosa.migration.stop import stop_stream
from limosa.model.vm import Disk, VmConfig
from limosa.qemu.machine import Machine
from limosa.qemu.protocol import (
    CopyState,
    Event,
    MachineProtocol,
    MigrationState,
    RdmaAddress,
    RunState,
    StreamParameters,
)
from limosa.qemu.session import GREETED_WITHIN_S
from limosa.security.stream import make_credentials
from limosa.testing.guest import FakeGuest
from limosa.testing.machine import FakeMachine
from limosa.testing.wire import Stage, Wire

MEMORY_MIB = 32
#: so slow that a move of the idle guest takes many seconds: whatever a test does meets it in its middle
SLOW = 20_000
#: Says at which address of this machine there is an RDMA device; a test in a lab VM sets it.
RDMA_VARIABLE = "LIMOSA_TEST_RDMA"
PATTERN = bytes(range(1, 256)) + b"\0"
DISK_BYTES = 1024 * 1024
TAG = "abc"
ENDINGS = {"completed", "failed", "cancelled"}


class Makers:
    """Makes machines of one kind, and ends them."""

    def __init__(self) -> None:
        self.made: list[MachineProtocol] = []
        self._ends: list[socket.socket] = []

    def stream(self) -> tuple[socket.socket, socket.socket]:
        """Both ends of a TCP stream; the source's and the destination's."""
        with socket.create_server(("127.0.0.1", 0)) as door:
            ours = socket.create_connection(door.getsockname())
            theirs, _ = door.accept()
        self._ends += ours, theirs
        return ours, theirs

    async def end(self) -> None:
        """Nothing is left."""
        for machine in self.made:
            await machine.quit()
        for end in self._ends:
            end.close()

    async def source(self) -> MachineProtocol:
        return await self.make(incoming=False)

    async def destination(self) -> MachineProtocol:
        return await self.make(incoming=True)

    async def make(self, *, incoming: bool) -> MachineProtocol:
        """A machine with a disk ``vda`` of its own."""
        raise NotImplementedError

    def rdma(self) -> RdmaAddress:
        """Where machines meet by RDMA. Skips the test if nowhere."""
        raise NotImplementedError

    def listener(self) -> socket.socket:
        """Where a destination's disks are awaited."""
        door = socket.create_server(("127.0.0.1", 0))
        self._ends.append(door)
        return door

    def connected(self, door: socket.socket) -> socket.socket:
        """A connection to a listener."""
        stream = socket.create_connection(door.getsockname())
        self._ends.append(stream)
        return stream

    def stay_in_post_copy(self) -> int:
        """The cap with which a move does so, until :meth:`cut`."""
        return SLOW

    def cut(self, stream: socket.socket) -> None:
        """Break a stream in post-copy."""
        stream.shutdown(socket.SHUT_RDWR)

    def assert_alike(self, source: MachineProtocol, destination: MachineProtocol) -> None:
        """The disks of both hold the same."""

    def freeze(self, destination: MachineProtocol) -> None:
        """Have it take nothing more, so that no switchover to it is ever completed."""
        raise NotImplementedError

    async def kill(self, frozen: MachineProtocol) -> None:
        await frozen.kill()


class Fakes(Makers):
    def __init__(self) -> None:
        super().__init__()
        self.wire = Wire()

    async def make(self, *, incoming: bool) -> MachineProtocol:
        machine = FakeMachine(self.wire, FakeGuest(MEMORY_MIB * 1024 * 1024), incoming=incoming)
        self.made.append(machine)
        return machine

    def rdma(self) -> RdmaAddress:
        self.wire.has_rdma = True
        return RdmaAddress("10.0.0.1", 40_000)

    def stay_in_post_copy(self) -> int:
        self.wire.hold(Stage.LOADED)
        return 0

    def cut(self, stream: socket.socket) -> None:
        self.wire.failures[Stage.LOADED] = "the cable was cut"
        self.wire.release(Stage.LOADED)

    def freeze(self, destination: MachineProtocol) -> None:
        self.wire.hold(Stage.SWITCHOVER)

    async def kill(self, frozen: MachineProtocol) -> None:
        await super().kill(frozen)
        self.wire.release(Stage.SWITCHOVER)


class Qemus(Makers):
    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self._frozen: list[Machine] = []

    async def make(self, *, incoming: bool) -> MachineProtocol:
        name = f"vm{len(self.made)}"
        image = self.folder / f"{name}.raw"
        image.write_bytes(bytes(DISK_BYTES) if incoming else PATTERN * (DISK_BYTES // len(PATTERN)))

        machine = await launch(self.folder / name, tiny_vm(image), incoming=incoming)
        self.made.append(machine)
        return machine

    def rdma(self) -> RdmaAddress:
        if RDMA_VARIABLE not in os.environ:
            pytest.skip("this machine has no RDMA device")
        return RdmaAddress(os.environ[RDMA_VARIABLE], 40_000)

    def freeze(self, destination: MachineProtocol) -> None:
        assert isinstance(destination, Machine)
        os.kill(destination.pid, signal.SIGSTOP)
        self._frozen.append(destination)

    async def end(self) -> None:
        for machine in self._frozen:
            await machine.kill()
        await super().end()

    def assert_alike(self, source: MachineProtocol, destination: MachineProtocol) -> None:
        one, other = (self.folder / f"vm{self.made.index(machine)}.raw" for machine in (source, destination))
        assert one.read_bytes() == other.read_bytes() == PATTERN * (DISK_BYTES // len(PATTERN))


def tiny_vm(image: Path) -> VmConfig:
    return VmConfig(
        name="tiny",
        uuid="5c7a2b9e-0f0e-4c06-8a0b-6d4b7b6f2a11",
        memory_mib=MEMORY_MIB,
        cpus=1,
        machine="q35",
        cpu="x86-64-v2",
        disks=(Disk(name="vda", path=str(image), format="raw"),),
    )


Scenario = Callable[[Makers], Awaitable[None]]
Run = Callable[[Scenario], None]


@pytest.fixture(params=["fake", pytest.param("qemu", marks=pytest.mark.qemu)])
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    """Runs a scenario with makers of one kind, for a minute at most; all machines are gone afterwards."""
    # Not tmp_path: the path of a Unix socket must be short.
    with tempfile.TemporaryDirectory(prefix="limosa-") as folder:

        async def play(scenario: Scenario) -> None:
            makers = Fakes() if request.param == "fake" else Qemus(Path(folder))
            try:
                async with asyncio.timeout(60):
                    await scenario(makers)
            finally:
                await makers.end()

        yield lambda scenario: asyncio.run(play(scenario))


class Recorder:
    """The events of one machine."""

    def __init__(self, machine: MachineProtocol) -> None:
        self.events: list[Event] = []
        self._news = asyncio.Event()
        machine.on_event(self._note)

    def _note(self, event: Event) -> None:
        self.events.append(event)
        self._news.set()

    def names(self) -> list[str]:
        """``STOP``, ``migration active`` and so on, without what comes an unknown number of times."""
        named = [
            f"migration {event.data['status']}" if event.name == "MIGRATION" else event.name for event in self.events
        ]
        return [name for name in named if name in ("STOP", "RESUME") or name.startswith("migration ")]

    def at(self, name: str) -> float:
        return next(event.at for event in reversed(self.events) if event.name == name)

    async def until(self, *names: str) -> str:
        """Wait for the first of these names; returns it."""
        while True:
            found = next((name for name in self.names() if name in names), None)
            if found is not None:
                return found
            self._news.clear()
            await self._news.wait()

    async def ending(self) -> str:
        return (await self.until(*(f"migration {state}" for state in ENDINGS))).removeprefix("migration ")


async def connected(
    makers: Makers, source: MachineProtocol, parameters: StreamParameters, theirs: StreamParameters | None = None
) -> tuple[MachineProtocol, socket.socket]:
    """A new destination that waits at one end of a stream, and the other end; the source is prepared."""
    destination = await makers.destination()
    await destination.prepare_incoming(theirs or parameters)
    await source.prepare_outgoing(parameters)
    ours, theirs_end = makers.stream()
    await destination.receive(theirs_end)
    theirs_end.close()
    return destination, ours


async def send(source: MachineProtocol, stream: socket.socket) -> None:
    """Begin to migrate; QEMU alone holds the stream then, so that its end is the stream's."""
    await source.migrate(stream)
    stream.close()


async def running_source(makers: Makers) -> MachineProtocol:
    source = await makers.source()
    await source.resume()
    return source


async def in_its_middle(makers: Makers) -> tuple[MachineProtocol, MachineProtocol, Recorder]:
    """Source and destination of a move that will take long yet, and the source's events."""
    source = await running_source(makers)
    destination, stream = await connected(makers, source, StreamParameters(bandwidth_bytes_per_s=SLOW))
    here = Recorder(source)
    await send(source, stream)
    await here.until("migration active")
    return source, destination, here


def test_a_new_machine_waits_and_obeys(run: Run) -> None:
    async def scenario(makers: Makers) -> None:
        machine = await makers.source()
        recorder = Recorder(machine)
        assert await machine.status() is RunState.PRELAUNCH
        assert (await machine.migration()).state is MigrationState.NONE
        resumed_at = await machine.resume()
        assert await machine.status() is RunState.RUNNING
        assert resumed_at == recorder.at("RESUME")
        await machine.resume_if_stopped()
        await machine.pause()
        await machine.pause()
        assert await machine.status() is RunState.PAUSED
        await machine.resume_if_stopped()
        assert recorder.names() == ["RESUME", "STOP", "RESUME"]
        await machine.announce()
        await machine.cancel_migration()

    run(scenario)


def test_events_end_with_the_subscription(run: Run) -> None:
    async def scenario(makers: Makers) -> None:
        machine = await makers.source()
        seen: list[Event] = []
        unsubscribe = machine.on_event(seen.append)
        await machine.resume()
        unsubscribe()
        unsubscribe()
        await machine.pause()
        assert [event.name for event in seen] == ["RESUME"]

    run(scenario)


@pytest.mark.parametrize("encrypted", [False, True])
def test_a_move(run: Run, encrypted: bool) -> None:
    async def scenario(makers: Makers) -> None:
        server, client = make_credentials() if encrypted else (None, None)
        source = await running_source(makers)
        theirs = StreamParameters(credentials=server)
        destination, stream = await connected(makers, source, StreamParameters(credentials=client), theirs)
        there, here = Recorder(destination), Recorder(source)
        await send(source, stream)
        assert await here.ending() == "completed"
        # QEMU says so a moment before it enters the state.
        assert await source.status() in (RunState.FINISH_MIGRATE, RunState.POSTMIGRATE)
        assert await destination.status() is RunState.PAUSED
        assert (await destination.migration()).state is MigrationState.COMPLETED
        resumed_at = await destination.resume()
        assert await destination.status() is RunState.RUNNING

        assert here.names() == [
            "migration setup",
            "migration active",
            "STOP",
            "migration device",
            "migration completed",
        ]
        assert there.names() == ["migration active", "migration completed", "RESUME"]
        assert here.at("STOP") <= there.at("MIGRATION") <= resumed_at == there.at("RESUME")
        while await source.status() is RunState.FINISH_MIGRATE:
            pass
        assert await source.status() is RunState.POSTMIGRATE
        look = await source.migration()
        assert look.state is MigrationState.COMPLETED
        assert look.total_s > 0
        assert look.iteration >= 2
        assert look.transferred_bytes > 0
        assert look.total_bytes >= MEMORY_MIB * 1024 * 1024
        assert look.remaining_bytes == 0
        for machine in (source, destination):
            await machine.forget_stream()
            await machine.forget_stream()
        await destination.announce()

    run(scenario)


def test_a_paused_guest_arrives_paused(run: Run) -> None:
    async def scenario(makers: Makers) -> None:
        source = await running_source(makers)
        await source.pause()
        destination, stream = await connected(makers, source, StreamParameters())
        here = Recorder(source)
        await send(source, stream)
        assert await here.ending() == "completed"
        assert "STOP" not in here.names()
        assert await destination.status() is RunState.PAUSED

    run(scenario)


def test_a_destination_never_runs_by_itself(run: Run) -> None:
    """Not even if it was told to run too early, which QEMU would remember."""

    async def scenario(makers: Makers) -> None:
        source = await running_source(makers)
        destination, stream = await connected(makers, source, StreamParameters())
        assert await destination.status() is RunState.INMIGRATE
        with pytest.raises(QemuError, match="arrived"):
            await destination.resume()
        there, here = Recorder(destination), Recorder(source)
        await send(source, stream)
        assert await here.ending() == "completed"
        assert await destination.status() is RunState.PAUSED
        assert "RESUME" not in there.names()

    run(scenario)


def test_cancel_leaves_the_source_as_it_was_and_ends_the_destination(run: Run) -> None:
    async def scenario(makers: Makers) -> None:
        source, destination, here = await in_its_middle(makers)
        with pytest.raises(QemuError):
            await source.migrate(makers.stream()[0])
        await source.cancel_migration()
        assert await here.ending() == "cancelled"
        assert (await source.migration()).state is MigrationState.CANCELLED
        assert await source.status() is RunState.RUNNING
        assert "STOP" not in here.names()
        await destination.gone.wait()
        assert destination.exit_text()
        await moves_after_all(makers, source)

    run(scenario)


def test_cancel_before_the_switchover_lets_a_stopped_guest_run(run: Run) -> None:
    async def scenario(makers: Makers) -> None:
        source = await running_source(makers)
        destination, stream = await connected(makers, source, StreamParameters(pause=True))
        here = Recorder(source)
        await send(source, stream)
        await here.until("migration pre-switchover")
        await source.cancel_migration()
        assert await here.ending() == "cancelled"
        assert await source.status() is RunState.RUNNING
        assert here.names()[-2:] == ["RESUME", "migration cancelled"]
        await destination.gone.wait()
        await moves_after_all(makers, source)

    run(scenario)


def test_a_lost_destination_leaves_the_source_as_it_was(run: Run) -> None:
    async def scenario(makers: Makers) -> None:
        source, destination, here = await in_its_middle(makers)
        await destination.kill()
        await source.set_bandwidth(0)
        assert await here.ending() == "failed"
        assert (await source.migration()).error
        await source.resume_if_stopped()
        assert await source.status() is RunState.RUNNING
        await moves_after_all(makers, source)

    run(scenario)


def test_a_destination_lost_during_the_switchover_lets_the_source_run(run: Run) -> None:
    async def scenario(makers: Makers) -> None:
        source, destination, here = await in_its_middle(makers)
        makers.freeze(destination)
        await source.set_downtime_limit(2_000_000)
        await source.set_bandwidth(0)
        await here.until("STOP")
        await makers.kill(destination)
        assert await here.ending() == "failed"
        await source.resume_if_stopped()
        assert await source.status() is RunState.RUNNING
        assert here.names()[-2:] == ["migration failed", "RESUME"]

    run(scenario)


def test_a_lost_source_ends_a_destination_without_the_whole_state(run: Run) -> None:
    async def scenario(makers: Makers) -> None:
        source, destination, _ = await in_its_middle(makers)
        await source.kill()
        await destination.gone.wait()

    run(scenario)


async def moves_after_all(makers: Makers, source: MachineProtocol) -> None:
    """The source is none the worse: the next move of it succeeds."""
    destination, stream = await connected(makers, source, StreamParameters())
    there = Recorder(destination)
    await send(source, stream)
    await there.until("migration completed")
    await destination.resume()
    assert await destination.status() is RunState.RUNNING


def test_terms_can_be_changed_while_memory_is_sent(run: Run) -> None:
    async def scenario(makers: Makers) -> None:
        source = await running_source(makers)
        _, stream = await connected(makers, source, StreamParameters(bandwidth_bytes_per_s=SLOW, downtime_limit_ms=1))
        here = Recorder(source)
        await send(source, stream)
        await here.until("migration active")
        await source.set_downtime_limit(0)
        await source.set_downtime_limit(0.2)
        await source.set_downtime_limit(59.5)
        await source.set_throttle(80, 10)
        assert (await source.migration()).state is MigrationState.ACTIVE
        await source.set_bandwidth(0)
        assert await here.ending() == "completed"

    run(scenario)


def test_a_stream_that_ends_at_once(run: Run) -> None:
    async def scenario(makers: Makers) -> None:
        source = await running_source(makers)
        await source.prepare_outgoing(StreamParameters())
        here = Recorder(source)
        stream, theirs = makers.stream()
        theirs.close()
        await send(source, stream)
        assert await here.ending() == "failed"
        await source.resume_if_stopped()
        assert await source.status() is RunState.RUNNING
        await moves_after_all(makers, source)

    run(scenario)


def test_a_destination_takes_one_stream(run: Run) -> None:
    async def scenario(makers: Makers) -> None:
        destination = await makers.destination()
        await destination.prepare_incoming(StreamParameters())
        await destination.receive(makers.stream()[0])
        with pytest.raises(QemuError):
            await destination.receive(makers.stream()[0])

    run(scenario)


def test_a_destination_that_is_sent_something_else_ends(run: Run) -> None:
    async def scenario(makers: Makers) -> None:
        destination = await makers.destination()
        await destination.prepare_incoming(StreamParameters())
        stranger, theirs = makers.stream()
        await destination.receive(theirs)
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        await destination.gone.wait()

    run(scenario)


@pytest.mark.parametrize("stranger", ["without credentials", "with others"])
def test_a_destination_refuses_strangers(run: Run, stranger: str) -> None:
    async def scenario(makers: Makers) -> None:
        server, _ = make_credentials()
        _, other = make_credentials()
        source = await running_source(makers)
        ours = StreamParameters(credentials=other if stranger == "with others" else None)
        destination, stream = await connected(makers, source, ours, StreamParameters(credentials=server))
        there, here = Recorder(destination), Recorder(source)
        await send(source, stream)
        assert await here.ending() == "failed"
        await source.resume_if_stopped()
        assert await source.status() is RunState.RUNNING
        assert "migration completed" not in there.names()

    run(scenario)


@pytest.mark.parametrize("pin_all", [False, True])
def test_a_move_by_rdma(run: Run, pin_all: bool) -> None:
    async def scenario(makers: Makers) -> None:
        terms, address = StreamParameters(rdma=True, rdma_pin_all=pin_all), makers.rdma()
        source, destination = await running_source(makers), await makers.destination()
        await destination.prepare_incoming(terms)
        await destination.receive(address)
        await source.prepare_outgoing(terms)
        here, there = Recorder(source), Recorder(destination)
        await source.migrate(address)
        assert await here.ending() == "completed"
        await there.until("migration completed")  # there is no return path that the source could wait for
        assert await destination.status() is RunState.PAUSED
        await destination.resume()
        assert await destination.status() is RunState.RUNNING

    run(scenario)


def test_rdma_where_nobody_has_it_is_refused_and_harms_nobody(run: Run) -> None:
    async def scenario(makers: Makers) -> None:
        nowhere = RdmaAddress("192.0.2.1", 40_000)
        source, destination = await running_source(makers), await makers.destination()
        await destination.prepare_incoming(StreamParameters(rdma=True))
        for _ in range(2):
            with pytest.raises(QemuError):  # and it takes nothing else any more
                await destination.receive(nowhere)
        assert await destination.status() is RunState.INMIGRATE
        await source.prepare_outgoing(StreamParameters(rdma=True))
        with pytest.raises(QemuError):
            await source.migrate(nowhere)
        assert await source.status() is RunState.RUNNING
        await moves_after_all(makers, source)

    run(scenario)


def test_an_rdma_address_is_nothing_but_that() -> None:
    for words in ("host1", "10.0.0.1:1,ipv6=on", "fd00::1", ""):
        with pytest.raises(AddressValueError):
            RdmaAddress(words, 1)


def test_post_copy(run: Run) -> None:
    async def scenario(makers: Makers) -> None:
        source = await running_source(makers)
        terms = StreamParameters(bandwidth_bytes_per_s=SLOW, post_copy=True)
        destination, stream = await connected(makers, source, terms)
        there, here = Recorder(destination), Recorder(source)
        await send(source, stream)
        await here.until("migration active")
        await source.start_post_copy()
        await there.until("migration postcopy-active")
        # Not sooner: at full speed so small a guest is across, and the move over, before post-copy begins.
        await source.set_bandwidth(0)
        assert await here.ending() == "completed"
        await there.until("migration completed")
        names = here.names()
        assert names.index("STOP") < names.index("migration postcopy-active") < names.index("migration completed")
        await destination.resume()
        assert await destination.status() is RunState.RUNNING

    run(scenario)


@pytest.mark.parametrize("encrypted", [False, True])
@pytest.mark.parametrize("noticed", [False, True])
def test_a_post_copy_whose_stream_breaks_goes_on_over_another(run: Run, encrypted: bool, noticed: bool) -> None:
    async def scenario(makers: Makers) -> None:
        server, client = make_credentials() if encrypted else (None, None)
        source = await running_source(makers)
        terms = StreamParameters(bandwidth_bytes_per_s=makers.stay_in_post_copy(), post_copy=True, credentials=client)
        destination, stream = await connected(makers, source, terms, dataclasses.replace(terms, credentials=server))
        there, here = Recorder(destination), Recorder(source)
        cut = stream.dup()
        await send(source, stream)
        await here.until("migration active")
        await source.start_post_copy()
        await there.until("migration postcopy-active")
        while await destination.status() is RunState.INMIGRATE:  # noqa: ASYNC110 - QEMU says nothing when it has
            await asyncio.sleep(0.01)
        await destination.resume()
        makers.cut(cut)
        cut.close()
        await here.until("migration postcopy-paused")
        if noticed:
            await there.until("migration postcopy-paused")
        await source.set_bandwidth(0)
        ours, theirs = makers.stream()
        taken = asyncio.ensure_future(destination.receive_rest(theirs))
        await source.send_rest(ours)
        await taken
        assert await here.ending() == "completed"
        await there.until("migration completed")
        assert await destination.status() is RunState.RUNNING

    run(scenario)


def test_a_stream_for_the_rest_is_taken_only_where_one_broke(run: Run) -> None:
    async def scenario(makers: Makers) -> None:
        source = await running_source(makers)
        ours, theirs = makers.stream()
        with pytest.raises(QemuError):
            await source.send_rest(ours)
        with pytest.raises(QemuError):
            await source.receive_rest(theirs)

    run(scenario)


def test_the_end(run: Run) -> None:
    async def scenario(makers: Makers) -> None:
        machine = await makers.source()
        assert not machine.gone.is_set()
        assert machine.exit_text() == ""
        await machine.quit()
        assert machine.gone.is_set()
        for question in (machine.status(), machine.resume(), machine.migration()):
            with pytest.raises(QemuGone):
                await question
        await machine.quit()
        await machine.kill()

    run(scenario)


async def copying(makers: Makers, source: MachineProtocol, bytes_per_s: int = 0) -> MachineProtocol:
    """A destination into whose disk ``vda`` the source's is being copied."""
    destination = await makers.destination()
    server, client = make_credentials()
    door = makers.listener()
    await destination.export_disks(["vda"], door, server)
    await source.trust_disks(client)
    stream = makers.connected(door)
    await source.copy_to_host("vda", TAG, stream, bytes_per_s, whole=True, encrypt=True)
    return destination


def nobody(makers: Makers) -> socket.socket:
    """A connection whose other end has hung up."""
    ours, theirs = makers.stream()
    theirs.close()
    return ours


async def until_ready(source: MachineProtocol) -> None:
    while (copy := (await source.copies())["vda"]).state is not CopyState.READY:
        assert copy.error == ""
        await asyncio.sleep(0.01)
    assert copy.copied_bytes == copy.total_bytes >= DISK_BYTES


def test_a_disk_goes_along(run: Run) -> None:
    async def scenario(makers: Makers) -> None:
        source = await running_source(makers)
        destination = await copying(makers, source)
        await until_ready(source)
        with pytest.raises(QemuError):
            await source.copy_to_host("vda", "other", nobody(makers), 0, whole=True, encrypt=False)
        parameters = StreamParameters(pause=True)
        await destination.prepare_incoming(parameters)
        await source.prepare_outgoing(parameters)
        ours, theirs = makers.stream()
        await destination.receive(theirs)
        here = Recorder(source)
        await send(source, ours)
        await here.until("migration pre-switchover")
        await source.hurry_copy("vda")
        await source.end_copy("vda")
        await source.hurry_copy("vda")
        assert await source.copies() == {}
        await source.continue_migration()
        assert await here.ending() == "completed"
        await destination.end_exports()
        await destination.resume()
        assert await destination.status() is RunState.RUNNING
        await source.drop_copy("vda", TAG)
        makers.assert_alike(source, destination)

    run(scenario)


def test_a_copy_is_given_up_and_made_again(run: Run) -> None:
    async def scenario(makers: Makers) -> None:
        source = await running_source(makers)
        await source.drop_copy("vda", TAG)
        await source.cap_copy("vda", SLOW)
        await source.hurry_copy("vda")
        for bytes_per_s in (SLOW, 0):
            destination = await copying(makers, source, bytes_per_s)
            assert set(await source.copies()) == {"vda"}
            await source.cap_copy("vda", SLOW)
            for _ in range(2):
                await source.drop_copy("vda", TAG)
            assert await source.copies() == {}
            for _ in range(2):
                await destination.end_exports()
        assert await source.status() is RunState.RUNNING

    run(scenario)


def test_a_guest_can_be_slowed_for_its_copy(run: Run) -> None:
    async def scenario(makers: Makers) -> None:
        source = await running_source(makers)
        destination = await copying(makers, source)
        await source.slow_writes("vda", 1_000_000)
        await until_ready(source)
        await source.end_copy("vda")
        await source.drop_copy("vda", TAG)
        await destination.kill()
        makers.assert_alike(source, destination)

    run(scenario)


def test_there_is_no_end_of_what_was_not_begun(run: Run) -> None:
    async def scenario(makers: Makers) -> None:
        source = await running_source(makers)
        with pytest.raises(QemuError):
            await source.end_copy("vda")
        with pytest.raises(QemuError):
            await source.copy_to_host("vda", TAG, nobody(makers), 0, whole=True, encrypt=True)
        await copying(makers, source)
        await until_ready(source)

    run(scenario)


@pytest.mark.qemu
class TestADestinationThatDoesNothing:
    """What only a real one can do: take no byte of a copy, and not go away."""

    def play(self, scenario: Scenario) -> None:
        async def within_time(folder: str) -> None:
            makers = Qemus(Path(folder))
            try:
                async with asyncio.timeout(20):
                    await scenario(makers)
            finally:
                await makers.end()

        with tempfile.TemporaryDirectory(prefix="limosa-") as folder:
            asyncio.run(within_time(folder))

    def test_its_copy_is_given_up_all_the_same(self) -> None:
        async def scenario(makers: Makers) -> None:
            source = await running_source(makers)
            makers.freeze(await copying(makers, source, SLOW))
            await source.drop_copy("vda", TAG)
            assert await source.copies() == {}

        self.play(scenario)

    def test_its_copy_is_given_up_also_by_a_qemu_whose_main_loop_waits_for_it(self) -> None:
        async def scenario(makers: Makers) -> None:
            source = await running_source(makers)
            makers.freeze(await copying(makers, source, SLOW))

            async def pause() -> None:
                await source.cap_copy("vda", 0)
                await source.pause()  # which waits for all I/O of the guest's disks

            pausing = asyncio.ensure_future(pause())
            await asyncio.wait({pausing}, timeout=0.5)
            assert not pausing.done()
            await source.drop_copy("vda", TAG)
            await pausing
            assert await source.copies() == {}

        self.play(scenario)

    def test_a_source_that_dies_waiting_for_it_is_seen_dead(self) -> None:
        async def scenario(makers: Makers) -> None:
            source = await running_source(makers)
            destination = await copying(makers, source)
            await until_ready(source)
            makers.freeze(destination)
            ending = asyncio.ensure_future(source.end_copy("vda"))
            await asyncio.wait({ending}, timeout=0.5)
            await source.kill()
            with pytest.raises(LimosaError):
                await ending

        self.play(scenario)

    def test_the_source_waits_a_little_to_be_greeted(self) -> None:
        async def scenario(makers: Makers) -> None:
            source = await running_source(makers)
            _, client = make_credentials()
            await source.trust_disks(client)
            stream = makers.connected(makers.listener())
            with pytest.raises(StorageError, match="vda") as caught:
                await source.copy_to_host("vda", TAG, stream, 0, whole=True, encrypt=True)
            assert "does not answer" in caught.value.why
            assert await source.copies() == {}
            assert await source.status() is RunState.RUNNING

        self.play(scenario)

    def test_memory_too_waits_a_little_to_be_greeted(self) -> None:
        async def scenario(makers: Makers) -> None:
            source = await running_source(makers)
            stream = await ungreeted(makers, source)
            with pytest.raises(QemuError, match="memory") as caught:
                await source.migrate(stream)
            assert "does not answer" in caught.value.why
            assert await source.status() is RunState.RUNNING
            assert (await source.migration()).state is MigrationState.FAILED

        self.play(scenario)

    def test_who_gives_up_waiting_for_the_greeting_has_qemu_give_up_too(self) -> None:
        """As when the session between the daemons is found to be broken."""

        async def scenario(makers: Makers) -> None:
            source = await running_source(makers)
            stream = await ungreeted(makers, source)
            waiting = asyncio.ensure_future(source.migrate(stream))
            await asyncio.wait({waiting}, timeout=0.5)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            async with asyncio.timeout(GREETED_WITHIN_S / 2):
                assert await source.status() is RunState.RUNNING
                await stop_stream(source)

        self.play(scenario)


async def ungreeted(makers: Makers, source: MachineProtocol) -> socket.socket:
    """A connection to a destination that says nothing, for a source that is ready to send encrypted memory."""
    _, client = make_credentials()
    await source.prepare_outgoing(StreamParameters(credentials=client))
    return makers.connected(makers.listener())
