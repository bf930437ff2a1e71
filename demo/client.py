"""The client: asks the VM from another namespace of the lab and times every answer.

It asks in two ways at once. *Requests* are HTTP on a new connection each, as from many visitors. *Messages* go to the
guest's echo service on one TCP connection that is kept for good; they follow each other closely, so the longest silence
between two answers is how long the guest was not there for the client.

Questions go out when they are due, whether or not those before have been answered: a blackout delays every question
that falls into it, as it would with many clients, and is not hidden by a client that waits politely.
"""

from __future__ import annotations

import os
import selectors
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from limosa.lab import namespaces

REQUEST_EVERY_S = 0.1
MESSAGE_EVERY_S = 0.005
#: An answer that takes longer has failed. TCP sends a lost first packet again after 1 and 3 s.
PATIENCE_S = 10.0

_REQUEST = b"GET /ok HTTP/1.0\r\n\r\n"
_MESSAGE = struct.Struct("!Q")
_CHUNK = 64 * 1024


@dataclass(frozen=True)
class Answer:
    """A question that was answered, and rightly."""

    asked_at: float
    answered_at: float

    @property
    def latency_s(self) -> float:
        """How long the client waited."""
        return self.answered_at - self.asked_at


@dataclass(frozen=True)
class Failure:
    """A question that was not, and why."""

    asked_at: float
    why: str


@dataclass
class Observed:
    """All a client saw."""

    requests: list[Answer] = field(default_factory=list)
    messages: list[Answer] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)


class Client:
    """Asks from :meth:`start` to :meth:`stop`, in a thread of its own."""

    def __init__(self, http: tuple[str, int], echo: tuple[str, int], *, namespace: str | None = None) -> None:
        self.observed = Observed()
        self._http = http
        self._echo = echo
        self._namespace = namespace
        self._fault: BaseException | None = None
        self._connected = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="client", daemon=True)

    def start(self) -> None:
        """Begin to ask. Raises ``OSError`` if the lasting connection cannot be made."""
        self._thread.start()
        self._connected.wait()
        if self._fault is not None:
            raise self._fault

    def stop(self) -> Observed:
        """Ask nothing more and wait for what is still to be answered, :data:`PATIENCE_S` at most."""
        self._stopping.set()
        self._thread.join()
        if self._fault is not None:
            raise self._fault
        return self.observed

    def _run(self) -> None:
        try:
            if self._namespace is not None:
                namespaces.enter(self._namespace)
            _go_first()
            self._ask()
        except Exception as fault:  # noqa: BLE001 - the edge of a thread: raised again by start or stop
            self._fault = fault
        finally:
            self._connected.set()

    def _ask(self) -> None:
        with selectors.DefaultSelector() as selector:
            askers: tuple[Asker, ...] = (
                Messages(self._echo, selector, self.observed),
                Requests(self._http, selector, self.observed),
            )
            self._connected.set()
            due = dict.fromkeys(askers, time.monotonic())
            while not self._stopping.is_set():
                _ask_what_is_due(due)
                _hear(selector, until=min(due.values()))
            while any(asker.waits() for asker in askers):
                _hear(selector, until=time.monotonic() + 0.1)
                _give_up(askers)
            for asker in askers:
                asker.close()


class Asker(Protocol):
    """A way to ask. The callables it registers with the selector take no arguments."""

    every_s: float

    def ask(self, now: float) -> None:
        """Send a question. What fails is noted, not raised."""

    def waits(self) -> bool:
        """Whether an answer is still to come."""

    def give_up(self, before: float) -> None:
        """Note as failed what was asked before a moment and is not answered."""

    def close(self) -> None:
        """Close what is open."""


