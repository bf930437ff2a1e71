"""Chains of images: an overlay, and the files below it, which show through where it has nothing of its own.

Formats are those that the overlays state; what a file that claims none contains is never believed (see ``images``).

The digest of a file that lies below disks stands for everything that shows through it, so that two hosts can tell
whether both have it: SHA-256 of its bytes; where more lies below it, of that and of the digest of the next together.
What the next is called does not count, because that is where it lies on each host.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from limosa.errors import StorageError
from limosa.model.vm import DiskFormat
from limosa.storage import qcow2
from limosa.storage.identity import version

#: Longer ones QEMU would open too; a circle would never end.
LONGEST = 64


def below(path: str, image_format: DiskFormat) -> Iterator[tuple[str, DiskFormat]]:
    """Path and format of each file below an image, the nearest first. Raises :class:`StorageError`."""
    for _ in range(LONGEST):
        if image_format != "qcow2":
            return
        header = qcow2.read(Path(path))
        if header.external_data:
            raise StorageError(f"{path} keeps its data in another file", todo="convert it with qemu-img convert")
        if not header.backing:
            return
        path, image_format = _absolute(path, header.backing), _stated(path, header)
        yield path, image_format
    raise StorageError(f"{path} has more than {LONGEST} backing files", todo="flatten the image")


def digest(path: str, image_format: DiskFormat) -> str:
    """The digest of an image with all that lies below it, hex. All of it is read, unless it was before.

    Raises :class:`StorageError`.
    """
    chain = [path, *(one for one, _ in below(path, image_format))]
    try:
        found = _contents(chain[-1], *version(os.stat(chain[-1])), above=False)
        for one in reversed(chain[:-1]):
            contents = _contents(one, *version(os.stat(one)), above=True)
            found = hashlib.sha256(f"{contents} above {found}".encode()).hexdigest()
    except OSError as error:
        raise StorageError(f"cannot read {error.filename or path}", why=error.strerror or str(error)) from error
    except ValueError as fault:
        raise StorageError(
            f"{path}, or one of its backing files, is not a valid qcow2 image", why=str(fault)
        ) from fault
    return found


@functools.lru_cache(maxsize=256)
def _contents(path: str, *_version: int, above: bool) -> str:
    """SHA-256 of a file, worked out once for each version of it; of one that lies ``above`` another without its name
    for that. Raises ``OSError`` and ``ValueError``."""
    with open(path, "rb") as stream:
        known = hashlib.sha256()
        if above:
            known.update(qcow2.below_called(stream.read(qcow2.LONGEST_CLUSTER), ""))
        return hashlib.file_digest(stream, lambda: known).hexdigest()


def _absolute(overlay: str, backing: str) -> str:
    if ":" in backing.split("/", maxsplit=1)[0]:
        raise StorageError(
            f"the backing file of {overlay}, {backing}, is not a file", todo="flatten it with qemu-img convert"
        )
    return str((Path(overlay).parent / backing).absolute())


def _stated(overlay: str, header: qcow2.Header) -> DiskFormat:
    match header.backing_format:
        case "qcow2":
            return "qcow2"
        case "raw":
            return "raw"
        case other:
            raise StorageError(
                f"{overlay} says '{other}' is the format of its backing file",
                why="only qcow2 and raw are accepted, and the format must be stated",
                todo=f"qemu-img rebase -u -b {header.backing} -F FORMAT {overlay}",
            )
