"""Logs that a VM writes are kept within bounds: a guest that writes to its serial console for ever, or makes QEMU
complain for ever, must not fill the file system that the host's journals lie on.

QEMU itself knows no limit for a ``logfile`` (``qemu_chr_write_log`` in chardev/char.c). It opens it to append
(``logappend``), as its standard error is opened, so what it writes after a log was cut goes to the new end.
"""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

from limosa.model.units import MIB

_log = logging.getLogger(__name__)

#: A log that has become larger than this is cut to its last part.
MOST_BYTES = 4 * MIB
KEPT_BYTES = 1 * MIB
#: A serial console takes some hundred KiB a second at most.
LOOK_EVERY_S = 10.0


async def keep_bounded(vms: Path) -> None:
    """Cut, again and again, what has grown too large in the folders of all VMs: those that run, crashed, or land."""
    while True:
        await asyncio.to_thread(cut_all, vms)
        await asyncio.sleep(LOOK_EVERY_S)


def cut_all(vms: Path) -> None:
    """Cut every log below ``vms``, old ones too, that has grown too large.

    What cannot be cut, or looked at, is told of in the daemon's log.
    """
    try:
        for path in vms.glob("*/*.log*"):
            _bound(path)
    except OSError as error:  # also because a VM left while its folder was looked through
        _log.warning("not all logs of VMs were looked at: %s", error)


def _bound(path: Path) -> None:
    try:
        if path.lstat().st_size > MOST_BYTES:
            _cut(path)
    except FileNotFoundError:
        return  # its VM was deleted, or has moved away
    except OSError as error:
        _log.error("%s is too large and cannot be cut: %s", path, error)


def _cut(path: Path) -> None:
    """Leave the last part. What is written in between comes before that, or is lost.

    The space is given back before any is asked for: the file system may be full already, and be so because of this log.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "ab") as stream:
        size = os.fstat(descriptor).st_size
        last = os.pread(descriptor, KEPT_BYTES, size - KEPT_BYTES)
        os.ftruncate(descriptor, 0)
        stream.write(last.partition(b"\n")[2] or last)
