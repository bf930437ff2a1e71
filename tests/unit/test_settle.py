"""Bringing a move to its end while its destination is away: what the source may still touch by then."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import AsyncMock, Mock

import msgspec
import pytest

from harness.homes import BareHome
from harness.landings import VM, first_view, header
from limosa.errors import (
    Cancelled,
    Conflict,
    DestinationLost,
    HostNotTrusted,
    HostUnreachable,
    LimosaError,
    OutcomeUnknown,
    QemuError,
    StateError,
    StorageError,
)
from limosa.host import outgoing as module_of_outgoing
from limosa.host.files import Files
from limosa.host.outgoing import Outgoing
from limosa.host.views import Views
from limosa.host.vms import HostedVm, Vms
from limosa.migration import settle, stop
from limosa.migration.home import Terms
from limosa.migration.journal import Journal
from limosa.migration.ownership import SourceStep
from limosa.migration.report import Report
from limosa.migration.settle import Settlement
from limosa.migration.source import SourceMove
from limosa.model.finding import Finding
from limosa.model.migration import Migration, Outcome, Phase, Side
from limosa.model.vm import VmState
from limosa.qemu.protocol import MigrationState, RunState
from limosa.settings import toml
from limosa.settings.host import ConvergencePolicy, HostSettings
from limosa.testing.guest import FakeGuest
from limosa.testing.machine import FakeMachine
from limosa.testing.wire import Wire
from limosa.transport.shares import Kind
from limosa.wire.peer import DestinationState, Running, Standing

FIRST, SECOND = "first0000000", "second000000"
OLD_IMAGE = "/images/vm-vda.qcow2"
CAUSE = Cancelled("the move was cancelled")


class There:
    """A destination as the source's settlement knows it: it can be away, and hears of an abort."""

    host = "there"

    def __init__(self, state: DestinationState, *, away: bool) -> None:
        self.state = state
        self.away = away
        self.rebooted = False
        self.asked = 0
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def dial(self) -> Any:
        self.asked += 1
        if self.away:
            raise HostUnreachable("host 'there' cannot be reached")
        return self

    async def attach(self, migration: str) -> Standing:
        return Standing(self.state, rebooted=self.rebooted)

    async def abort(self, reason: str) -> None:
        self.state = DestinationState.GONE

    async def take_over(self) -> Running:
        self.state = DestinationState.OWNED
        return Running(resumed_at=None)

    async def adopted(self) -> None:
        assert self.state is DestinationState.OWNED

    async def close(self) -> None: ...


class Here(BareHome):
    """The source's host. Giving the VM back is noted with the step its journal has then."""

    def __init__(self, machine: FakeMachine, journal: Journal) -> None:
        super().__init__(machine)
        self.given_back: list[str | None] = []
        self.why_stopped = ""
        self.shared = 0
        #: what an earlier daemon's QEMU says to this one; None: nothing
        self.earlier: FakeMachine | None = None
        #: images that were deleted when the VM left
        self.deleted: tuple[str, ...] = ()
        self._journal = journal

    async def qemu(self) -> FakeMachine | None:
        if self.earlier is None:
            raise QemuError("QEMU with pid 7 does not answer")
        return self.earlier

    async def vm_left(self, images: Sequence[str]) -> tuple[Finding, ...]:
        self.left, self.deleted = True, tuple(images)
        return ()

    async def reclaim(self) -> None: ...

    async def withdraw(self) -> None:
        assert self._journal.step == SourceStep.UNDOING, "the next daemon would not do it"

    async def vm_stays(self, why_stopped: str = "") -> None:
        self.given_back.append(self._journal.step)
        self.why_stopped = why_stopped

    async def vm_crashed(self) -> None:
        self.given_back.append(self._journal.step)

    async def sending(self) -> None:
        self.shared += 1


def view() -> Migration:
    return msgspec.structs.replace(first_view(), id=FIRST, phase=Phase.COPY)


class World:
    """A move that broke with these steps in its journal; its guest runs."""

    def __init__(self, folder: Path, there: There, *steps: SourceStep) -> None:
        self.there = there
        self.machine = FakeMachine(Wire(), FakeGuest(0))
        self.journal = Journal.begin(folder, msgspec.structs.replace(header(Side.SOURCE), migration=FIRST))
        for step in steps:
            left = (OLD_IMAGE,) if step is SourceStep.PREPARING else ()
            self.journal.record(step, 0.0, left=left)
        self.home = Here(self.machine, self.journal)
        self.report = Report(view(), lambda view: None)
        self.settlement = self.settling(self.journal)

    def settling(self, journal: Journal) -> Settlement:
        terms = Terms(ConvergencePolicy(), "tcp", encrypt=False)
        return Settlement(SourceMove(journal, self.machine, self.there.dial, self.home, terms, self.report), CAUSE)


