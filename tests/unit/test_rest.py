"""A post-copy whose stream breaks is mended as soon as the destination can be reached, and ends with either QEMU."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import pytest
from test_again import FACTS, play

from harness.homes import BareHome
from harness.landings import PORTS, BareLanding, header
from limosa.errors import HostUnreachable
from limosa.migration import rest, source
from limosa.migration.destination import Destination
from limosa.migration.home import Terms
from limosa.migration.journal import Journal
from limosa.migration.report import Report
from limosa.migration.source import SourceMove
from limosa.model.migration import Migration, Outcome, Phase, Progress, Side
from limosa.qemu.protocol import MigrationState, StreamParameters
from limosa.settings.host import ConvergencePolicy
from limosa.testing.guest import FakeGuest
from limosa.testing.machine import FakeMachine
from limosa.testing.peer import LocalPeer
from limosa.testing.wire import Stage, Wire


class Move:
    """A move whose guest runs at the destination, and whose stream has broken since."""

    def __init__(self, folder: Path) -> None:
        self.wire = Wire()
        self.source = FakeMachine(self.wire, FakeGuest(1 << 20))
        landing = BareLanding(self.wire)
        self.destination = landing.machine
        there = Destination(Journal.begin(folder, header(Side.DESTINATION)), landing, "boot", self.destination)
        self.peer = LocalPeer(there, FACTS, PORTS)
        self.is_away = False
        self.notes: list[str] = []
        first = Migration(
            id="m1",
            vm="vm",
            source="here",
            destination="there",
            side=Side.SOURCE,
            transport="tcp",
            phase=Phase.TEAR_DOWN,
            outcome=Outcome.UNDER_WAY,
            progress=Progress(),
            accepted_at=0.0,
        )
        report = Report(first, lambda view: self.notes.append(view.progress.note))
        terms = Terms(ConvergencePolicy(post_copy=True), "tcp", encrypt=False)
        home = cast(Any, BareHome(self.source))
        self.script = SourceMove(
            Journal.begin(folder, header(Side.SOURCE)), self.source, self.dial, home, terms, report
        )

    async def dial(self) -> LocalPeer:
        if self.is_away:
            raise HostUnreachable("host 'there' cannot be reached")
        return self.peer

    async def breaks(self) -> None:
        for machine in (self.source, self.destination):
            await machine.prepare_outgoing(StreamParameters(post_copy=True))
        await self.source.resume()
        ours, theirs = socket.socketpair()
        with ours, theirs:
            await self.destination.receive(theirs)
            await self.source.migrate(ours)
        await self.source.start_post_copy()
        self.wire.failures[Stage.LOADED] = "the cable was cut"
        await self.until(MigrationState.POSTCOPY_PAUSED)

    async def until(self, state: MigrationState) -> None:
        while (await self.source.migration()).state is not state:
            pass

    async def is_told(self, words: str) -> None:
        while not any(words in note for note in self.notes):  # noqa: ASYNC110 - any of many views
            await asyncio.sleep(0)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rest, "TRY_EVERY_S", 0)
    monkeypatch.setattr(rest, "LOOK_EVERY_S", 0)
    monkeypatch.setattr(source, "LOOK_EVERY_S", 0)


Scenario = Callable[[Move], Awaitable[None]]


def played(folder: Path, scenario: Scenario) -> None:
    async def begun() -> None:
        move = Move(folder)
        await move.breaks()
        await scenario(move)

    play(begun())


def test_it_goes_on_when_the_destination_is_back(tmp_path: Path) -> None:
    async def scenario(move: Move) -> None:
        move.is_away = True
        following = asyncio.ensure_future(move.script._everything_followed(move.source))
        await move.is_told("waits for the rest of its memory until host 'there' can be reached (host 'there' cannot")
        move.is_away = False
        await following
        for machine in (move.source, move.destination):
            assert (await machine.migration()).state is MigrationState.COMPLETED
        assert move.destination.guest.pages == move.source.guest.pages

    played(tmp_path, scenario)


def test_it_breaks_again_and_is_mended_again(tmp_path: Path) -> None:
    async def scenario(move: Move) -> None:
        move.wire.failures[Stage.LOADED] = "the cable was cut once more"
        await move.script._everything_followed(move.source)
        assert [event.data.get("status") for event in move.source.events].count("postcopy-paused") == 2
        assert (await move.destination.migration()).state is MigrationState.COMPLETED

    played(tmp_path, scenario)


@pytest.mark.parametrize("side", ["source", "destination"])
def test_it_ends_with_either_qemu(tmp_path: Path, side: str) -> None:
    async def scenario(move: Move) -> None:
        (move.source if side == "source" else move.destination).die("")
        await move.script._everything_followed(move.source)

    played(tmp_path, scenario)
