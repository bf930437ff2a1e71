"""The client: how long did the guest not answer?

An ICMP echo request, numbered, goes to the guest every millisecond; the guest's kernel answers, so no program in the
guest adds its own delays. What counts is when the answers arrived by the kernel's time stamps, so it does not matter
when this process gets to read them. It runs with real-time priority, because requests sent late would look like
answers that came late.

The gap is the longest time between two answers, less the millisecond that is between them anyway.

Run as a program (``python -m benchmarks.gap ADDRESS FILE``) it sends until SIGTERM and then writes the time stamps.
"""

from __future__ import annotations

import array
import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

PERIOD_S = 0.001
REAL_TIME_PRIORITY = 50
_SO_TIMESTAMPNS = 35  # linux/asm-generic/socket.h; not in Python's socket module
_IP_HEADER = 20
_ECHO_REQUEST, _ECHO_REPLY = 8, 0


@dataclass(frozen=True)
class Answers:
    """When answers of the guest arrived: seconds since the epoch, in order."""

    at: array.array[float]

    def gap_ms(self, first: float, last: float) -> float:
        """The longest gap that touches the time from ``first`` to ``last``, in milliseconds."""
        pairs = zip(self.at, self.at[1:], strict=False)
        gaps = [after - before for before, after in pairs if after >= first and before <= last]
        return max(0.0, max(gaps) - PERIOD_S) * 1000 if gaps else float("inf")


class Client:
    """The probing process. Started inside the namespace the calling thread is in."""

    def __init__(self, address: str, folder: Path) -> None:
        self._file = folder / "answers"
        command = [sys.executable, "-m", "benchmarks.gap", address, str(self._file)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        self._process.stdout.readline()  # it sends

    def stop(self) -> Answers:
        """End it; what it saw."""
        self._process.terminate()
        self._process.communicate()
        answers: array.array[float] = array.array("d")
        answers.frombytes(self._file.read_bytes())
        return Answers(answers)


def probe(address: str) -> array.array[float]:
    """Ask the guest until SIGTERM; when its answers arrived."""
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stopping.append(number))
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(REAL_TIME_PRIORITY))
    arrived: array.array[float] = array.array("d")
    identity = os.getpid() & 0xFFFF
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as icmp:
        icmp.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        icmp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 * 1024 * 1024)
        icmp.connect((address, 0))
        icmp.setblocking(False)
        print("sending", flush=True)
        number, due = 0, time.monotonic()
        while not stopping:
            _send(icmp, identity, number)
            _receive(icmp, identity, arrived)
            number, due = number + 1, max(due + PERIOD_S, time.monotonic() - 10 * PERIOD_S)
            time.sleep(max(0.0, due - time.monotonic()))
    return arrived


def _send(icmp: socket.socket, identity: int, number: int) -> None:
    packet = struct.pack("!BBHHHQ", _ECHO_REQUEST, 0, 0, identity, number & 0xFFFF, number)
    packet = packet[:2] + struct.pack("!H", _checksum(packet)) + packet[4:]
    # A queue is full, or the address is just being resolved: an answer less, which is what is measured.
    with contextlib.suppress(OSError):
        icmp.send(packet)


def _receive(icmp: socket.socket, identity: int, arrived: array.array[float]) -> None:
    while True:
        try:
            packet, ancillary, _, _ = icmp.recvmsg(256, 64)
        except BlockingIOError:
            return
        kind, _, _, whose = struct.unpack_from("!BBHH", packet, _IP_HEADER)
        if kind == _ECHO_REPLY and whose == identity:
            seconds, nanoseconds = struct.unpack_from("qq", ancillary[0][2])
            arrived.append(seconds + nanoseconds / 1e9)


def _checksum(packet: bytes) -> int:
    """The internet checksum (RFC 1071) of an even number of bytes."""
    total: int = sum(struct.unpack(f"!{len(packet) // 2}H", packet))
    total = (total >> 16) + (total & 0xFFFF)
    return ~(total + (total >> 16)) & 0xFFFF


if __name__ == "__main__":
    Path(sys.argv[2]).write_bytes(probe(sys.argv[1]).tobytes())
