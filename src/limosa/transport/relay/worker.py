"""The process that compresses, and the relay's handle of it.

It is a process and not a thread because of its priority: a thread that is last in line and holds Python's lock when
somebody else wants the processor would stop the whole relay.

Chunks, and what is left of them when known pages are left out, lie in slots, which both processes share; what the
worker makes of one is written to the slot's twin, so that a worker which dies or is not waited for leaves it as it was.
It knows nothing of other chunks.

A chunk is offered by a ticket in a socket, and both processes can take tickets out of it: whoever does has the chunk.
So the relay can withdraw what the worker had no time to begin with, and the kernel decides who was first.

The worker ends when the relay does: the kernel kills it then, whatever state it is in.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import socket
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from limosa.transport.relay import priority
from limosa.transport.relay.codec import Compressor
from limosa.transport.relay.errors import WorkerLost
from limosa.transport.relay.frames import HEAD_BYTES, MAX_CONTENT_BYTES

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
#: level
_BEGINNING = struct.Struct("=i")
#: slot, length of the content in it
_TICKET = struct.Struct("=II")
#: slot, compressed length, nanoseconds it took, nanoseconds of processor time
_RESULT = struct.Struct("=IIQQ")
#: Of a ticket without a chunk.
NO_SLOT = 0xFFFFFFFF


class Memory:
    """Slots for chunks, and for each a twin for what was made of it, shared with every process forked later."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self._view = memoryview(mmap.mmap(-1, 2 * slots * MAX_CONTENT_BYTES))

    def raw(self, slot: int, begin: int, end: int) -> memoryview:
        """Bytes of the chunk in a slot. Raises ``IndexError`` if there is no such slot."""
        return self.content(slot, HEAD_BYTES + end)[HEAD_BYTES + begin :]

    def content(self, slot: int, length: int) -> memoryview:
        """The first bytes of a slot. Raises ``IndexError`` if there is no such slot."""
        self._check(slot)
        start = slot * MAX_CONTENT_BYTES
        return self._view[start : start + length]

    def compressed(self, slot: int, length: int) -> memoryview:
        """The first bytes of a slot's twin. Raises ``IndexError`` if there is no such slot."""
        self._check(slot)
        start = (self.slots + slot) * MAX_CONTENT_BYTES
        return self._view[start : start + length]

    def _check(self, slot: int) -> None:
        # A negative one would be counted from the end, and somebody else's bytes taken for a chunk's.
        if not 0 <= slot < self.slots:
            raise IndexError(slot)


class Result(NamedTuple):
    """What the worker made of the content in ``slot``. If that would not be shorter, there is nothing in the twin."""

    slot: int
    length: int
    seconds: float
    cpu_seconds: float


class Worker:
    """A compressing process. Made by :meth:`start`."""

    def __init__(self, pidfd: int, offers: socket.socket, tickets: socket.socket, results: socket.socket) -> None:
        # Both ends of the tickets stay here: one to give them, the other to take them back.
        self._offers, self._tickets, self._results = offers, tickets, results
        self._pidfd = pidfd

    @classmethod
    def start(cls, memory: Memory, prepare: Callable[[], None]) -> Worker:
        """Fork a worker, which first calls ``prepare`` and then waits for :meth:`begin`.

        It is to be called before there are threads, since a process that is forked from one with threads may find
        locks that nobody will ever open. ``prepare`` closes what the worker must not hold and gives up rights.
        """
        offers, tickets = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        results, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        parent = os.getpid()
        pid = os.fork()
        if pid:
            theirs.close()
            return cls(os.pidfd_open(pid), offers, tickets, results)
        try:
            offers.close()
            results.close()
            os.setsid()
            priority.be_last()
            prepare()
            _die_with(parent)
            _work(memory, tickets, theirs)
        finally:
            os._exit(1)

    def begin(self, level: int) -> None:
        """Tell it how hard to compress: zstd's number. Before the first offer.

        Of one that has died meanwhile :meth:`result` tells, as ever.
        """
        with suppress(OSError):
            self._results.send(_BEGINNING.pack(level))

    def fileno(self) -> int:
        """Readable when there is a result, or the worker died."""
        return self._results.fileno()

    def offer(self, slot: int, length: int) -> None:
        """Let it compress a content, if it comes to it. Raises :class:`WorkerLost`."""
        try:
            self._offers.send(_TICKET.pack(slot, length), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError as error:
            raise WorkerLost(str(error)) from error

    def ask(self) -> None:
        """Let it say that it has a processor, by a result of :data:`NO_SLOT`. Raises :class:`WorkerLost`."""
        self.offer(NO_SLOT, 0)

    def withdraw(self) -> int | None:
        """Take back the oldest chunk with which it has not begun: its slot; None: it has begun with all."""
        try:
            return int(_TICKET.unpack(self._tickets.recv(_TICKET.size, socket.MSG_DONTWAIT))[0])
        except BlockingIOError:
            return None

    def result(self) -> Result | None:
        """The next result, or None if there is none yet. Raises :class:`WorkerLost`."""
        try:
            data = self._results.recv(_RESULT.size, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        except OSError as error:
            raise WorkerLost(str(error)) from error
        if len(data) != _RESULT.size:
            raise WorkerLost("it ended")
        slot, length, nanoseconds, cpu_nanoseconds = _RESULT.unpack(data)
        return Result(slot, length, nanoseconds / 1e9, cpu_nanoseconds / 1e9)

    def end(self) -> None:
        """End it, whatever it does. Does not wait: a process that is last in line may take its time to die."""
        # One that has not given up its rights yet is not ours to kill; it ends with its sockets, as they all do.
        with suppress(ProcessLookupError, PermissionError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        for sock in (self._offers, self._tickets, self._results):
            sock.close()


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when ``parent`` ends: one that was stopped would not notice by itself.

    To be called after rights were given up, which makes the kernel forget it (PR_SET_PDEATHSIG, prctl(2)).
    """
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    if os.getppid() != parent:
        os._exit(1)  # it ended before we asked


def _work(memory: Memory, tickets: socket.socket, results: socket.socket) -> None:
    """Compress until the relay is gone."""
    with suppress(BrokenPipeError, ConnectionResetError):
        beginning = results.recv(_BEGINNING.size)
        compressor = Compressor(*_BEGINNING.unpack(beginning)) if beginning else None
        while compressor is not None and (ticket := tickets.recv(_TICKET.size)):
            slot, length = _TICKET.unpack(ticket)
            if slot == NO_SLOT:
                results.send(_RESULT.pack(slot, 0, 0, 0))
                continue
            began, cpu_began = time.monotonic_ns(), time.thread_time_ns()
            made = compressor.compress(memory.content(slot, length))
            if len(made) < length:
                memory.compressed(slot, len(made))[:] = made
            took, cpu_took = time.monotonic_ns() - began, time.thread_time_ns() - cpu_began
            results.send(_RESULT.pack(slot, min(len(made), length), took, cpu_took))
