"""The mark beside an image that a move is making: ``.IMAGE.limosa-copy``.

It says that the image is an unfinished copy, and so nobody's: what a crash leaves behind is known by it, also where the
journal that named the image is lost. It is there before the image is, and is gone, durably, before the image is a VM's;
so an image that ever held what a guest was told is written has none. Nothing else tells a copy that was given up from
somebody's disk: a name can be chosen by anybody, and an attribute of the file goes along when the file is copied, or is
not there at all on a share.

A file that was brought to lie below disks has one in the same way, until a disk above it is a VM's.

Who wants to remove such an image takes the mark first, by renaming it to ``.IMAGE.limosa-removal``; who wants to give
the image to a VM deletes it first. One of the two is done, on shares too, so that an image is never removed from under
a VM that has just been given it.

Logical volumes have a tag instead (:mod:`limosa.storage.tags`).
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from limosa.errors import Conflict, StateError, StorageError
from limosa.model import reading
from limosa.model.base import Model
from limosa.settings.toml import sync_folder, write_atomically

_COPY, _REMOVAL = ".limosa-copy", ".limosa-removal"
_MOST_BYTES = 4096


class Mark(Model, frozen=True, forbid_unknown_fields=False):
    """Which host has made the image, and when, in seconds since the epoch; ``source``: whose VM it was to be for, if
    that is another host, which alone knows whether the move is over."""

    host: str
    at: float
    source: str = ""


@dataclass(frozen=True)
class Marked:
    """An image with a mark, or the mark of one that is not there. ``mark`` is null if what it says is damaged."""

    image: Path
    mark: Mark | None


def begin(image: str, mark: Mark) -> None:
    """Before the image is created: durably, and whole from when it is there. Raises :class:`StorageError`; there is
    none then."""
    path = _copy(image)
    try:
        # Whoever may read images may read whose they are.
        write_atomically(path, msgspec.json.encode(mark), mode=0o644)
    except StateError as error:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        raise StorageError(error.what, why=error.why) from error


def finish(image: str) -> None:
    """Before the image is a VM's: durably. Raises :class:`StorageError`; it must not become a VM's then."""
    path = _copy(image)
    try:
        path.unlink(missing_ok=True)
        sync_folder(path.parent)
    except OSError as error:
        raise StorageError(f"cannot remove {path}", why=error.strerror or str(error)) from error


def claim(image: str) -> None:
    """Before an image that was found is given to a VM. Raises :class:`Conflict` if it is being removed."""
    if os.path.exists(_copy(image)):
        finish(image)
    if os.path.exists(_removal(image)):
        raise being_removed(image)


def being_removed(image: str) -> Conflict:
    """Why an image may not be given to a VM."""
    return Conflict(
        f"{image} is being removed",
        why="a move did not finish it, and 'limosa storage clean' has begun to remove it",
        todo=f"use another image; if the removal was interrupted, finish it: limosa storage clean {image}",
    )


def condemn(image: str) -> bool:
    """Take the mark in order to remove the image. False if it has none: it is somebody's."""
    if _removal(image).exists():
        return True
    with suppress(FileNotFoundError):
        _copy(image).rename(_removal(image))
        return True
    return False


def has(image: str) -> bool:
    """Whether it has one, also one that was taken."""
    return _copy(image).exists() or _removal(image).exists()


def spare(image: str) -> None:
    """The image is not removed after all."""
    with suppress(FileNotFoundError):
        _removal(image).rename(_copy(image))


def forget(image: str) -> None:
    """The image is no more. Never fails: a mark without its image does no harm."""
    with suppress(OSError):
        _copy(image).unlink(missing_ok=True)
        _removal(image).unlink(missing_ok=True)


def find(folder: Path) -> list[Marked]:
    """All that have a mark in a folder. Raises ``OSError``."""
    return [
        Marked(folder / name[1 : -len(suffix)], _read(folder / name))
        for name in sorted(os.listdir(folder))
        for suffix in (_COPY, _REMOVAL)
        if name.startswith(".") and name.endswith(suffix) and len(name) > 1 + len(suffix)
    ]


def _read(path: Path) -> Mark | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            return reading.decode(os.read(descriptor, _MOST_BYTES), Mark)
        finally:
            os.close(descriptor)
    except (OSError, msgspec.MsgspecError):
        return None


def _copy(image: str) -> Path:
    return _beside(image, _COPY)


def _removal(image: str) -> Path:
    return _beside(image, _REMOVAL)


def _beside(image: str, suffix: str) -> Path:
    """By the image's real name, whichever way it is named."""
    real = Path(os.path.realpath(image))
    return real.with_name(f".{real.name}{suffix}")
