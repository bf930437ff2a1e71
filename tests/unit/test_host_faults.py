"""What nobody foresaw ends in an error as any other, and the log has the traceback."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from test_host_disk_moves import World, play, storage, world
from test_settle import There, outgoing_with

from harness.landings import VM, header
from limosa.errors import StateError
from limosa.host import disk_moves, outgoing
from limosa.host.api import _on_bug
from limosa.host.session import Session
from limosa.host.vms import HostedVm
from limosa.migration.journal import Journal
from limosa.migration.ownership import SourceStep
from limosa.migration.settle import Settlement
from limosa.migration.source import SourceMove
from limosa.model.migration import Fault, Migration, Outcome, Side
from limosa.model.vm import VmState
from limosa.security.identity import Identity
from limosa.testing.guest import FakeGuest
from limosa.testing.machine import FakeMachine
from limosa.testing.wire import Wire
from limosa.wire import peer as say
from limosa.wire.endpoints import Role
from limosa.wire.peer import DestinationState

__all__ = ["storage", "world"]


async def broken(*_: object) -> None:
    raise ZeroDivisionError("nobody foresaw it")


def is_logged(fault: Fault | None, log: pytest.LogCaptureFixture, during: str) -> bool:
    """Also where it happened."""
    assert fault is not None
    assert (fault.code, fault.why) == ("internal", "ZeroDivisionError('nobody foresaw it')")
    assert "journalctl" in fault.todo
    lines = log.text.splitlines()
    at = next(number for number, line in enumerate(lines) if f"an internal error: {during}" in line)
    return lines[at + 1].startswith("Traceback") and any("in broken" in line for line in lines[at:])


def test_in_a_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(SourceMove, "run", broken)

    async def scenario() -> None:
        machine = FakeMachine(Wire(), FakeGuest(0))
        await machine.resume()
        hosted = HostedVm(VM, VmState.RUNNING, machine=cast(Any, machine))
        moves = outgoing_with(tmp_path, hosted, lambda _: There(DestinationState.GONE, away=False), monkeypatch)
        begun = header(Side.SOURCE)
        moves._begin(Journal.begin(tmp_path, begun), hosted, machine)
        ended = await moves._views.ended(begun.migration)
        assert ended.outcome is Outcome.FAILED
        assert is_logged(ended.fault, caplog, f"move {begun.migration}")

    play(scenario())


def test_when_a_move_is_settled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is tried again, and the log has each cause once."""
    no_space = StateError("cannot write", why="No space left on device")
    unforeseen = ZeroDivisionError("nobody foresaw it")
    causes = iter([unforeseen, unforeseen, no_space, no_space, no_space, unforeseen])
    run = Settlement.run

    async def settles_later(settlement: Settlement) -> None:
        if (cause := next(causes, None)) is not None:
            raise cause
        await run(settlement)

    monkeypatch.setattr(SourceMove, "run", broken)
    monkeypatch.setattr(Settlement, "run", settles_later)
    monkeypatch.setattr(outgoing, "SETTLE_EVERY_S", 0.001)

    async def scenario() -> None:
        shown = await fails(tmp_path, monkeypatch)
        faults = [(view.outcome, view.fault.code) for view in shown if view.fault is not None]
        unresolved = [(Outcome.UNRESOLVED, code) for code in ("internal", "state-error", "internal")]
        assert faults == [*unresolved, (Outcome.FAILED, "internal")]
        kept = [record for record in caplog.records if "could not be settled yet" in record.message]
        assert [record.exc_info is not None for record in kept] == [True, False, True]

    play(scenario())


def test_when_nothing_but_the_end_of_a_move_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its VM is its users' again, and the move has failed, whatever follows."""
    record, tries = Journal.record, 0

    def is_full(journal: Journal, step: Any, *words: Any, **named: Any) -> None:
        nonlocal tries
        if step == SourceStep.UNDONE and (tries := tries + 1) < 4:
            raise StateError("cannot write", why="No space left on device")
        record(journal, step, *words, **named)

    monkeypatch.setattr(SourceMove, "run", broken)
    monkeypatch.setattr(Journal, "record", is_full)
    monkeypatch.setattr(outgoing, "SETTLE_EVERY_S", 0.001)

    async def scenario() -> None:
        shown = await fails(tmp_path, monkeypatch)
        assert (tries, {view.outcome for view in shown}) == (4, {Outcome.UNDER_WAY, Outcome.FAILED})
        assert len([one for one in caplog.messages if "could not be settled yet" in one]) == 1

    play(scenario())


async def fails(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Migration]:
    """A move that ends. Returns all that was shown of it."""
    machine = FakeMachine(Wire(), FakeGuest(0))
    await machine.resume()
    hosted = HostedVm(VM, VmState.RUNNING, machine=cast(Any, machine))
    moves = outgoing_with(folder, hosted, lambda _: There(DestinationState.GONE, away=False), monkeypatch)
    shown: list[Migration] = []
    monkeypatch.setattr(moves._views, "publish", shown.append)
    moves._begin(Journal.begin(folder, header(Side.SOURCE)), hosted, machine)
    await moves._background.idle()
    return shown


def test_in_a_move_of_disks(world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(disk_moves._Move, "run", broken)

    async def scenario() -> None:
        await world.load()
        begun = await world.begin()
        ended = await world.views.ended(begun.id)
        assert ended.outcome is Outcome.FAILED
        assert is_logged(ended.fault, caplog, f"move {begun.id} of disks")
        await world.moves._background.idle()

    play(scenario())


def test_when_a_move_of_disks_is_undone(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is tried again, and the log has it once."""
    recover, tries = world.moves._recover, 0

    async def recovers_later(*how: Any) -> Any:
        nonlocal tries
        tries += 1
        if tries < 4:
            await broken()
        return await recover(*how)

    monkeypatch.setattr(disk_moves._Move, "run", broken)
    monkeypatch.setattr(disk_moves, "UNDO_EVERY_S", 0.001)
    monkeypatch.setattr(world.moves, "_recover", recovers_later)

    async def scenario() -> None:
        await world.load()
        await world.views.ended((await world.begin()).id)
        await world.moves._background.idle()
        undone = [record for record in caplog.records if "could not be undone" in record.message]
        assert [record.exc_info is not None for record in undone] == [True]

    play(scenario())


def test_in_a_session(caplog: pytest.LogCaptureFixture) -> None:
    told: asyncio.Queue[Any] = asyncio.Queue()

    async def send_bytes(data: bytes) -> None:
        told.put_nowait(msgspec.json.decode(data, type=say.FromDestination))

    async def scenario() -> None:
        socket = SimpleNamespace(send_bytes=send_bytes, scope={"server": ("10.0.0.2", 7411)})
        session = Session(cast(Any, socket), Identity("here", Role.HOST), cast(Any, SimpleNamespace(host="there")))
        session._do = broken  # type: ignore[method-assign, assignment]
        session._messages.put_nowait(say.TakeOver())
        working = asyncio.ensure_future(session._work())
        assert is_logged((await told.get()).fault, caplog, "'TakeOver' of host here")
        working.cancel()

    play(scenario())


def test_in_a_request(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        request = SimpleNamespace(method="GET", scope={"path": "/v1/vms/a\nb"})
        try:
            await broken()
        except ZeroDivisionError as error:
            response = await _on_bug(cast(Any, request), error)
        assert is_logged(msgspec.json.decode(response.body, type=Fault), caplog, "GET /v1/vms/a%0Ab")

    play(scenario())
