"""Linux guests of a lab, and what a client on the LAN sees of them.

The client is in a network namespace of its own, so that whatever it sees has travelled: through the VM's tap, the
bridge of whichever host the VM is on, and the wire between them.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any

from harness.hosts import Host, wait_until
from limosa.lab import namespaces
from limosa.lab.image import command_line, guest_image
from limosa.lab.plan import Lab
from limosa.model.vm import DirectBoot
from limosa.wire import api

ECHO_PORT, HTTP_PORT = 7, 80
BOOT_WITHIN_S = 90.0
#: Longer than any blackout, retransmission included, and short enough to end a test that has failed.
ANSWER_WITHIN_S = 15.0


def address_of(number: int) -> str:
    """The address of guest ``number``, from 1."""
    return f"10.77.0.{100 + number}"


def linux(name: str, number: int = 1, *, memory_mib: int = 128, load: dict[str, Any] | None = None) -> api.NewVm:
    """A VM that boots the lab's guest on the LAN; ``load`` is for :func:`limosa.lab.image.command_line`.

    Each address has one MAC address: who spoke with an earlier guest there would call that for half a minute else.
    """
    image = guest_image()
    line = command_line(name=name, address=f"{address_of(number)}/24", **(load or {}))
    return api.NewVm(
        name=name,
        memory_mib=memory_mib,
        accelerator="tcg",
        boot=DirectBoot(kernel=str(image.kernel), initrd=str(image.initrd), command_line=line),
        nics=(api.NewNic(switch="lan", mac=f"52:54:00:4c:69:{number:02x}"),),
    )


def console_log(host: Host, vm: str) -> str:
    """What the guest has said on its serial console since it came to this host."""
    path = host.state / "vms" / vm / "console.log"
    return path.read_text(errors="replace") if path.exists() else ""


def wait_for_console(host: Host, vm: str, text: str) -> None:
    """Wait until the guest has said ``text``."""
    wait_until(lambda: text in console_log(host, vm), f"{vm} says '{text}'", BOOT_WITHIN_S)


def type_in(host: Host, line: str) -> None:
    """Have the shell on the serial console of a host's one VM carry out a line."""
    (folder,) = (host.run / "vm").iterdir()
    with socket.socket(socket.AF_UNIX) as console:
        console.settimeout(ANSWER_WITHIN_S)
        console.connect(str(folder / "console.sock"))
        # What was typed is echoed, but not what comes of this sum.
        console.sendall(f"{line}\necho DONE $((6 * 7))\n".encode())
        said = b""
        while b"DONE 42" not in said:
            said += console.recv(4096)


class LanClient:
    """A machine on the LAN that knows one guest by its address."""

    def __init__(self, lab: Lab, address: str) -> None:
        self._lab = lab
        self._address = address

    def connect(self, port: int) -> socket.socket:
        """An open connection to the guest."""
        return namespaces.inside(
            self._lab.client, lambda: socket.create_connection((self._address, port), timeout=ANSWER_WITHIN_S)
        )

    def get(self, path: str = "/") -> str:
        """The guest's answer to an HTTP request. Raises ``OSError`` also for one that is refused or incomplete."""
        with self.connect(HTTP_PORT) as stream:
            stream.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
            answer = b""
            while data := stream.recv(65536):
                answer += data
        head, _, body = answer.partition(b"\r\n\r\n")
        if b" 200 " not in head.partition(b"\r\n")[0] or not body:
            raise ConnectionError(f"the guest answered {answer[:80]!r}")
        return body.decode()

    def facts(self) -> dict[str, str]:
        """The guest's page: ``host``, ``uptime``, ``visits``, ``number``."""
        return dict(line.split(" ", 1) for line in self.get().splitlines())

    def uptime(self) -> float:
        """The guest's own count of the seconds it has run."""
        return float(self.facts()["uptime"])

    def sees_it_run(self) -> bool:
        """Whether the guest's clock goes on."""
        return self.uptime() < self.uptime()

    @contextmanager
    def talking(self) -> Iterator[Conversation]:
        """A conversation that goes on during the block."""
        with Conversation(self) as conversation:
            yield conversation


class Conversation:
    """One TCP connection on which numbered lines are echoed, one after another, and HTTP requests beside it.

    Nothing is ever repeated or connected anew: the first thing that goes wrong is kept in ``faults`` and ends it.
    """

    def __init__(self, client: LanClient) -> None:
        self.answers = 0
        self.requests = 0
        #: longest time between two answers, seconds
        self.longest_gap_s = 0.0
        self.faults: list[BaseException] = []
        self._client = client
        self._over = threading.Event()
        self._changed = threading.Condition()
        self._threads = [threading.Thread(target=self._guarded, args=(work,)) for work in (self._echo, self._request)]

    def __enter__(self) -> Conversation:
        for thread in self._threads:
            thread.start()
        self.wait_for_more()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def wait_for_more(self, count: int = 5) -> None:
        """Wait until the guest has answered both ways ``count`` times from now on; raises what went wrong."""
        with self._changed:
            answers, requests = self.answers + count, self.requests + count
            enough = self._changed.wait_for(
                lambda: self.faults or (self.answers >= answers and self.requests >= requests), ANSWER_WITHIN_S
            )
        if self.faults:
            raise self.faults[0]
        assert enough, f"the guest answers no more: {self.answers} of {answers}, {self.requests} of {requests}"

    def go_on_for(self, seconds: float) -> None:
        """Go on for so long; raises what goes wrong."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self.faults), seconds)
        if self.faults:
            raise self.faults[0]

    def _guarded(self, work: Any) -> None:
        try:
            work()
        except BaseException as fault:  # noqa: BLE001 - the edge of a thread: the test raises it
            with self._changed:
                self.faults.append(fault)
                self._changed.notify_all()

    def _echo(self) -> None:
        with self._client.connect(ECHO_PORT) as stream, stream.makefile("rb") as reader:
            stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            last = time.monotonic()
            while not self._over.is_set():
                line = f"line {self.answers}\n".encode()
                stream.sendall(line)
                answer = reader.readline()
                if answer != line:
                    raise ConnectionError(f"the guest echoed {answer!r} for {line!r}")
                now = time.monotonic()
                self._count("answers", max(self.longest_gap_s, now - last))
                last = now
                self._over.wait(0.005)
            # Not an abrupt end: the guest's side must still know this connection.
            stream.shutdown(socket.SHUT_WR)
            if reader.read():
                raise ConnectionError("the guest said something nobody had said to it")

    def _request(self) -> None:
        while not self._over.is_set():
            if self._client.get("/ok") != "ok":
                raise ConnectionError("the guest served another page")
            self._count("requests", self.longest_gap_s)
            self._over.wait(0.01)

    def _count(self, what: str, gap_s: float) -> None:
        with self._changed:
            setattr(self, what, getattr(self, what) + 1)
            self.longest_gap_s = gap_s
            self._changed.notify_all()


def wait_until_it_serves(client: LanClient) -> None:
    """Wait until the guest answers HTTP requests."""

    def serves() -> bool:
        with suppress(OSError):
            return client.get("/ok") == "ok"
        return False

    wait_until(serves, "the guest serves", BOOT_WITHIN_S)
