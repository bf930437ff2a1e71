"""Plain TCP: one connection from the source's daemon to an address and port the destination chose.

What was measured for the settings here, with a guest of 1 GiB on a link of 1 Gbit/s with TLS, median blackout:

- With Nagle's algorithm on the last small piece of the VM's state waits for the acknowledgement of the one before, up
  to 40 ms, and so does a piece of the TLS handshake. So it is off on both ends.
- What the kernel has taken and not sent yet is sent while the guest stands still. When that may be soon little may
  wait (``TCP_NOTSENT_LOWAT``): 40 to 11 ms. In the first pass that would cost a third of the throughput with TLS on a
  fast link and gain nothing. What is little is a matter of time: what is right there is 10 ms of a tenth of that
  speed, and at ten times of it gone before QEMU is woken.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import os
import secrets
import socket
import struct
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from limosa.errors import DestinationLost, LimosaError, NetworkError
from limosa.model.route import Compressed
from limosa.transport.channel import Used
from limosa.transport.lobby import Lobby

CONNECT_WITHIN_S = 10.0
#: Who has connected and does not say the token within this time is sent away.
TOKEN_WITHIN_S = 5.0
#: Callers the kernel keeps until they are asked.
_BACKLOG = 128

#: What was sent in post-copy and is not acknowledged after this long ends the stream (TCP_USER_TIMEOUT, tcp(7)): by
#: itself the kernel goes on for a quarter of an hour, for which the guest would wait.
SILENT_MS = 10_000

_TOKEN_BYTES = 16
#: Where in struct tcp_info (linux/tcp.h) these lie: tcpi_retransmits, timeouts since the last acknowledgement;
#: tcpi_bytes_acked; tcpi_busy_time and tcpi_rwnd_limited, microseconds.
_RETRANSMITS_AT = 2
_BYTES_ACKED_AT, _BUSY_TIME_AT, _RECEIVER_LIMITED_AT = 120, 168, 176
_TCP_INFO_BYTES = 256
#: What may wait in a shortened socket before QEMU has to wait itself (tcp(7)): what goes in this time, but so much.
_UNSENT_S, _UNSENT_BYTES = 0.001, 16 * 1024
#: Of that option: what the system's setting says.
_NO_LIMIT = 0
_SO_MAX_PACING_RATE = 47  # socket(7)
_NO_PACE = 2**64 - 1


class TcpChannel:
    """The source's end of a TCP connection. Made by :func:`connect`."""

    def __init__(self, connection: socket.socket) -> None:
        self.stream = connection
        self._used: Used | None = None

    def set_short(self, short: bool, pace: float) -> None:
        """See :class:`limosa.transport.channel.Channel`."""
        with contextlib.suppress(OSError):  # also if it is closed: then the stream is at its end
            limit = max(_UNSENT_BYTES, round(_UNSENT_S * pace)) if short else _NO_LIMIT
            self.stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, limit)

    def pace(self, bytes_per_s: int) -> bool:
        """See :class:`limosa.transport.channel.SocketChannel`."""
        return pace(self.stream, bytes_per_s)

    @property
    def connections(self) -> tuple[TcpChannel]:
        """See :class:`limosa.transport.channel.Channel`: it is one."""
        return (self,)

    def spread_over(self, ways: Iterable[tuple[str, str]]) -> None:
        """See :class:`limosa.transport.channel.Channel`: it is one connection."""

    def used(self) -> tuple[Used, ...]:
        """See :class:`limosa.transport.channel.Channel`."""
        try:
            info = self.stream.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
            self._used = used_by(info, self.stream.getsockname()[0], self.stream.getpeername()[0])
        except OSError:  # it is closed
            if self._used is not None:
                self._used = replace(self._used, connections=0)
        return (self._used,) if self._used is not None else ()

    async def compressed(self) -> Compressed | None:
        """See :class:`limosa.transport.channel.Channel`: nobody does."""
        return None

    async def fault(self) -> LimosaError | None:
        """See :class:`limosa.transport.channel.Channel`: QEMU says what the kernel knows."""
        return None

    def close(self) -> None:
        """See :class:`limosa.transport.channel.Channel`."""
        self.stream.close()


