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
from limosa.host import disk_moves
from limosa.host.api import _on_bug
from limosa.host.session import Session
from limosa.host.vms import HostedVm
from limosa.migration.journal import Journal
from limosa.migration.source import SourceMove
from limosa.model.migration import Fault, Outcome, Side
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
        outgoing = outgoing_with(tmp_path, hosted, lambda _: There(DestinationState.GONE, away=False), monkeypatch)
        begun = header(Side.SOURCE)
        outgoing._begin(Journal.begin(tmp_path, begun), hosted, machine)
        ended = await outgoing._views.ended(begun.migration)
        assert ended.outcome is Outcome.FAILED
        assert is_logged(ended.fault, caplog, f"move {begun.migration}")

    play(scenario())


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
