"""A location whose images are logical volumes.

They are raw, always: a format with a header would have QEMU believe what a guest can write there, and gains nothing
where LVM itself gives thin volumes and snapshots. A volume has whole extents, so it may be larger than its disk; the
VM's description says how much of it the disk is (:attr:`limosa.model.vm.Disk.size_bytes`), so that source and copy are
alike to the byte.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import struct
import threading
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import PurePosixPath

from msgspec.structs import replace

from limosa.background import in_full
from limosa.errors import StorageError
from limosa.model.storage import BackingFile, Location, LocationKind
from limosa.model.vm import DiskFormat
from limosa.storage import lvm, speed, tags
from limosa.storage.marks import Mark
from limosa.storage.tags import UnfinishedVolumes

#: Of linux/fs.h: write zeroes, by whatever is quickest on the device. Takes the first byte and a count.
_BLKZEROOUT = 0x127F


@dataclass(frozen=True)
class Volumes:
    """Images are logical volumes of a group, thin ones of its pool ``thin`` if that is named."""

    group: str
    thin: str = ""
    kind: LocationKind = "lvm"

    @property
    def root(self) -> str:
        """See :class:`Store`."""
        return f"/dev/{self.group}"

    @property
    def pool(self) -> Hashable:
        """See :class:`Store`."""
        return self.group, self.thin

    @property
    def unfinished(self) -> UnfinishedVolumes:
        """See :class:`Store`."""
        return UnfinishedVolumes(self.group)

    def look(self, name: str, *, default: bool) -> Location:
        """See :class:`Store`."""
        source = f"{self.group}/{self.thin}" if self.thin else self.group
        seen = Location(name=name, path=self.root, kind="lvm", source=source, thin=bool(self.thin), default=default)
        try:
            return self._look(seen)
        except StorageError as error:
            return replace(seen, fault=error.why or error.what)

    def _look(self, seen: Location) -> Location:
        devices = lvm.group(self.group)
        group, pool = devices[0], lvm.find(self.group, self.thin) if self.thin else None
        return replace(
            seen,
            total_bytes=pool.lv_size if pool is not None else group.vg_size,
            free_bytes=pool.lv_size - pool.taken_bytes if pool is not None else group.vg_free,
            unit_bytes=1 if self.thin else group.vg_extent_size,
            speed=speed.of_devices(one.pv_name for one in devices),
            fault=_fault_of_group(group) or (_fault_of_pool(pool) if self.thin else ""),
        )

    def taken(self, path: str) -> int:
        """See :class:`Store`."""
        volume = lvm.find(self.group, self._name(path))
        if volume is None:
            raise StorageError(f"there is no logical volume {path}")
        return volume.taken_bytes

    def lost_with(self, path: str) -> str:
        """See :class:`Store`."""
        volume = lvm.find(self.group, self._name(path))
        return volume.takes_along if volume is not None else ""

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
        """See :class:`Store`. What a pool gives is blank by itself."""
        if image_format != "raw" or backing is not None or (thick and self.thin):
            raise StorageError(f"{path} can only be raw, without a backing file", why="it is a logical volume")
        made = threading.Event()

        def work() -> None:
            self._create(path, size_bytes, mark, blank=blank)
            made.set()

        try:
            await in_full(work)
        except asyncio.CancelledError:
            if made.is_set():  # else one of that name is somebody's
                await in_full(self.remove, path)
            raise

    def _create(self, path: str, size_bytes: int, mark: Mark | None, *, blank: bool) -> None:
        borne = [tags.tag(mark)] if mark is not None else []
        lvm.create(self.group, self.thin, self._name(path), size_bytes, borne)
        try:
            if blank and not self.thin:
                _write_zeroes(path)
        except OSError as error:
            self.remove(path)
            raise StorageError(f"cannot write {path}", why=error.strerror or str(error)) from error

    def remove(self, path: str) -> None:
        """See :class:`Store`."""
        lvm.remove(self.group, self._name(path))

    def _name(self, path: str) -> str:
        return str(PurePosixPath(path).relative_to(self.root))


def _fault_of_group(group: lvm.Group) -> str:
    if group.vg_partial:
        return "devices of the volume group are missing"
    return "" if group.vg_permissions == "writeable" else "the volume group is read-only"


def _fault_of_pool(pool: lvm.Volume | None) -> str:
    if pool is None or pool.lv_layout != "thin,pool":
        return "it has no thin pool of that name"
    if pool.zero != "zero":
        return "the pool gives away what others left in it; see lvchange --zero y"
    return ""


def _write_zeroes(path: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        size = os.lseek(descriptor, 0, os.SEEK_END)
        fcntl.ioctl(descriptor, _BLKZEROOUT, struct.pack("=QQ", 0, size))
    finally:
        os.close(descriptor)
