"""The source's script and the destination's with fake QEMUs and a disk that moves along: the order of things, and
every way out."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
from collections.abc import Callable, Collection, Coroutine, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from test_preflight import VM

from harness.channels import BareChannel
from harness.homes import BareHome
from harness.landings import MemoryLanding
from limosa.errors import Cancelled, DestinationLost, InvalidInput, LimosaError, NotConverging, StorageError
from limosa.migration import disks, mirrors, source, steering
from limosa.migration.destination import Destination
from limosa.migration.disks import landed
from limosa.migration.examination import Examined
from limosa.migration.figures import by_our_clock
from limosa.migration.home import Terms
from limosa.migration.journal import Header, Journal
from limosa.migration.report import Report
from limosa.migration.settle import Settlement
from limosa.migration.source import SourceMove
from limosa.model.facts import VmFacts
from limosa.model.finding import Finding
from limosa.model.migration import Migration, Outcome, Phase, Progress, Side
from limosa.model.network import HostNetwork
from limosa.model.route import Route
from limosa.model.storage import DiskAction, DiskPlan
from limosa.qemu.protocol import (
    CopyState,
    CopyStatistics,
    MachineProtocol,
    MigrationState,
    RunState,
)
from limosa.settings.host import ConvergencePolicy
from limosa.testing.guest import FakeGuest
from limosa.testing.machine import FakeMachine
from limosa.testing.wire import Stage, Wire
from limosa.transport.channel import Used
from limosa.transport.choice import Ends
from limosa.transport.shares import Kind
from limosa.wire.peer import DestinationState, LayersAwaited, Prepare, Prepared, Standing

TAG = "abcdefabcdef"
PLAN = DiskPlan(disk="vda", action=DiskAction.COPY, path="/there/web1.qcow2", format="qcow2", expected_bytes=1 << 20)
ENDS = Ends("host1", "host2", HostNetwork(), HostNetwork(), ())
EXAMINED = Examined((), Route(transport="tcp"), ENDS, (PLAN,))


class Machine(FakeMachine):
    """A fake QEMU that notes in ``said`` what matters about disks."""

    def __init__(self, wire: Wire, said: list[str], *, incoming: bool = False) -> None:
        super().__init__(wire, FakeGuest(1 << 20), incoming=incoming)
        self.said = said
        #: whether a copy stays under way until a test says otherwise
        self.slow = False
        self.copy_fails_at_its_end = False

    async def copy_to_host(self, disk: str, *words: Any, **named: Any) -> None:
        await super().copy_to_host(disk, *words, **named)
        self.said.append("copy")
        if self.slow:
            self.copy_is(disk, CopyState.COPYING, remaining=1)

    async def end_copy(self, disk: str) -> None:
        assert self._run_state is RunState.FINISH_MIGRATE, "the guest could still write"
        if self.copy_fails_at_its_end:
            raise StorageError(f"disk {disk} could not be copied", why="No space left on device")
        await super().end_copy(disk)
        self.said.append("end")

    async def continue_migration(self) -> None:
        self.said.append("continue")
        await super().continue_migration()

    async def drop_copy(self, disk: str, tag: str) -> None:
        await super().drop_copy(disk, tag)
        self.said.append("drop")

    async def end_exports(self) -> None:
        await super().end_exports()
        self.said.append("close")

    def came_by_a_move(self) -> None:
        """As QEMU does, it says so for as long as it lives."""
        self._migration_is(MigrationState.COMPLETED)

    async def resume(self) -> float:
        assert not self.exported, "the guest runs and others may write its disk"
        at = await super().resume()
        self.said.append("resume")
        return at


class Channel(BareChannel):
    """A stream as the script knows it."""

    def __init__(self, stream: socket.socket) -> None:
        self.stream = stream
        self.paths: list[Used] = []
        #: each pace it was told, and whether it keeps to it
        self.paces: list[int] = []
        self.keeps = True

    def pace(self, bytes_per_s: int) -> bool:
        self.paces.append(bytes_per_s)
        return self.keeps

    def used(self) -> tuple[Used, ...]:
        return tuple(self.paths)

    def close(self) -> None:
        self.stream.close()


class Door:
    """The other end of the stream."""

    address, port, token = "10.0.0.2", 1, "0" * 32

    def __init__(self, stream: socket.socket) -> None:
        self._stream = stream
        self.closed = False

    async def accept(self) -> socket.socket:
        return self._stream

    def announce(self, addresses: Sequence[str]) -> None: ...

    def close(self) -> None:
        self.closed = True


class World(BareHome, MemoryLanding):
    """Two hosts. The source is a ``Home``, the destination a ``Landing``, and what lies between a ``Peer``."""

    host = "host2"

    def __init__(self, folder: Path) -> None:
        self.wire = Wire()
        self.said: list[str] = []
        self.here = Machine(self.wire, self.said)
        super().__init__(self.here)
        self.images_left: list[str] = []
        self.files_awaited: list[LayersAwaited] = []
        self.released = self.stayed = self.no_disks_there = False
        #: streams that find nobody, by what they are to carry
        self.unreached: list[str] = []
        self.disk_channels: list[Any] = []
        #: the destination's clock less the source's
        self.skew_s = 0.0
        self.line_moves = asyncio.Event()
        self.line_moves.set()
        header = Header(
            migration=TAG,
            side=Side.SOURCE,
            vm=VM,
            accelerator="tcg",
            source="host1",
            destination="host2",
            address="host2",
            accepted_at=0.0,
            boot="boot",
        )
        there = msgspec.structs.replace(
            header, side=Side.DESTINATION, vm=landed(VM, [PLAN]), images=(PLAN.path,), address=""
        )
        self._begin_landing(folder, there)
        view = Migration(
            id=TAG,
            vm=VM.name,
            source="host1",
            destination="host2",
            side=Side.SOURCE,
            transport="tcp",
            phase=Phase.WAITING,
            outcome=Outcome.UNDER_WAY,
            progress=Progress(),
            accepted_at=0.0,
        )
        self.seen: list[Migration] = []
        self.report = Report(view, self.seen.append)
        terms = Terms(ConvergencePolicy(patience_s=1), "tcp", encrypt=True)
        self.move = SourceMove(Journal.begin(folder, header), self.here, self.dial, self, terms, self.report)

    def _begin_landing(self, folder: Path, header: Header) -> None:
        self.there = Machine(self.wire, self.said, incoming=True)
        self.ours, theirs = socket.socketpair()
        self.door, self.disks_door = Door(theirs), Door(theirs)
        self.destination = Destination(Journal.begin(folder, header), self, "boot")

    # Peer

    async def dial(self) -> Any:
        return self

    @property
    def lost(self) -> asyncio.Future[None]:
        return self.destination.lost

    async def prepare(self, request: Prepare, in_line: Callable[[int], None], send_layers: Any) -> Prepared:
        if self.destination.step == "gone":
            before = self.destination.journal
            before.path.unlink()
            self._begin_landing(before.path.parent, before.header)
        return await self.destination.prepare(request, in_line, self.files_awaited.append)

    async def announce(self, addresses: Sequence[str]) -> None: ...

    async def disks_whole(self) -> None:
        self.destination.disks_whole()

    async def take_over(self) -> Any:
        running = await self.destination.take_over()
        assert running.resumed_at is not None
        return msgspec.structs.replace(running, resumed_at=running.resumed_at + self.skew_s)

    async def adopted(self) -> None:
        await self.destination.adopted()

    async def abort(self, reason: str) -> None:
        await self.destination.abort(reason)

    async def attach(self, migration: str) -> Standing:
        return await self.destination.standing()

    async def close(self) -> None:
        await self.destination.abandoned()

    # Landing

    async def launch(self, request: Prepare) -> MachineProtocol:
        return self.there

    async def open_door(self, request: Prepare, machine: MachineProtocol) -> Any:
        return self.door

    async def open_disks(self, request: Prepare, machine: MachineProtocol) -> Any:
        if self.no_disks_there:
            raise StorageError("no port is free")
        assert request.disk_credentials is not None
        await machine.export_disks(["vda"], self.ours, request.disk_credentials)
        return self.disks_door

    async def adopt(self, *, running: bool) -> None: ...

    async def release(self, machine: MachineProtocol | None) -> None:
        self.released = True
        if machine is not None:
            await machine.kill()

    # Home

    async def connect_disks(self, route: Route, prepared: Prepared, count: int) -> list[Any]:
        self._find("disks")
        self.disk_channels = [Channel(self.ours.dup()) for _ in range(count)]
        return self.disk_channels

    def _find(self, what: str) -> None:
        if what in self.unreached:
            self.unreached.remove(what)
            raise DestinationLost("the destination cannot be reached")

    async def promise(self, destination: str, copied: Collection[str]) -> None: ...

    async def reclaim(self) -> None: ...

    async def take_storage_slot(self, in_line: Callable[[int], None]) -> None:
        await self.line_moves.wait()

    async def connect(self, route: Route, prepared: Prepared) -> Any:
        self._find("memory")
        return Channel(self.ours)

    async def vm_left(self, images: Sequence[str]) -> tuple[Finding, ...]:
        assert self.destination.step == "owned", "the images were needed until then"
        self.images_left += images
        return tuple(disks.not_deleted(image, "it is broken") for image in images)

    async def vm_stays(self, why_stopped: str = "") -> None:
        self.stayed = True

    async def withdraw(self) -> None: ...

    async def vm_crashed(self) -> None: ...


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    async def examine(_peer: Any, _question: Any, facts: Coroutine[Any, Any, VmFacts], _disks: Any) -> Examined:
        facts.close()
        return EXAMINED

    monkeypatch.setattr(source, "examine", examine)
    monkeypatch.setattr(mirrors, "LOOK_EVERY_S", 0.001)
    monkeypatch.setattr(source, "LOOK_EVERY_S", 0.001)


def play(folder: Path, scenario: Callable[[World], Coroutine[Any, Any, None]]) -> None:
    async def within_time() -> None:
        world = World(folder)
        await world.here.resume()
        world.said.clear()
        async with asyncio.timeout(20):
            await scenario(world)

    asyncio.run(within_time())


async def undone(world: World, cause: LimosaError) -> None:
    """The move is settled: the guest goes on at the source without copies, and nothing is left there."""
    await Settlement(world.move, cause).run()
    assert await world.here.status() is RunState.RUNNING
    assert await world.here.copies() == {}
    assert world.stayed
    assert world.released
    assert world.there.gone.is_set()
    assert world.images_left == []
    assert world.move.journal.step == "undone"
    assert "resume" not in world.said or world.said.index("resume") > world.said.index("drop")


async def until(what: Callable[[], bool]) -> None:
    while not what():  # noqa: ASYNC110 - anything may make it true
        await asyncio.sleep(0.001)


def test_copies_are_whole_before_the_last_memory_goes(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        await world.move.run()
        assert world.said == ["copy", "end", "continue", "close", "resume"]
        assert world.images_left == [VM.disks[0].path]
        assert world.move.report.now.findings == (disks.not_deleted(VM.disks[0].path, "it is broken"),)
        assert await world.there.status() is RunState.RUNNING
        phases = list(dict.fromkeys(view.phase for view in world.seen))
        assert phases[:3] == [Phase.BUILD_UP, Phase.STORAGE, Phase.COPY]
        percents = [view.progress.percent for view in world.seen]
        assert percents == sorted(percents)

    play(tmp_path, scenario)


def test_disks_that_find_nobody_are_led_anew_but_no_memory_behind_them(tmp_path: Path) -> None:
    async def anew(world: World) -> None:
        world.unreached = ["disks"]
        first = world.there
        await world.move.run()
        assert first.gone.is_set()
        assert world.said == ["copy", "end", "continue", "close", "resume"]
        assert await world.there.status() is RunState.RUNNING

    async def behind(world: World) -> None:
        world.unreached = ["memory"]
        with pytest.raises(DestinationLost) as caught:
            await world.move.run()
        assert world.said.count("copy") == 1
        await undone(world, caught.value)

    for scenario in (anew, behind):
        (tmp_path / scenario.__name__).mkdir()
        play(tmp_path / scenario.__name__, scenario)


def test_the_blackout_is_the_same_whatever_the_destinations_clock_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[float | None] = []

    async def scenario(world: World) -> None:
        world.skew_s = skew_s
        monkeypatch.setattr(source, "time", SimpleNamespace(time=lambda: world.wire.now))
        await world.move.run()
        found.append(world.report.now.blackout_ms)

    for skew_s in (0.0, 0.03, -0.03, 3600.0):
        folder = tmp_path / str(skew_s)
        folder.mkdir()
        play(folder, scenario)
    assert found[0] is not None
    assert found == pytest.approx(found[:1] * 4, abs=0.01)


@pytest.mark.parametrize(
    ("resumed_at", "after_s", "wanted"),
    [
        (1000.008, 0.004, 1000.008),  # it may be right
        (1000.0039, 0.004, 1000.007),
        (1000.0039, None, 1000.0039),  # an older destination says less
        (1000.011, 0.004, 1000.007),
        (3.0, 0.004, 1000.007),
        (1000.011, -5.0, 1000.005),  # its clock was set meanwhile
        (1000.011, 5.0, 1000.010),
    ],
)
def test_when_the_guest_was_resumed_is_bounded_by_the_clock_here(
    resumed_at: float, after_s: float | None, wanted: float
) -> None:
    assert by_our_clock(resumed_at, after_s, said_at=1000.0, heard_at=1000.010) == pytest.approx(wanted, abs=1e-6)


def test_a_guest_that_stands_still_while_its_copy_begins_has_not_stopped_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(world: World) -> None:
        copy_to_host = world.here.copy_to_host

        async def begin(*words: Any, **named: Any) -> None:
            await copy_to_host(*words, **named)
            await world.here.pause()
            await world.here.resume()
            assert world.move.stopped_at is None

        monkeypatch.setattr(world.here, "copy_to_host", begin)
        await world.move.run()
        phases = list(dict.fromkeys(view.phase for view in world.seen))
        assert phases[:3] == [Phase.BUILD_UP, Phase.STORAGE, Phase.COPY]
        assert world.move.stopped_at is not None

    play(tmp_path, scenario)


def test_others_hear_of_a_network_that_a_move_takes_to_while_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(world: World) -> None:
        told: list[int] = []
        channel = Channel(world.ours)

        async def sending() -> None:
            told.append(len(world.report.now.route.paths) if world.report.now.route is not None else 0)

        async def connect(*_: object) -> Any:
            return channel

        monkeypatch.setattr(world, "sending", sending)
        monkeypatch.setattr(world, "connect", connect)
        world.wire.hold(Stage.COPY)
        running = asyncio.ensure_future(world.move.run())
        await world.wire.reached(Stage.COPY)
        before = list(told)
        channel.paths.append(Used("10.1.0.1", "10.1.0.2", 1))
        await until(lambda: told[len(before) :] == [1])
        world.wire.release(Stage.COPY)
        await running
        assert told[len(before) :] == [1]

    play(tmp_path, scenario)


@pytest.mark.parametrize("capped", [False, True])
def test_nothing_is_learnt_of_networks_while_a_cap_was_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capped: bool
) -> None:
    async def scenario(world: World) -> None:
        learnt: list[Any] = []
        monkeypatch.setattr(world, "learn", learnt.append)
        under_way = {Phase.STORAGE, Phase.COPY, Phase.SYNCHRONISE} if capped else set()
        monkeypatch.setattr(world, "bandwidth", lambda _: 10**9 if world.report.now.phase in under_way else 0)
        await world.move.run()
        assert bool(learnt) is not capped

    play(tmp_path, scenario)


@pytest.mark.parametrize("encrypt", [True, False])
def test_disks_that_relays_carry_are_encrypted_whatever_is_said_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encrypt: bool
) -> None:
    async def scenario(world: World) -> None:
        asked: list[bool] = []

        async def seats(*_: object, encrypt: bool) -> list[Any]:
            asked.append(encrypt)
            return []

        monkeypatch.setattr(world, "seats", seats)
        world.move.terms = dataclasses.replace(world.move.terms, encrypt=encrypt)
        await world.move.run()
        assert asked == [True]

    play(tmp_path, scenario)


def test_nobody_can_write_the_disks_any_more_when_the_last_memory_has_not_gone_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(world: World) -> None:
        go_on = world.here.continue_migration

        async def when_closed() -> None:
            await until(lambda: "close" in world.said)
            await go_on()

        monkeypatch.setattr(world.here, "continue_migration", when_closed)
        await world.move.run()
        assert world.said == ["copy", "end", "close", "continue", "resume"]

    play(tmp_path, scenario)


@pytest.mark.parametrize("moment", ["storage", Stage.SETUP, Stage.COPY, "pre-switchover"])
def test_cancelled(tmp_path: Path, moment: Stage | str) -> None:
    async def scenario(world: World) -> None:
        world.here.slow = moment == "storage"
        if isinstance(moment, Stage):
            world.wire.hold(moment)
        running = asyncio.ensure_future(world.move.run())
        if moment == "storage":
            await until(lambda: world.report.now.phase is Phase.STORAGE and "copy" in world.said)
        elif isinstance(moment, Stage):
            await world.wire.reached(moment)
        else:
            await world.move.before_switchover
        world.move.cancel()
        with pytest.raises(Cancelled) as caught:
            await running
        await undone(world, caught.value)
        assert world.report.now.outcome is Outcome.CANCELLED

    play(tmp_path, scenario)


def test_cancelled_while_its_qemu_answers_nothing_because_the_copy_of_a_disk_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU waits for what is on its way to the copy with all else standing still, until the connection ends."""

    async def scenario(world: World) -> None:
        qemus, theirs = socket.socketpair()

        async def connect_disks(*_: object) -> list[Channel]:
            return [Channel(qemus.dup())]

        async def goes_on_when_it_ends() -> None:
            theirs.setblocking(False)
            assert await asyncio.get_running_loop().sock_recv(theirs, 1) == b""
            world.here.answer_again()

        monkeypatch.setattr(world, "connect_disks", connect_disks)
        ended = asyncio.ensure_future(goes_on_when_it_ends())
        running = asyncio.ensure_future(world.move.run())
        await world.move.before_switchover
        world.here.hang()
        world.move.cancel()
        with pytest.raises(Cancelled) as caught:
            await running
        await undone(world, caught.value)
        await ended
        qemus.close()

    play(tmp_path, scenario)


