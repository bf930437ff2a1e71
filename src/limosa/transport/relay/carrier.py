"""One connection between two relays, used one way after its first words; and what a session needs of such.

Python's SSL sockets must not be read by one thread while another writes. So a session has two carriers, and each is
only written or only read once its handshake and :class:`~limosa.transport.relay.frames.Hello` are done. The server
sends no session tickets, which would otherwise wait to be read on the carrier that the client only writes.

What the connection is made of (TCP, Multipath TCP) is its maker's choice.
"""

from __future__ import annotations

import array
import fcntl
import select
import socket
import ssl
import termios
from contextlib import suppress
from typing import Any, Protocol

from limosa.security.tls import SERVER_NAME
from limosa.transport.relay.errors import BrokenStream, ConnectionLost

#: The most the kernel may hold of a carrier's data before it sends it (TCP_NOTSENT_LOWAT, tcp(7)): in general, and
#: when a guest is about to stand still. More would only be waited for.
UNSENT_BYTES = 1024 * 1024
SHORT_UNSENT_BYTES = 128 * 1024
_LEAST_UNSENT_BYTES = 16 * 1024
_TCP_RTO_MAX_MS = 44  # linux/tcp.h, since Linux 6.15
_OPTIONS = (
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES),
    # A host that is gone without a word is noticed after a minute, so that its session's memory is free again.
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 60_000),
    # A path that was cut is tried every second. The kernel doubles its pauses otherwise, and is silent for as long as
    # the cut has lasted when the cable is in again.
    (socket.IPPROTO_TCP, _TCP_RTO_MAX_MS, 1000),
)
_SIOCOUTQ = termios.TIOCOUTQ
_SIOCOUTQNSD = 0x894B  # linux/sockios.h
#: A header is sent together with so much of its payload: it costs a packet otherwise. What TLS puts into one record.
_TOGETHER_BYTES = 16 * 1024
_PORTION_BYTES = 128 * 1024


class Out(Protocol):
    """What a side of a session sends on."""

    #: what was taken so far
    sent_bytes: int

    def send(self, header: bytes, payload: memoryview | bytes = b"") -> None:
        """Send a frame whole; one thread at a time. Raises :class:`BrokenStream`."""

    def set_short(self, short: bool) -> None:
        """Whether only a little may wait to be sent, from now on."""

    def set_unsent(self, limit: int) -> None:
        """How much may wait to be sent, within reason."""

    def unacknowledged(self) -> tuple[int, int]:
        """Bytes that the other side has not acknowledged, and of these, those not sent yet."""


class In(Protocol):
    """What a side of a session receives on; one thread does."""

    def receive_into(self, view: memoryview) -> None:
        """Fill ``view``. Raises :class:`BrokenStream`, also if there will be no more."""

    def receive(self, count: int) -> bytes:
        """Exactly ``count`` bytes. Raises :class:`BrokenStream`."""


class Carrier:
    """A connection, encrypted if ``context`` is given. Making it does the TLS handshake, within ``timeout_s``.

    Raises :class:`BrokenStream` if the handshake fails; the connection is closed then.
    """

    def __init__(
        self, connection: socket.socket, context: ssl.SSLContext | None, *, server: bool, timeout_s: float
    ) -> None:
        self._socket = connection
        #: what the kernel took so far, less what TLS adds
        self.sent_bytes = 0
        self._unsent_limit, self._unsent_most = UNSENT_BYTES, UNSENT_BYTES
        connection.settimeout(timeout_s)
        for level, option, value in _OPTIONS:
            with suppress(OSError):  # not every kind of connection has them all
                connection.setsockopt(level, option, value)
        if context is not None:
            name = None if server else SERVER_NAME
            try:
                self._socket = context.wrap_socket(connection, server_side=server, server_hostname=name)
            except (OSError, ValueError) as error:
                connection.close()
                raise BrokenStream(f"TLS handshake failed: {error}") from error

    def settle(self) -> None:
        """From now on wait as long as it takes."""
        self._socket.settimeout(None)

    def set_short(self, short: bool) -> None:
        """Whether only a little may wait in the kernel, from now on."""
        self._unsent_most = SHORT_UNSENT_BYTES if short else UNSENT_BYTES
        self.set_unsent(self._unsent_limit)

    def set_unsent(self, limit: int) -> None:
        """How much may wait in the kernel, within reason. The kernel is told only of what makes a difference."""
        limit = max(_LEAST_UNSENT_BYTES, min(limit, self._unsent_most))
        if not 0.7 <= limit / self._unsent_limit <= 1.3:
            self._unsent_limit = limit
            with suppress(OSError):
                self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, limit)

    def send(self, header: bytes, payload: memoryview | bytes = b"") -> None:
        """See :class:`Out`. Raises :class:`ConnectionLost`."""
        first = max(0, _TOGETHER_BYTES - len(header))
        try:
            self._send(memoryview(header + bytes(payload[:first])))
            self._send(memoryview(payload)[first:])
        except OSError as error:
            raise _lost(error) from error

    def _send(self, data: memoryview) -> None:
        # In portions, so that other threads can follow how fast the carrier drains.
        while len(data):
            count = self._socket.send(data[:_PORTION_BYTES])
            self.sent_bytes += count
            data = data[count:]

    def receive_into(self, view: memoryview) -> None:
        """See :class:`In`. Raises :class:`ConnectionLost`."""
        while len(view):
            try:
                count = self._socket.recv_into(view)
            except OSError as error:
                raise _lost(error) from error
            if count == 0:
                raise ConnectionLost("the connection was closed")
            view = view[count:]

    def receive(self, count: int) -> bytes:
        """See :class:`In`. Raises :class:`ConnectionLost`."""
        data = bytearray(count)
        self.receive_into(memoryview(data))
        return bytes(data)

    def unacknowledged(self) -> tuple[int, int]:
        """Bytes the kernel holds: all that the other side has not acknowledged, and of these, those not sent yet."""
        return self._ask(_SIOCOUTQ), self._ask(_SIOCOUTQNSD)

    def has_ended(self) -> bool:
        """Whether the other side has ended it, or it broke; by a look that does not wait."""
        look = select.poll()
        look.register(self._socket, select.POLLRDHUP)
        return bool(look.poll(0))

    def end(self) -> None:
        """End the connection, also for a thread that waits for it; which is why it is not closed."""
        with suppress(OSError):
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def _ask(self, request: int) -> int:
        answer: array.array[Any] = array.array("i", [0])
        try:
            fcntl.ioctl(self._socket.fileno(), request, answer)
        except OSError:
            return 0
        return int(answer[0])


def _lost(error: OSError) -> ConnectionLost:
    if isinstance(error, TimeoutError):
        return ConnectionLost("the other relay says nothing")
    return ConnectionLost(f"the connection broke: {error.strerror or error}")
