"""Files that nobody writes, over one connection from daemon to daemon: those that lie below disks.

::

    piece    where it belongs (8 bytes, big-endian), its length (8 bytes), and so many bytes
    end      the file's size, and length 0

Pieces come in order and do not overlap; what none of them covers is zero. So holes are not sent, nor are zeroes that
take space at the source. Whether what came is what was meant is for the receiver's caller to say, who knows a digest.

Both ends work in a thread of their own, because they read and write files and encrypt. :meth:`stop` ends them from
outside at once: it shuts the connection down, which wakes whoever waits for it.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

from limosa.errors import LimosaError, NetworkError, StorageError
from limosa.security.tls import SERVER_NAME

_PIECE = struct.Struct(">QQ")
_PIECE_BYTES = 256 * 1024
#: Zeroes of at least this length, at a multiple of it, are not sent.
_GRAIN = 4096
_ZEROES = bytes(_PIECE_BYTES)
_HANDSHAKE_WITHIN_S = 10.0
#: So often a sender that has sent all it may asks whether it may send more by now.
_PAUSE_S = 0.2
#: Who only receives does not learn by itself that the way to it was cut. So it does after a minute, and the source is
#: told in the session; TCP there goes on for a quarter of an hour. Nobody is taken for gone who is only slow.
_KEEP_ALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
)


class _End:
    """One end of the connection; the caller keeps ``stream``, and closes it. Encrypted if ``context`` is given."""

    def __init__(self, stream: socket.socket, context: ssl.SSLContext | None) -> None:
        self._stream = stream
        self._context = context
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Have the work end, which raises then."""
        self._stopped.set()
        with suppress(OSError):  # it has ended
            self._stream.shutdown(socket.SHUT_RDWR)

    async def _work(self, work: Callable[[socket.socket], None], *, server: bool) -> None:
        """Do it in a thread. It has ended when this does, also for a caller that is cancelled."""
        with ThreadPoolExecutor(1, thread_name_prefix="layers") as own:
            working = asyncio.get_running_loop().run_in_executor(own, self._connected, work, server)
            try:
                await asyncio.shield(working)
            except asyncio.CancelledError:
                self.stop()
                await asyncio.wait({working})
                working.exception()  # that it was ended so is known
                raise

    def _connected(self, work: Callable[[socket.socket], None], server: bool) -> None:
        name = None if server else SERVER_NAME
        connection = self._stream.dup()
        try:
            connection.settimeout(_HANDSHAKE_WITHIN_S)
            if self._context is not None:
                connection = self._context.wrap_socket(connection, server_side=server, server_hostname=name)
            connection.settimeout(None)
            work(connection)
        except OSError as error:
            why = error.strerror or str(error) or "the connection ended"
            raise NetworkError("the backing files could not be sent", why=why) from error
        except LimosaError:
            self.stop()  # the other end is not to wait for what will not come
            raise
        finally:
            connection.close()


class Sender(_End):
    """The source's end. ``bytes_per_s`` may be changed meanwhile, 0: no cap."""

    def __init__(self, stream: socket.socket, context: ssl.SSLContext | None, bytes_per_s: int) -> None:
        super().__init__(stream, context)
        self.bytes_per_s = bytes_per_s
        self.sent_bytes = 0

    async def send(self, paths: Sequence[str]) -> None:
        """Send files, and return when the connection has taken all. Raises :class:`NetworkError`,
        :class:`StorageError`."""
        await self._work(lambda connection: self._send(connection, paths), server=False)

    def _send(self, connection: socket.socket, paths: Iterable[str]) -> None:
        for path in paths:
            for at, piece in pieces(path):
                connection.sendall(_PIECE.pack(at, len(piece)) + piece)
                self.sent_bytes += len(piece)
                self._keep_to_rate(len(piece))

    def _keep_to_rate(self, sent: float) -> None:
        while self.bytes_per_s > 0 and sent > 0:
            began = time.monotonic()
            if self._stopped.wait(min(_PAUSE_S, sent / self.bytes_per_s)):
                raise OSError(errno.ECANCELED, os.strerror(errno.ECANCELED))
            sent -= (time.monotonic() - began) * self.bytes_per_s


