"""Files that lie below disks, as a move brings them to a host.

A layer is a copy of its original byte for byte, so that what is compressed stays compressed, and both can be known to
be the same; but in a qcow2 image the name of the file below it is where that lies here. It is a file in a folder, for
logical volumes stand alone. Nobody writes it: it is the daemon's, and QEMU's user may only read it.

Its name keeps that of the original, so that later moves know where to look, and has the identity of the move, which
makes it one that nobody else has: ``golden.k3v9x0p2m7aq-1.qcow2``. A name proves nothing; contents are compared.
Until the move commits, or a disk of another move is put above it, it has the mark of an unfinished copy (``marks``).
"""

from __future__ import annotations

import os
import pwd
import re
import stat
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path, PurePosixPath

from limosa.errors import StorageError
from limosa.model.vm import DiskFormat
from limosa.settings.toml import sync_folder
from limosa.storage import chains, marks, qcow2
from limosa.storage.marks import Mark

#: A file's mode: its owner and the group of QEMU's user read it, nobody writes it. Before, while its bytes come.
_MODE, _ARRIVES = 0o440, 0o600
_STEM_MAX = 100
_TAG = r"\.(?P<tag>[a-z0-9]{12})-[0-9]+"
_OURS = re.compile(_TAG + r"\Z")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*" + _TAG + r"\.(qcow2|raw)")
_STRANGE = re.compile(r"[^A-Za-z0-9_.-]")


def stem(path: str) -> str:
    """What a layer and its original have in common in their names."""
    return _OURS.sub("", PurePosixPath(path).stem)


def name(origin: str, tag: str, number: int, image_format: str) -> str:
    """The file name of the copy of ``origin``. ``tag`` is the identity of the move, ``number`` its own in that."""
    plain = _STRANGE.sub("-", stem(origin))[:_STEM_MAX].strip(".-") or "layer"
    return f"{plain}.{tag}-{number}.{image_format}"


def read_name(name: str) -> str | None:
    """The identity of the move that :func:`name` was given; None if the name is not of that form."""
    match = _NAME.fullmatch(name)
    return match["tag"] if match else None


def make(path: Path, mark: Mark) -> None:
    """Create the file for a layer, empty, beside its mark. Raises :class:`StorageError`; nothing is left then."""
    if os.path.lexists(path):
        raise StorageError(f"{path} exists already")
    marks.begin(str(path), mark)
    try:
        _create(path)
    except StorageError:
        marks.forget(str(path))
        raise


def arrives(path: Path) -> bool:
    """Whether a file with the name of one has not come whole yet; it may say that it lies above what lay below its
    original, where that is. False for one that is not there."""
    with suppress(OSError):
        return read_name(path.name) is not None and stat.S_IMODE(path.lstat().st_mode) == _ARRIVES
    return False


def claim_below(image: str, image_format: DiskFormat, claim: Callable[[str], None], own: Collection[str]) -> None:
    """Before an image is a VM's: ``claim`` what lies below it, but for what its move has brought, its ``own``.

    Raises :class:`StorageError`, and what ``claim`` raises: :class:`Conflict` if any of it is being removed.
    """
    for path, _ in chains.below(image, image_format):
        if path not in own:
            claim(path)


def _create(path: Path) -> None:
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _ARRIVES))
        sync_folder(path.parent)
    except FileExistsError:
        raise StorageError(f"{path} exists already") from None
    except OSError as error:
        path.unlink(missing_ok=True)
        raise StorageError(f"cannot create {path}", why=error.strerror or str(error)) from error


def finish(path: Path, below: str, user: str | None) -> None:
    """Make a layer durable whose bytes are here: it lies above ``below`` (empty: nothing), and ``user`` may read it.

    Raises :class:`StorageError`.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if below:
                os.pwrite(descriptor, _called(descriptor, below), 0)
            if user is not None:
                os.fchown(descriptor, -1, pwd.getpwnam(user).pw_gid)
            os.fchmod(descriptor, _MODE)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise StorageError(f"cannot write {path}", why=error.strerror or str(error)) from error
    except ValueError as fault:
        raise StorageError(
            f"{path} cannot have the backing file {below}", why=str(fault), todo="flatten the disk"
        ) from fault


def _called(descriptor: int, below: str) -> bytes:
    return qcow2.below_called(os.pread(descriptor, qcow2.LONGEST_CLUSTER, 0), below)