def test_cancelled_before_the_destination_heard_of_it_though_it_came_by_a_move_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(world: World) -> None:
        world.here.came_by_a_move()
        world.line_moves.clear()
        running = asyncio.ensure_future(world.move.run())
        await until(lambda: world.move.journal.step == "preparing")
        world.move.cancel()
        with pytest.raises(Cancelled) as caught:
            await running
        # The destination has no journal of a move it never heard of, and its session is about none.
        monkeypatch.setattr(world.destination, "standing", unknown)
        monkeypatch.setattr(world.destination, "abort", refuse)
        await Settlement(world.move, caught.value).run()
        assert (world.stayed, world.move.journal.step) == (True, "undone")
        assert await world.here.status() is RunState.RUNNING
        assert world.report.now.outcome is Outcome.CANCELLED

    async def unknown() -> Standing:
        return Standing(DestinationState.UNKNOWN)

    async def refuse(reason: str) -> None:
        raise InvalidInput("no migration was prepared or attached in this session")

    play(tmp_path, scenario)


@pytest.mark.parametrize("moment", ["storage", "memory"])
def test_a_copy_that_fails_ends_the_move(tmp_path: Path, moment: str) -> None:
    async def scenario(world: World) -> None:
        world.here.slow = moment == "storage"
        if moment == "memory":
            world.wire.hold(Stage.COPY)
        running = asyncio.ensure_future(world.move.run())
        await until(lambda: "vda" in world.here.copying)
        if moment == "memory":
            await world.wire.reached(Stage.COPY)
        world.here.copy_is("vda", CopyState.ENDED, error="Input/output error")
        with pytest.raises(LimosaError, match="vda") as caught:
            await running
        assert caught.value.why == "Input/output error"
        await undone(world, caught.value)
        assert world.report.now.outcome is Outcome.FAILED

    play(tmp_path, scenario)


