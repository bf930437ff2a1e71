"""A terminal tied to a VM's serial console, over a WebSocket on the same connection kinds as everything else.

Bytes go through untouched both ways: the terminal is in raw mode, so that the guest gets Ctrl-C and the like, and
**Ctrl-]** detaches (as in telnet and ``virsh console``). The terminal is put back however the session ends, also by a
signal. Two threads work: one shows what the guest says; the calling one reads the keyboard and is woken through a pipe
when the other one has come to the end.
"""

from __future__ import annotations

import os
import select
import signal
import termios
import threading
import tty
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from types import FrameType
from typing import NoReturn, Protocol

from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus
from websockets.sync.client import connect

from limosa.client.host import error_of, fill_path
from limosa.client.route import Route
from limosa.errors import NotPermitted
from limosa.wire.endpoints import CONSOLE_PATH

#: Ctrl-]
DETACH = b"\x1d"
_CHUNK = 4096


class Session(Protocol):
    """What :func:`attach` needs of a WebSocket."""

    def send(self, message: bytes, /) -> None:
        """Send one binary message."""

    def recv(self) -> bytes | str:
        """Wait for a message. Raises ``ConnectionClosed``."""

    def close(self) -> None:
        """End the session; a waiting :meth:`recv` raises. May be called twice."""


@contextmanager
def open_console(route: Route, vm: str) -> Iterator[Session]:
    """A session with the VM's console. Raises what the daemon raised, or :class:`HostUnreachable`."""
    uri = f"ws://{route.authority}{fill_path(CONSOLE_PATH, {'vm': vm})}"
    try:
        # The stream is TLS already where it has to be. Compression would only delay single keys.
        session = connect(uri, sock=route.connect(), compression=None, user_agent_header=None, close_timeout=1)
    except InvalidStatus as fault:
        if fault.response.status_code == HTTPStatus.FORBIDDEN and not fault.response.body:
            # How servers refuse a WebSocket before it has begun; there is no room for more words.
            raise NotPermitted(
                f"the host refused the console of VM '{vm}'", why="it needs the role operator and a VM that runs"
            ) from fault
        raise error_of(fault.response.status_code, bytes(fault.response.body or b"")) from fault
    except InvalidHandshake as fault:
        raise route.explain(ConnectionError(str(fault))) from fault
    except OSError as fault:
        raise route.explain(fault) from fault
    with session:
        yield session


def attach(session: Session, keyboard: int, screen: int) -> str:
    """Pass bytes between two file descriptors and the console until one side ends it; says in words which.

    ``keyboard`` is in raw mode meanwhile, if it is a terminal. Its end of file detaches as Ctrl-] does.
    """
    reader = _Reader(session, screen)
    try:
        with _raw_mode(keyboard):
            reader.start()
            _type(session, keyboard, reader.wake)
            detached = not reader.reason
    finally:
        session.close()
        reader.finish()
    return "detached" if detached else reader.reason


class _Reader(threading.Thread):
    """Shows what the guest says, until the session ends or the screen is gone; ``wake`` then becomes readable."""

    def __init__(self, session: Session, screen: int) -> None:
        super().__init__(daemon=True)
        self.reason = ""
        self.wake, self._done = os.pipe()
        self._session = session
        self._screen = screen

    def run(self) -> None:
        try:
            while True:
                message = self._session.recv()
                _write(self._screen, message.encode() if isinstance(message, str) else message)
        except ConnectionClosed as fault:
            self.reason = (fault.rcvd and fault.rcvd.reason) or "the host closed the console"
        except OSError as fault:
            self.reason = f"cannot write to the terminal: {fault.strerror}"
        finally:
            os.close(self._done)

    def finish(self) -> None:
        """Wait for the end, which the closed session brings about, and free the pipe."""
        if self.ident is None:
            os.close(self._done)
        else:
            self.join()
        os.close(self.wake)


def _type(session: Session, keyboard: int, wake: int) -> None:
    """Send what is typed until Ctrl-], the end of the keyboard, or ``wake``."""
    while True:
        ready, _, _ = select.select([keyboard, wake], [], [])
        if wake in ready:
            return
        typed, detach, _ = os.read(keyboard, _CHUNK).partition(DETACH)
        try:
            if typed:
                session.send(typed)
        except ConnectionClosed:
            return
        if detach or not typed:
            return


@contextmanager
def _raw_mode(terminal: int) -> Iterator[None]:
    """Raw mode while the block runs, if it is a terminal; put back on every way out, SIGTERM and SIGHUP included."""
    if not os.isatty(terminal):
        yield
        return
    before = termios.tcgetattr(terminal)
    handlers = {number: signal.signal(number, _exit) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        tty.setraw(terminal)
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSAFLUSH, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _exit(number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def _write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
