"""The storage of this host: its locations, facts about disks, and images that are made and removed for moves."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import msgspec

from limosa.background import in_full
from limosa.errors import Conflict, StorageError
from limosa.host.files import Files
from limosa.host.page import Page
from limosa.host.slots import Slots
from limosa.model.base import is_clean_path
from limosa.model.storage import BackingFile, DiskFacts, DiskPlan, LayerPlan, Location
from limosa.model.units import format_bytes
from limosa.model.vm import Disk, DiskFormat
from limosa.settings.host import HostSettings
from limosa.storage import access, chains, layers, qcow2
from limosa.storage.locations import Locations
from limosa.storage.marks import Mark
from limosa.storage.stores import Store

_log = logging.getLogger(__name__)
#: QEMU shows a guest, and copies, whole ones.
_SECTOR = 512


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
        page.before_change(self._check_locations)
        #: what copies under way will still need, by the path of the image
        self._held: dict[str, int] = {}
        #: while somebody looks at what is free in order to hold it
        self._looking = asyncio.Lock()

    @property
    def places(self) -> Locations:
        """The locations by the settings of now."""
        return places(self._page, self._files)

    async def locations(self) -> tuple[Location, ...]:
        """All locations. What copies under way will still need is not free."""
        return await asyncio.to_thread(self._look)

    async def facts(self, disks: Iterable[Disk]) -> tuple[DiskFacts, ...]:
        """What is to know before they are copied. Raises :class:`StorageError`."""
        return await asyncio.to_thread(lambda: tuple(self._facts(disk) for disk in disks))

    async def digest(self, backing: BackingFile) -> BackingFile:
        """The same with its digest, for which it and all below it is read once. Raises :class:`StorageError`."""
        return await asyncio.to_thread(_with_digest, backing)

    async def find(self, wanted: BackingFile, written: Collection[str] = ()) -> BackingFile | None:
        """A file of this host with the same digest, readable for QEMU's user, where one would look for it.

        That is: under the same path; in the location of the same name; in any location under the same file name, or
        that of a layer and its original. Only files in a location count, so that nobody can have another file of the
        host shown to a guest, and no logical volumes: those stand alone. Nor any that is ``written``.
        """
        return await asyncio.to_thread(self._find, wanted, written)

    def _find(self, wanted: BackingFile, written: Collection[str]) -> BackingFile | None:
        unfit = {os.path.realpath(path) for path in written}
        for path in self._candidates(wanted):
            if os.path.realpath(path) in unfit:
                continue
            with suppress(OSError, StorageError):
                if _size(path) == wanted.size and access.may(Path(path), self.user, write=False):
                    found = _with_digest(self._backing(path, wanted.format))
                    if found.digest == wanted.digest:
                        return found
        return None

    def _candidates(self, wanted: BackingFile) -> list[str]:
        stores = {name: self.places.store(name) for name in sorted(self.places.names)}
        folders = {name: Path(store.root) for name, store in stores.items() if store.kind == "folder"}
        found = [Path(wanted.path), *(folder / Path(wanted.path).name for folder in folders.values())]
        if wanted.location in folders and is_clean_path(f"/{wanted.location_path}"):
            found.insert(1, folders[wanted.location] / wanted.location_path)
        for folder in folders.values():
            found += _alike(folder, wanted)
        return list(dict.fromkeys(str(path) for path in found if self.places.of(str(path)) in folders))

    async def make(self, plan: DiskPlan) -> None:
        """Hold space for the image of a copy, which will write all of it, and create it, durably, with the mark of one
        that is not finished. Raises :class:`StorageError`; nothing is left then. Who is cancelled removes it."""
        store = self.places.store(plan.location)
        if os.path.lexists(plan.path):
            raise StorageError(f"{plan.path} exists already")
        await self._hold(plan.path, plan.location, plan.expected_bytes)
        try:
            await store.create(
                plan.path,
                plan.format,
                plan.virtual_bytes,
                plan.backing,
                thick=plan.thick,
                blank=False,
                mark=self._mark(),
            )
            await in_full(access.give_new, Path(plan.path), self.user)
        except BaseException:
            self.settle(plan.path)
            raise

    async def make_layer(self, plan: LayerPlan) -> None:
        """Hold space for a file that is to lie below disks and create it, empty, and otherwise as :meth:`make`."""
        path = plan.file.path
        await self._hold(path, plan.location, plan.expected_bytes)
        try:
            await in_full(layers.make, Path(path), self._mark())
        except BaseException:
            self.settle(path)
            raise

    async def finish(self, paths: Iterable[str]) -> None:
        """The images are whole and about to be a VM's: durably no unfinished copies any more. Raises
        :class:`StorageError`; they must not be a VM's then."""
        for path in paths:
            await in_full(self.places.store_of(path).unfinished.finish, path)

    def _mark(self) -> Mark:
        return Mark(host=self._host, at=time.time())

    async def _hold(self, path: str, location: str, needed: int) -> None:
        """Between plan and deed another copy may have taken the space, so it is looked at again."""
        async with self._looking:
            found = next((one for one in await self.locations() if one.name == location), None)
            if found is None or found.lacks(needed):
                raise StorageError(
                    f"location '{location}' has no room for {Path(path).name}",
                    why=f"{format_bytes(found.free_bytes if found else 0)} are free, {format_bytes(needed)} are needed",
                    todo="free space there, or choose another location",
                )
            self._held[path] = needed

    def resume(self, paths: Iterable[str]) -> None:
        """An earlier daemon was about to make these images, and their moves are not over. To be settled as others."""
        self._held |= dict.fromkeys(paths, 0)

    def settle(self, path: str) -> None:
        """An image is complete: nothing more is held for it."""
        self._held.pop(path, None)

    def _check_locations(self, settings: HostSettings) -> None:
        """Raise :class:`Conflict` if one is changed in which moves make images: a mark would stay on an image that is
        not known any more as what it is, such as a volume's tag, and what a crash leaves would not be found."""
        now, then = self.places, _places(settings, self._files)
        for path in self._held:
            if (now.of(path), now.store_of(path).kind) != (then.of(path), then.store_of(path).kind):
                raise Conflict(
                    f"location '{now.of(path)}' is in use",
                    why=f"a move makes {path} in it",
                    todo="wait until it has ended, see 'limosa migration list'",
                    host=self._host,
                )

    async def remove(self, path: str) -> None:
        """Delete an image that its VM has left, or never had. Block devices that are in no location stay. Never fails;
        what could not be deleted is logged."""
        self.settle(path)
        try:
            await in_full(self.places.store_of(path).remove, path)
        except StorageError as error:
            _log.error("%s is not used any more: %s", path, error)

    def _facts(self, disk: Disk) -> DiskFacts:
        below = tuple(self._backing(*one) for one in chains.below(disk.path, disk.format))
        header = qcow2.read(Path(disk.path)) if disk.format == "qcow2" else None
        allocated = self._taken(disk.path)
        size = header.virtual_bytes if header is not None else disk.size_bytes or _size(disk.path)
        return DiskFacts(
            name=disk.name,
            path=disk.path,
            format=disk.format,
            virtual_bytes=-(-size // _SECTOR) * _SECTOR,
            allocated_bytes=allocated,
            chain_bytes=allocated + sum(file.allocated_bytes for file in below),
            below=below,
            snapshots=header.snapshots if header is not None else 0,
            location=self.places.of(disk.path),
            needed=self.places.store_of(disk.path).lost_with(disk.path),
        )

    def _backing(self, path: str, image_format: DiskFormat) -> BackingFile:
        name, inside = self.places.place(path)
        return BackingFile(
            path=path,
            format=image_format,
            size=_size(path),
            allocated_bytes=self._taken(path),
            location=name,
            location_path=inside,
        )

    def _look(self) -> tuple[Location, ...]:
        places = self.places
        # In this order: what is taken in between counts twice, and not never.
        needed = {name: self._needed_in(places.store(name)) for name in places.names}
        return tuple(
            msgspec.structs.replace(one, free_bytes=max(0, one.free_bytes - needed[one.name])) for one in places.look()
        )

    def _needed_in(self, store: Store) -> int:
        """What copies under way will still need of the space that ``store`` has too."""
        places, pool = self.places, store.pool
        held = ((places.store_of(path), path, total) for path, total in list(self._held.items()))
        return sum(_still_needed(one, path, total) for one, path, total in held if one.pool == pool)

    def _taken(self, path: str) -> int:
        """Bytes an image takes on its storage. Raises :class:`StorageError`."""
        return self.places.store_of(path).taken(path)


def places(page: Page, files: Files) -> Locations:
    """The locations of a host by its settings of now."""
    return _places(page.now, files)


def _places(settings: HostSettings, files: Files) -> Locations:
    return Locations(settings.locations, settings.default_location, files.images)


def _with_digest(backing: BackingFile) -> BackingFile:
    return msgspec.structs.replace(backing, digest=chains.digest(backing.path, backing.format))


def _alike(folder: Path, wanted: BackingFile) -> Iterator[Path]:
    """Files of a folder that may be the layer which is wanted, or its original, by their names."""
    stem = layers.stem(wanted.path)
    with suppress(OSError):  # it has gone
        yield from sorted(path for path in folder.iterdir() if layers.stem(path.name) == stem)


def _size(path: str) -> int:
    """Bytes a file, or block device, has. Raises :class:`StorageError`."""
    try:
        with open(path, "rb") as stream:
            return stream.seek(0, os.SEEK_END)
    except OSError as error:
        raise StorageError(f"cannot read {path}", why=error.strerror or str(error)) from error


def _still_needed(store: Store, path: str, total: int) -> int:
    try:
        return max(0, total - store.taken(path))
    except StorageError:
        return total  # it is about to be made