def play(scenario: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(20):
            await scenario()

    asyncio.run(limited())


async def until(what: Callable[[], bool]) -> None:
    while not what():  # noqa: ASYNC110 - anything may make it true
        await asyncio.sleep(0)


MIGRATING = (SourceStep.PREPARING, SourceStep.MIGRATING)


@pytest.mark.parametrize(
    ("steps", "cause", "code"),
    [
        (MIGRATING, HostUnreachable("the session broke"), "destination-lost"),
        (MIGRATING, HostNotTrusted("its certificate has expired"), "host-not-trusted"),
        ((), HostUnreachable("nobody is there"), "host-unreachable"),
    ],
)
def test_a_destination_that_dies_after_it_was_told_of_the_vm_is_lost(
    tmp_path: Path, steps: tuple[SourceStep, ...], cause: LimosaError, code: str
) -> None:
    async def scenario() -> None:
        world = World(tmp_path, There(DestinationState.INCOMING, away=False), *steps)
        world.settlement.cause = cause
        await world.settlement.run()
        fault = world.report.now.fault
        assert (world.report.now.outcome, fault and fault.code) == (Outcome.FAILED, code)
        assert [record.fault.code for record in world.journal.records if record.fault] == [code]

    play(scenario)


def test_a_copy_that_qemu_cannot_end_yet_is_ended_later_and_keeps_nobody_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settle, "DROP_EVERY_S", 0)

    async def scenario() -> None:
        world = World(tmp_path, There(DestinationState.INCOMING, away=False), *MIGRATING)
        asked: list[str] = []
        ends = asyncio.Event()

        async def drop(machine: object, tag: str, disks: object) -> None:
            asked.append(tag)
            if not ends.is_set():
                raise StorageError("the copy of disk vda does not end")

        monkeypatch.setattr("limosa.migration.mirrors.drop", drop)
        await world.settlement.run()
        assert world.home.given_back == [SourceStep.HOME]
        await until(lambda: len(asked) > 3)
        ends.set()
        await world.settlement.background.idle()
        assert set(asked) == {FIRST}

    play(scenario)


@pytest.mark.parametrize("dies", [False, True])
def test_it_is_written_that_the_vm_is_home_before_it_is_given_back(tmp_path: Path, dies: bool) -> None:
    async def scenario() -> None:
        world = World(tmp_path, There(DestinationState.INCOMING, away=True), *MIGRATING)
        await world.machine.resume()
        if dies:
            world.machine.die("")
        running = asyncio.ensure_future(world.settlement.run())
        await until(lambda: world.there.asked > 1)
        assert world.home.given_back == [SourceStep.HOME]
        assert world.report.now.outcome is Outcome.CANCELLED
        assert world.home.shared == 1
        world.there.away = False
        await running
        assert world.there.state is DestinationState.GONE
        assert world.home.given_back == [SourceStep.HOME]
        assert [record.step for record in world.journal.records][2:] == ["undoing", "home", "undone"]

    play(scenario)


@pytest.mark.parametrize("now", ["paused", "stopped", "moved away and back"])
def test_what_its_users_did_with_it_since_is_left_as_it_is(tmp_path: Path, now: str) -> None:
    async def scenario() -> None:
        steps = (*MIGRATING, SourceStep.UNDOING, SourceStep.HOME)
        world = World(tmp_path, There(DestinationState.LOADED, away=False), *steps)
        if now == "stopped":
            world.machine.die("")
        if now == "moved away and back":
            world.machine._migration_is(MigrationState.COMPLETED)
        before = list(world.machine.events)
        await world.settling(Journal.load(world.journal.path)).run()
        assert world.machine.events == before
        assert world.home.given_back == []
        assert world.there.state is DestinationState.GONE
        assert world.report.now.outcome is Outcome.CANCELLED

    play(scenario)


def test_a_vm_that_a_person_gave_to_the_destination_meanwhile_is_told_of(tmp_path: Path) -> None:
    async def scenario() -> None:
        steps = (*MIGRATING, SourceStep.UNDOING, SourceStep.HOME)
        world = World(tmp_path, There(DestinationState.OWNED, away=False), *steps)
        await world.machine.resume()
        await world.settlement.run()
        assert await world.machine.status() is RunState.RUNNING
        assert world.report.now.outcome is Outcome.FAILED
        assert world.report.now.fault is not None
        assert world.report.now.fault.code == "owner-unknown"

    play(scenario)


def test_a_cancel_that_came_too_late_lets_the_guest_go_on_when_the_destination_has_destroyed_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path, There(DestinationState.LOADED, away=False), *MIGRATING, SourceStep.UNDOING)
        world.machine._migration_is(MigrationState.COMPLETED)
        await world.settlement.run()
        assert await world.machine.status() is RunState.RUNNING
        assert world.home.given_back == [SourceStep.HOME]

    play(scenario)


def test_a_person_is_heard_once_and_the_destination_asked_no_more_often_for_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path, There(DestinationState.INCOMING, away=True), *MIGRATING)
        waiting = asyncio.ensure_future(world.settlement._wait(3600))
        await asyncio.sleep(0)
        world.settlement.resolved.set_result(Side.SOURCE)
        await waiting
        waiting = asyncio.ensure_future(world.settlement._wait(3600))
        for _ in range(10):
            await asyncio.sleep(0)
        assert not waiting.done()
        waiting.cancel()

    play(scenario)


HANDED_OVER = (*MIGRATING, SourceStep.HANDING_OVER)


def test_a_guest_that_qemu_runs_no_more_is_given_back_as_it_is(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path, There(DestinationState.INCOMING, away=False), *MIGRATING)
        await world.machine.resume()
        world.machine._enter(RunState.INTERNAL_ERROR)
        await world.settlement.run()
        assert world.home.given_back == [SourceStep.HOME]
        assert "Resetting the Virtual Machine is required" in world.home.why_stopped
        assert await world.machine.status() is RunState.INTERNAL_ERROR
        assert world.report.now.outcome is Outcome.CANCELLED

    play(scenario)


def test_one_that_it_only_refuses_for_now_is_given_back_when_a_person_says_whose_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse() -> None:
        raise QemuError("QEMU refused cont", why='Failed to get "write" lock')

    async def scenario() -> None:
        world = World(tmp_path, There(DestinationState.GONE, away=False), *HANDED_OVER)
        world.machine._migration_is(MigrationState.COMPLETED)
        monkeypatch.setattr(world.machine, "resume_if_stopped", refuse)
        with pytest.raises(QemuError, match="refused cont"):
            await world.settlement.run()
        assert world.home.given_back == []
        world.settlement.resolve(Side.SOURCE)
        await world.settlement.run()
        assert world.home.given_back == [SourceStep.HOME]
        assert "write" in world.home.why_stopped

    play(scenario)


