"""The floor: a script that does with QMP what a live migration needs, and nothing else.

The destination's QEMU is started with ``-S``; both ends get their capabilities and, with TLS, credentials; the source
migrates; as soon as its QEMU reports completed the destination continues and the source quits. No checks, no journal,
no limits, no recovery, no other host to talk to: less than this is no safe move. The connection is made here and
handed over without Nagle's algorithm, which QEMU would leave on.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmarks.ground import HOSTS, Ground
from benchmarks.guest import BOOT_WITHIN_S, Guest
from benchmarks.qmp import Message, Qmp, stamp
from benchmarks.systems import Moved, other
from limosa.qemu import cpu, credentials
from limosa.security.stream import make_credentials
from limosa.security.tls import SERVER_NAME
from limosa.settings.host import ConvergencePolicy

PROGRAM = "/usr/bin/qemu-system-x86_64"
FIRST_PORT = 4444
CAPABILITIES = ("events", "return-path", "late-block-activate")
#: The same with which Limosa begins; the script never raises it.
DOWNTIME_LIMIT_MS = round(ConvergencePolicy().first_downtime_ms)


class Bare:
    """A guest moved by the script."""

    def __init__(self, ground: Ground, guest: Guest, name: str = "bare") -> None:
        self.name = name
        self.host = HOSTS[0]
        self._ground = ground
        self._guest = guest
        self._console = ground.folder / f"{guest.name}-console"
        self._log = ground.folder / f"{guest.name}-log"
        self._tap = f"bare{guest.number}"
        self._port = FIRST_PORT + guest.number
        self._started = 0
        for host in HOSTS:
            ground.add_tap(host, self._tap)

    def boot(self) -> None:
        """Start the guest on the first host; returns when its memory is filled."""
        self._process, self._qmp = self._launch(self.host, [])
        wait_for(self._console, self._guest.loaded)

    def pause(self) -> None:
        """Stop the guest."""
        self._qmp.execute("stop")

    def wake(self) -> None:
        """Let it run again."""
        self._qmp.execute("cont")

    def move(self, *, encrypted: bool) -> Moved:
        """Move the guest to the other host."""
        began, own = time.perf_counter(), time.thread_time()
        there = other(self.host)
        source, waiting = self._qmp, self._process
        process, destination = self._launch(there, ["-S", "-incoming", "defer"])
        self._prepare(source, destination, encrypted=encrypted)
        address = (self._ground.migration_address(there), self._port)
        destination.execute("migrate-incoming", {"uri": f"tcp:{address[0]}:{address[1]}"})
        uri = self._connect(source, address)
        source.events.clear()
        source.execute("migrate", {"uri": uri})

        stopped = source.wait(lambda event: event["event"] == "STOP")
        source.wait(_completed)
        destination.execute("cont")
        resumed = destination.wait(lambda event: event["event"] == "RESUME")

        total_ms = source.execute("query-migrate")["total-time"]
        source.quit()
        waiting.wait()
        self._process, self._qmp, self.host = process, destination, there
        wall_s, own_s = time.perf_counter() - began, time.thread_time() - own
        self._forget(destination, encrypted=encrypted)
        return Moved(
            wall_s=wall_s,
            transfer_s=total_ms / 1000,
            blackout_ms=(stamp(resumed) - stamp(stopped)) * 1000,
            command_cpu_s=own_s,
            stopped_at=stamp(stopped),
        )

    def _launch(self, host: str, more: Sequence[str]) -> tuple[subprocess.Popen[bytes], Qmp]:
        self._started += 1
        path = self._ground.folder / f"{self._guest.name}-{self._started}.qmp"
        command = [PROGRAM, *self._arguments(path), *more]
        return self._ground.spawn(host, self.name, command, self._log), Qmp(path)

    def _arguments(self, qmp: Path) -> Sequence[str]:
        """The same machine and devices as Limosa's and libvirt's."""
        guest = self._guest
        model, features = cpu.parse(guest.cpu)
        switches = [f"{name}={'on' if on else 'off'}" for name, on in features.items()]
        return [
            *("-nodefaults", "-no-user-config", "-display", "none"),
            *("-machine", f"{guest.machine},accel=tcg", "-cpu", ",".join([model, *switches])),
            *("-m", str(guest.load.memory_mib), "-smp", "1"),
            *("-kernel", guest.kernel, "-initrd", guest.initrd, "-append", guest.command_line),
            *("-qmp", f"unix:{qmp},server=on,wait=off"),
            *("-chardev", f"file,id=console,path={self._console},append=on", "-device", "isa-serial,chardev=console"),
            *("-netdev", f"tap,id=net0,ifname={self._tap},script=no,downscript=no"),
            *("-device", f"virtio-net-pci,netdev=net0,mac={guest.mac},romfile=,disable-legacy=on,addr=2.0"),
            *("-device", "VGA,addr=1.0"),
        ]

    def _prepare(self, source: Qmp, destination: Qmp, *, encrypted: bool) -> None:
        capabilities = {"capabilities": [{"capability": name, "state": True} for name in CAPABILITIES]}
        stream = {"tls-creds": "tls", "tls-hostname": SERVER_NAME} if encrypted else {}
        limits = {"downtime-limit": DOWNTIME_LIMIT_MS, "max-bandwidth": 0}
        if encrypted:
            self._add_credentials(source, destination)
        for end, parameters in ((source, limits | stream), (destination, stream)):
            end.execute("migrate-set-capabilities", capabilities)
            end.execute("migrate-set-parameters", parameters)

    def _add_credentials(self, source: Qmp, destination: Qmp) -> None:
        server, client = make_credentials()
        with ExitStack() as files:
            folder = self._ground.folder / f"{self._guest.name}-server"
            files.enter_context(credentials.written(folder, server, "server", None))
            _add_tls(destination, folder, "server")
            folder = self._ground.folder / f"{self._guest.name}-client"
            files.enter_context(credentials.written(folder, client, "client", None))
            _add_tls(source, folder, "client")

    def _connect(self, source: Qmp, address: tuple[str, int]) -> str:
        """Connect the source with the waiting destination. Returns what QEMU is to migrate to."""
        with self._ground.inside(self.host, lambda: socket.create_connection(address)) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            source.execute("getfd", {"fdname": "stream"}, [connection.fileno()])
        return "fd:stream"

    def _forget(self, qemu: Qmp, *, encrypted: bool) -> None:
        """Make the destination ready to be the next move's source."""
        if encrypted:
            qemu.execute("object-del", {"id": "tls"})
            qemu.execute("migrate-set-parameters", {"tls-creds": "", "tls-hostname": ""})


def wait_for(file: Path, words: bytes) -> None:
    """Return when a console's log has these words. Raises ``TimeoutError``, and ``OSError`` if its folder goes."""
    deadline = time.monotonic() + BOOT_WITHIN_S
    while file.name not in os.listdir(file.parent) or words not in file.read_bytes():
        if time.monotonic() > deadline:
            raise TimeoutError(f"the guest did not say {words.decode()} within {BOOT_WITHIN_S:.0f} s: {file}")
        time.sleep(0.2)


def _completed(event: Message) -> bool:
    if event["event"] != "MIGRATION":
        return False
    if event["data"]["status"] == "failed":
        raise RuntimeError("the floor's migration failed")
    return bool(event["data"]["status"] == "completed")


def _add_tls(qemu: Qmp, folder: Path, endpoint: str) -> None:
    qemu.execute(
        "object-add",
        {"qom-type": "tls-creds-x509", "id": "tls", "dir": str(folder), "endpoint": endpoint, "verify-peer": True},
    )
