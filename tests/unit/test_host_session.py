"""The destination's end of a session that breaks while memory is copied, and of the one that takes its place."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import msgspec
import pytest
from starlette.websockets import WebSocketDisconnect

from harness.landings import VM, BareLanding, header
from limosa.errors import LimosaError
from limosa.host import session
from limosa.host.session import Session
from limosa.migration.destination import Destination
from limosa.migration.journal import Journal
from limosa.migration.ownership import DestinationStep
from limosa.model import reading
from limosa.model.migration import Side
from limosa.model.network import HostNetwork
from limosa.qemu.protocol import MigrationState
from limosa.security.identity import Identity
from limosa.testing.wire import Wire
from limosa.wire import peer as say
from limosa.wire.encoding import encode
from limosa.wire.endpoints import Role

WITHIN_S = 20.0
LONG_S = 1000.0
MIGRATION = "abcdefghijkl"
OFFERED = say.Offered(network=HostNetwork(), addresses=("10.0.0.2",))
PREPARE = say.Prepare(
    migration=MIGRATION, vm=VM, accelerator="kvm", running=True, transport="tcp", credentials=None, post_copy=False
)
RELAY = say.RelayPlace(session="0" * 32, channel=0, window_log=20, credentials=None, several=False)


def play(scenario: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(WITHIN_S):
            await scenario

    asyncio.run(limited())


class Host:
    """What a session needs of the destination: one landing."""

    host = "there"

    def __init__(self, folder: Path) -> None:
        place = BareLanding(Wire())
        self.machine = place.machine
        journal = Journal.begin(folder, msgspec.structs.replace(header(Side.DESTINATION), migration=MIGRATION))
        self.landing = Destination(journal, place, boot="boot")

    async def prepare(self, request: say.Prepare = PREPARE) -> None:
        await self.landing.prepare(request, lambda _: None, lambda _: None)

    async def find(self, migration: str, source: str) -> Destination:
        assert (migration, source) == (MIGRATION, "here")
        return self.landing

    async def finish(self, destination: Destination) -> None:
        await destination.ended()

    def settled(self, destination: Destination, cause: LimosaError | None = None) -> None:
        assert destination is self.landing

    async def offers(self, reached_at: str) -> AsyncIterator[say.Offered]:
        yield OFFERED


class Source:
    """The WebSocket of a session, and the source at its other end."""

    scope: ClassVar = {"server": ("127.0.0.1", 1)}

    def __init__(self, host: Host) -> None:
        self._asked: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.answers: asyncio.Queue[bytes] = asyncio.Queue()
        self.session = Session(cast(Any, self), Identity("here", Role.HOST), cast(Any, host))
        self.serving = asyncio.ensure_future(self.session.serve())

    async def receive_bytes(self) -> bytes:
        asked = await self._asked.get()
        if asked is None:
            raise WebSocketDisconnect
        return asked

    async def send_bytes(self, data: bytes) -> None:
        self.answers.put_nowait(data)

    async def hear(self) -> say.FromDestination:
        return reading.decode(await self.answers.get(), cast(Any, say.FromDestination))  # type: ignore[no-any-return]

    async def attach(self, *, goes_on: bool) -> say.FromDestination:
        self._asked.put_nowait(encode(say.Hello(host="here", oldest=1, newest=1)))
        assert isinstance(await self.hear(), say.Welcome)
        self._asked.put_nowait(encode(say.Attach(migration=MIGRATION, goes_on=goes_on)))
        return await self.hear()

    async def take_over(self) -> say.FromDestination:
        self._asked.put_nowait(encode(say.TakeOver()))
        return await self.hear()

    def talks_nonsense(self) -> None:
        self._asked.put_nowait(b"nonsense")

    def breaks(self) -> None:
        self._asked.put_nowait(None)


@pytest.mark.parametrize("striped", [True, False])
def test_the_session_that_takes_its_place_hears_what_it_would_have_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, striped: bool
) -> None:
    monkeypatch.setattr(session, "ATTACHED_WITHIN_S", LONG_S)
    relay = msgspec.structs.replace(RELAY, striped=striped)

    async def scenario() -> None:
        host = Host(tmp_path)
        await host.prepare(msgspec.structs.replace(PREPARE, relay=relay))
        first = Source(host)
        assert await first.attach(goes_on=False) == say.Standing(state=say.DestinationState.INCOMING)
        first.breaks()
        while not host.landing._is_abandoned:  # noqa: ASYNC110 - play() bounds it
            await asyncio.sleep(0)
        second = Source(host)
        assert await second.attach(goes_on=True) == say.Standing(state=say.DestinationState.INCOMING)
        await first.serving
        assert first.answers.empty()
        if striped:
            assert await second.hear() == OFFERED
        host.machine.die("out of memory")
        lost = await second.hear()
        assert isinstance(lost, say.Lost)
        assert "out of memory" in lost.fault.why
        second.breaks()
        await second.serving
        assert host.landing.step is DestinationStep.GONE

    play(scenario())


def test_a_source_that_is_not_understood_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "ATTACHED_WITHIN_S", LONG_S)

    async def scenario() -> None:
        host = Host(tmp_path)
        await host.prepare()
        source = Source(host)
        await source.attach(goes_on=False)
        source.talks_nonsense()
        await source.serving
        assert host.landing.step is DestinationStep.GONE

    play(scenario())


def test_without_one_the_landing_is_destroyed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "ATTACHED_WITHIN_S", 0.01)

    async def scenario() -> None:
        host = Host(tmp_path)
        await host.prepare()
        source = Source(host)
        await source.attach(goes_on=False)
        source.breaks()
        await source.serving
        assert host.landing.step is DestinationStep.GONE

    play(scenario())


def test_it_is_said_how_long_after_the_word_the_guest_was_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "time", SimpleNamespace(time=lambda: 1000.0))

    async def scenario() -> None:
        host = Host(tmp_path)
        await host.prepare()
        host.machine._loaded(MigrationState.COMPLETED)
        host.machine.wire.now = 1000.004
        source = Source(host)
        await source.attach(goes_on=False)
        running = await source.take_over()
        assert isinstance(running, say.Running)
        assert running.after_s is not None
        assert (running.resumed_at, round(running.after_s, 6)) == (1000.004, 0.004)
        assert isinstance(await source.hear(), say.Adopted)
        source.breaks()
        await source.serving

    play(scenario())
