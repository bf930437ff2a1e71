"""The run folder of one QEMU: its sockets, made before it exists.

::

    RUN_DIR/qmp.sock       ours; QEMU inherits it listening, so connecting needs no waiting and no polling
    RUN_DIR/console.sock   ours; the serial console, inherited likewise
    RUN_DIR/vnc.sock       made by QEMU
    RUN_DIR/stream/        ours, for a moment: TLS credentials of a migration
    RUN_DIR/disks/         the same for disks that are copied

One without a guest, which copies the disks of a VM that does not run, has only ``qmp.sock``.

Nobody but root and QEMU's user gets in. QEMU may make names in it but, because the folder is root's and sticky, cannot
remove or replace ours: what the daemon opens there is what the daemon made.
"""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

from limosa.errors import QemuError

QMP, CONSOLE, VNC, STREAM, DISKS, REST = "qmp.sock", "console.sock", "vnc.sock", "stream", "disks", "rest.sock"

_SOCKET_PATH_MAX = 107


def create(run_dir: Path, owner: tuple[int, int] | None) -> None:
    """Make the folder, empty of what an earlier QEMU left. ``owner`` is QEMU's uid and gid, None for our own.

    Its parent must exist. Raises :class:`QemuError`.
    """
    if len(os.fsencode(run_dir / CONSOLE)) > _SOCKET_PATH_MAX:
        raise QemuError(f"the run folder {run_dir} has too long a path for a Unix socket", todo="choose a shorter one")
    try:
        remove(run_dir)
        run_dir.mkdir(mode=0o700, exist_ok=True)
        if owner is not None:
            os.chown(run_dir, 0, owner[1])
            run_dir.chmod(0o1770)
    except OSError as error:
        raise QemuError(f"cannot make the run folder {run_dir}", why=error.strerror or str(error)) from error


def remove(run_dir: Path) -> None:
    """Remove what :func:`create` and QEMU made, and the folder unless something else is in it."""
    for name in (QMP, CONSOLE, VNC, REST):
        (run_dir / name).unlink(missing_ok=True)
    shutil.rmtree(run_dir / STREAM, ignore_errors=True)
    try:
        run_dir.rmdir()
    except OSError:  # not there, or somebody keeps something in it
        return


def listen(path: Path) -> socket.socket:
    """A socket that listens at ``path``, usable by its owner only. Raises :class:`QemuError`."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        os.fchmod(listener.fileno(), 0o600)  # before bind: Linux gives the file the mode of the socket
        listener.bind(str(path))
        listener.listen(1)
    except OSError as error:
        listener.close()
        raise QemuError(f"cannot listen at {path}", why=error.strerror or str(error)) from error
    return listener
