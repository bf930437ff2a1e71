"""Disk images: what they are, making new ones.

``qemu-img`` is asked with the format said, never left to find it out: a guest that owns a raw disk can write the header
of another format into it, and a program that then believed the contents would open whatever files that header names.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
from pathlib import Path

import msgspec

from limosa.background import apart, in_full
from limosa.errors import InvalidInput, StorageError
from limosa.model import reading
from limosa.model.base import Model
from limosa.model.storage import BackingFile
from limosa.model.vm import DiskFormat
from limosa.storage import mounts, qcow2
from limosa.storage.access import check_kind, grant
from limosa.storage.qcow2 import MAGIC

__all__ = ["ImageInfo", "create", "detect_format", "grant", "info"]

_QEMU_IMG = "/usr/bin/qemu-img"
#: A disk of 1 TiB whose tables are in memory takes 2 s.
_MEASURE_WITHIN_S = 10.0
_CLUSTER = 64 * 1024
_NAMES: dict[str, DiskFormat] = {".qcow2": "qcow2", ".raw": "raw", ".img": "raw"}


class ImageInfo(Model, frozen=True, forbid_unknown_fields=False, rename="kebab"):
    """What ``qemu-img info`` says."""

    format: str
    virtual_size: int
    #: bytes it takes on its storage
    actual_size: int = 0
    backing_filename: str = ""
    full_backing_filename: str = ""
    backing_filename_format: str = ""


async def info(path: Path, image_format: DiskFormat) -> ImageInfo:
    """What the image is. Does not mind that a QEMU has it open; raises :class:`StorageError`.

    Refused: an image that keeps its data in another file, and a backing file without a stated format, whose contents
    QEMU would have to believe.
    """
    output = await _qemu_img("info", "--force-share", "--output=json", "-f", image_format, str(path))
    try:
        raw = reading.decode(output, dict)
        found = reading.convert(raw, ImageInfo)
    except msgspec.MsgspecError as error:
        raise StorageError(f"qemu-img gives an unexpected answer about {path}", why=str(error)) from error
    if raw.get("format-specific", {}).get("data", {}).get("data-file"):
        raise StorageError(f"{path} keeps its data in another file", todo="convert it with qemu-img convert")
    if found.backing_filename and not found.backing_filename_format:
        raise StorageError(
            f"{path} does not say what format its backing file has",
            todo=f"qemu-img rebase -u -b {found.backing_filename} -F FORMAT {path}",
        )
    return found


class _Measured(Model, frozen=True, forbid_unknown_fields=False, rename="kebab"):
    """What ``qemu-img measure`` says of a qcow2 image that would be made of another."""

    required: int
    fully_allocated: int


async def data_bytes(path: Path, image_format: DiskFormat) -> int:
    """How much a copy of an image holds, without what lies below it: what is compressed inside it, or by its file
    system, is not in a copy. Does not mind that a QEMU has it open. Raises :class:`StorageError`."""
    alone = {"backing": None} if image_format == "qcow2" else {}
    node = {"driver": image_format, "file": {"driver": "file", "filename": str(path)}, **alone}
    arguments = ("measure", "--force-share", "--output=json", "-O", "qcow2", f"json:{json.dumps(node)}")
    try:
        async with asyncio.timeout(_MEASURE_WITHIN_S):
            found = reading.decode(await _qemu_img(*arguments), _Measured)
            size = await apart(_size, path, image_format)
    except (TimeoutError, msgspec.MsgspecError) as error:
        raise StorageError(f"qemu-img cannot measure {path}", why=str(error) or "it takes too long") from error
    # Both are with the tables of a full image, and in whole clusters of the default size.
    return found.required - (found.fully_allocated - -(-size // _CLUSTER) * _CLUSTER)


def _size(path: Path, image_format: DiskFormat) -> int:
    return qcow2.read(path).virtual_bytes if image_format == "qcow2" else path.stat().st_size


async def detect_format(path: Path) -> DiskFormat:
    """The format of an image whose owner did not say it: only where name and contents agree.

    Raises :class:`InvalidInput` where they do not, :class:`StorageError` if it cannot be read.
    """
    by_contents, by_name = await apart(_formats, path)
    if by_name != by_contents:
        raise InvalidInput(
            f"the format of {path} is not certain",
            why=f"its contents look like {by_contents}, its name does not",
            todo="state it: format = 'qcow2' or 'raw'",
        )
    if by_contents == "qcow2":
        await info(path, "qcow2")
    return by_contents


def _formats(path: Path) -> tuple[DiskFormat, DiskFormat | None]:
    """By what an image contains, and by its name."""
    by_contents: DiskFormat = "qcow2" if _head(path) == MAGIC else "raw"
    return by_contents, _NAMES.get(path.suffix.lower(), "raw" if path.is_block_device() else None)


def _head(path: Path) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a FIFO would keep us waiting
        try:
            check_kind(path, os.fstat(descriptor))
            return os.read(descriptor, len(MAGIC))
        finally:
            os.close(descriptor)
    except OSError as error:
        todo = "give a size to have it made, or name one that is there" if isinstance(error, FileNotFoundError) else ""
        raise StorageError(f"cannot read {path}", why=error.strerror or str(error), todo=todo) from error


async def create(
    path: Path, image_format: DiskFormat, size_bytes: int, backing: BackingFile | None = None, *, thick: bool = False
) -> None:
    """Make a new, empty image, readable by its owner only. Nothing that exists is overwritten.

    ``backing``: what shows through where the image has nothing of its own; ``thick``: take all its space now. Raises
    :class:`StorageError` (exists, no such folder, no space); nothing is left then.
    """
    made = threading.Event()

    def make() -> None:
        _make(path)
        made.set()
        if image_format == "qcow2":
            _check_locks(path)

    try:
        await in_full(make)
        below = ["-b", backing.path, "-F", backing.format] if backing is not None else []
        options = [*below, *(["-o", "preallocation=falloc"] if thick else [])]
        await _qemu_img("create", "-q", "-f", image_format, *options, str(path), str(size_bytes))
    except BaseException:
        if made.is_set():  # else one of that name is somebody's
            await in_full(path.unlink, missing_ok=True)
        raise


def _make(path: Path) -> None:
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        raise StorageError(f"{path} exists already", todo="leave the size out to use it as it is") from None
    except OSError as error:
        todo = "make the folder first, or name another" if isinstance(error, FileNotFoundError) else ""
        raise StorageError(f"cannot create {path}", why=error.strerror or str(error), todo=todo) from error


def _check_locks(path: Path) -> None:
    if mounts.of(str(path)).locks_are_mandatory:
        raise StorageError(
            f"cannot create {path}",
            why="qemu-img locks the file it writes, and this share rejects writes to locked files",
            todo="mount it with the option nobrl; Limosa itself keeps other hosts from using the image",
        )


async def _qemu_img(command: str, *arguments: str) -> bytes:
    try:
        child = await asyncio.create_subprocess_exec(
            _QEMU_IMG,
            command,
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={"LC_ALL": "C"},
        )
    except OSError as error:
        raise StorageError(f"cannot run {_QEMU_IMG}", why=str(error), todo="install qemu-utils") from error
    try:
        output, words = await child.communicate()
    except asyncio.CancelledError:
        child.kill()
        raise
    if child.returncode != 0:
        raise StorageError(
            f"qemu-img {command} failed for {arguments[-2] if command == 'create' else arguments[-1]}",
            why=words.decode("utf-8", "replace").strip().removeprefix("qemu-img: "),
        )
    return output