def test_a_copy_that_cannot_be_made_whole_lets_the_guest_go_on(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        world.here.copy_fails_at_its_end = True
        with pytest.raises(StorageError, match="vda") as caught:
            await world.move.run()
        assert "continue" not in world.said
        await undone(world, caught.value)

    play(tmp_path, scenario)


def test_a_guest_does_not_stop_before_the_copy_of_its_disk_has_caught_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirrors, "BEHIND_S", 0.01)
    monkeypatch.setattr(mirrors, "PIECE_BYTES", 1)

    async def scenario(world: World) -> None:
        world.move.terms = dataclasses.replace(world.move.terms, policy=ConvergencePolicy(patience_s=60))
        world.here.guest.dirty_rate_bytes_per_s = 1e6
        world.wire.hold(Stage.COPY)
        running = asyncio.ensure_future(world.move.run())
        await world.wire.reached(Stage.COPY)
        world.here.copy_is("vda", CopyState.READY, remaining=2)
        await until(lambda: world.here.parameters is not None and world.here.parameters.downtime_limit_ms == 0)
        await until(lambda: set(world.here.slowed) == {"vda"})
        world.wire.release(Stage.COPY)
        await world.wire.passes(10)
        assert await world.here.status() is RunState.RUNNING
        await until(lambda: bandwidth(world) == steering.TRICKLE)
        await world.move.cap_memory(77)
        assert bandwidth(world) == steering.TRICKLE
        assert world.report.now.progress.note == (
            "the copy of disk vda has to catch up before the guest may stop; "
            "the guest's writes to disk vda are slowed, so that its copy keeps up"
        )
        world.here.copy_is("vda", CopyState.READY, remaining=1)
        await running
        assert bandwidth(world) == 0
        assert world.said == ["copy", "end", "continue", "close", "resume"]

    def bandwidth(world: World) -> int:
        return world.here.parameters.bandwidth_bytes_per_s if world.here.parameters is not None else 0

    play(tmp_path, scenario)


