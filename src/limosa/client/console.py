"""A terminal tied to a VM's serial console, over a WebSocket on the same connection kinds as everything else.

Bytes go through untouched both ways: the terminal is in raw mode, so that the guest gets Ctrl-C and the like, and
**Ctrl-]** detaches (as in telnet and ``virsh console``). The terminal is put back however the session ends, also by a
signal. Everything happens on one event loop in one thread: two threads that read and write one ``SSLSocket`` at once
can hang it for ever. :func:`run` makes the loop, whose select(2), unlike epoll, also takes a file or /dev/null as the
keyboard or the screen.
"""

from __future__ import annotations

import asyncio
import os
import selectors
import signal
import termios
import tty
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from http import HTTPStatus
from typing import Any, Protocol, TypeVar

from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus

from limosa.client.host import error_of, fill_path
from limosa.client.route import Route
from limosa.errors import LimosaError, NotPermitted
from limosa.wire.endpoints import CONSOLE_PATH

#: Ctrl-]
DETACH = b"\x1d"
#: A write of at most PIPE_BUF bytes does not block where select(2) says that one is possible.
_CHUNK = 4096
_SIGNALS = (signal.SIGTERM, signal.SIGHUP)

T = TypeVar("T")


class Session(Protocol):
    """What :func:`attach` needs of a WebSocket."""

    async def send(self, message: bytes, /) -> None:
        """Send one binary message. Raises ``ConnectionClosed``."""

    async def recv(self) -> bytes | str:
        """Wait for a message. Raises ``ConnectionClosed``."""


def run(visit: Coroutine[Any, Any, T]) -> T:
    """Run what uses a console on a loop of its own. The terminal's signals need the main thread."""
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as runner:
        return runner.run(visit)


@asynccontextmanager
async def open_console(route: Route, vm: str) -> AsyncIterator[Session]:
    """A session with the VM's console. Raises what the daemon raised, or :class:`HostUnreachable`.

    The loop stands still until the host's port is open, ten seconds at most.
    """
    path = fill_path(CONSOLE_PATH, {"vm": vm})
    try:
        stream, context = route.dial()
        uri = f"{'wss' if context else 'ws'}://{route.authority}{path}"
        # Compression would only delay single keys.
        session = await connect(
            uri, sock=stream, ssl=context, compression=None, user_agent_header=None, close_timeout=1
        )
    except InvalidStatus as fault:
        raise _refusal(fault, vm) from fault
    except InvalidHandshake as fault:
        raise route.explain(ConnectionError(str(fault))) from fault
    except OSError as fault:
        raise route.explain(fault) from fault
    async with session:
        yield session


async def attach(session: Session, keyboard: int, screen: int) -> str:
    """Pass bytes between two file descriptors and the console until one side ends it; says in words which.

    ``keyboard`` is in raw mode meanwhile, if it is a terminal; SIGTERM and SIGHUP then raise ``SystemExit`` once it is
    put back. The keyboard's end of file detaches as Ctrl-] does.
    """
    with _raw_mode(keyboard) as signalled:
        showing = asyncio.create_task(_show(session, screen))
        typing = asyncio.create_task(_type(session, keyboard))
        ends: set[asyncio.Future[Any]] = {signalled, showing, typing}
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            showing.cancel()
            typing.cancel()
            await asyncio.wait({showing, typing})
    if signalled.done():
        raise SystemExit(128 + signalled.result())
    return typing.result() if showing.cancelled() else showing.result()


async def _show(session: Session, screen: int) -> str:
    """Show what the guest says until the session ends or the screen is gone; says why."""
    try:
        while True:
            message = await session.recv()
            await _write(screen, message.encode() if isinstance(message, str) else message)
    except ConnectionClosed as fault:
        return _end_of(fault)
    except OSError as fault:
        return f"cannot write to the terminal: {fault.strerror}"


async def _type(session: Session, keyboard: int) -> str:
    """Send what is typed until Ctrl-], the end of the keyboard or of the session; says why."""
    try:
        while True:
            typed, detach, _ = (await _read(keyboard)).partition(DETACH)
            if typed:
                await session.send(typed)
            if detach or not typed:
                return "detached"
    except ConnectionClosed as fault:
        return _end_of(fault)
    except OSError as fault:
        return f"cannot read from the terminal: {fault.strerror}"


async def _read(descriptor: int) -> bytes:
    loop = asyncio.get_running_loop()
    await _until_ready(descriptor, loop.add_reader, loop.remove_reader)
    return os.read(descriptor, _CHUNK)


async def _write(descriptor: int, data: bytes) -> None:
    """Write it all. A screen that takes nothing for a while keeps neither the keyboard nor the session waiting."""
    loop = asyncio.get_running_loop()
    while data:
        await _until_ready(descriptor, loop.add_writer, loop.remove_writer)
        data = data[os.write(descriptor, data[:_CHUNK]) :]


async def _until_ready(descriptor: int, add: Callable[..., None], remove: Callable[[int], bool]) -> None:
    ready = asyncio.Event()
    add(descriptor, ready.set)
    try:
        await ready.wait()
    finally:
        remove(descriptor)


@contextmanager
def _raw_mode(terminal: int) -> Iterator[asyncio.Future[int]]:
    """Raw mode while the block runs, if it is a terminal; gives what is done with the number of SIGTERM or SIGHUP."""
    loop = asyncio.get_running_loop()
    signalled: asyncio.Future[int] = loop.create_future()

    def arrived(number: int) -> None:
        if not signalled.done():
            signalled.set_result(number)

    if not os.isatty(terminal):
        yield signalled
        return
    before = termios.tcgetattr(terminal)
    for number in _SIGNALS:
        loop.add_signal_handler(number, arrived, number)
    try:
        tty.setraw(terminal)
        yield signalled
    finally:
        with suppress(termios.error):  # a terminal that hung up
            termios.tcsetattr(terminal, termios.TCSAFLUSH, before)
        for number in _SIGNALS:
            loop.remove_signal_handler(number)


def _end_of(fault: ConnectionClosed) -> str:
    return (fault.rcvd and fault.rcvd.reason) or "the host closed the console"


def _refusal(fault: InvalidStatus, vm: str) -> LimosaError:
    response = fault.response
    if response.status_code == HTTPStatus.FORBIDDEN and not response.body:
        # How servers refuse a WebSocket before it has begun; there is no room for more words.
        return NotPermitted(
            f"the host refused the console of VM '{vm}'", why="it needs the role operator and a VM that runs"
        )
    return error_of(response.status_code, bytes(response.body or b""))
