"""The storage of this host: its locations, facts about disks, and images that are made and removed for moves."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterable
from pathlib import Path

import msgspec

from limosa.errors import StorageError
from limosa.host.files import Files
from limosa.host.page import Page
from limosa.model.storage import DiskFacts, DiskPlan, Location
from limosa.model.vm import Disk
from limosa.settings.toml import sync_folder
from limosa.storage import images
from limosa.storage.locations import Locations

_log = logging.getLogger(__name__)


class Storage:
    """Where this host keeps images."""

    def __init__(self, page: Page, files: Files) -> None:
        self._page = page
        self._files = files
        #: what copies under way will still need, by the path of the image
        self._held: dict[str, int] = {}

    @property
    def places(self) -> Locations:
        """The locations by the settings of now."""
        settings = self._page.now
        return Locations(settings.locations, settings.default_location, self._files.images)

    async def locations(self) -> tuple[Location, ...]:
        """All locations. What copies under way will still need is not free."""
        found = await asyncio.to_thread(self.places.look)
        return tuple(
            msgspec.structs.replace(location, free_bytes=max(0, location.free_bytes - self._needed_in(location.path)))
            for location in found
        )

    async def facts(self, disks: Iterable[Disk]) -> tuple[DiskFacts, ...]:
        """What is to know before they are copied. Raises :class:`StorageError`."""
        return tuple(await asyncio.gather(*(self._facts(disk) for disk in disks)))

    async def make(self, plan: DiskPlan) -> None:
        """Create the image of a copy, durably, and hold space for it. Raises :class:`StorageError`; nothing is left
        then."""
        path = Path(plan.path)
        await images.create(path, plan.format, plan.virtual_bytes, plan.backing, thick=plan.thick)
        try:
            await asyncio.to_thread(sync_folder, path.parent)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise StorageError(f"cannot write {path.parent}", why=error.strerror or str(error)) from error
        self._held[plan.path] = plan.expected_bytes

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
        except FileNotFoundError:
            pass
        except OSError as error:
            _log.error("%s is not used any more and could not be deleted: %s", path, error.strerror or error)

    async def _facts(self, disk: Disk) -> DiskFacts:
        info = await images.info(Path(disk.path), disk.format)
        return DiskFacts(
            name=disk.name,
            path=disk.path,
            format=disk.format,
            virtual_bytes=info.virtual_size,
            allocated_bytes=info.actual_size,
            chain_bytes=info.actual_size,
            snapshots=tuple(snapshot.name for snapshot in info.snapshots),
            location=self.places.of(disk.path),
        )

    def _needed_in(self, folder: str) -> int:
        """What copies under way to the file system of ``folder`` will still need."""
        try:
            device = os.stat(folder).st_dev
        except OSError:
            return 0
        return sum(_still_needed(path, total) for path, total in self._held.items() if _device(path) == device)


def _device(path: str) -> int:
    try:
        return os.stat(path).st_dev
    except OSError:
        return -1


def _still_needed(path: str, total: int) -> int:
    try:
        return max(0, total - os.stat(path).st_blocks * 512)
    except OSError:
        return 0