def test_connections_keep_the_cap_of_a_copy_that_is_ready_until_the_guest_stands_still(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        world.bandwidth = lambda kind: 100 if kind is Kind.STORAGE else 0  # type: ignore[method-assign]
        world.wire.hold(Stage.COPY)
        running = asyncio.ensure_future(world.move.run())
        await world.wire.reached(Stage.COPY)
        await world.move.cap_copies(50)
        (channel,) = world.disk_channels
        assert channel.paces == [100, 50]
        world.wire.release(Stage.COPY)
        await running
        assert channel.paces == [100, 50, 0]

    play(tmp_path, scenario)


@pytest.mark.parametrize("keeps", [False, True])
def test_a_guest_writes_no_more_than_a_cap_that_nothing_on_the_way_keeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keeps: bool
) -> None:
    monkeypatch.setattr(mirrors, "BEHIND_S", 0.01)

    async def scenario(world: World) -> None:
        world.bandwidth = lambda kind: 10**6 if kind is Kind.STORAGE else 0  # type: ignore[method-assign]
        world.here.guest.dirty_rate_bytes_per_s = 1e6
        world.wire.hold(Stage.COPY)
        running = asyncio.ensure_future(world.move.run())
        await world.wire.reached(Stage.COPY)
        (channel,) = world.disk_channels
        channel.keeps = keeps
        await world.move.cap_copies(10**6)
        looks = 0

        def used() -> tuple[Used, ...]:
            nonlocal looks
            looks += 1
            return (Used("10.1.0.1", "10.1.0.2", looks * 10**6),)

        channel.used = used
        if not keeps:
            await until(lambda: set(world.here.slowed) == {"vda"})
            assert world.here.slowed["vda"] <= 10**6
        world.wire.release(Stage.COPY)
        await running
        assert keeps or looks
        assert "the copy of disk vda has to catch up" not in {view.progress.note for view in world.seen}
        assert not keeps or world.here.slowed == {}

    play(tmp_path, scenario)


