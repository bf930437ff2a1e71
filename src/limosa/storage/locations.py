"""Locations: named folders for images, and what the kernel says about each."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from limosa.errors import NotFound
from limosa.model.base import is_clean_path
from limosa.model.storage import OWN_LOCATION, Location, Place
from limosa.storage import mounts

_MEMORY = frozenset({"tmpfs", "ramfs"})
_DEVICES = Path("/sys/dev/block")


def innermost(path: str, folders: Mapping[str, str]) -> tuple[str, str]:
    """The name of the innermost of ``folders`` (paths by name) a file is in, and its path below that; both empty if it
    is in none, or a path with ``..`` does not let that be told."""
    pure = PurePosixPath(path)
    inside = [(len(folder), name) for name, folder in folders.items() if pure.is_relative_to(folder)]
    if not inside or not is_clean_path(path):
        return "", ""
    name = max(inside)[1]
    return name, str(pure.relative_to(folders[name]))


class Locations:
    """The locations of one host. ``own`` is the folder of the one that every host has."""

    def __init__(self, named: Mapping[str, Place], default: str, own: Path) -> None:
        self._places = {OWN_LOCATION: Place(path=str(own))} | dict(named)
        self._default = default

    def path(self, name: str) -> Path:
        """The folder of a location. Raises :class:`NotFound`."""
        if name not in self._places:
            names = ", ".join(sorted(self._places))
            raise NotFound(f"there is no location '{name}'", todo=f"choose one of {names}")
        return Path(self._places[name].path)

    @property
    def names(self) -> frozenset[str]:
        """The names there are."""
        return frozenset(self._places)

    def place(self, path: str) -> tuple[str, str]:
        """The innermost location a file is in, and its path below that; both empty if it is in none, or a path with
        ``..`` does not let that be told."""
        return innermost(path, {name: place.path for name, place in self._places.items()})

    def of(self, path: str) -> str:
        """The name of that location."""
        return self.place(path)[0]

    @property
    def own(self) -> str:
        """The folder that is this host's alone."""
        return self._places[OWN_LOCATION].path

    def shared(self) -> dict[str, str]:
        """Folders that an administrator says other hosts see too, by name."""
        return {name: place.path for name, place in self._places.items() if place.shared}

    def look(self) -> tuple[Location, ...]:
        """All of them as they are now, by name. Asks file systems, which can block where a server is gone."""
        return tuple(self._look(name, self._places[name]) for name in sorted(self._places))

    def _look(self, name: str, place: Place) -> Location:
        default = name == self._default
        try:
            status = os.stat(place.path)
            space = os.statvfs(place.path)
        except OSError as error:
            why = error.strerror or str(error)
            return Location(name=name, path=place.path, shared=place.shared, default=default, fault=why)
        mount = mounts.find(status.st_dev)
        read_only = bool(space.f_flag & os.ST_RDONLY)
        return Location(
            name=name,
            path=place.path,
            file_system=mount.kind,
            source=mount.source,
            share=mounts.name_on_server(place.path),
            shared=place.shared or bool(mount.share),
            default=default,
            speed=_speed(status.st_dev, mount),
            total_bytes=space.f_blocks * space.f_frsize,
            free_bytes=space.f_bavail * space.f_frsize,
            fault="it is mounted read-only" if read_only else "",
        )


def _speed(device: int, mount: mounts.Mount) -> str:
    if mount.share:
        return "network"
    if mount.kind in _MEMORY:
        return "memory"
    block = _DEVICES / f"{os.major(device)}:{os.minor(device)}"
    for queue in (block / "queue", block.resolve().parent / "queue"):  # a partition's is its disk's
        try:
            return "disk" if (queue / "rotational").read_text().strip() == "1" else "ssd"
        except OSError:
            continue
    return ""
