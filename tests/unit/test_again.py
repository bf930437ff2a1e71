"""A move whose RDMA fails before the hand-over, or whose stream finds nobody, goes on by itself: both scripts, with
fake machines."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from harness.homes import BareHome
from harness.landings import ADDRESS, PORTS, BareLanding, first_view, header
from limosa.background import in_full
from limosa.errors import Cancelled, DestinationLost, LimosaError, MigrationFailed, NotConverging, QemuGone
from limosa.migration import source
from limosa.migration.destination import Destination
from limosa.migration.home import Terms
from limosa.migration.journal import Journal
from limosa.migration.ownership import DestinationStep, SourceStep
from limosa.migration.report import Report
from limosa.migration.source import SourceMove
from limosa.migration.steering import Steering
from limosa.model.facts import DestinationFacts, VmFacts
from limosa.model.migration import Migration, Side
from limosa.model.network import HostNetwork, HostNic, NicAddress
from limosa.model.route import Route
from limosa.qemu.protocol import (
    MachineProtocol,
    MigrationState,
    MigrationStatistics,
    RdmaAddress,
    RunState,
    StreamParameters,
)
from limosa.settings.host import ConvergencePolicy
from limosa.testing.guest import FakeGuest
from limosa.testing.machine import FakeMachine
from limosa.testing.peer import LocalPeer
from limosa.testing.wire import Stage, Wire
from limosa.transport import rdma, tcp
from limosa.transport.channel import Channel, Doorway
from limosa.wire.peer import Prepare, Prepared

OURS, THEIRS = "127.0.0.1", ADDRESS
MIB = 1024 * 1024


def network(address: str) -> HostNetwork:
    own = (NicAddress(address=address, prefix=8),)
    nic = HostNic(name="eth0", index=2, kind="physical", up=True, carrier=True, mtu=9000, addresses=own, rdma="mlx5_0")
    return HostNetwork(nics=(nic,), mptcp=True, encrypt=False)


class Here(BareHome):
    """The source's :class:`limosa.migration.home.Home`."""

    #: so often a stream still finds nobody
    unreached = 0

    async def facts(self) -> VmFacts:
        return VmFacts(
            running=True,
            accelerator="kvm",
            qemu=(10, 0, 0),
            files=(),
            live_migration=True,
            encrypt=False,
            post_copy=False,
            network=network(OURS),
        )

    async def connect(self, route: Route, prepared: Prepared) -> Channel:
        if route.transport == "rdma":
            return rdma.RdmaChannel(RdmaAddress(route.paths[0].there, prepared.port))
        if self.unreached:
            self.unreached -= 1
            raise DestinationLost("the destination cannot be reached")
        return await tcp.connect(prepared.address, prepared.port, prepared.token)


class There(BareLanding):
    """Where RDMA can be awaited, too."""

    async def open_door(self, request: Prepare, machine: MachineProtocol) -> Doorway:
        if request.transport == "rdma":
            return await rdma.open_door(machine, THEIRS, PORTS)
        return await super().open_door(request, machine)


FACTS = DestinationFacts(
    host="there",
    qemu=(10, 0, 0),
    live_migration=True,
    accelerators=("kvm",),
    machine_known=True,
    cpu_known=True,
    cpu_missing=(),
    switches_missing=(),
    memory_available_mib=1024,
    name_taken=False,
    uuid_taken=False,
    files=(),
    firmware_available=True,
    post_copy_possible=False,
    addresses=(THEIRS,),
    trial_port=0,
    time=0.0,
    network=network(THEIRS),
)


class Move:
    """One move, with as many tries at the destination as it makes."""

    def __init__(self, folder: Path, transport: str = "rdma") -> None:
        self.folder = folder
        self.wire = Wire()
        self.wire.has_rdma = True
        self.source = FakeMachine(self.wire, FakeGuest(16 * MIB, dirty_rate_bytes_per_s=1 * MIB))
        self.tries: list[Destination] = []
        self.landings: list[There] = []
        self.home = Here(self.source)
        first = msgspec.structs.replace(first_view(), transport=transport)
        self.report = Report(first, lambda view: None)
        self.journal = Journal.begin(folder, header(Side.SOURCE))
        terms = Terms(ConvergencePolicy(first_downtime_ms=60), transport, encrypt=False)
        self.script = SourceMove(self.journal, self.source, self._dial, self.home, terms, self.report)

    async def run(self) -> Migration:
        await self.source.resume()
        await self.script.run()
        return self.report.now

    async def _dial(self) -> LocalPeer:
        if not self.tries or self.tries[-1].step is DestinationStep.GONE:
            folder = self.folder / str(len(self.tries))
            folder.mkdir()
            self.landings.append(There(self.wire))
            journal = await in_full(Journal.begin, folder, header(Side.DESTINATION))
            self.tries.append(Destination(journal, self.landings[-1], boot="boot"))
        return LocalPeer(self.tries[-1], FACTS, PORTS)


