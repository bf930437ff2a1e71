"""The storage of this host: its locations, facts about disks, and images that are made and removed for moves."""

from __future__ import annotations

import asyncio
import logging
import os
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import msgspec

from limosa.errors import StorageError
from limosa.host.files import Files
from limosa.host.page import Page
from limosa.host.slots import Slots
from limosa.model.base import is_clean_path
from limosa.model.storage import BackingFile, DiskFacts, DiskPlan, LayerPlan, Location
from limosa.model.units import format_bytes
from limosa.model.vm import Disk, DiskFormat
from limosa.settings.toml import sync_folder
from limosa.storage import access, chains, images, layers, leases, marks, qcow2
from limosa.storage.locations import Locations

_log = logging.getLogger(__name__)


class Storage:
    """Where this host keeps images."""

    def __init__(self, page: Page, files: Files, user: str | None, host: str) -> None:
        self._page = page
        self._files = files
        self.user = user
        self._host = host
        #: places for moves that copy disks on this host or from it, and for those that bring disks; two lines, so that
        #: two hosts cannot wait for each other
        self.leaving = Slots(lambda: page.now.max_storage_moves)
        self.arriving = Slots(lambda: page.now.max_storage_moves)
        for slots in (self.leaving, self.arriving):
            page.on_change(slots.admit)
        #: what copies under way will still need, by the path of the image
        self._held: dict[str, int] = {}
        #: one at a time looks at what is free and takes of it
        self._holding = asyncio.Lock()

    @property
    def places(self) -> Locations:
        """The locations by the settings of now."""
        settings = self._page.now
        return Locations(settings.locations, settings.default_location, self._files.images)

    async def locations(self) -> tuple[Location, ...]:
        """All locations. What copies under way will still need is not free."""
        return await asyncio.to_thread(lambda: tuple(self._less_held(one) for one in self.places.look()))

    async def facts(self, disks: Iterable[Disk]) -> tuple[DiskFacts, ...]:
        """What is to know before they are copied. Raises :class:`StorageError`."""
        return await asyncio.to_thread(lambda: tuple(self._facts(disk) for disk in disks))

    async def digest(self, backing: BackingFile) -> BackingFile:
        """The same with its digest, for which it and all below it is read once. Raises :class:`StorageError`."""
        return await asyncio.to_thread(_with_digest, backing)

    async def find(self, wanted: BackingFile) -> BackingFile | None:
        """A file of this host with the same digest, readable for QEMU's user, where one would look for it.

        That is: under the same path; in the location of the same name; in any location under the same file name, or
        that of a layer and its original. Only files in a location count, so that nobody can have another file of the
        host shown to a guest.
        """
        return await asyncio.to_thread(self._find, wanted)

    def _find(self, wanted: BackingFile) -> BackingFile | None:
        for path in self._candidates(wanted):
            with suppress(OSError, StorageError):
                if _size(path) == wanted.size and access.may(Path(path), self.user, write=False):
                    found = _with_digest(self._backing(path, wanted.format))
                    if found.digest == wanted.digest:
                        return found
        return None

    def _candidates(self, wanted: BackingFile) -> list[str]:
        places, folders = self.places, [self.places.path(name) for name in sorted(self.places.names)]
        found = [Path(wanted.path), *(folder / Path(wanted.path).name for folder in folders)]
        if wanted.location in places.names and is_clean_path(f"/{wanted.location_path}"):
            found.insert(1, places.path(wanted.location) / wanted.location_path)
        for folder in folders:
            found += _alike(folder, wanted)
        return list(dict.fromkeys(str(path) for path in found if places.of(str(path))))

    async def make(self, plan: DiskPlan) -> None:
        """Hold space for the image of a copy and create it, durably, with the mark of one that is not finished. Raises
        :class:`StorageError`; nothing is left then."""
        path = Path(plan.path)
        if path.exists():
            raise StorageError(f"{path} exists already")
        await self._hold(plan.path, plan.location, plan.expected_bytes)
        try:
            await asyncio.to_thread(marks.begin, plan.path, self._mark())
            await images.create(path, plan.format, plan.virtual_bytes, plan.backing, thick=plan.thick)
            access.give_new(path, self.user)
            try:
                await asyncio.to_thread(sync_folder, path.parent)
            except OSError as error:
                path.unlink(missing_ok=True)
                raise StorageError(f"cannot write {path.parent}", why=error.strerror or str(error)) from error
        except BaseException:
            marks.forget(plan.path)
            self.settle(plan.path)
            raise

    async def make_layer(self, plan: LayerPlan) -> None:
        """Hold space for a file that is to lie below disks and create it, empty, and otherwise as :meth:`make`."""
        path = plan.file.path
        await self._hold(path, plan.location, plan.expected_bytes)
        making = asyncio.ensure_future(asyncio.to_thread(layers.make, Path(path), self._mark()))
        try:
            await asyncio.shield(making)
        except BaseException:
            await asyncio.wait({making})  # who is cancelled removes it next, which must not come before it is made
            self.settle(path)
            raise

    async def finish(self, paths: Iterable[str]) -> None:
        """The images are whole and about to be a VM's: durably no unfinished copies any more. Raises
        :class:`StorageError`; they must not be a VM's then."""
        for path in paths:
            await asyncio.to_thread(marks.finish, path)

    def _mark(self) -> marks.Mark:
        return marks.Mark(host=self._host, at=time.time())

    async def _hold(self, path: str, location: str, needed: int) -> None:
        """Between plan and deed another copy may have taken the space, so it is looked at again."""
        async with self._holding:
            found = next((one for one in await self.locations() if one.name == location), None)
            if found is None or found.lacks(needed):
                raise StorageError(
                    f"location '{location}' has no room for {Path(path).name}",
                    why=f"{format_bytes(found.free_bytes if found else 0)} are free, {format_bytes(needed)} are needed",
                    todo="free space there, or choose another location",
                )
            self._held[path] = needed

    def settle(self, path: str) -> None:
        """An image is complete: nothing more is held for it."""
        self._held.pop(path, None)

    def remove(self, path: str) -> None:
        """Delete an image that its VM has left, or never had. Block devices stay. Never fails; what could not be
        deleted is logged."""
        self.settle(path)
        try:
            if not Path(path).is_block_device():
                os.unlink(path)
            _forget(path)
        except FileNotFoundError:
            _forget(path)
        except OSError as error:
            _log.error("%s is not used any more and could not be deleted: %s", path, error.strerror or error)

    def _facts(self, disk: Disk) -> DiskFacts:
        below = list(chains.below(disk.path, disk.format))
        header = qcow2.read(Path(disk.path)) if disk.format == "qcow2" else None
        allocated = _allocated(disk.path)
        return DiskFacts(
            name=disk.name,
            path=disk.path,
            format=disk.format,
            virtual_bytes=header.virtual_bytes if header is not None else _size(disk.path),
            allocated_bytes=allocated,
            chain_bytes=allocated + sum(_allocated(path) for path, _ in below),
            below=tuple(self._backing(*one) for one in below),
            snapshots=header.snapshots if header is not None else 0,
            location=self.places.of(disk.path),
        )

    def _backing(self, path: str, image_format: DiskFormat) -> BackingFile:
        name, inside = self.places.place(path)
        return BackingFile(
            path=path,
            format=image_format,
            size=_size(path),
            allocated_bytes=_allocated(path),
            location=name,
            location_path=inside,
        )

    def _less_held(self, location: Location) -> Location:
        return msgspec.structs.replace(
            location, free_bytes=max(0, location.free_bytes - self._needed_in(location.path))
        )

    def _needed_in(self, folder: str) -> int:
        """What copies under way to the file system of ``folder`` will still need."""
        try:
            device = os.stat(folder).st_dev
        except OSError:
            return 0
        held = ((path, total) for path, total in list(self._held.items()) if _device(Path(path).parent) == device)
        return sum(_still_needed(path, total) for path, total in held)


