"""Network namespaces by name, as ``ip netns`` keeps them, and the processes in them.

A namespace belongs to a thread and is inherited by what the thread starts, so :func:`inside` gives work a thread of its
own there: sockets, child processes and further threads it makes are in the namespace, and the caller never leaves its
own.
"""

from __future__ import annotations

import ctypes
import os
import re
import select
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from limosa.errors import NetworkError, NotFound, StateError

FOLDER = Path("/run/netns")

# From linux/sched.h and linux/mount.h.
CLONE_NEWNET = 0x40000000
MS_BIND = 0x1000
MS_REC = 0x4000
MS_SHARED = 1 << 20
MNT_DETACH = 2

_libc = ctypes.CDLL(None, use_errno=True)
T = TypeVar("T")


def create(name: str) -> None:
    """Make a namespace, empty but for a loopback interface that is down. Raises :class:`NetworkError`."""
    with _kernel_refusals(f"cannot make the network namespace '{name}'"):
        _share_folder()
        path = FOLDER / name
        os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0))
        try:
            _in_thread(lambda: _make_and_bind(path))
        except BaseException:
            path.unlink()
            raise


def remove(name: str) -> None:
    """Take the name away; the namespace ends with the last process in it. Nothing happens if there is none."""
    path = FOLDER / name
    _libc.umount2(os.fsencode(path), MNT_DETACH)  # fails if a crash left the file without the mount: that is all right
    path.unlink(missing_ok=True)


def names(pattern: re.Pattern[str]) -> list[str]:
    """Names of all namespaces that match, sorted."""
    try:
        return sorted(name for name in os.listdir(FOLDER) if pattern.match(name))
    except FileNotFoundError:
        return []


def enter(name: str) -> None:
    """Move the calling thread into a namespace. Raises :class:`NotFound` and :class:`NetworkError`."""
    try:
        descriptor = os.open(FOLDER / name, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as fault:
        raise NotFound(f"there is no network namespace '{name}'", todo="'limosa lab status' shows the labs") from fault
    try:
        with _kernel_refusals(f"cannot enter the network namespace '{name}'"):
            _check(_libc.setns(descriptor, CLONE_NEWNET))
    finally:
        os.close(descriptor)


def inside(name: str, work: Callable[[], T]) -> T:
    """The answer of ``work``, done by a thread in the namespace. Raises what ``work`` and :func:`enter` raise."""

    def enter_and_work() -> T:
        enter(name)
        return work()

    return _in_thread(enter_and_work)


def inode(name: str) -> int | None:
    """What identifies a namespace while it lives; None if there is none, or only its file."""
    try:
        status = (FOLDER / name).stat()
    except FileNotFoundError:
        return None
    return status.st_ino if status.st_dev == Path("/proc/self/ns/net").stat().st_dev else None


def inode_of_process(pid: int) -> int | None:
    """The namespace a process is in; None if it has ended, or is not ours to look at (a container's outside)."""
    try:
        return os.stat(f"/proc/{pid}/ns/net").st_ino
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None


def processes_in(inodes: Collection[int]) -> list[int]:
    """All processes inside any of these namespaces."""
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    return [pid for pid in pids if inode_of_process(pid) in inodes]


def kill_all_in(inodes: Collection[int], *, within_s: float = 20.0) -> int:
    """Kill every process in these namespaces and wait until none is left; returns how many there were.

    Raises :class:`StateError` if some do not end, which only a process stuck in the kernel can do.
    """
    killed = 0
    deadline = time.monotonic() + within_s
    # A process may start another while the list is made, so ask until there is none.
    while pids := processes_in(inodes):
        if time.monotonic() > deadline:
            raise StateError("processes of the lab do not end", why=f"still there: {pids}")
        killed += sum(_kill(pid, inodes, deadline) for pid in pids)
    return killed


def _kill(pid: int, inodes: Collection[int], deadline: float) -> bool:
    """Kill one process if it is (still) in one of the namespaces, and wait for its end."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    try:
        # Only now is it certain that the number is not another process's.
        if inode_of_process(pid) not in inodes:
            return False
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        return bool(select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0])
    finally:
        os.close(descriptor)


def _make_and_bind(path: Path) -> None:
    _check(_libc.unshare(CLONE_NEWNET))
    _check(_libc.mount(b"/proc/thread-self/ns/net", os.fsencode(path), b"none", MS_BIND, None))


def _share_folder() -> None:
    """Make the folder a mount of its own that is shared, as ``ip netns`` does, so that all see what is bound there."""
    FOLDER.mkdir(mode=0o755, exist_ok=True)
    folder = os.fsencode(FOLDER)
    if _libc.mount(b"", folder, b"none", MS_SHARED | MS_REC, None) == 0:
        return
    _check(_libc.mount(folder, folder, b"none", MS_BIND | MS_REC, None))
    _check(_libc.mount(b"", folder, b"none", MS_SHARED | MS_REC, None))


def _in_thread(work: Callable[[], T]) -> T:
    answers: list[T] = []
    faults: list[BaseException] = []

    def run() -> None:
        try:
            answers.append(work())
        except BaseException as fault:  # noqa: BLE001 - raised again in the caller's thread
            faults.append(fault)

    thread = threading.Thread(target=run, name="namespace")
    thread.start()
    thread.join()
    if faults:
        raise faults[0]
    return answers[0]


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


@contextmanager
def _kernel_refusals(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as fault:
        todo = "run it as root" if isinstance(fault, PermissionError) else ""
        raise NetworkError(what, why=fault.strerror or str(fault), todo=todo) from fault