class Messages:
    """Numbers sent on one connection that is kept; the guest sends them back. Raises ``OSError`` if it is not made."""

    every_s = MESSAGE_EVERY_S

    def __init__(self, address: tuple[str, int], selector: selectors.BaseSelector, observed: Observed) -> None:
        self._selector = selector
        self._observed = observed
        self._asked: deque[tuple[int, float]] = deque()
        self._next = 0
        self._received = b""
        self._broken = False
        self._stream = socket.create_connection(address, PATIENCE_S)
        self._stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._acknowledge_at_once()
        self._stream.setblocking(False)
        selector.register(self._stream, selectors.EVENT_READ, self._read)

    def ask(self, now: float) -> None:
        """Send the next number."""
        if self._broken:
            return
        try:
            self._stream.send(_MESSAGE.pack(self._next))
        except BlockingIOError:
            return  # 300 KB wait in the kernel: that is a failure of time, which give_up notes
        except OSError as fault:
            self._break(now, f"the connection broke: {fault.strerror}")
            return
        self._asked.append((self._next, now))
        self._next += 1

    def waits(self) -> bool:
        """See :class:`Asker`."""
        return bool(self._asked)

    def give_up(self, before: float) -> None:
        """See :class:`Asker`; a connection that is silent for so long is of no use any more."""
        if self._asked and self._asked[0][1] < before:
            self._break(self._asked[0][1], f"the connection was silent for {PATIENCE_S:.0f} s")

    def close(self) -> None:
        """See :class:`Asker`."""
        self._stream.close()

    def _read(self) -> None:
        now = time.monotonic()
        try:
            data = self._stream.recv(_CHUNK)
            self._acknowledge_at_once()
        except OSError as fault:
            self._break(now, f"the connection broke: {fault.strerror}")
            return
        if not data:
            self._break(now, "the VM closed the connection")
        self._received += data
        while len(self._received) >= _MESSAGE.size and not self._broken:
            self._take(_MESSAGE.unpack_from(self._received)[0], now)
            self._received = self._received[_MESSAGE.size :]

    def _take(self, number: int, now: float) -> None:
        if not self._asked or self._asked[0][0] != number:
            self._break(now, "the VM sent something else than it was sent")
            return
        _, asked_at = self._asked.popleft()
        self._observed.messages.append(Answer(asked_at, now))

    def _break(self, asked_at: float, why: str) -> None:
        self._observed.failures.append(Failure(asked_at, why))
        self._broken = True
        self._asked.clear()
        self._selector.unregister(self._stream)

    def _acknowledge_at_once(self) -> None:
        # The guest's echo has Nagle's algorithm on: it holds an answer back until the one before is acknowledged. Not
        # a lasting option, see tcp(7).
        self._stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)


class Requests:
    """HTTP, each request on a connection of its own."""

    every_s = REQUEST_EVERY_S

    def __init__(self, address: tuple[str, int], selector: selectors.BaseSelector, observed: Observed) -> None:
        self._address = address
        self._selector = selector
        self._observed = observed
        self._open: set[_Request] = set()

    def ask(self, now: float) -> None:
        """Begin a request."""
        self._open.add(_Request(self._address, now, self._selector, self._end))

    def waits(self) -> bool:
        """See :class:`Asker`."""
        return bool(self._open)

    def give_up(self, before: float) -> None:
        """See :class:`Asker`."""
        for request in [one for one in self._open if one.asked_at < before]:
            request.end(f"no answer within {PATIENCE_S:.0f} s")

    def close(self) -> None:
        """See :class:`Asker`."""
        for request in list(self._open):
            request.end("the client left")

    def _end(self, request: _Request, why: str) -> None:
        self._open.discard(request)
        if why:
            self._observed.failures.append(Failure(request.asked_at, why))
        else:
            self._observed.requests.append(Answer(request.asked_at, time.monotonic()))


class _Request:
    """One request on its way: connecting, then sent, then read to its end."""

    def __init__(
        self,
        address: tuple[str, int],
        now: float,
        selector: selectors.BaseSelector,
        ended: Callable[[_Request, str], None],
    ) -> None:
        self.asked_at = now
        self._selector = selector
        self._ended = ended
        self._reply = b""
        self._stream = socket.socket()
        self._stream.setblocking(False)
        self._stream.connect_ex(address)
        selector.register(self._stream, selectors.EVENT_WRITE, self._send)

    def end(self, why: str) -> None:
        """Close the connection; ``why`` it failed, or nothing if it did not."""
        self._selector.unregister(self._stream)
        self._stream.close()
        self._ended(self, why)

    def _send(self) -> None:
        if number := self._stream.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.end(f"no connection: {os.strerror(number)}")
            return
        try:
            self._stream.sendall(_REQUEST)
        except OSError as fault:
            self.end(f"the connection broke: {fault.strerror}")
            return
        self._selector.modify(self._stream, selectors.EVENT_READ, self._read)

    def _read(self) -> None:
        try:
            data = self._stream.recv(_CHUNK)
        except OSError as fault:
            self.end(f"the connection broke: {fault.strerror}")
            return
        self._reply += data
        if not data:
            self.end("" if _is_right(self._reply) else f"a wrong answer: {self._reply[:80]!r}")


def _ask_what_is_due(due: dict[Asker, float]) -> None:
    for asker, at in due.items():
        now = time.monotonic()
        if now >= at:
            asker.ask(now)
            # What this process was too late for is left out, not asked all at once.
            due[asker] = max(at + asker.every_s, now)
    _give_up(due)


def _give_up(askers: Iterable[Asker]) -> None:
    before = time.monotonic() - PATIENCE_S
    for asker in askers:
        asker.give_up(before)


def _hear(selector: selectors.BaseSelector, until: float) -> None:
    """Take the answers that are there, or the first that come."""
    for key, _ in selector.select(max(0.0, until - time.monotonic())):
        key.data()


def _is_right(reply: bytes) -> bool:
    head, _, body = reply.partition(b"\r\n\r\n")
    return head.split(None, 2)[1:2] == [b"200"] and body == b"ok"


def _go_first() -> None:
    """Have the calling thread scheduled before others, so that it times the VM and not what else this machine does."""
    if os.geteuid() == 0:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), -10)