class TcpDoorway:
    """The destination's end: a listener. Raises :class:`NetworkError` if every port of the range is taken.

    ``protocol`` is another than TCP's for Multipath TCP, whose sockets are the same but for it. On ``further``
    addresses the source may come too, to the same port.
    """

    def __init__(
        self,
        address: str,
        ports: tuple[int, int],
        protocol: int = socket.IPPROTO_TCP,
        further: Sequence[str] = (),
    ) -> None:
        self._listener, *self._others = listen_within((address, *further), ports, protocol)
        self._token = secrets.token_bytes(_TOKEN_BYTES)
        #: where callers are asked, while the source is awaited
        self._asking: Lobby | None = None
        #: by whom callers are met, a task for each listener
        self._ushers: list[asyncio.Task[None]] = []

    @property
    def address(self) -> str:
        """See :class:`limosa.transport.channel.Doorway`."""
        return str(self._listener.getsockname()[0])

    def hand_over(self) -> socket.socket:
        """The listener itself, for a server that asks its callers for certificates instead of the token. Nobody is to
        :meth:`accept` then."""
        return self._listener

    @property
    def port(self) -> int:
        """See :class:`limosa.transport.channel.Doorway`."""
        return int(self._listener.getsockname()[1])

    @property
    def token(self) -> str:
        """See :class:`limosa.transport.channel.Doorway`."""
        return self._token.hex()

    async def accept(self) -> socket.socket:
        """See :class:`limosa.transport.channel.Doorway`."""
        return (await self.accept_several(1))[0]

    async def accept_several(self, count: int) -> list[socket.socket]:
        """Wait for so many connections of the source. Otherwise as :meth:`accept`."""
        arrived: asyncio.Queue[socket.socket] = asyncio.Queue()
        self._asking = lobby = self._lobby_for(arrived.put_nowait)
        for listener in (self._listener, *self._others):
            self._meet(lobby.serve(listener))
        came: list[socket.socket] = []
        try:
            while len(came) < count:
                came.append(await arrived.get())
        except BaseException:
            for source in came:
                source.close()
            raise
        finally:
            self._asking = None
            ushers, self._ushers = self._ushers, []
            for usher in ushers:
                usher.cancel()
            await asyncio.gather(*ushers, return_exceptions=True)
            await lobby.close()
            while not arrived.empty():
                arrived.get_nowait().close()
        self._expect_nobody()
        return came

    def _lobby_for(self, admit: Callable[[socket.socket], None]) -> Lobby:
        """Where callers are asked for the token."""
        return Lobby(partial(_knows, self._token), admit)

    def _meet(self, callers: Coroutine[Any, Any, None]) -> None:
        self._ushers.append(asyncio.ensure_future(callers))

    def announce(self, addresses: Iterable[str]) -> None:
        """See :class:`limosa.transport.channel.Doorway`."""

    def _expect_nobody(self) -> None:
        self._close_listeners()

    def close(self) -> None:
        """See :class:`limosa.transport.channel.Doorway`."""
        self._close_listeners()

    def _close_listeners(self) -> None:
        for listener in (self._listener, *self._others):
            close_listener(listener)


async def _knows(token: bytes, caller: socket.socket) -> bool:
    """Whether a caller says the token."""
    if not hmac.compare_digest(await _said(caller), token):
        return False
    _send_at_once(caller)
    return True


async def connect(address: str, port: int, token: str, source: str = "") -> TcpChannel:
    """Call a destination (``address``: IPv4 or IPv6), from ``source`` if that is given.

    Raises :class:`DestinationLost` if it cannot be reached.
    """
    return TcpChannel(await call(address, port, token, source))


async def connect_any(addresses: Iterable[str], port: int, token: str) -> TcpChannel:
    """A connection to the first of these addresses that can be reached. Raises :class:`DestinationLost`."""
    failure = DestinationLost("the destination has no address in a network that may carry moves")
    for address in addresses:
        try:
            return await connect(address, port, token)
        except DestinationLost as error:
            failure = error
    raise failure


def end_in_silence(connection: socket.socket) -> None:
    """Have a connection end when its other end is silent for :data:`SILENT_MS`, if its protocol can. Never raises."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENT_MS)


async def call(
    address: str, port: int, token: str = "", source: str = "", protocol: int = socket.IPPROTO_TCP
) -> socket.socket:
    """The connection of :func:`connect`, of any protocol with TCP's addresses."""
    connection = socket.socket(_family(address), socket.SOCK_STREAM, protocol)
    loop = asyncio.get_running_loop()
    try:
        connection.setblocking(False)
        _send_at_once(connection)
        if source:
            connection.bind((source, 0))
        async with asyncio.timeout(CONNECT_WITHIN_S):
            await _connect(connection, address, port)
            await loop.sock_sendall(connection, bytes.fromhex(token))
    except BaseException as error:
        connection.close()
        if isinstance(error, OSError):  # TimeoutError is one
            why = error.strerror or f"no answer within {CONNECT_WITHIN_S:.0f} s"
            raise DestinationLost(f"the destination at {address} port {port} cannot be reached", why=why) from error
        raise
    return connection


