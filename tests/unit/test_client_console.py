"""The console: bytes both ways, Ctrl-], and a terminal that is always put back."""

from __future__ import annotations

import os
import pty
import queue
import signal
import termios
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from websockets.exceptions import ConnectionClosedOK
from websockets.frames import Close
from websockets.http11 import Request, Response
from websockets.sync.server import Server, ServerConnection, unix_serve

from limosa.client.console import attach, open_console
from limosa.client.route import UnixRoute
from limosa.errors import HostUnreachable, NotFound, NotPermitted


class FakeSession:
    """A session whose guest says what the test puts in."""

    def __init__(self) -> None:
        self.sent = b""
        self.said: queue.Queue[bytes | None] = queue.Queue()

    def send(self, message: bytes, /) -> None:
        self.sent += message

    def recv(self) -> bytes:
        message = self.said.get()
        if message is None:
            raise ConnectionClosedOK(Close(1000, "the VM stopped"), None)
        return message

    def close(self) -> None:
        self.said.put(None)


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
    session = FakeSession()

    def greet() -> bytes:
        # The session is read only once the terminal is raw; what is typed earlier would be for the shell.
        os.write(terminal.person, b"root\x03\x1dnot this")
        session.recv = lambda: FakeSession.recv(session)  # type: ignore[method-assign]
        return b"login: "

    session.recv = greet  # type: ignore[method-assign]
    assert attach(session, terminal.device, terminal.device) == "detached"
    assert session.sent == b"root\x03"
    assert terminal.is_as_before()
    assert b"login: " in os.read(terminal.person, 100)


def test_the_end_of_the_session_ends_it(terminal: Terminal) -> None:
    session = FakeSession()
    session.said.put(None)
    assert attach(session, terminal.device, terminal.device) == "the VM stopped"
    assert terminal.is_as_before()


def test_a_signal_puts_the_terminal_back(terminal: Terminal) -> None:
    session = FakeSession()

    def interrupt(*_: object) -> bytes:
        os.kill(os.getpid(), signal.SIGTERM)
        return FakeSession.recv(session)

    session.recv = interrupt  # type: ignore[method-assign]
    with pytest.raises(SystemExit) as ended:
        attach(session, terminal.device, terminal.device)
    assert ended.value.code == 128 + signal.SIGTERM
    assert terminal.is_as_before()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_keyboard_that_ends_detaches() -> None:
    session = FakeSession()
    read, write = os.pipe()
    os.write(write, b"poweroff\n")
    os.close(write)
    with open(os.devnull, "wb") as nowhere:
        assert attach(session, read, nowhere.fileno()) == "detached"
    os.close(read)
    assert session.sent == b"poweroff\n"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    def echo(connection: ServerConnection) -> None:
        for message in connection:
            connection.send(message)

    def admit(connection: ServerConnection, request: Request) -> Response | None:
        if request.path == "/v1/vms/web1/console":
            return None
        if request.path == "/v1/vms/web3/console":
            return connection.respond(403, "")
        return connection.respond(404, '{"code": "not-found", "what": "there is no VM"}')

    with unix_serve(echo, str(tmp_path / "s"), process_request=admit) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.usefixtures("server")
def test_over_a_real_websocket(tmp_path: Path) -> None:
    with open_console(UnixRoute(str(tmp_path / "s")), "web1") as session:
        session.send(b"\x00\xff")
        assert session.recv() == b"\x00\xff"
    with pytest.raises(NotFound, match="there is no VM"), open_console(UnixRoute(str(tmp_path / "s")), "web2"):
        pass


@pytest.mark.usefixtures("server")
def test_a_refusal_without_words(tmp_path: Path) -> None:
    with pytest.raises(NotPermitted, match="role operator"), open_console(UnixRoute(str(tmp_path / "s")), "web3"):
        pass


def test_no_daemon(tmp_path: Path) -> None:
    with pytest.raises(HostUnreachable), open_console(UnixRoute(str(tmp_path / "s")), "web1"):
        pass