def _forget(path: str) -> None:
    """Remove what lay beside an image."""
    leases.forget(path)
    marks.forget(path)


def _with_digest(backing: BackingFile) -> BackingFile:
    return msgspec.structs.replace(backing, digest=chains.digest(backing.path, backing.format))


def _alike(folder: Path, wanted: BackingFile) -> Iterator[Path]:
    """Files of a folder that may be the layer which is wanted, or its original, by their names."""
    stem = layers.stem(wanted.path)
    with suppress(OSError):  # it has gone
        yield from sorted(path for path in folder.iterdir() if layers.stem(path.name) == stem)


def _allocated(path: str) -> int:
    """Bytes a file takes on its storage. Raises :class:`StorageError`."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise StorageError(f"cannot look at {path}", why=error.strerror or str(error)) from error
    return status.st_blocks * 512 or _size(path) if stat.S_ISBLK(status.st_mode) else status.st_blocks * 512


def _size(path: str) -> int:
    """Bytes a file, or block device, has. Raises :class:`StorageError`."""
    try:
        with open(path, "rb") as stream:
            return stream.seek(0, os.SEEK_END)
    except OSError as error:
        raise StorageError(f"cannot read {path}", why=error.strerror or str(error)) from error


def _device(path: Path) -> int:
    try:
        return os.stat(path).st_dev
    except OSError:
        return -1


def _still_needed(path: str, total: int) -> int:
    try:
        return max(0, total - os.stat(path).st_blocks * 512)
    except OSError:
        return total  # it is about to be made