@pytest.mark.parametrize("step", [SourceStep.MIGRATING, SourceStep.UNDOING])
def test_a_guest_that_runs_here_is_here_though_qemu_says_that_a_migration_completed(
    tmp_path: Path, step: SourceStep
) -> None:
    """That by which it came here: the daemon was killed before QEMU was told to send it. Or this one: the destination
    had destroyed its copy, and the daemon was killed before it had written that the guest went on here."""

    async def scenario() -> None:
        steps = dict.fromkeys((*MIGRATING, step))
        world = World(tmp_path, There(DestinationState.INCOMING, away=True), *steps)
        world.machine._migration_is(MigrationState.COMPLETED)
        await world.machine.resume()
        await stays(world)

    play(scenario)


@pytest.mark.parametrize("owner", Side)
def test_a_guest_that_is_certainly_here_stays_whatever_a_person_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Side
) -> None:
    async def unwritable() -> None:
        raise StorageError("cannot write the lease")

    async def scenario() -> None:
        world = World(tmp_path, There(DestinationState.INCOMING, away=True), *MIGRATING)
        await world.machine.resume()
        with monkeypatch.context() as patch:
            patch.setattr(world.home, "reclaim", unwritable)
            with pytest.raises(StorageError):
                await world.settlement.run()
        if owner is Side.DESTINATION:
            with pytest.raises(Conflict, match="cannot be given to host 'there': its guest is here"):
                world.settlement.resolve(owner)
        else:
            world.settlement.resolve(owner)
        assert world.there.asked == 0
        await stays(world)

    play(scenario)


@pytest.mark.parametrize("owner", Side)
def test_one_of_which_that_was_not_known_when_a_person_spoke_stays_when_its_stream_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Side
) -> None:
    stop_stream = AsyncMock()

    async def scenario() -> None:
        world = World(tmp_path, There(DestinationState.INCOMING, away=True), *MIGRATING)
        await world.machine.resume()
        world.machine.hang()
        with pytest.raises(QemuError, match="does not answer"):
            await world.settlement.run()
        world.settlement.resolve(owner)
        world.machine.answer_again()
        await stays(world)
        stop_stream.assert_awaited_once()

    monkeypatch.setattr(settle, "stop_stream", stop_stream)
    monkeypatch.setattr(settle, "QEMU_ANSWERS_WITHIN_S", 0.01)
    play(scenario)


async def stays(world: World) -> None:
    """Settle a move whose destination stays away until the VM is its users' again."""
    running = asyncio.ensure_future(world.settlement.run())
    await until(lambda: bool(world.home.given_back) or running.done())
    assert not world.home.left
    assert world.home.given_back == [SourceStep.HOME]
    assert await world.machine.status() is RunState.RUNNING
    world.there.away = False
    await running
    assert world.report.now.outcome is Outcome.CANCELLED


class TestAQemuThatIsSilent:
    """An earlier daemon started it, and it has not answered this one."""

    def world(self, folder: Path, *steps: SourceStep, state: DestinationState = DestinationState.LOADED) -> World:
        world = World(folder, There(state, away=False), *steps)
        world.settlement.move.machine = None
        return world

    @pytest.mark.parametrize("steps", [(), MIGRATING, HANDED_OVER, (*MIGRATING, SourceStep.UNDOING)])
    def test_it_is_waited_for_since_it_may_run_the_guest(self, tmp_path: Path, steps: tuple[SourceStep, ...]) -> None:
        async def scenario() -> None:
            world = self.world(tmp_path, *steps)
            for _ in range(2):
                with pytest.raises(QemuError) as raised:
                    await world.settlement.run()
            assert raised.value.why == "its QEMU does not answer"
            assert [record.step for record in world.journal.records] == list(steps)
            assert world.home.given_back == []
            assert world.there.state is DestinationState.LOADED

        play(scenario)

    def test_it_keeps_its_guest_when_it_answers(self, tmp_path: Path) -> None:
        async def scenario() -> None:
            world = self.world(tmp_path, *MIGRATING)
            with pytest.raises(QemuError):
                await world.settlement.run()
            world.home.earlier = world.machine
            await world.settlement.run()
            assert await world.machine.status() is RunState.RUNNING
            assert world.there.state is DestinationState.GONE
            assert [record.step for record in world.journal.records][2:] == ["undoing", "home", "undone"]

        play(scenario)

    def test_one_whose_vm_has_left_durably_is_ended_as_it_is(self, tmp_path: Path) -> None:
        async def scenario() -> None:
            world = self.world(tmp_path, *HANDED_OVER, SourceStep.CONFIRMED, state=DestinationState.OWNED)
            await world.settlement.run()
            assert world.machine.gone.is_set()
            assert world.report.now.outcome is Outcome.COMPLETED

        play(scenario)