class Receiver(_End):
    """The destination's end."""

    async def receive(self, files: Sequence[tuple[str, int]]) -> None:
        """Receive files of these sizes, bytes, into ones that are there and empty. They are not flushed.

        Raises :class:`NetworkError` also if something comes that no sender says, and :class:`StorageError`.
        """
        with suppress(OSError):  # it comes from a relay, which sees to that itself; or its protocol cannot
            for level, option, value in _KEEP_ALIVE:
                self._stream.setsockopt(level, option, value)
        await self._work(lambda connection: self._receive(connection, files), server=True)

    def _receive(self, connection: socket.socket, files: Iterable[tuple[str, int]]) -> None:
        buffer = memoryview(bytearray(_PIECE_BYTES))
        for path, size in files:
            with _opened(path, os.O_WRONLY | os.O_NOFOLLOW) as descriptor:
                filled = 0
                while piece := _announced(connection, filled, size):
                    at, filled = piece
                    _fill(connection, buffer[: filled - at])
                    _write(path, descriptor, buffer[: filled - at], at)
                _cut(path, descriptor, size)


def pieces(path: str) -> Iterator[tuple[int, bytes]]:
    """What of a file is no zeroes, in pieces with their places, and at last its size with nothing. Raises
    :class:`StorageError`."""
    with _opened(path, os.O_RDONLY) as descriptor:
        try:
            size = os.lseek(descriptor, 0, os.SEEK_END)
            for begin, end in _data(descriptor, size):
                for at in range(begin, end, _PIECE_BYTES):
                    piece = os.pread(descriptor, min(_PIECE_BYTES, end - at), at)
                    yield from ((at + skip, part) for skip, part in _without_zeroes(piece))
        except OSError as error:
            raise _fault(path, error) from error
        yield size, b""


def _data(descriptor: int, size: int) -> Iterator[tuple[int, int]]:
    """Begin and end of what takes space in a file."""
    at = 0
    while at < size:
        try:
            at = os.lseek(descriptor, at, os.SEEK_DATA)
            end = os.lseek(descriptor, at, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole follows
                return
            if error.errno != errno.EINVAL:
                raise
            end = size  # a block device does not tell
        yield at, end
        at = end


def _without_zeroes(piece: bytes) -> Iterator[tuple[int, bytes]]:
    """The parts of a piece that are no zeroes, with where in it they begin."""
    if piece == _ZEROES[: len(piece)]:
        return
    begin: int | None = None
    for at in range(0, len(piece), _GRAIN):
        grain = piece[at : at + _GRAIN]
        if grain != _ZEROES[: len(grain)]:
            begin = at if begin is None else begin
        elif begin is not None:
            yield begin, piece[begin:at]
            begin = None
    if begin is not None:
        yield begin, piece[begin:]


def _announced(connection: socket.socket, filled: int, size: int) -> tuple[int, int] | None:
    """Begin and end of the next piece, which may not be before ``filled``; None at the end of the file."""
    head = memoryview(bytearray(_PIECE.size))
    _fill(connection, head)
    at, length = _PIECE.unpack(head)
    if (at, length) == (size, 0):
        return None
    if not filled <= at <= at + length <= size or not 0 < length <= _PIECE_BYTES:
        raise OSError(errno.EPROTO, os.strerror(errno.EPROTO))
    return at, at + length


def _fill(connection: socket.socket, buffer: memoryview) -> None:
    while buffer:
        count = connection.recv_into(buffer)
        if count == 0:
            raise OSError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
        buffer = buffer[count:]


def _write(path: str, descriptor: int, data: memoryview, at: int) -> None:
    try:
        while data:
            count = os.pwrite(descriptor, data, at)
            data, at = data[count:], at + count
    except OSError as error:
        raise _fault(path, error) from error


def _cut(path: str, descriptor: int, size: int) -> None:
    try:
        os.ftruncate(descriptor, size)
    except OSError as error:
        raise _fault(path, error) from error


@contextmanager
def _opened(path: str, flags: int) -> Iterator[int]:
    try:
        descriptor = os.open(path, flags | os.O_CLOEXEC)
    except OSError as error:
        raise _fault(path, error) from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _fault(path: str, error: OSError) -> StorageError:
    return StorageError(f"{path} cannot be read or written", why=error.strerror or str(error))
