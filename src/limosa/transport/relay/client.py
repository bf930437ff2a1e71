"""A daemon's relays: starting one, asking it, knowing when it ended.

A relay lives as long as the daemon's end of its control socket. So there is nothing to clean up after a daemon that was
killed, and :meth:`Relay.end` cannot fail. What the daemon must do is to notice when a relay ends by itself
(:attr:`Relay.ended`): all streams through it have ended then, and QEMU says so for each move; the next move needs a new
relay.

A relay runs as the same unprivileged user as QEMU. It reads what comes from the network, and needs nothing but the
descriptors it is given.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import msgspec

import limosa
from limosa.errors import InvalidInput, RelayFailed
from limosa.model import reading
from limosa.qemu.process import let_be_ended, owner_of
from limosa.transport.relay import control
from limosa.transport.relay.control import Answer, ChannelStatistics, FromRelay, Statistics
from limosa.transport.relay.frames import MAX_RAW_BYTES
from limosa.wire.parsing import parse
from limosa.wire.peer import StreamCredentials

A = TypeVar("A", bound=Answer)
V = TypeVar("V")

_decoder: msgspec.json.Decoder[FromRelay] = reading.decoder(FromRelay)
DEFAULT_LEVEL = 1
_SO_SNDBUFFORCE = 32  # socket(7)
#: A relay that is only busy answers sooner, also one that is still being loaded.
ANSWERS_WITHIN_S = 15.0
#: A relay is of the same Limosa as its daemon, also where that is not installed.
_SOURCES = Path(limosa.__file__).parent.parent


class Relay:
    """A relay process. Made by :meth:`start`; belongs to one event loop.

    Every call raises :class:`RelayFailed` if the relay ended, also while the call waits. A relay that does not answer
    within :data:`ANSWERS_WITHIN_S`, waited for or not, is ended: it would let every move wait that it carries or that
    joins it. ``on_channel_ended`` is called with the last figures of each channel, ``on_lane_lost`` with the number of
    a lane that broke or did not come about, and why.
    """

    def __init__(self, process: subprocess.Popen[bytes], sock: socket.socket) -> None:
        self.pid = process.pid
        #: set as soon as the relay is gone, whoever ended it; its streams have ended then
        self.ended = asyncio.Event()
        self.on_channel_ended: Callable[[ChannelStatistics], None] = lambda _: None
        self.on_lane_lost: Callable[[int, str], None] = lambda _number, _why: None
        self._why = ""
        self._process, self._socket = process, sock
        self._asked: deque[asyncio.Future[Answer]] = deque()
        self._loop = asyncio.get_running_loop()
        #: the window that was agreed on, once the session is up
        self._opened: asyncio.Future[int] = self._loop.create_future()
        self._pidfd = os.pidfd_open(process.pid)
        self._loop.add_reader(sock.fileno(), self._on_message)
        self._loop.add_reader(self._pidfd, self._on_exit)

    @classmethod
    async def start(cls, *, user: str | None = None) -> Relay:
        """A new relay, which runs as ``user`` (root may name one; None: our own).

        Raises :class:`RelayFailed`, or :class:`QemuError` if there is no such user; nothing runs then, nor if it is
        cancelled.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            # Forking takes milliseconds, which another VM's switchover should not have to wait for.
            starting = asyncio.ensure_future(asyncio.to_thread(_spawn, theirs.fileno(), user))
            try:
                process = await asyncio.shield(starting)
            except asyncio.CancelledError:
                with suppress(RelayFailed):
                    process = await starting
                    process.kill()
                    process.wait()
                ours.close()
                raise
            except BaseException:
                ours.close()
                raise
        ours.setblocking(False)
        return cls(process, ours)

    async def open_sender(
        self,
        connections: Sequence[socket.socket],
        *,
        credentials: StreamCredentials | None,
        window_log: int,
        level: int | None = DEFAULT_LEVEL,
    ) -> int:
        """Be the source's side over connections to the destination's relay, of which it gets duplicates: a forward and
        a backward one.

        ``level``: zstd's, None for no compression. Returns the window both sides agreed on, as a power of two.
        """
        wish = control.OpenSender(credentials=credentials, window_log=window_log, level=level, striped=False)
        return await self._open(wish, connections)

    async def call_lanes(
        self, *, credentials: StreamCredentials | None, window_log: int, level: int | None = DEFAULT_LEVEL
    ) -> None:
        """Be the source's side of a striped session, which is :meth:`opened` with its first lane."""
        wish = control.OpenSender(credentials=credentials, window_log=window_log, level=level, striped=True)
        await self._ask(control.Done, wish)

    async def open_receiver(
        self, connections: Sequence[socket.socket], *, credentials: StreamCredentials | None, window_log: int
    ) -> int:
        """Be the destination's side. Otherwise as :meth:`open_sender`."""
        wish = control.OpenReceiver(credentials=credentials, window_log=window_log, striped=False)
        return await self._open(wish, connections)

    async def await_lanes(self, *, credentials: StreamCredentials | None, window_log: int) -> None:
        """Be the destination's side of a striped session, which is :meth:`opened` with its first lane."""
        await self._ask(
            control.Done, control.OpenReceiver(credentials=credentials, window_log=window_log, striped=True)
        )

    async def opened(self) -> int:
        """Wait for the session to be open. Returns the window, as a power of two."""
        return await asyncio.shield(self._opened)

    async def add_lane(self, number: int, connections: Sequence[socket.socket]) -> None:
        """At the source of a striped session: have a lane join, over a forward and a backward connection.

        It gets duplicates, and is not waited for. ``number``: higher than all before. Raises :class:`InvalidInput` if
        there are as many lanes as may be.
        """
        await self._ask(control.Done, control.AddLane(lane=number), [one.fileno() for one in connections])

    async def add_connection(self, connection: socket.socket) -> None:
        """At the destination of a striped session: another connection of the source's, of which it gets a duplicate.

        It is not waited for. Raises :class:`InvalidInput` if there are as many lanes as may be.
        """
        await self._ask(control.Done, control.AddConnection(), [connection.fileno()])

    async def _open(self, wish: control.Open, connections: Sequence[socket.socket]) -> int:
        await self._ask(control.Done, wish, [one.fileno() for one in connections])
        return await self.opened()

    async def carry(self, number: int, stream: socket.socket) -> None:
        """Carry another stream, which stands: the relay gets a duplicate. See :meth:`open_channel`."""
        await self._ask(control.Done, control.OpenChannel(channel=number), (stream.fileno(),))

    async def open_channel(self, number: int) -> socket.socket:
        """Carry another stream. Returns the socket for QEMU, which is the caller's to close.

        The destination's relay is to be asked first, which may be before its session is open. A number must not be
        used twice in a session.
        """
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                for end in (ours, theirs):
                    widen(end)
                await self.carry(number, theirs)
        except BaseException:
            ours.close()
            raise
        return ours

    async def set_short(self, number: int, short: bool) -> None:
        """Whether little of this channel may wait from now on: it would be sent while the guest stands still."""
        await self._ask(control.Done, control.SetShort(channel=number, short=short))

    async def set_pace(self, number: int, bytes_per_s: int) -> None:
        """At the source: take so much of this channel from now on, 0: no cap."""
        await self._ask(control.Done, control.SetPace(channel=number, bytes_per_s=bytes_per_s))

    async def statistics(self) -> Statistics:
        """The open channels' figures and the worker's."""
        return await self._ask(Statistics, control.AskStatistics())

    async def end(self) -> None:
        """End it. Returns when it is gone; may be repeated, and never fails."""
        if not self.ended.is_set():
            self._process.kill()
        await self.ended.wait()

    def why(self) -> str:
        """Why it ended, as far as it could say."""
        return self._why

    async def _ask(self, kind: type[A], message: control.Message, descriptors: Sequence[int] = ()) -> A:
        if self.ended.is_set():
            raise self._failed()
        waiting: asyncio.Future[Answer] = self._loop.create_future()
        try:
            control.send(self._socket, message, descriptors)
        except OSError as error:
            raise RelayFailed("the relay does not listen", why=error.strerror or "") from error
        self._asked.append(waiting)
        late = self._loop.call_later(ANSWERS_WITHIN_S, self._give_up, waiting)
        waiting.add_done_callback(lambda _: late.cancel())
        answer = await asyncio.shield(waiting)  # its answer is due also if nobody waits for it any more
        if isinstance(answer, control.Refused):
            raise InvalidInput("the relay refused", why=answer.why)
        assert isinstance(answer, kind)
        return answer

    def _give_up(self, waiting: asyncio.Future[Answer]) -> None:
        while not waiting.done() and self._on_message():
            pass  # where it is this daemon that stood still, the answer is there, behind what else was said
        if not waiting.done():
            self._why = f"it did not answer within {ANSWERS_WITHIN_S:.0f} s"
            self._process.kill()

    def _on_message(self) -> bool:
        """Take one message. Returns whether there was any."""
        try:
            data, _ = control.receive(self._socket)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            self._loop.remove_reader(self._socket.fileno())
            return False
        self._take(parse(data, _decoder, "what the relay says"))
        return True

    def _take(self, message: FromRelay) -> None:
        if isinstance(message, control.Failed):
            self._why = message.why
        elif isinstance(message, control.Opened):
            _set(self._opened, message.window_log)
        elif isinstance(message, control.LaneLost):
            self.on_lane_lost(message.lane, message.why)
        elif isinstance(message, control.ChannelEnded):
            self.on_channel_ended(message.statistics)
        elif self._asked:
            _set(self._asked.popleft(), message)

    def _on_exit(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        code = self._process.wait()  # reaps it: the pidfd says it has ended, so this does not block
        self._drain()
        self._socket.close()
        self._why = self._why or (f"ended by signal {-code}" if code < 0 else f"exit status {code}")
        self.ended.set()
        _break(self._opened, self._failed())
        for waiting in self._asked:
            _break(waiting, self._failed())
        self._asked.clear()

    def _drain(self) -> None:
        """Hear its last words before its socket is closed."""
        self._loop.remove_reader(self._socket.fileno())
        with suppress(OSError):
            while (packet := control.receive(self._socket))[0]:
                self._take(parse(packet[0], _decoder, "what the relay says"))

    def _failed(self) -> RelayFailed:
        return RelayFailed("the relay ended, and with it every stream it carried", why=self._why)


def _set(waiting: asyncio.Future[V], value: V) -> None:
    if not waiting.done():  # who asked may have been cancelled
        waiting.set_result(value)


def _break(waiting: asyncio.Future[V], error: RelayFailed) -> None:
    if not waiting.done():
        waiting.set_exception(error)
        waiting.exception()  # it may have no listener


def widen(sock: socket.socket) -> None:
    """Let a chunk fit into a socket: with the usual 208 KiB each would take several turns, half of the throughput."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, MAX_RAW_BYTES)
    except PermissionError:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MAX_RAW_BYTES)  # as much of it as everybody may have


def _spawn(descriptor: int, user: str | None) -> subprocess.Popen[bytes]:
    # It gives up its rights itself, once it is loaded: the user might not be able to read this installation.
    owner = owner_of(user) or ()
    try:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "limosa.transport.relay", str(descriptor), *map(str, owner)],
            stdin=subprocess.DEVNULL,
            cwd="/",
            env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "PYTHONPATH": str(_SOURCES)},
            pass_fds=[descriptor],
            start_new_session=True,
            umask=0o077,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise RelayFailed("cannot start a relay", why=str(error)) from error
    let_be_ended(child.pid)
    return child
