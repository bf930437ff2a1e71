"""The socket whose other end a QEMU holds: written without ever waiting, however slow that QEMU reads.

What the QEMU does not take at once is kept and written as it makes room. Guest memory comes only as fast as the
destination's QEMU takes it (see the credit in ``sender``); on the return path, where little is said, a QEMU that does
not read at all loses its channel.
"""

from __future__ import annotations

import socket
import threading
from collections import deque
from contextlib import suppress

from limosa.transport.relay.frames import WINDOW_BYTES

#: No sender that keeps to its credit ever makes us keep more.
MAX_KEPT_BYTES = WINDOW_BYTES


class Plug:
    """One end of a channel. Reading is the business of one thread, writing of any."""

    def __init__(self, number: int, connection: socket.socket) -> None:
        self.number = number
        self._socket = connection
        self._lock = threading.Lock()
        self._kept: deque[memoryview] = deque()
        self.kept_bytes = 0
        self._ending = False
        #: this QEMU sends no more
        self.input_ended = False
        #: this QEMU was told that no more comes
        self.output_ended = False

    def fileno(self) -> int:
        """For poll."""
        return self._socket.fileno()

    def read_into(self, view: memoryview) -> int | None:
        """Bytes that were there; 0: the QEMU sends no more, None: nothing is there now. Raises ``OSError``."""
        try:
            return self._socket.recv_into(view, len(view), socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None

    def write(self, data: memoryview) -> int:
        """Write, and keep what the QEMU does not take yet. Returns what it took.

        Raises ``OSError`` if it takes nothing any more, or if too much would have to be kept.
        """
        with self._lock:
            if self._ending:
                raise BrokenPipeError("data after the end")
            count = 0 if self._kept else self._send(data)
            if count < len(data):
                if self.kept_bytes + len(data) - count > MAX_KEPT_BYTES:
                    raise BlockingIOError("its QEMU does not read")
                self._kept.append(memoryview(bytes(data[count:])))
                self.kept_bytes += len(data) - count
            return count

    def flush(self) -> int:
        """Write what was kept, as far as the QEMU takes it. Returns how much that was. Raises ``OSError``."""
        with self._lock:
            written = 0
            while self._kept:
                data = self._kept.popleft()
                count = self._send(data)
                written += count
                if count < len(data):
                    self._kept.appendleft(data[count:])
                    break
            self.kept_bytes -= written
            self._end_output()
            return written

    def finish(self) -> None:
        """No more will be written: the QEMU sees the end once it has all. Raises ``OSError``."""
        with self._lock:
            self._ending = True
            self._end_output()

    def close(self) -> None:
        """Unplug at once, whatever is kept."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _send(self, data: memoryview) -> int:
        try:
            return self._socket.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return 0

    def _end_output(self) -> None:
        if self._ending and not self._kept and not self.output_ended:
            self.output_ended = True
            with suppress(OSError):  # it closed already
                self._socket.shutdown(socket.SHUT_WR)
