"""The storage of this host: its locations, facts about disks, and images that are made and removed for moves."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Collection, Hashable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from limosa.background import apart, in_full
from limosa.errors import Conflict, InvalidInput, StorageError
from limosa.host.files import Files
from limosa.host.looks import Looks, Step, Walks
from limosa.host.page import Page
from limosa.host.slots import Slots
from limosa.model.base import is_clean_path
from limosa.model.storage import BackingFile, DiskFacts, DiskPlan, LayerPlan, Location
from limosa.model.units import format_bytes
from limosa.model.vm import Disk, DiskFormat
from limosa.settings.host import HostSettings
from limosa.storage import access, chains, images, layers, qcow2
from limosa.storage.locations import Locations
from limosa.storage.marks import Mark
from limosa.storage.stores import Store

_log = logging.getLogger(__name__)
#: QEMU shows a guest, and copies, whole ones.
_SECTOR = 512
#: A location that has not answered for so long is not used.
ANSWERS_WITHIN_S = 5.0
#: Nor is an image, or a folder, that has not for so long; one on a busy disk may take seconds.
STEP_WITHIN_S = 10.0


@dataclass(frozen=True)
class _Held:
    """What a copy under way will need in all, and what that space is taken from."""

    total: int
    pool: Hashable


@dataclass(frozen=True)
class _Seen:
    """A look at a location."""

    location: Location
    pool: Hashable


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
        self._held: dict[str, _Held] = {}
        self._looks: Looks[_Seen] = Looks(ANSWERS_WITHIN_S)
        #: looks at images of VMs, which may lie anywhere
        self.walks = Walks(STEP_WITHIN_S)
        #: while somebody looks at what is free in order to hold it
        self._looking = asyncio.Lock()

    @property
    def places(self) -> Locations:
        """The locations by the settings of now."""
        return places(self._page, self._files)

    async def locations(self) -> tuple[Location, ...]:
        """All locations, by name. What copies under way will still need is not free. One whose server is gone has a
        fault that says so."""
        places = self.places
        names = sorted(places.names)
        seen = await asyncio.gather(*(self._look(places, name) for name in names))
        return tuple(
            one.location if one is not None else places.silent(name) for name, one in zip(names, seen, strict=True)
        )

    async def check_answer(self, names: Iterable[str] | None = None) -> None:
        """Before these locations are looked into, or with no names all. Raises :class:`StorageError` if one does not
        answer, and :class:`NotFound`."""
        places = self.places
        for name in sorted(places.names if names is None else set(names)):
            if await self._look(places, name) is None:
                raise StorageError(
                    f"location '{name}' does not answer",
                    why="so what is stored there is unknown",
                    todo="fix it, or remove it with 'limosa storage remove'",
                )

    async def answers(self, path: str) -> bool:
        """Whether the file system an image is on does."""

        def look(step: Step) -> None:
            step(path)
            os.path.lexists(path)

        try:
            await self.walks.walk(look)
        except StorageError as error:
            _log.warning("%s", error)
            return False
        return True

    async def facts(self, disks: Iterable[Disk]) -> tuple[DiskFacts, ...]:
        """What is to know before they are copied. Raises :class:`StorageError`."""

        def look(step: Step) -> list[DiskFacts]:
            found = []
            for disk in disks:
                step(disk.path)
                found.append(self._facts(disk))
            return found

        found = await self.walks.walk(look)
        return tuple(await asyncio.gather(*(_measured(fact) for fact in found)))

    async def digest(self, backing: BackingFile) -> BackingFile:
        """The same with its digest, for which it and all below it is read once. Raises :class:`StorageError`."""
        return await apart(_with_digest, backing)

    async def find(self, wanted: BackingFile, written: Collection[str] = ()) -> BackingFile | None:
        """A file of this host with the same digest, readable for QEMU's user, where one would look for it.

        That is: under the same path; in the location of the same name; in any location under the same file name, or
        that of a layer and its original. Only files in a location count, so that nobody can have another file of the
        host shown to a guest, and no logical volumes: those stand alone. Nor any that is ``written``: raises
        :class:`StorageError` if one of those does not answer.
        """

        def really(step: Step) -> set[str]:
            found = set()
            for path in written:
                step(path)
                found.add(os.path.realpath(path))
            return found

        usable = {one.name for one in await self.locations() if not one.fault}
        return await apart(self._find, wanted, usable, await self.walks.walk(really))

    def _find(self, wanted: BackingFile, usable: Collection[str], unfit: Collection[str]) -> BackingFile | None:
        for path in self._candidates(wanted, usable):
            if os.path.realpath(path) in unfit:
                continue
            with suppress(OSError, StorageError):
                if _size(path) == wanted.size and access.may(Path(path), self.user, write=False):
                    found = _with_digest(self._backing(path, wanted.format))
                    if found.digest == wanted.digest:
                        return found
        return None

    def _candidates(self, wanted: BackingFile, usable: Collection[str]) -> list[str]:
        stores = {name: self.places.store(name) for name in sorted(self.places.names.intersection(usable))}
        folders = {name: Path(store.root) for name, store in stores.items() if store.kind == "folder"}
        found = [Path(wanted.path), *(folder / Path(wanted.path).name for folder in folders.values())]
        if wanted.location in folders and is_clean_path(f"/{wanted.location_path}"):
            found.insert(1, folders[wanted.location] / wanted.location_path)
        for folder in folders.values():
            found += _alike(folder, wanted)
        return list(dict.fromkeys(str(path) for path in found if self.places.of(str(path)) in folders))

    async def hold(self, plans: Iterable[DiskPlan]) -> None:
        """Hold space for images that are made later. Raises :class:`StorageError`. What is held is to be settled, like
        images that were made."""
        for plan in plans:
            await self._hold(plan.path, plan.location, plan.space_bytes)

    async def make(self, plan: DiskPlan, source: str = "") -> None:
        """Hold space for the image of a copy, which will write all of it, if none is held, and create it, durably, with
        the mark of one that is not finished. ``source``: the host the VM comes from, if that is another. Raises
        :class:`StorageError`; nothing is left then. Who is cancelled removes it."""
        store = self.places.store(plan.location)
        if plan.path not in self._held:
            await self._hold(plan.path, plan.location, plan.space_bytes)
        try:
            if await in_full(os.path.lexists, plan.path):
                raise StorageError(f"{plan.path} exists already")
            await store.create(
                plan.path,
                plan.format,
                plan.virtual_bytes,
                plan.backing,
                thick=plan.thick,
                blank=False,
                mark=self._mark(source),
            )
            await in_full(access.give_new, Path(plan.path), self.user)
        except BaseException:
            self.settle(plan.path)
            raise

    async def make_layer(self, plan: LayerPlan, source: str) -> None:
        """Hold space for a file that is to lie below disks and create it, empty, and otherwise as :meth:`make`."""
        path = plan.file.path
        await self._hold(path, plan.location, plan.expected_bytes)
        try:
            await in_full(layers.make, Path(path), self._mark(source))
        except BaseException:
            self.settle(path)
            raise

    async def finish(self, paths: Iterable[str]) -> None:
        """The images are whole and about to be a VM's: durably no unfinished copies any more. Raises
        :class:`StorageError`; they must not be a VM's then."""
        for path in paths:
            await in_full(self.places.store_of(path).unfinished.finish, path)

    def _mark(self, source: str) -> Mark:
        return Mark(host=self._host, at=time.time(), source=source)

    async def _hold(self, path: str, location: str, needed: int) -> None:
        """Between plan and deed another copy may have taken the space, so it is looked at again."""
        async with self._looking:
            # What another has begun to hold since a look under way began is not in that.
            places = self.places
            seen = await self._look(places, location, anew=True)
            found = seen.location if seen is not None else places.silent(location)
            if found.fault:
                raise StorageError(
                    f"location '{location}' cannot be used", why=found.fault, todo="fix it, or choose another location"
                )
            if seen is None or found.lacks(needed):
                raise StorageError(
                    f"location '{location}' has no room for {Path(path).name}",
                    why=f"{format_bytes(found.free_bytes)} are free, {format_bytes(needed)} are needed",
                    todo="free space there, or choose another location",
                )
            self._held[path] = _Held(needed, seen.pool)

    def resume(self, paths: Iterable[str]) -> None:
        """An earlier daemon was about to make these images, and their moves are not over. To be settled as others."""
        self._held |= dict.fromkeys(paths, _Held(0, None))

    def settle(self, path: str) -> None:
        """An image is complete: nothing more is held for it."""
        self._held.pop(path, None)

    async def _check_locations(self, settings: HostSettings) -> None:
        """Raise :class:`InvalidInput` if a new location cannot be used, because moves would fail there, and
        :class:`Conflict` if one is changed in which moves make images: a mark would stay on an image that is not known
        any more as what it is, such as a volume's tag, and what a crash leaves would not be found."""
        now, then = self.places, _places(settings, self._files)
        for name in then.added_to(now):
            seen = await self._look(then, name)
            new = seen.location if seen is not None else then.silent(name)
            if new.fault:
                place, what = (new.source, "a volume group") if new.kind == "lvm" else (new.path, "a folder")
                raise InvalidInput(
                    f"{place} cannot be location '{name}'",
                    why=new.fault,
                    todo=f"name {what} that exists on the host",
                )
        for path in self._held:
            if (now.of(path), now.store_of(path).kind) != (then.of(path), then.store_of(path).kind):
                raise Conflict(
                    f"location '{now.of(path)}' is in use",
                    why=f"a move is creating {path} in it",
                    todo="wait until it has ended, see 'limosa migration list'",
                    host=self._host,
                )

    async def remove(self, path: str) -> str:
        """Delete an image that its VM has left, or never had. Block devices that are in no location stay. Never fails:
        returns why it could not be deleted, which is logged, or nothing."""
        self.settle(path)
        try:
            await in_full(self.places.store_of(path).remove, path)
        except StorageError as error:
            _log.error("%s is no longer used, but stays: %s", path, error)
            return str(error)
        return ""

    def _facts(self, disk: Disk) -> DiskFacts:
        itself = ((disk.path, disk.format),) if disk.read_only else ()
        below = tuple(self._backing(*one) for one in (*itself, *chains.below(disk.path, disk.format)))
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
            bitmaps=header.bitmaps if header is not None else 0,
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

    async def _look(self, places: Locations, name: str, *, anew: bool = False) -> _Seen | None:
        """One location; None if it does not answer. Raises :class:`NotFound`."""
        store = places.store(name)

        def look() -> _Seen:
            pool = store.pool
            needed = self._needed_in(pool)  # before: what is taken in between counts twice, and not never
            seen = places.look(name)
            return _Seen(msgspec.structs.replace(seen, free_bytes=max(0, seen.free_bytes - needed)), pool)

        return await self._looks.look((name, store), look, anew=anew)

    def _needed_in(self, pool: Hashable) -> int:
        """What copies under way will still need of the space of ``pool``."""
        held = [(path, one.total) for path, one in list(self._held.items()) if one.pool == pool]
        return sum(_still_needed(self.places.store_of(path), path, total) for path, total in held)

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


async def _measured(fact: DiskFacts) -> DiskFacts:
    """The same with what a copy holds where that is more than it takes on its storage."""
    if fact.chain_bytes >= fact.virtual_bytes or await apart(Path(fact.path).is_block_device):
        return fact
    one = await _copied_bytes(fact.path, fact.format, fact.allocated_bytes)
    below = [await _copied_bytes(file.path, file.format, file.allocated_bytes) for file in fact.below]
    return msgspec.structs.replace(fact, allocated_bytes=one, chain_bytes=one + sum(below))


async def _copied_bytes(path: str, image_format: DiskFormat, taken: int) -> int:
    with suppress(OSError, StorageError):  # what it takes is a good guess but for what is compressed
        return max(taken, await images.data_bytes(Path(path), image_format))
    return taken


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
