"""Who has a file open, and having it to oneself while it is removed.

To look, ``/proc`` is read (proc(5)) and QEMU's lock on the image is asked for; neither disturbs anybody. Of what
processes have open only files with the image's inode number are looked at, so that no share is asked which has nothing
to do with it: its server may be gone. To remove, the kernel itself is made to say that nobody else has the file open,
by a lease (fcntl(2), F_SETLEASE): it gives one to write only where there is no other descriptor, loop devices and
servers inside the kernel included, and keeps who opens the file from now on waiting. File systems that know no leases
are looked at in ``/proc`` once more.

QEMU's lock is on bytes 100 to 299 of the image (RAW_LOCK_PERM_BASE in block/file-posix.c): who has the image open holds
some of them, so a lock on all of them keeps every QEMU out, by NFS also those of other hosts.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import stat
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from limosa.errors import StorageError
from limosa.storage import mounts

#: struct flock: type, whence, start, length, pid (of 0 for locks of an open file description)
_FLOCK = "hhqqi0q"
_QEMU_FROM, _QEMU_COUNT = 100, 200
#: of each hundred the bytes that speak of writing and of resizing (BLK_PERM_WRITE and BLK_PERM_RESIZE)
_WRITE, _RESIZE = 1, 3
#: fcntl(2): which signal tells of somebody who wants the file; one that is ignored unless it is handled, because the
#: usual one would end the daemon
_F_SETSIG = 10
_NO_LEASES = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK}

#: Device and inode of a file; of a block device what it is, since it may have several nodes.
FileKey = tuple[int, int]


@dataclass(frozen=True)
class OpenFiles:
    """Every file that is open on this host, by any other process or as a loop device, as :func:`everywhere` saw it."""

    #: processes and their descriptors, by the inode's number; by 0 where a kernel before 5.14 does not tell it
    descriptors: Mapping[int, Sequence[tuple[str, str]]] = field(default_factory=dict)
    #: loop devices and their files
    loops: Sequence[tuple[str, str]] = ()

    def who_has(self, descriptor: int) -> str:
        """Who has the file open that we have open by this, in words; empty if nobody. Asks its own file system. Raises
        ``OSError``."""
        ours = key(os.fstat(descriptor))
        for process, number in self.descriptors.get(_inode("self", str(descriptor)), ()):
            if _may_be(f"/proc/{process}/fd/{number}", ours):
                return f"process {process} has it open"
        device = mounts.device_at(os.readlink(f"/proc/self/fd/{descriptor}"))
        for loop, file in self.loops:
            if mounts.device_at(file) == device and _may_be(file, ours):
                return f"it is the loop device {loop}"
        return ""


def everywhere() -> OpenFiles:
    """Look. Asks no file system."""
    descriptors: dict[int, list[tuple[str, str]]] = {}
    for process in (name for name in os.listdir("/proc") if name.isdecimal() and int(name) != os.getpid()):
        with suppress(OSError):  # it has ended
            for number in os.listdir(f"/proc/{process}/fd"):
                with suppress(OSError):
                    if os.readlink(f"/proc/{process}/fd/{number}").startswith("/"):  # else a socket or the like
                        descriptors.setdefault(_inode(process, number), []).append((process, number))
    loops = []
    for file in Path("/sys/block").glob("loop*/loop/backing_file"):
        with suppress(OSError):
            loops.append((file.parents[1].name, file.read_text().rstrip("\n")))
    return OpenFiles(descriptors, loops)


def _inode(process: str, descriptor: str) -> int:
    """The number the kernel has for what is open, without asking the file system, as ``stat`` does. Raises
    ``OSError``."""
    with open(f"/proc/{process}/fdinfo/{descriptor}", "rb") as lines:
        return next((int(line[4:]) for line in lines if line.startswith(b"ino:")), 0)


def _may_be(path: str, wanted: FileKey) -> bool:
    """Whether a file is the wanted one. One that cannot be looked at may be."""
    try:
        return key(os.stat(path)) == wanted
    except (FileNotFoundError, ProcessLookupError):  # it has been closed
        return False
    except OSError:
        return True


def key(status: os.stat_result) -> FileKey:
    """What tells a file from others on this host."""
    return (-1, status.st_rdev) if stat.S_ISBLK(status.st_mode) else (status.st_dev, status.st_ino)


def use_of(image: Path, open_files: OpenFiles) -> str:
    """Who uses the image, in words; empty if nobody. Raises ``OSError``."""
    descriptor = os.open(image, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        return open_files.who_has(descriptor) or ("" if _is_unlocked(descriptor) else "a QEMU holds its lock")
    finally:
        os.close(descriptor)


@contextmanager
def alone(image: Path) -> Iterator[None]:
    """Have the image to oneself: nobody has it open, and no QEMU can open it meanwhile.

    Raises :class:`StorageError` if somebody has, or it is no plain file.
    """
    try:
        descriptor = os.open(image, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise StorageError(f"cannot open {image}", why=error.strerror or str(error)) from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise StorageError(f"{image} is not a file")
        if why := _obstacle(descriptor):
            raise StorageError(f"{image} is in use", why=why)
        yield
    finally:
        os.close(descriptor)  # and with it go lock and lease


@contextmanager
def unwritten(image: str) -> Iterator[None]:
    """Keep every QEMU from writing the image meanwhile, by the lock one has that does not let others write. Who reads
    it is not disturbed. A file system without locks for open files gives none.

    Raises :class:`StorageError` if one writes it, or it cannot be opened.
    """
    try:
        descriptor = os.open(image, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise StorageError(f"cannot open {image}", why=error.strerror or str(error)) from error
    try:
        for sort in (_WRITE, _RESIZE):
            _forbid(descriptor, image, sort)
        yield
    finally:
        os.close(descriptor)  # and with it goes the lock


def _forbid(descriptor: int, image: str, sort: int) -> None:
    """As ``raw_check_lock_bytes`` and ``raw_apply_lock_bytes`` do it: first say it, then see who does it already."""
    does_not_let, does = _QEMU_FROM + 100 + sort, _QEMU_FROM + sort
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _lock(fcntl.F_RDLCK, does_not_let, 1))
        answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, _lock(fcntl.F_WRLCK, does, 1))
    except OSError as error:
        if error.errno in _NO_LEASES:
            return
        raise StorageError(f"cannot lock {image}", why=error.strerror or str(error)) from error
    if struct.unpack(_FLOCK, answer)[0] != fcntl.F_UNLCK:
        raise StorageError(f"{image} is in use", why="a QEMU has it open for writing", todo="stop the VM that does")


def _obstacle(descriptor: int) -> str:
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _qemus_bytes())
    except OSError as error:
        return "a QEMU holds its lock" if error.errno in (errno.EAGAIN, errno.EACCES) else str(error)
    try:
        fcntl.fcntl(descriptor, _F_SETSIG, signal.SIGURG)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except OSError as error:
        who = everywhere().who_has(descriptor)
        return who or ("" if error.errno in _NO_LEASES else "somebody has it open")
    return ""


def _is_unlocked(descriptor: int) -> bool:
    answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, _qemus_bytes())
    return int(struct.unpack(_FLOCK, answer)[0]) == fcntl.F_UNLCK


def _qemus_bytes() -> bytes:
    return _lock(fcntl.F_WRLCK, _QEMU_FROM, _QEMU_COUNT)


def _lock(sort: int, start: int, count: int) -> bytes:
    return struct.pack(_FLOCK, sort, os.SEEK_SET, start, count, 0)
