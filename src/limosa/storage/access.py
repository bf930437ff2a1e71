"""Whether QEMU's user may open a file, and giving it an image.

The question is put to the kernel as that user, so that access lists, network shares and read-only mounts all count.

Giving an image away is done only where it can hurt nobody: an operator may name any path of the host, and a daemon that
is root must not be talked into handing out a system file, or one that it runs or believes itself. So only a regular
file of root's with one name, on a local file system or just made by us, outside of the system's own folders and of
Limosa's, is ever given, and a logical volume that Limosa has made, which is given anew after each restart of the host;
for everything else the error says what to do.
"""

from __future__ import annotations

import ctypes
import os
import platform
import pwd
import shlex
import stat
import sys
import threading
from collections.abc import Collection
from pathlib import Path

from limosa.errors import StorageError
from limosa.storage import lvm, mounts

_SYSTEM = ("/bin", "/boot", "/dev", "/etc", "/lib", "/lib64", "/opt", "/proc", "/root", "/sbin", "/sys", "/usr")
#: What this program runs from.
_PROGRAM = tuple(Path(folder).resolve() for folder in (sys.prefix, sys.exec_prefix, Path(__file__).parents[1]))
#: The number of the system call setgroups(2).
_SETGROUPS = {"x86_64": 116, "aarch64": 159}


def may(path: Path, user: str | None, *, write: bool) -> bool:
    """Whether ``user`` (None: whoever we are) may read ``path``, and with ``write`` also write it."""
    return all(_test(sort, path, user) for sort in ([os.R_OK, os.W_OK] if write else [os.R_OK]))


def grant(
    path: Path, user: str | None, *, read_only: bool, own: Collection[Path] = (), only_look: bool = False
) -> None:
    """Make sure that ``user`` may open the file, by giving it to that user if need be and if it is safe.

    Only images that are written are ever given, and nothing that lies in ``own``, the daemon's files and folders.
    ``only_look``: find what stands in the way, as far as that can be known, and give nothing. Raises
    :class:`StorageError` saying what stands in the way; the file is then as it was.
    """
    check_kind(path, status_of(path))
    if may(path, user, write=not read_only):
        return
    verb = "read" if read_only else "write"
    if user is None:
        raise StorageError(f"the daemon may not {verb} {path}", todo="change its permissions or the mount")
    closed = _closed_folder(path, user)
    reason = "it is only read" if read_only else "" if closed else _give(path, user, own, only_look=only_look)
    if reason or closed:
        raise StorageError(
            f"QEMU's user '{user}' may not {verb} {path}",
            why=f"it may not enter the folder {closed}" if closed else reason,
            todo=f"keep the image elsewhere, or let '{user}' through: setfacl -m u:{user}:x {shlex.quote(str(closed))}"
            if closed
            else f"let '{user}' {verb} it, for example with chown, or setfacl -m u:{user}:{verb[0]} on the file",
        )


def give_new(path: Path, user: str | None, own: Collection[Path] = ()) -> None:
    """Give the user an image that has just been made here, also on storage other hosts use: none of them has it yet.

    Where that fails, or the file system knows no owners, :func:`grant` judges. Nothing in ``own`` is given.
    """
    if user is not None and not may(path, user, write=True):
        _give(path, user, own, new=True)


def check_kind(path: Path, status: os.stat_result) -> None:
    """Raise :class:`StorageError` unless it is a file or a block device: to open others can block, or never end."""
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)):
        raise StorageError(f"{path} is neither a file nor a block device", todo="name the image itself")


def status_of(path: Path) -> os.stat_result:
    """What the kernel says of a file. Raises :class:`StorageError` if it is not there or cannot be looked at."""
    try:
        return path.stat()
    except FileNotFoundError:
        raise StorageError(f"there is no file {path}", todo="create it, or mount the storage it is on") from None
    except OSError as error:
        raise StorageError(f"cannot look at {path}", why=error.strerror or str(error)) from error


def _give(path: Path, user: str, own: Collection[Path], *, new: bool = False, only_look: bool = False) -> str:
    """Give the file to the user if that is safe; else the reason why it is not."""
    real = path.resolve()
    if path.is_block_device():
        return _give_volume(path, user, only_look=only_look)
    if any(real.is_relative_to(folder) for folder in _SYSTEM):
        return "it lies in a folder of the system's"
    if any(real.is_relative_to(folder) for folder in (*_PROGRAM, *(folder.resolve() for folder in own))):
        return "it lies where Limosa has files of its own"
    try:
        descriptor = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        return error.strerror or str(error)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != 0 or status.st_nlink != 1:
            return "it is not a regular file of root's with a single name"
        if not new and mounts.find(status.st_dev).share:
            return "it lies on storage other hosts use too"
        return "" if only_look else _make_owner(descriptor, path, user, of_group=True)
    except (OSError, KeyError) as error:
        return str(error)
    finally:
        os.close(descriptor)


def _give_volume(path: Path, user: str, *, only_look: bool) -> str:
    """Give a logical volume of ours to the user; else the reason why it is none."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if not lvm.is_ours(path, os.fstat(descriptor).st_rdev):
                return "it is not a logical volume that Limosa has created"
            return "" if only_look else _make_owner(descriptor, path, user, of_group=False)
        finally:
            os.close(descriptor)
    except (OSError, KeyError, StorageError) as error:
        return str(error)


def _make_owner(descriptor: int, path: Path, user: str, *, of_group: bool) -> str:
    """Make the user the file's owner; where it may not write it even so, the file is as it was, and the reason why.
    Raises ``OSError`` and ``KeyError``."""
    before, entry = os.fstat(descriptor), pwd.getpwnam(user)
    os.fchown(descriptor, entry.pw_uid, entry.pw_gid if of_group else -1)
    if may(path, user, write=True):
        return ""
    os.fchown(descriptor, before.st_uid, before.st_gid)
    return "its mode, its file system or the mount does not let its owner write it"


def _closed_folder(path: Path, user: str) -> Path | None:
    """The first folder on the way that the user may not pass through."""
    return next((folder for folder in reversed(path.resolve().parents) if not _test(os.X_OK, folder, user)), None)


def _test(sort: int, path: Path, user: str | None) -> bool:
    """What the kernel says to ``user`` (None: to us)."""
    if user is None:
        return os.access(path, sort, effective_ids=True)
    entry = pwd.getpwnam(user)
    answer: list[bool] = []

    def ask() -> None:
        if _become(entry.pw_uid, entry.pw_gid):
            answer.append(os.access(path, sort, effective_ids=True))

    # In a thread of its own, which ends with the identity it took on. A process would take a hundred times as long, and
    # preflight asks within the time that a move takes.
    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    return answer == [True]


def _become(uid: int, gid: int) -> bool:
    """Have the kernel treat this thread as that user in all that concerns files (setfsuid(2), credentials(7)).

    glibc passes setgroups(2) on to all threads of a process, the system call itself concerns one.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if os.geteuid() != 0 or libc.syscall(_SETGROUPS[platform.machine()], 0, None) != 0:
        return False
    libc.setfsgid(gid)
    libc.setfsuid(uid)
    return int(libc.setfsuid(-1)) == uid
