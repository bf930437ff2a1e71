"""Images that a crash left behind: found, shown with what proves that nobody uses them, and removed.

Journals and records remove what a move made. Where they are lost, with the state folder of a host or on a disk that was
mended, the images stay. An image is offered for removal only if all of this holds:

- it has the mark of an unfinished copy (:mod:`limosa.storage.unfinished`), and its name is one that a move gives;
- nothing on this host has a claim to it (:mod:`limosa.host.claims`): no VM, image above it, unfinished or damaged
  journal, process, lock or lease;
- where other hosts see it, all that are known were asked, the one that made it among them, and say the same;
- where its VM came from another host, that one was asked, and says that the move is over: until then the guest may
  have run here last, and a person may have to say so.

Whatever cannot be known is a doubt, and an image with a doubt is shown and never removed. Images without a mark,
such as those ``--keep`` left, are always doubted. To remove one the mark is taken first, so that no VM can be started
on it; then everything is asked once more.

All of it holds as well for files that a move has brought to lie below disks. A move that did not end leaves whole
chains, so an image is also offered if only such lie above it as are offered themselves. Those are removed before it.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from limosa.background import apart, in_full
from limosa.errors import Conflict, LimosaError, NotFound, StorageError
from limosa.host.claims import Claims, Known
from limosa.host.looks import Step
from limosa.host.neighbours import sought
from limosa.host.parts import Parts
from limosa.host.proof import Elsewhere, all_judged, doubts_here, is_named, verdict
from limosa.migration.disks import read_name
from limosa.model.storage import ImageSought, ImageUse, Leftover
from limosa.storage import chains, mounts
from limosa.storage.stores import Store
from limosa.wire.api import CleanReport

_log = logging.getLogger(__name__)


class Leftovers:
    """Those of one host."""

    def __init__(self, parts: Parts) -> None:
        self._host = parts.name
        self._vms = parts.vms
        self._storage = parts.storage
        self._migrations = parts.files.migrations
        self._neighbours = parts.neighbours
        self._cleaning = asyncio.Lock()

    async def look(self) -> tuple[Leftover, ...]:
        """Every image that may be one, by path. Never fails because of a location that cannot be read; raises
        :class:`StorageError` if one does not answer, or an image of a VM."""
        await self._storage.check_answer()
        locations = await self._storage.locations()
        places = self._storage.places
        found = await apart(
            lambda: {one.path: one for name in places.names for one in _candidates(name, places.store(name))}
        )
        shared = {location.name for location in locations if location.shared}
        return await self._judge([found[path] for path in sorted(found)], shared)

    async def clean(self, paths: Sequence[str]) -> CleanReport:
        """Remove those that are named, or all that may be removed.

        Raises :class:`NotFound` and :class:`Conflict` if one that is named may not be, before anything is removed. One
        of which the proof does not hold any more when its turn comes stays, and the report says why.
        """
        async with self._cleaning:
            found = {one.path: one for one in await self.look()}
            for path in paths:
                self._check(path, found.get(path))
            chosen = [found[path] for path in dict.fromkeys(paths)] or [one for one in found.values() if not one.doubts]
            removed, kept = [], []
            for one in await apart(_highest_first, chosen):
                try:
                    await self._remove(one)
                    removed.append(one)
                except LimosaError as error:
                    kept.append(msgspec.structs.replace(one, proof=(), doubts=(str(error),)))
            return CleanReport(removed=tuple(removed), kept=tuple(kept))

    async def uses(self, images: Sequence[ImageSought]) -> tuple[ImageUse, ...]:
        """For another host: who uses these images here. Those that it asks about together may go together."""
        claims = await self._claims()
        shared = {location.name for location in await self._storage.locations() if location.shared}

        def answer(step: Step) -> tuple[ImageUse, ...]:
            seen = [self._seen(image, shared) for image in images]
            going = set(itertools.chain.from_iterable(seen))
            return tuple(_use(image.migration, at, claims, going, step) for image, at in zip(images, seen, strict=True))

        return await self._storage.walks.walk(answer)

    def _seen(self, image: ImageSought, shared: Collection[str]) -> list[Path]:
        """Where the image is on this host."""
        seen = [Path(path) for path in mounts.paths_of(image.share)] if image.share else []
        if image.location is not None and image.location in shared:
            seen.append(self._storage.places.path(image.location) / image.name)
        return seen

    async def _claims(self) -> Claims:
        await self._storage.check_answer()
        known, places = Known.of(self._vms), self._storage.places
        return await self._storage.walks.walk(lambda step: Claims.look(self._migrations, known, places, step=step))

    async def _judge(self, found: Sequence[Leftover], shared: Collection[str]) -> tuple[Leftover, ...]:
        """The same with proof and doubts, without those that are in use."""
        claims = await self._claims()
        unused = await apart(lambda: [one for one in found if not claims.by_name(Path(one.path), one.migration)])
        comes_from = {one.path: one.source for one in unused if one.source not in ("", self._host)}
        elsewhere = await self._ask([one for one in unused if one.location in shared or one.path in comes_from])

        def judge(one: Leftover, going: Collection[Path]) -> Leftover:
            others = elsewhere.get(one.path)
            if others is not None and one.location not in shared:
                others = others.only(comes_from[one.path])
            return verdict(one, self._host, doubts_here(one, claims, self._host, going), others)

        judged = await apart(all_judged, unused, judge)
        return tuple(one for one in judged if not is_named(elsewhere.get(one.path)))

    async def _ask(self, images: Sequence[Leftover]) -> dict[str, Elsewhere]:
        """What other hosts say of images, by path."""
        places = self._storage.places
        asked = await apart(lambda: {one.path: sought(one.path, one.migration, places) for one in images})
        return await self._neighbours.uses(asked)

    def _check(self, path: str, found: Leftover | None) -> None:
        if found is None:
            raise NotFound(
                f"{path} is not an image that a move left behind",
                why="it was not made by a move, or a VM or a move uses it",
                todo="'limosa storage leftovers' shows which there are",
                host=self._host,
            )
        if found.doubts:
            raise Conflict(
                f"{path} stays: it is not certain to be unused",
                why="; ".join(found.doubts),
                todo="if you know that nobody needs it, delete it yourself",
                host=self._host,
            )

    async def _remove(self, one: Leftover) -> None:
        """Remove an image if it is still certain that nobody uses it. Raises :class:`Conflict` or ``StorageError``."""
        unfinished = self._storage.places.store_of(one.path).unfinished
        if not await in_full(unfinished.condemn, one.path):
            raise Conflict(f"{one.path} is in use by now", host=self._host)
        try:
            shared = {location.name for location in await self._storage.locations() if location.shared}
            again = await self._judge([one], shared)
            if not again or again[0].doubts:
                why = "; ".join(again[0].doubts) if again else "a VM or a move names it"
                raise Conflict(f"{one.path} is not certain to be unused", why=why, host=self._host)
            await in_full(unfinished.remove, one.path)
        except BaseException:
            with suppress(OSError, StorageError):  # the next look finds it all the same
                await in_full(unfinished.spare, one.path)
            raise
        _log.info("removed %s, which move %s had not finished", one.path, one.migration)


def _candidates(location: str, store: Store) -> Iterator[Leftover]:
    """The images in a location that have the name of one that a move made."""
    with suppress(StorageError):  # it has gone
        for found in store.unfinished.find():
            if made := read_name(Path(found.path).name):
                yield Leftover(
                    path=found.path,
                    location=location,
                    vm=made.vm,
                    disk=made.disk,
                    migration=made.migration,
                    size_bytes=found.size_bytes,
                    changed_at=found.changed_at,
                    host=found.mark.host if found.mark is not None else "",
                    source=found.mark.source if found.mark is not None else "",
                )


def _highest_first(images: Iterable[Leftover]) -> list[Leftover]:
    """Each before what lies below it."""
    return sorted(images, key=lambda one: _height(Path(one.path)), reverse=True)


def _height(image: Path) -> int:
    """How many files lie below it, of those that are there."""
    height = 0
    with suppress(StorageError):
        for _ in chains.below(str(image), "raw" if image.suffix == ".raw" else "qcow2"):
            height += 1
    return height


def _use(migration: str, seen: Sequence[Path], claims: Claims, going: Collection[Path], step: Step) -> ImageUse:
    """Also of one that is not seen here, its move may be known."""
    reasons, named = [claims.of_move(migration)], claims.is_under_way(migration)
    for path in seen:
        step(str(path))
        reasons.append(claims.on(path, migration, going))
        named = named or bool(claims.by_name(path, migration))
    reasons += claims.unread
    return ImageUse(use="; ".join(dict.fromkeys(filter(None, reasons))), named=named)
