"""The console: bytes both ways, Ctrl-], and a terminal that is always put back."""

from __future__ import annotations

import asyncio
import os
import pty
import signal
import termios
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
from websockets.asyncio.server import ServerConnection, serve, unix_serve
from websockets.exceptions import ConnectionClosedOK
from websockets.frames import Close
from websockets.http11 import Request, Response

from harness.background import Background
from limosa.client.console import Session, attach, open_console, run
from limosa.client.route import Route, TlsRoute, UnixRoute
from limosa.errors import HostNotTrusted, HostUnreachable, NotFound, NotPermitted
from limosa.security import ca, tls
from limosa.wire.endpoints import Role


class FakeSession:
    """A session whose guest says what the test puts in; None is its end."""

    def __init__(self, *said: bytes | None) -> None:
        self.sent = b""
        self.said = list(said)

    async def send(self, message: bytes, /) -> None:
        self.sent += message

    async def recv(self) -> bytes:
        if not self.said:
            await asyncio.Event().wait()
        message = self.said.pop(0)
        if message is None:
            raise ConnectionClosedOK(Close(1000, "the VM stopped"), None)
        return message


def sit_at(session: Session, keyboard: int, screen: int) -> str:
    return run(attach(session, keyboard, screen))


class Terminal:
    """A pseudo-terminal: ``person`` is who types and reads, ``device`` what a program has."""

    def __init__(self) -> None:
        self.person, self.device = pty.openpty()
        self.before = termios.tcgetattr(self.device)

    def is_as_before(self) -> bool:
        return termios.tcgetattr(self.device) == self.before


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    terminal = Terminal()
    yield terminal
    os.close(terminal.person)
    os.close(terminal.device)


def test_ctrl_bracket_detaches_and_sends_what_was_typed_before(terminal: Terminal) -> None:
    class Greeting(FakeSession):
        async def recv(self) -> bytes:
            if self.said:
                # The session is read only once the terminal is raw; what is typed earlier would be for the shell.
                os.write(terminal.person, b"root\x03\x1dnot this")
            return await super().recv()

    session = Greeting(b"login: ")
    assert sit_at(session, terminal.device, terminal.device) == "detached"
    assert session.sent == b"root\x03"
    assert terminal.is_as_before()
    assert b"login: " in os.read(terminal.person, 100)


def test_the_end_of_the_session_ends_it(terminal: Terminal) -> None:
    assert sit_at(FakeSession(b"bye", None), terminal.device, terminal.device) == "the VM stopped"
    assert terminal.is_as_before()
    assert os.read(terminal.person, 100) == b"bye"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_puts_the_terminal_back(terminal: Terminal, number: signal.Signals) -> None:
    class Interrupted(FakeSession):
        async def recv(self) -> bytes:
            assert not terminal.is_as_before()
            os.kill(os.getpid(), number)
            return await super().recv()

    with pytest.raises(SystemExit) as ended:
        sit_at(Interrupted(), terminal.device, terminal.device)
    assert ended.value.code == 128 + number
    assert terminal.is_as_before()
    assert signal.getsignal(number) is signal.SIG_DFL


def test_a_keyboard_that_ends_detaches() -> None:
    session = FakeSession()
    read, write = os.pipe()
    os.write(write, b"poweroff\n")
    os.close(write)
    with open(os.devnull, "wb") as nowhere:
        assert sit_at(session, read, nowhere.fileno()) == "detached"
    os.close(read)
    assert session.sent == b"poweroff\n"


def test_a_file_or_nothing_may_be_the_keyboard(tmp_path: Path) -> None:
    (tmp_path / "typed").write_bytes(b"x" * 10_000)
    for keyboard, typed in ((tmp_path / "typed", b"x" * 10_000), (Path(os.devnull), b"")):
        session = FakeSession()
        with keyboard.open("rb") as file, (tmp_path / "screen").open("wb") as screen:
            assert sit_at(session, file.fileno(), screen.fileno()) == "detached"
        assert session.sent == typed


