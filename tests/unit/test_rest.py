"""A post-copy whose stream breaks is mended as soon as the destination can be reached, and ends with either QEMU."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import msgspec
import pytest
from test_again import FACTS, play

from harness.homes import BareHome
from harness.landings import ADDRESS, PORTS, VM, BareLanding, first_view, header
from limosa.errors import HostUnreachable, QemuError, QemuGone
from limosa.host.incoming import Incoming
from limosa.host.session import Session
from limosa.host.vms import HostedVm
from limosa.migration import rest, source
from limosa.migration.destination import Destination
from limosa.migration.home import Terms
from limosa.migration.journal import Journal
from limosa.migration.ownership import DestinationStep
from limosa.migration.report import Report
from limosa.migration.source import SourceMove
from limosa.model.migration import Phase, Side
from limosa.model.network import HostNetwork
from limosa.model.vm import VmState
from limosa.qemu.protocol import MigrationState, StreamParameters
from limosa.security.identity import Identity
from limosa.settings.host import ConvergencePolicy, HostSettings
from limosa.testing.guest import FakeGuest
from limosa.testing.machine import FakeMachine
from limosa.testing.peer import LocalPeer
from limosa.testing.wire import Stage, Wire
from limosa.transport import tcp
from limosa.wire import peer as say
from limosa.wire.endpoints import Role

MIGRATION = "abcdefabcdef"


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
        first = msgspec.structs.replace(first_view(), phase=Phase.TEAR_DOWN)
        report = Report(first, lambda view: self.notes.append(view.progress.note))
        terms = Terms(ConvergencePolicy(post_copy=True), "tcp", encrypt=False)
        home = BareHome(self.source)
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


class Connection:
    """A WebSocket of the source's, as the destination's session knows it."""

    scope: ClassVar = {"server": (ADDRESS, 1)}

    def __init__(self) -> None:
        self.asked: asyncio.Queue[bytes] = asyncio.Queue()
        self.answers: asyncio.Queue[bytes] = asyncio.Queue()

    async def receive_bytes(self) -> bytes:
        return await self.asked.get()

    async def send_bytes(self, data: bytes) -> None:
        self.answers.put_nowait(data)

    async def ask(self, message: say.Message) -> Any:
        self.asked.put_nowait(msgspec.json.encode(message))
        return msgspec.json.decode(await self.answers.get(), type=say.FromDestination)


def host_with(hosted: HostedVm | None) -> Incoming:
    async def network() -> HostNetwork:
        return HostNetwork()

    page = SimpleNamespace(now=HostSettings(migration_ports=PORTS), on_change=lambda callback: None)
    parts = SimpleNamespace(
        name="there",
        boot="boot",
        page=page,
        vms=SimpleNamespace(find=lambda name: hosted),
        files=SimpleNamespace(migrations=None),
        inspector=SimpleNamespace(network=network),
        storage=None,
    )
    return Incoming(cast(Any, parts))


def landed(folder: Path, machine: FakeMachine) -> Destination:
    journal = Journal.begin(folder, msgspec.structs.replace(header(Side.DESTINATION), migration=MIGRATION))
    for step in (DestinationStep.RESERVED, DestinationStep.CONTINUING, DestinationStep.OWNED):
        journal.record(step, 0.0)
    return Destination(journal, BareLanding(machine.wire), "boot", machine)


def test_a_destination_hands_its_qemu_the_stream_of_who_knows_the_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        machine = FakeMachine(Wire(), FakeGuest(0))
        taken: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

        async def receive_rest(stream: socket.socket) -> None:
            stream.setblocking(False)
            with stream:
                taken.set_result(await asyncio.get_running_loop().sock_recv(stream, 4))

        monkeypatch.setattr(machine, "receive_rest", receive_rest)
        incoming = host_with(HostedVm(VM, VmState.RUNNING, machine=cast(Any, machine)))
        incoming._landing[MIGRATION] = landing = landed(tmp_path, machine)
        connection = Connection()
        session = Session(cast(Any, connection), Identity("here", Role.HOST), incoming)
        serving = asyncio.ensure_future(session.serve())
        await connection.ask(say.Hello(host="here", oldest=1, newest=1))
        for _ in range(2):
            assert (await connection.ask(say.Attach(migration=MIGRATION))).state is say.DestinationState.OWNED
            adopted = msgspec.json.decode(await connection.answers.get(), type=say.FromDestination)
            assert isinstance(adopted, say.Adopted)
            incoming._landing[MIGRATION] = landing
            assert landing._sessions == 1
        awaited = await connection.ask(say.AwaitRest())
        assert awaited.addresses == (ADDRESS,)
        channel = await tcp.connect_any(("127.0.0.9", *awaited.addresses), awaited.port, awaited.token)
        channel.stream.send(b"page")
        assert await taken == b"page"
        channel.close()
        serving.cancel()
        await asyncio.wait({serving})
        assert landing._sessions == 0

    play(scenario())


def test_a_destination_says_whether_its_qemu_has_ended_or_only_keeps_silent(tmp_path: Path) -> None:
    async def scenario() -> None:
        destination = landed(tmp_path, FakeMachine(Wire(), FakeGuest(0)))
        for ended in (None, HostedVm(VM, VmState.CRASHED)):
            with pytest.raises(QemuGone):
                host_with(ended).machine_of(destination)
        silent = HostedVm(VM, VmState.CRASHED, fault=QemuError("QEMU does not answer"))
        with pytest.raises(QemuError, match="does not answer") as caught:
            host_with(silent).machine_of(destination)
        assert not isinstance(caught.value, QemuGone)

    play(scenario())
