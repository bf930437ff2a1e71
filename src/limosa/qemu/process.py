"""One QEMU process: started so that it outlives us, identified so that it cannot be confused, watched without polling.

A process is known by its pid *and* its start time (field 22 of ``/proc/PID/stat``): after a crash the daemon finds its
QEMUs again by that pair, and a pid that was given to another process meanwhile does not match. A pidfd is opened
before the start time is compared, so from then on signals reach that process or nobody.

QEMU runs in its own session, with a file mode mask of 077, with no descriptors but those it is given, and as an
unprivileged user where one is named. It is not tied to our life on purpose: a VM survives its daemon.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import re
import resource
import signal
import stat
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from limosa.errors import QemuError, QemuGone

_KILL_WITHIN_S = 15.0
_LOG_TAIL_BYTES = 4096
_LOG_TAIL_LINES = 4
#: From linux/capability.h: whoever has it may raise the limits of others.
_CAP_SYS_RESOURCE = 24
_OWN_SCORE = Path("/proc/self/oom_score_adj")
_IN_USE = re.compile(r"Failed to get .* lock; Is another process using the image \[(.*)\]\?")
#: ``-msg timestamp=on`` puts a time before, and QEMU its own program name.
_PREFIX = re.compile(r"\A(\S+Z )?(\S*qemu-system-\w+: )?")


class QemuProcess:
    """A QEMU process that runs, or ran. Made by :func:`spawn` or :meth:`attach`."""

    def __init__(self, pid: int, start_time: int, pidfd: int, log: Path, child: subprocess.Popen[bytes] | None) -> None:
        self.pid = pid
        #: clock ticks after boot; means something only together with ``pid`` and one boot of the machine
        self.start_time = start_time
        #: set as soon as the process has ended
        self.gone = asyncio.Event()
        self._pidfd = pidfd
        self._log = log
        self._child = child
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(pidfd, self._on_exit)

    @classmethod
    def attach(cls, pid: int, start_time: int) -> QemuProcess:
        """The process that was started as ``pid`` at ``start_time``. Raises :class:`QemuGone` if it is no more."""
        try:
            pidfd = os.pidfd_open(pid)
        except OSError as error:
            raise QemuGone(f"QEMU with pid {pid} has ended") from error
        if _running_since(pid) != start_time:
            os.close(pidfd)
            raise QemuGone(f"QEMU with pid {pid} has ended")
        return cls(pid, start_time, pidfd, _log_of(pid), child=None)

    @property
    def exit_code(self) -> int | None:
        """As ``subprocess`` has it; None while it runs, or if it was not our child."""
        return self._child.returncode if self._child is not None else None

    def exit_text(self) -> str:
        """Why it ended, as far as it can be known: QEMU's last words, else how it was ended. Empty while it runs."""
        if not self.gone.is_set():
            return ""
        return last_words(self._log) or self._exit_status()

    async def kill(self) -> None:
        """End it by force. Returns when it is gone; raises :class:`QemuError` if the kernel cannot end it in 15 s."""
        if not self.gone.is_set():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        try:
            async with asyncio.timeout(_KILL_WITHIN_S):
                await self.gone.wait()
        except TimeoutError:
            raise QemuError(
                f"QEMU with pid {self.pid} does not end",
                why="the kernel holds it, most likely in access to storage that does not answer",
                todo="check its storage",
            ) from None

    async def ends(self, within_s: float) -> bool:
        """Whether it ends within that time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self.gone.wait()
        return self.gone.is_set()

    def owner(self) -> tuple[int, int] | None:
        """The uid and gid it runs as, or None if they are our own. Raises :class:`QemuGone`."""
        try:
            status = Path(f"/proc/{self.pid}/status").read_text()
        except OSError as error:
            raise QemuGone(f"QEMU with pid {self.pid} has ended", why=self.exit_text()) from error
        uid, gid = (int(re.findall(rf"^{key}:\t(\d+)", status, re.MULTILINE)[0]) for key in ("Uid", "Gid"))
        return None if uid == os.geteuid() else (uid, gid)

    def let_lock_memory(self) -> None:
        """Let it lock any amount of memory, if we may allow that; else what it may stays as it is."""
        with contextlib.suppress(PermissionError, ProcessLookupError):
            if not self.gone.is_set():
                resource.prlimit(self.pid, resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    def release(self) -> None:
        """Stop watching; the process goes on."""
        if self._pidfd >= 0:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1

    def _on_exit(self) -> None:
        self.release()
        if self._child is not None:
            self._child.wait()  # reaps it: the pidfd says it has ended, so this does not block
        self.gone.set()

    def _exit_status(self) -> str:
        code = self.exit_code
        if code is None:
            return "it ended without a word"
        return f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"


async def spawn(
    command: Sequence[str], *, pass_fds: Sequence[int], log: Path, user: str | None, kvm: bool
) -> QemuProcess:
    """Start QEMU. What it writes goes to ``log``; the log of the run before is kept as ``*.old``.

    ``user`` is the unprivileged user to run as (root only), in its own group and, with ``kvm``, the one that may use
    ``/dev/kvm``. Raises :class:`QemuError`; nothing runs then, nor if it is cancelled.
    """
    # Forking and loading take several milliseconds, which another VM's switchover should not have to wait for.
    starting = asyncio.ensure_future(asyncio.to_thread(_start, command, pass_fds, log, user, kvm))
    try:
        child = await asyncio.shield(starting)
    except asyncio.CancelledError:
        child = await starting
        child.kill()
        child.wait()
        raise
    # A child that ended already stays a zombie until we reap it, so neither its pid nor its start time can be lost.
    start_time = start_time_of(child.pid)
    assert start_time is not None
    return QemuProcess(child.pid, start_time, os.pidfd_open(child.pid), log, child)


def _start(
    command: Sequence[str], pass_fds: Sequence[int], log: Path, user: str | None, kvm: bool
) -> subprocess.Popen[bytes]:
    uid, gid = owner_of(user) or (None, None)
    try:
        with _fresh(log) as words:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=words,
                stderr=words,
                cwd="/",
                env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"},
                pass_fds=pass_fds,
                start_new_session=True,
                umask=0o077,
                user=uid,
                group=gid,
                extra_groups=None if user is None else _groups(kvm=kvm),
            )
    except (OSError, subprocess.SubprocessError) as error:
        raise QemuError(f"cannot start {command[0]}", why=str(error)) from error
    let_be_ended(child.pid)
    return child


def let_be_ended(pid: int) -> None:
    """Where the kernel was told to spare us when memory is short, have it judge this child, which has inherited that,
    as any other process. It would otherwise end all else on the host for the sake of a VM (``proc(5)``, oom_score_adj).
    """
    with contextlib.suppress(OSError):  # it has ended
        if int(_OWN_SCORE.read_text()) < 0:
            Path(f"/proc/{pid}/oom_score_adj").write_text("0")


def _fresh(log: Path) -> BinaryIO:
    """A new, empty log; the old one is kept beside it."""
    with contextlib.suppress(FileNotFoundError):
        log.replace(log.with_name(f"{log.name}.old"))
    return os.fdopen(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600), "ab")


def find(argument: str) -> tuple[int, int] | None:
    """Pid and start time of the process that was started with exactly this argument, or None."""
    wanted = b"\0" + os.fsencode(argument) + b"\0"
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if wanted in path.read_bytes():
                pid = int(path.parent.name)
                start_time = start_time_of(pid)
                return (pid, start_time) if start_time is not None else None
    return None


async def end(argument: str) -> bool:
    """Kill the process that was started with exactly this argument; whether there was one.

    Raises :class:`QemuError` if the kernel cannot end it.
    """
    found = find(argument)
    if found is None:
        return False
    with contextlib.suppress(QemuGone):
        await QemuProcess.attach(*found).kill()
    return True


def start_time_of(pid: int) -> int | None:
    """When the process ``pid`` started, in clock ticks after boot, or None if there is none."""
    fields = _stat(pid)
    return int(fields[19]) if fields else None


def last_words(log: Path) -> str:
    """The last lines QEMU wrote, without time stamps, on one line; empty if it wrote nothing."""
    try:
        with log.open("rb") as stream:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - _LOG_TAIL_BYTES))
            lines = stream.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    words = [_PREFIX.sub("", line.strip()) for line in lines]
    return "; ".join([line for line in words if line][-_LOG_TAIL_LINES:])


def image_in_use(words: str) -> str:
    """Which image's lock another process holds, if that is why QEMU has ended with these last words; empty if it is
    not (``raw_check_lock_bytes``'s callers, block/file-posix.c)."""
    found = _IN_USE.search(words)
    return found[1] if found is not None else ""


def owner_of(user: str | None) -> tuple[int, int] | None:
    """The uid and gid of ``user``, or None for None. Raises :class:`QemuError` if there is no such user."""
    if user is None:
        return None
    try:
        entry = pwd.getpwnam(user)
    except KeyError:
        raise QemuError(
            f"there is no user '{user}' to run QEMU as", todo=f"useradd --system --shell /usr/sbin/nologin {user}"
        ) from None
    return entry.pw_uid, entry.pw_gid


def lockable_mib() -> int | None:
    """How much memory a QEMU of ours can be let lock, in MiB; None if any amount.

    See :meth:`QemuProcess.let_lock_memory` and ``prlimit(2)``.
    """
    (held,) = re.findall(r"^CapEff:\t([0-9a-f]+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    _, most = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if int(held, 16) & 1 << _CAP_SYS_RESOURCE or most == resource.RLIM_INFINITY:
        return None
    return most // (1024 * 1024)


def _groups(*, kvm: bool) -> list[int]:
    """Groups that open ``/dev/kvm`` to QEMU; never root's, which would open more."""
    if not kvm or not Path("/dev/kvm").exists():
        return []
    device = os.stat("/dev/kvm")
    return [device.st_gid] if device.st_gid != 0 and device.st_mode & stat.S_IWGRP else []


def _log_of(pid: int) -> Path:
    """Where the process writes its words: what its standard error is."""
    try:
        return Path(f"/proc/{pid}/fd/2").readlink()
    except OSError:
        return Path(os.devnull)


def _running_since(pid: int) -> int | None:
    """Like :func:`start_time_of`, but None for a process that has ended and was not reaped yet."""
    fields = _stat(pid)
    return int(fields[19]) if fields and fields[0] not in ("Z", "X") else None


def _stat(pid: int) -> list[str]:
    """The fields of ``/proc/PID/stat`` after the name, which may itself hold blanks and brackets."""
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
    except OSError:
        return []