class TestWhatAPersonSays:
    """Of a move that was handed over, to a destination that may not have heard of it."""

    def world(self, folder: Path, state: DestinationState, *, away: bool, owner: Side) -> World:
        world = World(folder, There(state, away=away), *HANDED_OVER)
        world.machine._migration_is(MigrationState.COMPLETED)
        world.machine._run_state = RunState.POSTMIGRATE
        world.settlement.resolve(owner)
        return world

    @pytest.mark.parametrize("away", [True, False])
    def test_what_may_be_the_last_images_are_kept_where_only_the_person_knows(self, tmp_path: Path, away: bool) -> None:
        async def scenario() -> None:
            world = self.world(tmp_path, DestinationState.UNKNOWN, away=away, owner=Side.DESTINATION)
            await world.settlement.run()
            assert world.report.now.outcome is Outcome.COMPLETED
            assert world.home.left
            assert world.home.deleted == ()
            (said,) = world.report.now.findings
            assert (said.code, OLD_IMAGE in said.what, "administrator" in said.what) == ("image-left", True, True)
            world.journal.close()
            lines = world.journal.path.read_bytes().splitlines(keepends=True)
            world.journal.path.write_bytes(b"".join(lines[:-1]))  # the daemon died before it had deleted them
            await world.settling(Journal.load(world.journal.path)).run()
            assert world.home.deleted == ()

        play(scenario)

    @pytest.mark.parametrize("state", [DestinationState.OWNED, DestinationState.LOADED])
    def test_a_destination_that_has_it_is_handed_it(self, tmp_path: Path, state: DestinationState) -> None:
        async def scenario() -> None:
            world = self.world(tmp_path, state, away=False, owner=Side.DESTINATION)
            await world.settlement.run()
            assert world.there.state is DestinationState.OWNED
            assert world.home.deleted == (OLD_IMAGE,)

        play(scenario)

    def test_one_that_could_not_run_it_is_not_given_it_when_it_has_gone_away_since(self, tmp_path: Path) -> None:
        class Refuses(There):
            async def take_over(self) -> Running:
                self.state, self.away = DestinationState.GONE, True
                raise DestinationLost("its QEMU refused to run it")

        async def scenario() -> None:
            world = World(tmp_path, there := Refuses(DestinationState.LOADED, away=False), *HANDED_OVER)
            world.machine._migration_is(MigrationState.COMPLETED)
            world.machine._run_state = RunState.POSTMIGRATE
            world.settlement.resolve(Side.DESTINATION)
            running = asyncio.ensure_future(world.settlement.run())
            await until(lambda: there.away)
            asked = there.asked
            await until(lambda: there.asked > asked + 1)
            assert not world.home.left
            there.away = False
            await running
            assert world.home.given_back

        play(scenario)

    def test_a_destination_that_has_destroyed_it_is_not_given_it(self, tmp_path: Path) -> None:
        async def scenario() -> None:
            world = self.world(tmp_path, DestinationState.GONE, away=False, owner=Side.DESTINATION)
            world.there.rebooted = True
            running = asyncio.ensure_future(world.settlement.run())
            await until(lambda: world.there.asked > 1)
            with pytest.raises(Conflict, match="cannot be given to host 'there'"):
                world.settlement.resolve(Side.DESTINATION)
            assert not world.home.left
            assert not world.machine.gone.is_set()
            world.settlement.resolve(Side.SOURCE)
            await running
            assert await world.machine.status() is RunState.RUNNING

        play(scenario)

    @pytest.mark.parametrize(
        ("state", "why"), [(DestinationState.GONE, "was restarted"), (DestinationState.UNKNOWN, "knows nothing")]
    )
    def test_one_is_asked_also_if_the_destination_answers_and_cannot_know(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: DestinationState, why: str
    ) -> None:
        async def scenario() -> None:
            there = There(state, away=True)
            there.rebooted = True
            world = World(tmp_path, there, *HANDED_OVER)
            world.machine._migration_is(MigrationState.COMPLETED)
            running = asyncio.ensure_future(world.settlement.run())
            await until(lambda: world.report.now.outcome is Outcome.UNRESOLVED)
            assert world.report.now.fault is not None
            assert why not in world.report.now.fault.why
            there.away = False
            await until(lambda: world.report.now.fault is not None and why in world.report.now.fault.why)
            assert world.report.now.outcome is Outcome.UNRESOLVED
            assert not world.home.given_back
            world.settlement.resolve(Side.SOURCE)
            await running
            assert world.home.given_back == [SourceStep.HOME]

        monkeypatch.setattr(settle, "UNRESOLVED_AFTER_S", 0.0)
        play(scenario)

    def test_it_does_not_run_here_if_the_destination_answers_that_it_owns_it(self, tmp_path: Path) -> None:
        async def scenario() -> None:
            world = self.world(tmp_path, DestinationState.OWNED, away=False, owner=Side.SOURCE)
            await world.settlement.run()
            assert world.home.given_back == []
            assert world.report.now.outcome is Outcome.COMPLETED

        play(scenario)

    def test_nobody_has_a_say_when_the_destination_has_confirmed(self, tmp_path: Path) -> None:
        async def scenario() -> None:
            steps = (*HANDED_OVER, SourceStep.CONFIRMED)
            world = World(tmp_path, There(DestinationState.OWNED, away=True), *steps)
            for owner in Side:
                with pytest.raises(Conflict, match="needs no decision"):
                    world.settlement.resolve(owner)

        play(scenario)


async def nothing(*_: object) -> None: ...


def outgoing_with(
    folder: Path,
    hosted: HostedVm | Vms,
    destination: Callable[[str], There],
    monkeypatch: pytest.MonkeyPatch,
    *,
    boot: str = "boot",
    ask_again: Callable[[HostedVm], Awaitable[None]] = nothing,
    withdraw: Callable[..., Awaitable[None]] = nothing,
) -> Outgoing:
    """The moves of a host that has one VM, or these. ``destination`` is who is called at an address."""
    monkeypatch.setattr(Outgoing, "_dialler", lambda _, address, *_tell: destination(address).dial)
    page = SimpleNamespace(now=HostSettings(), on_change=lambda callback: None)
    one = SimpleNamespace(find=lambda name: hosted, ask_again=ask_again, crashed=nothing)
    vms = hosted if isinstance(hosted, Vms) else one
    relays = SimpleNamespace(pace=lambda: None)
    leasing = SimpleNamespace(reclaim=nothing, withdraw=withdraw, give_back=nothing)
    parts = SimpleNamespace(
        name="here",
        boot=boot,
        page=page,
        vms=vms,
        storage=SimpleNamespace(leaving=None),
        inspector=None,
        leasing=leasing,
        relays=relays,
        neighbours=None,
        files=SimpleNamespace(migrations=folder),
    )
    return Outgoing(cast(Any, parts), folder, Views("here", folder))


