"""Other VMs on the hosts, which compute all the time and tell how much they get done.

Each has one processor and a shell that counts to a thousand and writes a dot, again and again; its work is the dots in
the file its console is logged to. They are no VMs of Limosa's and have no NIC.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from benchmarks.ground import HOSTS, Ground
from benchmarks.guest import BOOT_WITHIN_S
from benchmarks.qmp import Qmp
from benchmarks.systems.bare import PROGRAM, wait_for
from limosa.lab.image import command_line, guest_image

GROUP = "neighbours"
MEMORY_MIB = 128
#: How many of them compute at each load.
LOADS = {"idle": 0.0, "half": 0.5, "busy": 1.0}

_TIMES = 1000
_LOOP = f"while :; do i=0; while [ $i -lt {_TIMES} ]; do i=$((i+1)); done; echo -n .; done\n"
_ASK_EVERY_S = 1.0


class Neighbours:
    """As many as the machine has processors, paused at first."""

    def __init__(self, place: Ground) -> None:
        count = os.cpu_count() or 1
        self._all = [_Neighbour(place, number) for number in range(count)]
        self._at_work: list[_Neighbour] = []
        for neighbour in self._all:
            neighbour.boot()
            neighbour.pause()

    @contextmanager
    def at(self, load: str) -> Iterator[None]:
        """Have so many of them compute."""
        self._at_work = self._all[: round(len(self._all) * LOADS[load])]
        for neighbour in self._at_work:
            neighbour.wake()
        try:
            yield
        finally:
            for neighbour in self._at_work:
                neighbour.pause()
            self._at_work = []

    def meter(self) -> Callable[[], float]:
        """What they get done a second from now on, all together, in thousands of steps."""
        began, before = time.monotonic(), self._done()
        return lambda: (self._done() - before) / (time.monotonic() - began)

    def _done(self) -> int:
        return sum(neighbour.done() for neighbour in self._at_work)


class _Neighbour:
    def __init__(self, place: Ground, number: int) -> None:
        self._place = place
        self._host = HOSTS[number % len(HOSTS)]
        self._files = place.folder / f"neighbour-{number}"
        self._log = self._file("console")

    def boot(self) -> None:
        """Start it and its work."""
        self._place.spawn(self._host, GROUP, self._command(), self._file("log"))
        self._qmp = Qmp(self._file("qmp"))
        wait_for(self._log, b"LIMOSA READY")
        self._begin()

    def pause(self) -> None:
        self._qmp.execute("stop")

    def wake(self) -> None:
        self._qmp.execute("cont")

    def done(self) -> int:
        """Dots so far, and the few bytes said before."""
        return self._log.stat().st_size

    def _begin(self) -> None:
        """Tell the shell what to do, until it does it: it may not listen yet."""
        deadline = time.monotonic() + BOOT_WITHIN_S
        while b"....." not in self._log.read_bytes():
            if time.monotonic() > deadline:
                raise TimeoutError(f"the neighbour does not work: {self._log}")
            with socket.socket(socket.AF_UNIX) as console, suppress(ConnectionRefusedError):
                console.connect(str(self._file("shell")))
                console.sendall(_LOOP.encode())
                time.sleep(_ASK_EVERY_S)

    def _command(self) -> list[str]:
        image = guest_image()
        shell = f"socket,id=console,path={self._file('shell')},server=on,wait=off,logfile={self._log}"
        return [
            *(PROGRAM, "-nodefaults", "-no-user-config", "-display", "none", "-machine", "q35,accel=tcg"),
            *("-m", str(MEMORY_MIB), "-smp", "1", "-kernel", str(image.kernel), "-initrd", str(image.initrd)),
            *("-append", command_line(name=self._files.name), "-qmp", f"unix:{self._file('qmp')},server=on,wait=off"),
            *("-chardev", shell, "-device", "isa-serial,chardev=console"),
        ]

    def _file(self, kind: str) -> Path:
        return self._files.with_suffix(f".{kind}")