def play(scenario: Awaitable[None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(20):
            await scenario

    asyncio.run(limited())


def cannot_listen(move: Move) -> None:
    move.wire.has_rdma = False


def breaks(stage: Stage) -> Callable[[Move], None]:
    def prepare(move: Move) -> None:
        move.wire.failures[stage] = "the cable was cut"

    return prepare


@pytest.mark.parametrize(
    "harm",
    [cannot_listen, breaks(Stage.SETUP), breaks(Stage.COPY), breaks(Stage.SWITCHOVER)],
    ids=["cannot listen", *map(str, (Stage.SETUP, Stage.COPY, Stage.SWITCHOVER))],
)
def test_what_fails_goes_on_by_another_way(tmp_path: Path, harm: Callable[[Move], None]) -> None:
    async def scenario() -> None:
        move = Move(tmp_path)
        harm(move)
        ended = await move.run()
        assert ended.route is not None
        assert (ended.route.transport, "not rdma: " in ended.route.why) == ("tcp", True)
        assert [finding.code for finding in ended.findings] == ["rdma-not-used"]
        assert [one.step for one in move.tries] == [DestinationStep.GONE, DestinationStep.OWNED]
        assert move.landings[0].machine.gone.is_set()
        assert await move.landings[1].machine.status() is RunState.RUNNING
        assert move.landings[1].machine.guest.pages == move.source.guest.pages
        assert move.home.left
        steps = [record.step for record in move.journal.records]
        assert steps.count(SourceStep.PREPARING) == 2
        assert steps[-1] == SourceStep.FINISHED

    play(scenario())


def test_a_destination_that_dies_in_mid_move_is_asked_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        move = Move(tmp_path)
        move.wire.hold(Stage.COPY)
        running = asyncio.ensure_future(move.run())
        await move.wire.reached(Stage.COPY)
        await move.landings[0].machine.kill()
        move.wire.release(Stage.COPY)
        ended = await running
        assert ended.route is not None
        assert ended.route.transport == "tcp"
        assert await move.landings[1].machine.status() is RunState.RUNNING

    play(scenario())


@pytest.mark.parametrize("came_by_a_move", [False, True])
def test_a_stream_that_finds_nobody_is_led_anew_once(
    tmp_path: Path, came_by_a_move: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "LAST_WORDS_WITHIN_S", 0.01)

    async def scenario() -> None:
        move = Move(tmp_path, "tcp")
        move.home.unreached = 1
        if came_by_a_move:
            move.source._migration_is(MigrationState.COMPLETED)  # as QEMU says for as long as it lives
        ended = await move.run()
        assert ended.findings == ()
        assert [one.step for one in move.tries] == [DestinationStep.GONE, DestinationStep.OWNED]
        assert move.landings[0].machine.gone.is_set()
        assert move.landings[1].machine.guest.pages == move.source.guest.pages
        (tmp_path / "other").mkdir()
        other = Move(tmp_path / "other", "tcp")
        other.home.unreached = 2
        with pytest.raises(DestinationLost):
            await other.run()
        assert len(other.tries) == 2

    play(scenario())


@pytest.mark.parametrize("safely", [True, False])
def test_a_guest_that_cannot_be_slowed_safely_is_slowed_in_another_try(tmp_path: Path, safely: bool) -> None:
    async def scenario() -> None:
        move = Move(tmp_path, "tcp")
        move.source.is_slowed_safely = safely
        slows = []

        async def prepare(parameters: StreamParameters) -> None:
            slows.append(parameters.slows)
            await FakeMachine.prepare_outgoing(move.source, parameters)

        async def steer(steering: Steering, look: MigrationStatistics, pace: float) -> str:
            if len(slows) == 1 and not slows[0]:
                steering.must_slow = NotConverging("the move does not converge", why="the guest writes")
                raise steering.must_slow
            return ""

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(move.source, "prepare_outgoing", prepare)
            patch.setattr(Steering, "steer", steer)
            move.wire.hold(Stage.COPY)
            running = asyncio.ensure_future(move.run())
            if not safely:
                while len(slows) < 2:  # noqa: ASYNC110 - many things lead there
                    await asyncio.sleep(0.001)
            move.wire.release(Stage.COPY)
            await running
        assert slows == ([True] if safely else [False, True])
        last = [DestinationStep.OWNED]
        assert [one.step for one in move.tries] == (last if safely else [DestinationStep.GONE, *last])
        assert move.landings[-1].machine.guest.pages == move.source.guest.pages

    play(scenario())


def test_nothing_is_tried_again_that_went_well_or_another_way(tmp_path: Path) -> None:
    async def scenario() -> None:
        move = Move(tmp_path)
        ended = await move.run()
        assert ended.route is not None
        assert (ended.route.transport, len(move.tries), ended.findings) == ("rdma", 1, ())
        (tmp_path / "other").mkdir()
        other = Move(tmp_path / "other")
        other.wire.has_rdma = False
        other.wire.failures[Stage.SETUP] = "this is the second failure"
        with pytest.raises(MigrationFailed):
            await other.run()
        assert len(other.tries) == 2

    play(scenario())


def test_a_cancel_or_the_death_of_the_source_is_no_failure_of_rdma(tmp_path: Path) -> None:
    async def scenario(act: Callable[[Move], None], error: type[LimosaError]) -> None:
        (tmp_path / error.code).mkdir()
        move = Move(tmp_path / error.code)
        move.wire.hold(Stage.COPY)
        running = asyncio.ensure_future(move.run())
        await move.wire.reached(Stage.COPY)
        act(move)
        with pytest.raises(error):
            await running
        assert len(move.tries) == 1

    play(scenario(lambda move: move.script.cancel(), Cancelled))
    play(scenario(lambda move: move.source.die("killed"), QemuGone))
