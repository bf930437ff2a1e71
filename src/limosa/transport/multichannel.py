"""Multipath TCP: one connection to QEMU, made of as many TCP connections as there are paths, by the kernel.

The source calls the destination's first address as with TCP, or, if that does not answer, the next. The destination's
kernel announces the further ones (``endpoints``) over that connection, and the source's kernel connects to each, from
whichever NIC leads there. A path that dies costs its share of the speed; one that appears is announced and used.

A kernel takes a further connection only where somebody listens, so the door stays open, on every address, as long as
the move lasts. Such connections never come to us; who does when the source is there is a stranger and is hung up on.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import ipaddress
import logging
import os
import socket
import struct
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace

from limosa.errors import DestinationLost, NetworkError
from limosa.transport import tcp
from limosa.transport.channel import Used, by_path
from limosa.transport.lobby import next_caller

_log = logging.getLogger(__name__)

IPPROTO_MPTCP = 262
SOL_MPTCP = 284

# From linux/mptcp.h: MPTCP_FULL_INFO fills a struct mptcp_full_info and the two arrays it points to; the others, which
# kernels before 6.5 have, a struct mptcp_subflow_data and an array behind it.
MPTCP_TCPINFO, MPTCP_SUBFLOW_ADDRS, MPTCP_FULL_INFO = 2, 3, 4
_HEAD = struct.Struct("=6I2Q")
_HEAD_BYTES = 512  # with the struct mptcp_info that follows, and room for what later kernels add to that
_TCP_INFO_BYTES = 256
_SUBFLOW_BYTES = 264
#: In a struct mptcp_subflow_info: the connection's number, and two sockaddr_storage.
_LOCAL_AT, _PEER_AT = 8, 136
_MOST_SUBFLOWS = 16
_DATA = struct.Struct("=4I")
#: In a struct mptcp_subflow_addrs: two sockaddr_storage.
_ADDRS_BYTES, _REMOTE_AT = 256, 128
#: Looks at connections that come and go meanwhile.
_LOOKS = 5

_libc = ctypes.CDLL(None, use_errno=True)


class MultichannelChannel(tcp.TcpChannel):
    """The source's end. ``release`` is called once when it is closed."""

    def __init__(self, connection: socket.socket, release: Callable[[], None]) -> None:
        super().__init__(connection)
        self._release = release
        #: by what the connection is known by: one that has died is not told any more
        self._seen: dict[Hashable, Used] = {}

    def set_short(self, short: bool, pace: float) -> None:
        """See :class:`limosa.transport.channel.Channel`: it does nothing.

        What waits, waits in the connections this one is made of, where ``TCP_NOTSENT_LOWAT`` has no effect; and with it
        Linux 6.18 sent some 2 MiB/s of a stream without TLS, since the writer was woken late.
        """

    def used(self) -> tuple[Used, ...]:
        """See :class:`limosa.transport.channel.Channel`."""
        try:
            alive = subflows(self.stream)
        except OSError:
            # It is closed, or the two ends have agreed on plain TCP because something between them wanted that.
            if not self._seen:
                return super().used()
            alive = {}
        for number in self._seen.keys() - alive.keys():
            self._seen[number] = replace(self._seen[number], alive=False, connections=0)
        self._seen.update(alive)
        return by_path(self._seen.values())

    def close(self) -> None:
        """See :class:`limosa.transport.channel.Channel`."""
        if self.stream.fileno() != -1:
            self._release()
        super().close()


class MultichannelDoorway(tcp.TcpDoorway):
    """The destination's end: listeners of one port on as many addresses as have it free. The source may come to any.

    ``announce`` is called with addresses the source has found a way to, ``release`` once when the door is closed.
    Raises :class:`NetworkError` if every port of the range is taken on the first.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        ports: tuple[int, int],
        announce: Callable[[Iterable[str]], None],
        release: Callable[[], None],
    ) -> None:
        try:
            super().__init__(addresses[0], ports, IPPROTO_MPTCP, addresses[1:])
        except NetworkError:  # one of them may have gone
            super().__init__(addresses[0], ports, IPPROTO_MPTCP)
        self._announce = announce
        self._release = release
        self._first, self._port = self.address, self.port  # a socket that is closed does not know them any more
        #: those to announce: all we listen on but the one the source comes to, which is the first until it is there
        self._further: set[str] = set(addresses[1 : 1 + len(self._others)])
        #: the source is there, or it will be without our hearing of it
        self.connected = asyncio.Event()
        self._open = True
        for address in addresses[1:]:
            self.listen_on(address)

    def announce(self, addresses: Iterable[str]) -> None:
        """See :class:`limosa.transport.channel.Doorway`."""
        if self._open:
            self._announce(addresses)

    def close(self) -> None:
        """See :class:`limosa.transport.channel.Doorway`."""
        if self._open:
            self._open = False
            self._release()
        for usher in self._ushers:
            usher.cancel()
        super().close()

    async def accept_several(self, count: int) -> list[socket.socket]:
        """See :class:`limosa.transport.tcp.TcpDoorway`."""
        came = await super().accept_several(count)
        if any(one.getsockname()[0] != self._first for one in came):
            self._further.add(self._first)
        self.connected.set()
        return came

    def hand_over(self) -> socket.socket:
        """See :class:`limosa.transport.tcp.TcpDoorway`: the first address's. To others nobody is to come."""
        self.connected.set()
        for listener in self._others:
            self._meet(_turn_away(listener))
        return super().hand_over()

    def listen_on(self, address: str) -> bool:
        """Let the source in at a further address too; false if that cannot be, or if it is not a further one."""
        if not self._open:
            return False
        if address in self._further or address == self._first:
            return address in self._further
        try:
            listener = tcp.listen(address, self._port, IPPROTO_MPTCP)
        except OSError as error:  # the address has gone again, or another has the port there
            _log.warning("%s has no room at port %d: a move has one path less: %s", address, self._port, error)
            return False
        self._further.add(address)
        self._others.append(listener)
        if self.connected.is_set():
            self._meet(_turn_away(listener))
        elif self._asking is not None:
            self._meet(self._asking.serve(listener))
        return True

    def _expect_nobody(self) -> None:
        for listener in (self._listener, *self._others):
            self._meet(_turn_away(listener))