def test_a_stream_that_a_hanging_qemu_does_not_end_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        machine = FakeMachine(Wire(), FakeGuest(0))
        machine.hang()
        with pytest.raises(QemuError, match="does not end a migration"):
            await stop.stop_stream(machine)

    monkeypatch.setattr(stop, "CANCEL_WITHIN_S", 0.01)
    play(scenario)


class TestACancel:
    """By a daemon: it is answered at once, whatever hangs."""

    @pytest.fixture(autouse=True)
    def _quick(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module_of_outgoing, "CANCEL_WITHIN_S", 0.05)
        monkeypatch.setattr(module_of_outgoing, "SETTLE_EVERY_S", 0.01)

    def moving(
        self, folder: Path, machine: FakeMachine, there: There, monkeypatch: pytest.MonkeyPatch
    ) -> tuple[Outgoing, HostedVm]:
        """A move that copies memory until it is interrupted."""

        async def run(move: SourceMove) -> None:
            for step in MIGRATING:
                move.journal.record(step, 0.0)
            move.report.enter(Phase.COPY)
            await move.guard(asyncio.Event().wait())

        monkeypatch.setattr(SourceMove, "run", run)
        hosted = HostedVm(VM, VmState.RUNNING, machine=cast(Any, machine), migration=FIRST)
        outgoing = outgoing_with(folder, hosted, lambda _: there, monkeypatch)
        journal = Journal.begin(folder, msgspec.structs.replace(header(Side.SOURCE), migration=FIRST))
        outgoing._begin(journal, hosted, machine)
        return outgoing, hosted

    async def copies(self, outgoing: Outgoing) -> None:
        await until(lambda: outgoing._views.show(FIRST).phase is Phase.COPY)

    def test_while_its_qemu_does_not_answer_says_so_and_is_done_when_it_does(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def scenario() -> None:
            machine = FakeMachine(Wire(), FakeGuest(0))
            await machine.resume()
            there = There(DestinationState.INCOMING, away=False)
            outgoing, hosted = self.moving(tmp_path, machine, there, monkeypatch)
            await self.copies(outgoing)
            machine.hang()
            for _ in range(2):
                with pytest.raises(OutcomeUnknown, match="is not cancelled yet: its QEMU has not answered within"):
                    await outgoing.cancel(FIRST)
            machine.answer_again()
            assert (await outgoing._views.ended(FIRST)).outcome is Outcome.CANCELLED
            assert hosted.migration is None
            assert await machine.status() is RunState.RUNNING
            await until(lambda: there.state is DestinationState.GONE)
            outgoing._background.cancel()

        play(scenario)

    def test_of_a_qemu_that_hangs_for_longer_people_are_told(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def scenario() -> None:
            machine = FakeMachine(Wire(), FakeGuest(0))
            await machine.resume()
            there = There(DestinationState.INCOMING, away=False)
            outgoing, _ = self.moving(tmp_path, machine, there, monkeypatch)
            await self.copies(outgoing)
            machine.hang()
            told = await outgoing.cancel(FIRST)
            assert told.outcome is Outcome.UNRESOLVED
            assert told.fault is not None
            assert (told.fault.code, told.fault.why) == ("qemu-error", "its QEMU does not answer")
            with pytest.raises(Conflict, match="its QEMU does not answer"):
                await outgoing.cancel(FIRST)
            machine.answer_again()
            await until(lambda: outgoing._views.show(FIRST).outcome is Outcome.CANCELLED)
            outgoing._background.cancel()

        monkeypatch.setattr(settle, "QEMU_ANSWERS_WITHIN_S", 0.01)
        monkeypatch.setattr(module_of_outgoing, "CANCEL_WITHIN_S", 10)
        play(scenario)

    def test_that_comes_when_all_was_sent_waits_for_the_destination_and_says_so(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def scenario() -> None:
            machine = FakeMachine(Wire(), FakeGuest(0))
            there = There(DestinationState.LOADED, away=True)
            outgoing, hosted = self.moving(tmp_path, machine, there, monkeypatch)
            await self.copies(outgoing)
            machine._migration_is(MigrationState.COMPLETED)
            with pytest.raises(OutcomeUnknown, match="host 'there', which may have the whole VM, has not answered"):
                await outgoing.cancel(FIRST)
            assert hosted.migration == FIRST
            outgoing._background.cancel()

        play(scenario)

    def test_is_refused_once_the_destination_is_given_its_word(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Hangs(There):
            async def take_over(self) -> Running:
                await asyncio.Event().wait()
                raise AssertionError

        async def scenario() -> None:
            machine = FakeMachine(Wire(), FakeGuest(0))
            there = Hangs(DestinationState.LOADED, away=False)
            outgoing, _ = self.moving(tmp_path, machine, there, monkeypatch)
            await self.copies(outgoing)
            machine._migration_is(MigrationState.COMPLETED)
            for _ in range(2):  # the first is what finds out that it comes too late
                with pytest.raises(Conflict, match="any more: the VM is handed over to host 'there'"):
                    await outgoing.cancel(FIRST)
            assert Journal.look(tmp_path / f"{FIRST}.source.jsonl").step == SourceStep.HANDING_OVER
            outgoing._background.cancel()

        monkeypatch.setattr(module_of_outgoing, "CANCEL_WITHIN_S", 10)
        play(scenario)


class TestAVmThatLeft:
    """By a daemon that has its file, and may be killed, or lose its machine, at any moment."""

    def world(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Outgoing, Vms, Journal]:
        """A daemon that finds the journal of a move that the destination has confirmed."""
        files = Files(folder / "state", folder / "run")
        files.make()
        leasing = SimpleNamespace(give_back=nothing)
        records = SimpleNamespace(attach=nothing, forget_ended=lambda _: None)
        launcher = SimpleNamespace(leasing=leasing, records=records, check_memory=lambda *_: None)
        vms = Vms("here", files, cast(Any, launcher))
        there = There(DestinationState.OWNED, away=False)
        outgoing = outgoing_with(files.migrations, vms, lambda _: there, monkeypatch)
        path = files.migrations / f"{FIRST}.source.jsonl"
        if path.exists():
            return outgoing, vms, Journal.load(path)
        journal = Journal.begin(files.migrations, msgspec.structs.replace(header(Side.SOURCE), migration=FIRST))
        for step in (*HANDED_OVER, SourceStep.CONFIRMED):
            journal.record(step, 0.0)
        files.vm(VM.name).mkdir()
        toml.write(files.vm(VM.name) / "vm.toml", VM)
        return outgoing, vms, journal

    async def returns(self, vms: Vms) -> None:
        """The same VM lands here again."""
        hosted = vms.reserve(VM, SECOND)
        await vms.adopt(hosted, running=True)
        hosted.has_ended(SECOND)

    async def settled(self, outgoing: Outgoing, journal: Journal) -> None:
        await outgoing.recover(journal)
        await until(lambda: not outgoing._active)
        assert journal.step == SourceStep.FINISHED

    def test_may_come_back_when_a_power_cut_could_not_take_that_from_the_journal(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def scenario() -> None:
            outgoing, vms, journal = self.world(tmp_path, monkeypatch)
            await vms.load()
            durable, was_taken, fsync = [b""], [], os.fsync

            def watched(descriptor: int) -> None:
                fsync(descriptor)
                if os.path.samestat(os.fstat(descriptor), journal.path.stat()):
                    durable[0] = journal.path.read_bytes()
                    was_taken.append(vms.is_taken(VM.name))

            monkeypatch.setattr(os, "fsync", watched)
            await self.settled(outgoing, journal)
            await self.returns(vms)
            journal.path.write_bytes(durable[0])
            assert was_taken == [True]
            outgoing, vms, journal = self.world(tmp_path, monkeypatch)
            await vms.load()
            await self.settled(outgoing, journal)
            assert [config.name for config in vms._folders.read()] == [VM.name]

        play(scenario)

    def test_cannot_come_back_before_and_be_taken_for_the_one_that_left(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its end cannot be written. So it is tried again and again, and the next daemon does it, too."""

        full = Mock(side_effect=StateError("cannot write the journal", why="No space left on device"))

        async def scenario() -> None:
            for _ in range(2):
                full.reset_mock()
                outgoing, vms, journal = self.world(tmp_path, monkeypatch)
                await vms.load()
                with monkeypatch.context() as patch:
                    patch.setattr(journal, "record", full)
                    await outgoing.recover(journal)
                    await until(lambda: full.call_count > 1)
                    assert vms._folders.read() == []
                    with pytest.raises(Conflict):
                        await self.returns(vms)
                    outgoing._background.cancel()
                    await outgoing._background.idle()
            outgoing, vms, journal = self.world(tmp_path, monkeypatch)
            await self.settled(outgoing, journal)
            await self.returns(vms)

        monkeypatch.setattr(module_of_outgoing, "SETTLE_EVERY_S", 0.01)
        play(scenario)


async def breaks_in_copy(move: SourceMove) -> None:
    """What ``run`` is for a move whose destination goes away while it copies."""
    move.report.enter(Phase.COPY)
    move.journal.record(SourceStep.PREPARING, 0.0)
    raise HostUnreachable("host 'x' cannot be reached")


class TestByADaemon:
    """What a daemon makes of broken moves, and of the journals of an earlier one."""

    @pytest.fixture
    def there(self) -> dict[str, DestinationState | None]:
        """How destinations answer, by their address; None: they are away."""
        return {}

    def test_a_move_whose_destination_has_died_keeps_no_other_from_going(
        self, tmp_path: Path, there: dict[str, DestinationState | None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def scenario() -> None:
            there["x"] = None
            monkeypatch.setattr(SourceMove, "run", breaks_in_copy)
            machine = FakeMachine(Wire(), FakeGuest(0))
            hosted = HostedVm(VM, VmState.RUNNING, machine=cast(Any, machine))
            outgoing = self.outgoing(tmp_path, hosted, there, monkeypatch)
            journal = self.journal(tmp_path, FIRST, "x")
            await outgoing.recover(journal)
            await until(lambda: outgoing._views.show(FIRST).outcome is Outcome.FAILED)
            assert journal.step == SourceStep.HOME
            assert (outgoing.slots.taken, outgoing.under_way) == (0, 0)
            (move,) = outgoing._active.values()
            await machine.set_bandwidth(7)  # the share of a later move of the same VM
            move.home.own_cap = 1
            await outgoing._bandwidth.share()
            assert machine.parameters is not None
            assert machine.parameters.bandwidth_bytes_per_s == 7
            assert outgoing._bandwidth.allowance(FIRST, Kind.MEMORY) == 0
            outgoing._background.cancel()

        play(scenario)

    def outgoing(
        self,
        folder: Path,
        hosted: HostedVm,
        there: dict[str, DestinationState | None],
        monkeypatch: pytest.MonkeyPatch,
        *,
        boot: str = "boot",
    ) -> Outgoing:
        def destination(address: str) -> There:
            answer = there[address]
            return There(answer or DestinationState.GONE, away=answer is None)

        return outgoing_with(folder, hosted, destination, monkeypatch, boot=boot)

    def journal(self, folder: Path, identity: str, address: str, *steps: SourceStep) -> Journal:
        its = msgspec.structs.replace(header(Side.SOURCE), migration=identity, address=address)
        journal = Journal.begin(folder, its)
        for step in steps:
            fault = CAUSE.fault() if step is SourceStep.UNDOING else None
            journal.record(step, 0.0, fault=fault)
        journal.close()
        return Journal.load(journal.path)

    def test_a_vm_that_died_with_its_host_is_not_given_back_before_the_destination_has_answered(
        self, tmp_path: Path, there: dict[str, DestinationState | None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def scenario() -> None:
            there["x"] = None
            hosted = HostedVm(VM, VmState.CRASHED)
            outgoing = self.outgoing(tmp_path, hosted, there, monkeypatch, boot="another boot")
            journal = self.journal(tmp_path, FIRST, "x", *MIGRATING)
            await outgoing.recover(journal)
            await until(lambda: outgoing._views.show(FIRST).outcome is Outcome.UNRESOLVED)
            assert hosted.migration == FIRST
            assert journal.step == SourceStep.MIGRATING
            outgoing._background.cancel()

        monkeypatch.setattr(settle, "UNRESOLVED_AFTER_S", 0.0)
        play(scenario)

    def test_the_lease_of_a_vm_whose_qemu_is_silent_is_given_back_when_that_has_ended(
        self, tmp_path: Path, there: dict[str, DestinationState | None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Until then it may write."""

        async def scenario() -> None:
            there["x"] = DestinationState.LOADED
            has_ended, withdrawn = asyncio.Event(), asyncio.Event()

            async def ask_again(hosted: HostedVm) -> None:
                if not has_ended.is_set():
                    raise QemuError("QEMU with pid 7 does not answer")
                hosted.fault = None

            async def withdraw(*_: object) -> None:
                withdrawn.set()

            hosted = HostedVm(VM, VmState.CRASHED, fault=QemuError("QEMU with pid 7 does not answer"))
            outgoing = outgoing_with(
                tmp_path,
                hosted,
                lambda _: There(DestinationState.LOADED, away=False),
                monkeypatch,
                ask_again=ask_again,
                withdraw=withdraw,
            )
            journal = self.journal(tmp_path, FIRST, "x", *MIGRATING)
            await outgoing.recover(journal)
            await until(lambda: outgoing._views.show(FIRST).outcome is Outcome.UNRESOLVED)
            assert journal.step == SourceStep.MIGRATING
            assert not withdrawn.is_set()
            has_ended.set()
            await until(lambda: journal.step == SourceStep.UNDONE)
            assert withdrawn.is_set()
            assert hosted.migration is None
            outgoing._background.cancel()

        monkeypatch.setattr(module_of_outgoing, "SETTLE_EVERY_S", 0.0)
        play(scenario)

    def test_a_move_that_a_restart_undid_has_failed(
        self, tmp_path: Path, there: dict[str, DestinationState | None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It is no fault of the program's, and the VM is where it was."""

        async def scenario() -> None:
            there["x"] = DestinationState.GONE
            hosted = HostedVm(VM, VmState.RUNNING, machine=cast(Any, FakeMachine(Wire(), FakeGuest(0))))
            outgoing = self.outgoing(tmp_path, hosted, there, monkeypatch)
            await outgoing.recover(self.journal(tmp_path, FIRST, "x", *MIGRATING))
            await until(lambda: outgoing._views.show(FIRST).outcome is Outcome.FAILED)
            fault = outgoing._views.show(FIRST).fault
            assert fault is not None
            assert (fault.code, fault.vm, fault.todo) == ("migration-failed", VM.name, "move it again")
            with pytest.raises(Conflict, match="cannot be cancelled any more: it has ended: failed"):
                await outgoing.cancel(FIRST)
            outgoing._background.cancel()

        play(scenario)

    def test_a_vm_that_cannot_go_on_says_why(
        self, tmp_path: Path, there: dict[str, DestinationState | None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def scenario() -> None:
            there["x"] = DestinationState.GONE
            machine = FakeMachine(Wire(), FakeGuest(0))
            machine._run_state = RunState.INTERNAL_ERROR
            hosted = HostedVm(VM, VmState.PAUSED, machine=cast(Any, machine))
            outgoing = self.outgoing(tmp_path, hosted, there, monkeypatch)
            await outgoing.recover(self.journal(tmp_path, FIRST, "x", *MIGRATING))
            await until(lambda: outgoing._views.show(FIRST).outcome is Outcome.FAILED)
            assert (hosted.migration, hosted.state) == (None, VmState.PAUSED)
            assert "Resetting the Virtual Machine is required" in hosted.reason
            outgoing._background.cancel()

        play(scenario)

    def test_an_earlier_move_has_no_say_in_what_a_later_one_left_open(
        self, tmp_path: Path, there: dict[str, DestinationState | None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The destination of the earlier one has destroyed its copy; that of the later one may run the guest."""

        async def scenario() -> None:
            there.update({"x": DestinationState.GONE, "y": None})
            machine = FakeMachine(Wire(), FakeGuest(0))
            machine._migration_is(MigrationState.COMPLETED)
            hosted = HostedVm(VM, VmState.PAUSED, machine=cast(Any, machine))
            outgoing = self.outgoing(tmp_path, hosted, there, monkeypatch)
            first = self.journal(tmp_path, FIRST, "x", *MIGRATING, SourceStep.UNDOING, SourceStep.HOME)
            second = self.journal(tmp_path, SECOND, "y", *MIGRATING, SourceStep.HANDING_OVER)
            before = list(machine.events)
            await outgoing.recover(first)
            await outgoing.recover(second)
            await until(lambda: first.step == SourceStep.UNDONE)
            assert outgoing._views.show(FIRST).outcome is Outcome.CANCELLED
            assert hosted.migration == SECOND
            assert second.step == SourceStep.HANDING_OVER
            assert machine.events == before
            outgoing._background.cancel()

        play(scenario)

    def test_a_vm_that_is_home_can_be_operated_though_its_destination_stays_away(
        self, tmp_path: Path, there: dict[str, DestinationState | None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def scenario() -> None:
            there["x"] = None
            hosted = HostedVm(VM, VmState.STOPPED)
            outgoing = self.outgoing(tmp_path, hosted, there, monkeypatch)
            journal = self.journal(tmp_path, FIRST, "x", *MIGRATING, SourceStep.UNDOING, SourceStep.HOME)
            await outgoing.recover(journal)
            assert hosted.migration is None
            await until(lambda: outgoing._views.show(FIRST).outcome is Outcome.CANCELLED)
            with pytest.raises(LimosaError, match="needs no decision"):
                await outgoing.resolve(FIRST, Side.SOURCE)
            outgoing._background.cancel()

        play(scenario)

    def test_one_that_failed_is_shown_as_it_was_also_after_a_restart(
        self, tmp_path: Path, there: dict[str, DestinationState | None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its destination stays away, so that it is not settled when the daemon is restarted."""

        async def scenario() -> None:
            there["x"] = None
            monkeypatch.setattr(SourceMove, "run", breaks_in_copy)
            hosted = HostedVm(VM, VmState.RUNNING, machine=cast(Any, FakeMachine(Wire(), FakeGuest(0))))
            outgoing = self.outgoing(tmp_path, hosted, there, monkeypatch)
            journal = self.journal(tmp_path, FIRST, "x")
            await outgoing.recover(journal)
            failed = await outgoing._views.ended(FIRST)
            assert (failed.outcome, failed.phase, set(failed.phases)) == ("failed", Phase.COPY, {"waiting", "copy"})
            outgoing._background.cancel()
            there["x"] = DestinationState.GONE
            again = self.outgoing(tmp_path, hosted, there, monkeypatch)
            await again.recover(Journal.load(journal.path))
            assert again._views.show(FIRST) == failed
            await until(lambda: not again._active)
            assert again._views.show(FIRST) == failed

        play(scenario)

    @pytest.mark.parametrize("state", [DestinationState.GONE, None])
    def test_one_that_waits_for_a_person_does_so_also_after_a_restart(
        self,
        tmp_path: Path,
        there: dict[str, DestinationState | None],
        monkeypatch: pytest.MonkeyPatch,
        state: DestinationState | None,
    ) -> None:
        async def scenario() -> None:
            there["x"] = state
            phases = {"build-up": 0.1, "copy": 2.0}
            left = msgspec.structs.replace(
                first_view(), id=FIRST, phase=Phase.SWITCHOVER, outcome=Outcome.UNRESOLVED, phases=phases, total_s=2.1
            )
            Views("here", tmp_path).publish(left)
            outgoing = self.outgoing(tmp_path, HostedVm(VM, VmState.STOPPED), there, monkeypatch)
            journal = self.journal(tmp_path, FIRST, "x", *MIGRATING, SourceStep.HANDING_OVER)
            await outgoing.recover(journal)
            assert outgoing._views.show(FIRST) == left
            if state is None:
                await until(lambda: FIRST in outgoing._settling)
                await outgoing.resolve(FIRST, Side.SOURCE)
            await until(lambda: outgoing._views.show(FIRST).outcome is Outcome.FAILED)
            shown = outgoing._views.show(FIRST)
            assert (shown.phases, shown.total_s) == (phases, 2.1)
            outgoing._background.cancel()

        play(scenario)

    @pytest.mark.parametrize(
        ("steps", "outcome", "code"),
        [
            ([SourceStep.HANDING_OVER, SourceStep.CONFIRMED, SourceStep.FINISHED], Outcome.COMPLETED, ""),
            ([SourceStep.UNDOING, SourceStep.HOME, SourceStep.UNDONE], Outcome.CANCELLED, "cancelled"),
            ([SourceStep.HOME, SourceStep.UNDONE], Outcome.FAILED, "migration-failed"),
        ],
    )
    @pytest.mark.parametrize("kept", [None, b"", b'{"vm":"\xff"}', Outcome.UNRESOLVED])
    def test_a_move_that_ended_with_its_daemon_is_known_by_its_journal(
        self,
        tmp_path: Path,
        there: dict[str, DestinationState | None],
        monkeypatch: pytest.MonkeyPatch,
        steps: list[SourceStep],
        outcome: Outcome,
        code: str,
        kept: bytes | Outcome | None,
    ) -> None:
        async def scenario() -> None:
            outgoing = self.outgoing(tmp_path, HostedVm(VM, VmState.RUNNING), there, monkeypatch)
            journal = self.journal(tmp_path, FIRST, "x", *MIGRATING, *steps)
            if isinstance(kept, Outcome):
                view = msgspec.structs.replace(first_view(), id=FIRST, outcome=kept)
                (tmp_path / f"{FIRST}.view.json").write_bytes(msgspec.json.encode(view))
            elif kept is not None:
                (tmp_path / f"{FIRST}.view.json").write_bytes(kept)
            await outgoing.recover(journal)
            shown = await outgoing._views.ended(FIRST)
            assert (shown.outcome, shown.fault.code if shown.fault else "") == (outcome, code)
            assert outgoing._views.list() == [shown]

        play(scenario)
