"""Chains of images: an overlay, and what shows through where it has nothing of its own.

Formats are those that the overlays state; what a file that claims none contains is never believed (see ``images``).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from limosa.errors import StorageError
from limosa.model.vm import DiskFormat
from limosa.storage import qcow2

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
    raise StorageError(f"more than {LONGEST} files lie below each other at {path}", todo="flatten the image")


def _absolute(overlay: str, backing: str) -> str:
    if ":" in backing.split("/", maxsplit=1)[0]:
        raise StorageError(f"{overlay} lies above {backing}, which is no file", todo="flatten it with qemu-img convert")
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
                why="only qcow2 and raw are used, and only where it is said",
                todo=f"qemu-img rebase -u -b {header.backing} -F FORMAT {overlay}",
            )