def test_a_screen_that_is_full_does_not_keep_the_keyboard_waiting(terminal: Terminal) -> None:
    class Flood(FakeSession):
        async def recv(self) -> bytes:
            os.write(terminal.person, b"q")
            return await super().recv()

        async def send(self, message: bytes, /) -> None:
            await super().send(message)
            os.write(terminal.person, b"\x1d")

    nobody_reads, write = os.pipe()
    session = Flood(b"y" * 1_000_000)
    assert sit_at(session, terminal.device, write) == "detached"
    assert session.sent == b"q"
    os.close(nobody_reads)
    os.close(write)


def test_a_screen_that_is_gone_ends_it(terminal: Terminal) -> None:
    read, write = os.pipe()
    os.close(read)
    assert sit_at(FakeSession(b"hello"), terminal.device, write) == "cannot write to the terminal: Broken pipe"
    assert terminal.is_as_before()
    os.close(write)


async def said_back(route: Route, vm: str, message: bytes) -> bytes | str:
    async with open_console(route, vm) as session:
        await session.send(message)
        return await session.recv()


async def echo(connection: ServerConnection) -> None:
    async for message in connection:
        await connection.send(message)


def admit(connection: ServerConnection, request: Request) -> Response | None:
    if request.path == "/v1/vms/web1/console":
        return None
    if request.path == "/v1/vms/web3/console":
        return connection.respond(403, "")
    return connection.respond(404, '{"code": "not-found", "what": "there is no VM"}')


@pytest.fixture
def background() -> Iterator[Background]:
    with Background() as background:
        yield background


@pytest.fixture
def route(background: Background, tmp_path: Path) -> Iterator[UnixRoute]:
    """To a host on a Unix socket."""

    @asynccontextmanager
    async def served() -> AsyncIterator[UnixRoute]:
        async with unix_serve(echo, str(tmp_path / "s"), process_request=admit):
            yield UnixRoute(str(tmp_path / "s"))

    with background.open(served()) as route:
        yield route


@pytest.fixture
def tls_route(background: Background, tmp_path: Path) -> Iterator[TlsRoute]:
    """To a host on TCP, as an operator."""
    ca.create_authority(tmp_path / "ca")
    ca.issue_host(tmp_path / "ca", "Host_1", ["127.0.0.1"], tmp_path / "host")
    ca.issue_person(tmp_path / "ca", "alice", Role.OPERATOR, tmp_path / "alice")

    @asynccontextmanager
    async def served() -> AsyncIterator[TlsRoute]:
        context = tls.server_context(tmp_path / "host")
        async with serve(echo, "127.0.0.1", 0, process_request=admit, ssl=context) as server:
            port = next(iter(server.sockets)).getsockname()[1]
            yield TlsRoute("Host_1", "127.0.0.1", port, tmp_path / "alice", "client")

    with background.open(served()) as route:
        yield route


def test_over_a_real_websocket(route: UnixRoute) -> None:
    assert run(said_back(route, "web1", b"\x00\xff")) == b"\x00\xff"
    with pytest.raises(NotFound, match="there is no VM"):
        run(said_back(route, "web2", b""))


def test_a_refusal_without_words(route: UnixRoute) -> None:
    with pytest.raises(NotPermitted, match="role operator"):
        run(said_back(route, "web3", b""))


def test_over_tls(tls_route: TlsRoute) -> None:
    assert run(said_back(tls_route, "web1", b"\x00\xff")) == b"\x00\xff"
    with pytest.raises(NotFound, match="there is no VM"):
        run(said_back(tls_route, "web2", b""))


def test_over_tls_another_host_is_not_taken_for_the_one_called(tls_route: TlsRoute) -> None:
    with pytest.raises(HostNotTrusted, match="Hostname mismatch"):
        run(said_back(msgspec.structs.replace(tls_route, name="host2"), "web1", b""))


def test_no_daemon(tmp_path: Path) -> None:
    with pytest.raises(HostUnreachable, match="no host daemon"):
        run(said_back(UnixRoute(str(tmp_path / "s")), "web1", b""))
