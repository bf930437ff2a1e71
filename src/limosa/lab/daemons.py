"""The host daemons of a lab: started inside their namespaces, awaited by sd_notify(3), found again by ``daemon.json``.

Each has a session of its own, so nothing that happens to the terminal reaches it, and writes to ``daemon.log``. It
tells readiness as it would tell systemd: ``READY=1`` in a datagram to the socket that NOTIFY_SOCKET names. So no port
is polled, and a daemon that dies instead is noticed at once, through its pidfd.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import msgspec

from limosa.errors import HostUnreachable, LimosaError, StateError
from limosa.lab import namespaces
from limosa.lab.plan import Lab
from limosa.model import reading
from limosa.model.base import Model

READY_WITHIN_S = 30.0
STOP_WITHIN_S = 10.0
LOG_LINES = 8


class DaemonRecord(Model, frozen=True):
    """``daemon.json``: a process, told apart from a later one of the same number by its start time (clock ticks)."""

    pid: int
    start_time: int


@dataclass
class Starting:
    """A daemon that was started and has not told readiness yet."""

    lab: Lab
    host: str
    process: subprocess.Popen[bytes]
    notify: socket.socket
    pidfd: int

    def __enter__(self) -> Starting:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self.pidfd)
        self.notify.close()
        _notify_path(self.lab, self.host).unlink(missing_ok=True)

    def wait(self, deadline: float) -> None:
        """Return when it is ready. Raises :class:`HostUnreachable` with the end of its log if it dies or is late."""
        while (left := deadline - time.monotonic()) > 0:
            ready = select.select([self.notify.fileno(), self.pidfd], [], [], left)[0]
            if self.notify.fileno() in ready and b"READY=1" in self.notify.recv(4096).splitlines():
                return
            if self.pidfd in ready:
                raise self._failure(f"it ended with status {self.process.wait()}")
        raise self._failure(f"it was not ready within {READY_WITHIN_S:.0f} s")

    def _failure(self, why: str) -> LimosaError:
        lines = _last_lines(log_of(self.lab, self.host))
        said = "; its log ends: " + " | ".join(lines) if lines else "; its log is empty"
        return HostUnreachable(f"the daemon of {self.host} did not start", why=why + said, host=self.host)


def default_command() -> list[str]:
    """How a host daemon is started, up to its settings file: with the Limosa that runs this."""
    return [str(Path(sys.executable).with_name("limosa")), "host", "serve", "--settings"]


def start(lab: Lab, hosts: Iterable[str], command: Sequence[str] | None = None) -> None:
    """Start the daemons of ``hosts`` side by side and wait until all are ready.

    Raises :class:`HostUnreachable` if one is not; the others are left as they are.
    """
    deadline = time.monotonic() + READY_WITHIN_S
    with ExitStack() as stack:
        starting = [stack.enter_context(_launch(lab, host, command or default_command())) for host in hosts]
        for daemon in starting:
            daemon.wait(deadline)


def stop(lab: Lab, host: str) -> bool:
    """End a host's daemon as systemd would, with SIGTERM; its VMs go on. Returns whether one was running.

    Raises :class:`StateError` if it does not end in time.
    """
    pid = pid_of(lab, host)
    if pid is None:
        return False
    with suppress(ProcessLookupError):
        descriptor = os.pidfd_open(pid)
        try:
            if pid_of(lab, host) == pid:
                signal.pidfd_send_signal(descriptor, signal.SIGTERM)
            if not select.select([descriptor], [], [], STOP_WITHIN_S)[0]:
                raise StateError(f"the daemon of {host} does not end", why=f"process {pid} had {STOP_WITHIN_S:.0f} s")
        finally:
            os.close(descriptor)
    return True


def pid_of(lab: Lab, host: str) -> int | None:
    """The host's daemon, if it runs."""
    try:
        record = reading.decode(_record_path(lab, host).read_bytes(), DaemonRecord)
    except (OSError, msgspec.DecodeError):
        return None  # never started, or a crash tore the file: what is in the namespace is found without it
    return record.pid if _start_time(record.pid) == record.start_time else None


def log_of(lab: Lab, host: str) -> Path:
    """What the daemon writes."""
    return lab.host_state(host) / "daemon.log"


def _launch(lab: Lab, host: str, command: Sequence[str]) -> Starting:
    notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    path = _notify_path(lab, host)
    try:
        path.unlink(missing_ok=True)
        os.fchmod(notify.fileno(), 0o600)
        notify.bind(str(path))
        process = _spawn(lab, host, command, path)
        pidfd = os.pidfd_open(process.pid)
    except BaseException:
        notify.close()
        raise
    record = DaemonRecord(pid=process.pid, start_time=_start_time(process.pid) or 0)
    _record_path(lab, host).write_bytes(msgspec.json.encode(record))
    return Starting(lab, host, process, notify, pidfd)


def _spawn(lab: Lab, host: str, command: Sequence[str], notify: Path) -> subprocess.Popen[bytes]:
    full = [*command, str(lab.host_state(host) / "host.toml")]
    environment = {**os.environ, "NOTIFY_SOCKET": str(notify)}
    try:
        with log_of(lab, host).open("ab") as log:
            return namespaces.inside(
                lab.namespace(host),
                lambda: subprocess.Popen(
                    full,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd="/",
                    start_new_session=True,
                ),
            )
    except OSError as fault:
        raise StateError(f"cannot start {full[0]}", why=fault.strerror or str(fault)) from fault


def _start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None if it has ended (proc(5), field 22)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()  # the name before it may hold anything, brackets and spaces too
    return None if fields[0] in "ZX" else int(fields[19])


def _last_lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-LOG_LINES:]
    except OSError:
        return []


def _record_path(lab: Lab, host: str) -> Path:
    return lab.host_state(host) / "daemon.json"


def _notify_path(lab: Lab, host: str) -> Path:
    return lab.host_run(host) / "notify.sock"