async def _turn_away(listener: socket.socket) -> None:
    """Hang up on whoever comes: a queue full of strangers would keep the kernel from taking further connections."""
    while True:
        (await next_caller(listener)).close()


async def connect(
    ways: Iterable[tuple[str, str]], port: int, token: str, release: Callable[[], None]
) -> MultichannelChannel:
    """Call a destination by the first of these ways, of which there is one at least, by which it answers: each from an
    address here, empty where routing decides, to one there.

    Raises :class:`DestinationLost` if it answers by none: what was wrong with the first.
    """
    faults: list[DestinationLost] = []
    for here, there in ways:
        try:
            return MultichannelChannel(await tcp.call(there, port, token, here, IPPROTO_MPTCP), release)
        except DestinationLost as error:
            _log.warning("%s", error)
            faults.append(error)
    raise faults[0]


def subflows(connection: socket.socket) -> dict[Hashable, Used]:
    """What goes over each TCP connection this one is made of now, by the kernel's number of it, or, from a kernel that
    does not number them, by its ends. Raises ``OSError`` if it is made of none."""
    try:
        return _numbered(connection)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
    return _by_ends(connection)


def _numbered(connection: socket.socket) -> dict[Hashable, Used]:
    """See :func:`subflows`. Since Linux 6.5."""
    head = ctypes.create_string_buffer(_HEAD_BYTES)
    flows = ctypes.create_string_buffer(_MOST_SUBFLOWS * _SUBFLOW_BYTES)
    infos = ctypes.create_string_buffer(_MOST_SUBFLOWS * _TCP_INFO_BYTES)
    arrays = ctypes.addressof(flows), ctypes.addressof(infos)
    _HEAD.pack_into(head, 0, 0, _TCP_INFO_BYTES, 0, _SUBFLOW_BYTES, 0, _MOST_SUBFLOWS, *arrays)
    _ask(connection, MPTCP_FULL_INFO, head)
    count = min(_HEAD.unpack_from(head)[4], _MOST_SUBFLOWS)
    found: dict[Hashable, Used] = {}
    for place in range(count):
        flow = flows.raw[place * _SUBFLOW_BYTES :][:_SUBFLOW_BYTES]
        info = infos.raw[place * _TCP_INFO_BYTES :][:_TCP_INFO_BYTES]
        (number,) = struct.unpack_from("=I", flow)
        found[number] = tcp.used_by(info, _address(flow[_LOCAL_AT:]), _address(flow[_PEER_AT:]))
    return found


def _by_ends(connection: socket.socket) -> dict[Hashable, Used]:
    """See :func:`subflows`. Since Linux 5.16. Figures and addresses are asked for one after the other; the kernel tells
    both in the same order, and they belong together if the addresses are the same before and after."""
    ends = _array(connection, MPTCP_SUBFLOW_ADDRS, _ADDRS_BYTES)
    for _ in range(_LOOKS):
        infos, before = _array(connection, MPTCP_TCPINFO, _TCP_INFO_BYTES), ends
        ends = _array(connection, MPTCP_SUBFLOW_ADDRS, _ADDRS_BYTES)
        if before == ends and len(infos) == len(ends):
            break
    pairs = zip(ends, infos, strict=False)
    return {end: tcp.used_by(info, _address(end), _address(end[_REMOTE_AT:])) for end, info in pairs}


def _array(connection: socket.socket, what: int, size: int) -> list[bytes]:
    """One thing of each TCP connection, of ``size`` bytes."""
    data = ctypes.create_string_buffer(_DATA.size + _MOST_SUBFLOWS * size)
    _DATA.pack_into(data, 0, _DATA.size, 0, 0, size)
    _ask(connection, what, data)
    count = min(_DATA.unpack_from(data)[1], _MOST_SUBFLOWS)
    return [data.raw[_DATA.size + place * size :][:size] for place in range(count)]


def _ask(connection: socket.socket, what: int, into: ctypes.Array[ctypes.c_char]) -> None:
    size = ctypes.c_uint32(len(into))
    if _libc.getsockopt(connection.fileno(), SOL_MPTCP, what, into, ctypes.byref(size)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _address(sockaddr: bytes) -> str:
    """The address in a ``struct sockaddr``; IPv4 also where it lies in an IPv6 one."""
    (family,) = struct.unpack_from("=H", sockaddr)
    if family == socket.AF_INET:
        return str(ipaddress.IPv4Address(sockaddr[4:8]))
    address = ipaddress.IPv6Address(sockaddr[8:24])
    return str(address.ipv4_mapped or address)