def pace(connection: socket.socket, bytes_per_s: int) -> bool:
    """Let a connection send so much from now on, 0: as much as it can. TCP keeps to it by itself, also without a queue
    discipline that does; Multipath TCP has no such option. False if there is none, or the connection is closed."""
    rate = struct.pack("=Q", bytes_per_s or _NO_PACE)
    try:
        connection.setsockopt(socket.SOL_SOCKET, _SO_MAX_PACING_RATE, rate)
    except OSError:
        return False
    return True


def used_by(info: bytes, here: str, there: str) -> Used:
    """What a ``struct tcp_info`` says of a connection between two addresses."""
    places = (_BYTES_ACKED_AT, _BUSY_TIME_AT, _RECEIVER_LIMITED_AT)
    sent, busy_us, receiver_us = (struct.unpack_from("=Q", info, at)[0] for at in places)
    return Used(here, there, sent, busy_s=(busy_us - receiver_us) / 1e6, overdue=info[_RETRANSMITS_AT] > 0)


def listen(address: str, port: int, protocol: int = socket.IPPROTO_TCP) -> socket.socket:
    """A listener that does not block. Raises ``OSError``."""
    listener = socket.socket(_family(address), socket.SOCK_STREAM, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setblocking(False)
        listener.bind((address, port))
        listener.listen(_BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


def close_listener(listener: socket.socket) -> None:
    """Close it. A loop may still wait for a caller there, and would take the next socket of its number for it."""
    with contextlib.suppress(RuntimeError):  # there is no loop
        if listener.fileno() != -1:
            asyncio.get_running_loop().remove_reader(listener)
    listener.close()


def listen_within(
    addresses: Sequence[str], ports: tuple[int, int], protocol: int = socket.IPPROTO_TCP
) -> list[socket.socket]:
    """Listeners on the first port of a range that is free on each address.

    Raises :class:`NetworkError` if there is none.
    """
    for port in range(ports[0], ports[1] + 1):
        with contextlib.suppress(OSError), contextlib.ExitStack() as made:
            listeners = [made.enter_context(listen(address, port, protocol)) for address in addresses]
            made.pop_all()
            return listeners
    raise NetworkError(
        f"no port from {ports[0]} to {ports[1]} of {', '.join(addresses)} is free to receive a VM",
        todo="see what listens there, or change the setting migration_ports",
    )


def free_ports(address: str, ports: Iterable[int]) -> Iterator[int]:
    """Those of the ports that nobody uses, each looked at when it is asked for.

    A port with no more than the rest of a connection (TIME-WAIT), on which :func:`listen` would succeed, is none of
    them: the kernel makes no endpoint of Multipath TCP there.
    """
    return (port for port in ports if _is_free(address, port))


def _is_free(address: str, port: int) -> bool:
    try:
        with socket.socket(_family(address), socket.SOCK_STREAM) as probe:
            probe.bind((address, port))
    except OSError:
        return False
    return True


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ipaddress.ip_address(address).version == 6 else socket.AF_INET


async def _connect(connection: socket.socket, address: str, port: int) -> None:
    """What ``sock_connect`` of a loop does, but for its look-up of the address, which knows no Multipath TCP."""
    loop = asyncio.get_running_loop()
    try:
        connection.connect((address, port))
    except BlockingIOError:
        writable = asyncio.Event()
        loop.add_writer(connection, writable.set)
        try:
            await writable.wait()
        finally:
            loop.remove_writer(connection)
        if number := connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            raise OSError(number, os.strerror(number)) from None


async def _said(caller: socket.socket) -> bytes:
    """As many bytes as a token has, or fewer if the caller ends. Raises ``TimeoutError``, ``OSError``."""
    loop, said = asyncio.get_running_loop(), b""
    async with asyncio.timeout(TOKEN_WITHIN_S):
        while len(said) < _TOKEN_BYTES and (more := await loop.sock_recv(caller, _TOKEN_BYTES - len(said))):
            said += more
    return said


def _send_at_once(connection: socket.socket) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
