"""Two sockets made one way, by threads: for a QEMU that can be given no descriptor."""

from __future__ import annotations

import socket
from contextlib import suppress
from threading import Thread

_CHUNK_BYTES = 256 * 1024


def splice(one: socket.socket, other: socket.socket) -> None:
    """Carry what comes from each into the other, until either ends; then both are closed. They are the threads' now."""
    for each in (one, other):
        each.setblocking(True)
    Thread(target=_both, args=(one, other), daemon=True).start()


def _both(one: socket.socket, other: socket.socket) -> None:
    with one, other:
        back = Thread(target=_carry, args=(other, one), daemon=True)
        back.start()
        _carry(one, other)
        back.join()


def _carry(source: socket.socket, sink: socket.socket) -> None:
    chunk = memoryview(bytearray(_CHUNK_BYTES))
    with suppress(OSError):
        while count := source.recv_into(chunk):
            sink.sendall(chunk[:count])
    for each in (source, sink):
        with suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