def test_what_is_shown_as_sent_of_a_disk_is_what_its_connection_has_carried(tmp_path: Path) -> None:
    """A copy counts holes and zeroes, too."""

    async def scenario(world: World) -> None:
        world.wire.hold(Stage.COPY)
        running = asyncio.ensure_future(world.move.run())
        await world.wire.reached(Stage.COPY)
        (channel,) = world.disk_channels
        channel.paths.append(Used("10.1.0.1", "10.1.0.2", 7))
        world.wire.release(Stage.COPY)
        await running
        (disk,) = world.report.now.progress.disks
        assert (disk.copied_bytes, disk.sent_bytes) == (disk.total_bytes, 7)
        of_memory = world.here._statistics.transferred_bytes
        assert world.report.now.progress.transferred_bytes == of_memory + 7

    play(tmp_path, scenario)


def test_the_blackout_begins_when_qemu_says_though_it_tells_later(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        assert world.move._stopped_at(99.9) == 99.9
        await world.move.run()
        world.move._sent_at = 100.0
        world.report.change(qemu_downtime_ms=500.0)
        assert [world.move._stopped_at(said_at) for said_at in (99.9, 99.2)] == [99.5, 99.2]

    play(tmp_path, scenario)


def test_a_move_without_disks_has_none_to_cap(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        await world.move.cap_copies(50)
        assert world.said == []

    play(tmp_path, scenario)


def test_what_was_made_whole_is_shown_as_whole(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        world.wire.hold(Stage.COPY)
        running = asyncio.ensure_future(world.move.run())
        await world.wire.reached(Stage.COPY)
        world.here.copy_is("vda", CopyState.READY, remaining=1)
        await until(lambda: left(world) == 1)
        world.wire.release(Stage.COPY)
        await running
        assert left(world) == 0

    def left(world: World) -> int:
        return sum(disk.total_bytes - disk.copied_bytes for disk in world.report.now.progress.disks)

    play(tmp_path, scenario)


def test_what_each_path_carries_is_shown_while_disks_are_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = 0
    monkeypatch.setattr(Channel, "used", lambda _: (Used("10.0.0.1", "10.0.0.2", sent),))

    def shown(world: World) -> int:
        route = world.report.now.route
        return sum(path.sent_bytes for path in route.paths) if route is not None else 0

    async def scenario(world: World) -> None:
        nonlocal sent
        world.here.slow = True
        running = asyncio.ensure_future(world.move.run())
        await until(lambda: world.report.now.phase is Phase.STORAGE and "copy" in world.said)
        await until(lambda: shown(world) == 0 and world.report.now.route is not None)
        sent = 77
        await until(lambda: shown(world) == 77)
        world.here.copy_is("vda", CopyState.READY)
        await running

    play(tmp_path, scenario)


def test_a_copy_that_never_catches_up_ends_the_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirrors, "BEHIND_S", 0.001)

    async def scenario(world: World) -> None:
        world.move.terms = dataclasses.replace(world.move.terms, policy=ConvergencePolicy(patience_s=0.02))
        world.wire.hold(Stage.COPY)
        running = asyncio.ensure_future(world.move.run())
        await world.wire.reached(Stage.COPY)
        while not running.done():
            world.here.copying["vda"] = CopyStatistics(CopyState.READY, 0, 2 * mirrors.PIECE_BYTES)
            await asyncio.sleep(0.001)
        with pytest.raises(NotConverging, match="vda falls behind") as caught:
            await running
        await undone(world, caught.value)

    play(tmp_path, scenario)


def test_disks_that_are_not_whole_in_time_are_given_as_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steering, "STANDS_STILL_S", 0.01)

    async def scenario(world: World) -> None:
        async def never(disk: str) -> None:
            await asyncio.Event().wait()

        monkeypatch.setattr(world.here, "end_copy", never)
        with pytest.raises(LimosaError, match="disks") as caught:
            await world.move.run()
        await undone(world, caught.value)

    play(tmp_path, scenario)


def test_a_destination_that_cannot_take_disks_keeps_no_door_open(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        world.no_disks_there = True
        with pytest.raises(StorageError) as caught:
            await world.move.run()
        assert world.door.closed
        await undone(world, caught.value)

    play(tmp_path, scenario)


def test_a_destination_that_dies_in_the_copy(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        world.here.slow = True
        running = asyncio.ensure_future(world.move.run())
        await until(lambda: "vda" in world.here.copying)
        world.there.die("killed")
        with pytest.raises(LimosaError, match="did not land") as caught:
            await running
        await undone(world, caught.value)

    play(tmp_path, scenario)
