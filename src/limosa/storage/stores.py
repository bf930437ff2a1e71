"""What a location can be: a folder with files, or a group of logical volumes (:mod:`limosa.storage.volumes`).

An image is known by its path, which lies right below the store's ``root``, and is the same to everybody else whatever
it is: QEMU, journals, ``vm.toml``. Making, removing and counting are the store's.
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Hashable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from limosa.background import in_full
from limosa.errors import StorageError
from limosa.model.storage import BackingFile, Location, LocationKind
from limosa.model.vm import DiskFormat
from limosa.settings.toml import sync_folder
from limosa.storage import images, leases, marks, mounts, speed
from limosa.storage.marks import Mark
from limosa.storage.unfinished import Unfinished, UnfinishedFiles

#: set once the space of files that are gone is free, and on which device that is
_freeing: dict[threading.Event, int] = {}


class Store(Protocol):
    """Where images lie."""

    @property
    def kind(self) -> LocationKind:
        """Which of the two it is."""

    @property
    def root(self) -> str:
        """The folder below which images have their paths."""

    @property
    def pool(self) -> Hashable:
        """What its space is taken from: alike for stores that take theirs from the same."""

    @property
    def unfinished(self) -> Unfinished:
        """The images in it that moves have not finished."""

    def look(self, name: str, *, default: bool) -> Location:
        """As it is now, under the name it has as a location. Never fails; blocks where a server is gone."""

    def taken(self, path: str) -> int:
        """Bytes an image takes. Raises :class:`StorageError`."""

    def lost_with(self, path: str) -> str:
        """Why an image cannot be removed alone, in words; empty if it can. Raises :class:`StorageError`."""

    async def create(
        self,
        path: str,
        image_format: DiskFormat,
        size_bytes: int,
        backing: BackingFile | None = None,
        *,
        thick: bool = False,
        blank: bool = True,
        mark: Mark | None = None,
    ) -> None:
        """Make a new image, durably, which only root or we may open. Raises :class:`StorageError` (exists, no space);
        nothing is left then.

        Not ``blank`` may hold what somebody left there, for who writes all of it anyway. With a ``mark`` it bears that
        from the beginning, until it is finished (:mod:`limosa.storage.unfinished`).
        """

    def remove(self, path: str) -> None:
        """Delete an image, if it is there, and what belongs to it. Raises :class:`StorageError`; it is there then."""


@dataclass(frozen=True)
class Folder:
    """Images are files. ``shared``: an administrator says that other hosts see them too."""

    root: str
    shared: bool = False
    kind: LocationKind = "folder"

    @property
    def pool(self) -> Hashable:
        """See :class:`Store`."""
        try:
            return os.stat(self.root).st_dev
        except OSError:
            return self.root

    @property
    def unfinished(self) -> Unfinished:
        """See :class:`Store`."""
        return UnfinishedFiles(Path(self.root))

    def look(self, name: str, *, default: bool) -> Location:
        """See :class:`Store`."""
        try:
            status = os.stat(self.root)
            _until_freed(status.st_dev)
            space = os.statvfs(self.root)
        except OSError as error:
            return self._faulty(name, error.strerror or str(error), default=default)
        if not stat.S_ISDIR(status.st_mode):
            return self._faulty(name, "it is not a folder", default=default)
        mount = mounts.find(status.st_dev)
        read_only = bool(space.f_flag & os.ST_RDONLY)
        return Location(
            name=name,
            path=self.root,
            file_system=mount.kind,
            source=mount.source,
            share=mounts.name_on_server(self.root),
            shared=self.shared or bool(mount.share),
            default=default,
            speed=speed.of_mount(status.st_dev, mount),
            total_bytes=space.f_blocks * space.f_frsize,
            free_bytes=space.f_bavail * space.f_frsize,
            fault="it is mounted read-only" if read_only else "",
        )

    def _faulty(self, name: str, fault: str, *, default: bool) -> Location:
        return Location(name=name, path=self.root, shared=self.shared, default=default, fault=fault)

    def taken(self, path: str) -> int:
        """See :class:`Store`. A block device that lies there takes all it has."""
        try:
            if Path(path).is_block_device():
                with open(path, "rb") as stream:
                    return stream.seek(0, os.SEEK_END)
            return os.stat(path).st_blocks * 512
        except OSError as error:
            raise StorageError(f"cannot look at {path}", why=error.strerror or str(error)) from error

    def lost_with(self, path: str) -> str:
        """See :class:`Store`. A file takes nothing along."""
        return ""

    async def create(
        self,
        path: str,
        image_format: DiskFormat,
        size_bytes: int,
        backing: BackingFile | None = None,
        *,
        thick: bool = False,
        blank: bool = True,
        mark: Mark | None = None,
    ) -> None:
        """See :class:`Store`."""
        try:
            if mark is not None:
                await in_full(marks.begin, path, mark)
            await images.create(Path(path), image_format, size_bytes, backing, thick=thick)
            await _keep(Path(path))
        except BaseException:
            if mark is not None:
                await in_full(marks.forget, path)
            raise

    def remove(self, path: str) -> None:
        """See :class:`Store`. A link goes with the image it leads to. A block device is somebody's disk: it stays."""
        image = Path(os.path.realpath(path))
        try:
            if not image.is_block_device():
                _unlink(image)
                Path(path).unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"cannot delete {path}", why=error.strerror or str(error)) from error
        leases.forget(str(image))
        marks.forget(str(image))


def _unlink(image: Path) -> None:
    """Remove a file, if it is there. To free a large one takes a local file system up to seconds, for which only those
    wait who ask for its space: it does so when the last who has it open closes it. A share would keep the name until
    then."""
    held, device = -1, 0
    with suppress(OSError):
        device = os.stat(image).st_dev
        if not mounts.find(device).share:
            held = os.open(image, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        image.unlink(missing_ok=True)
    finally:
        if held != -1:
            freed = threading.Event()
            _freeing[freed] = device
            threading.Thread(target=_free, args=(held, freed), daemon=True).start()


def _free(held: int, freed: threading.Event) -> None:
    try:
        os.close(held)
    finally:
        del _freeing[freed]
        freed.set()


def _until_freed(device: int) -> None:
    for freed, where in list(_freeing.items()):
        if where == device:
            freed.wait()


async def _keep(image: Path) -> None:
    """Have its folder keep a new image, durably; else the image is removed."""
    try:
        await in_full(sync_folder, image.parent)
    except BaseException as error:
        await in_full(image.unlink, missing_ok=True)
        if isinstance(error, OSError):
            raise StorageError(f"cannot write {image.parent}", why=error.strerror or str(error)) from error
        raise
