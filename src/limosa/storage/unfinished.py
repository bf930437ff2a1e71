"""Images that moves have not finished, in one store: marked as such, found after a crash, removed if nobody has them.

What the mark means and who may take it away says :mod:`limosa.storage.marks`. It is a file beside an image that is a
file (here), and a tag of an image that is a logical volume (:mod:`limosa.storage.tags`).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from limosa.errors import StorageError
from limosa.storage import leases, marks, openers
from limosa.storage.marks import Mark
from limosa.storage.openers import OpenFiles


@dataclass(frozen=True)
class Found:
    """An image, or the mark of one that is not there. ``mark`` is null if it has none, or a damaged one."""

    path: str
    #: what it takes on its storage
    size_bytes: int
    #: when it was written last, in seconds since the epoch; of a logical volume, when it was made
    changed_at: float
    mark: Mark | None


class Unfinished(Protocol):
    """Those of one store, and what else may be one. Images are known by their paths."""

    def finish(self, image: str) -> None:
        """Before the image is a VM's: take its mark away, durably. Raises :class:`StorageError`; it must not become a
        VM's then."""

    def claim(self, image: str) -> None:
        """Before an image that was found is given to a VM. Raises :class:`limosa.errors.Conflict` if it is being
        removed, and :class:`StorageError`."""

    def condemn(self, image: str) -> bool:
        """Take the mark in order to remove the image. False if it has none: it is somebody's. Raises
        :class:`StorageError`."""

    def spare(self, image: str) -> None:
        """The image is not removed after all. Raises :class:`StorageError`; the next look finds it all the same."""

    def find(self) -> Iterator[Found]:
        """All images there are, marked or not, and marks without their images. Raises :class:`StorageError`."""

    def user(self, image: str, open_files: OpenFiles) -> str:
        """Who uses the image on this host, or why that is not certain, in words; empty if nobody does, or there is no
        such image. Raises :class:`StorageError`."""

    def remove(self, image: str) -> None:
        """Delete an image that is condemned, and what belongs to it. Raises :class:`StorageError` if somebody has it
        open; it is still there then."""


@dataclass(frozen=True)
class UnfinishedFiles:
    """See :class:`Unfinished`: images are files right in a folder."""

    folder: Path

    def finish(self, image: str) -> None:
        """See :class:`Unfinished`."""
        marks.finish(image)

    def claim(self, image: str) -> None:
        """See :class:`Unfinished`."""
        marks.claim(image)

    def condemn(self, image: str) -> bool:
        """See :class:`Unfinished`."""
        return marks.condemn(image)

    def spare(self, image: str) -> None:
        """See :class:`Unfinished`."""
        marks.spare(image)

    def find(self) -> Iterator[Found]:
        """See :class:`Unfinished`."""
        try:
            marked = {found.image.name: found.mark for found in marks.find(self.folder)}
            names = {*os.listdir(self.folder), *marked}
        except OSError as error:
            raise StorageError(f"cannot look into {self.folder}", why=error.strerror or str(error)) from error
        for name in sorted(names):
            mark = marked.get(name)
            try:
                status = os.lstat(self.folder / name)
            except OSError:  # it is not made yet, or no more
                yield Found(str(self.folder / name), 0, mark.at if mark is not None else 0.0, mark)
                continue
            if stat.S_ISREG(status.st_mode):
                yield Found(str(self.folder / name), status.st_blocks * 512, status.st_mtime, mark)

    def user(self, image: str, open_files: OpenFiles) -> str:
        """See :class:`Unfinished`. Asks ``/proc``, and for QEMU's lock."""
        try:
            return openers.use_of(Path(image), open_files)
        except FileNotFoundError:
            return ""
        except OSError as error:
            raise StorageError(f"cannot look at {image}", why=error.strerror or str(error)) from error

    def remove(self, image: str) -> None:
        """See :class:`Unfinished`. The mark goes last, so that what is left of a crash meanwhile is found again."""
        if os.path.lexists(image):
            with openers.alone(Path(image)):
                try:
                    os.unlink(image)
                except OSError as error:
                    raise StorageError(f"cannot remove {image}", why=error.strerror or str(error)) from error
        leases.forget(image)
        marks.forget(image)
