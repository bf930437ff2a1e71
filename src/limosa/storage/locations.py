"""Locations: named places for images. What each is and does is its :class:`limosa.storage.stores.Store`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from limosa.errors import NotFound
from limosa.model.base import is_clean_path
from limosa.model.storage import OWN_LOCATION, Location, Place
from limosa.storage import lvm
from limosa.storage.stores import Folder, Store
from limosa.storage.volumes import Volumes


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

    def store(self, name: str) -> Store:
        """What a location is. Raises :class:`NotFound`."""
        if name not in self._places:
            names = ", ".join(sorted(self._places))
            raise NotFound(f"there is no location '{name}'", todo=f"choose one of {names}")
        return _store(self._places[name])

    def added_to(self, before: Locations) -> list[str]:
        """The names of those that were not where they are now."""
        roots = {name: (place.path, place.lvm) for name, place in before._places.items()}
        return [name for name, place in self._places.items() if roots.get(name) != (place.path, place.lvm)]

    def path(self, name: str) -> Path:
        """The folder below which a location's images have their paths. Raises :class:`NotFound`."""
        return Path(self.store(name).root)

    def store_of(self, path: str) -> Store:
        """Where an image lies: the store of its location, or the folder it is in if that is none."""
        name = self.of(path)
        return self.store(name) if name else Folder(str(PurePosixPath(path).parent))

    def claim(self, path: str) -> None:
        """Before an image that was found is given to a VM, whichever way it is named: it is no leftover of a move.

        Raises :class:`limosa.errors.Conflict` if it is being removed as one, and ``StorageError``.
        """
        real = lvm.path_of(path) or path
        self.store_of(real).unfinished.claim(real)

    @property
    def names(self) -> frozenset[str]:
        """The names there are."""
        return frozenset(self._places)

    def place(self, path: str) -> tuple[str, str]:
        """The innermost location a file is in, and its path below that; both empty if it is in none, or a path with
        ``..`` does not let that be told."""
        return innermost(path, {name: place.root for name, place in self._places.items()})

    def of(self, path: str) -> str:
        """The name of that location."""
        return self.place(path)[0]

    @property
    def own(self) -> str:
        """The folder that is this host's alone."""
        return self._places[OWN_LOCATION].root

    def shared(self) -> dict[str, str]:
        """Folders that an administrator says other hosts see too, by name."""
        return {name: place.root for name, place in self._places.items() if place.shared}

    def is_said_to_be_shared(self, path: str) -> bool:
        """Whether a file is in one of those."""
        return innermost(path, self.shared()) != ("", "")

    def look(self, name: str) -> Location:
        """One of them as it is now. Asks its file system, which can block where a server is gone."""
        return self.store(name).look(name, default=name == self._default)

    def silent(self, name: str) -> Location:
        """One that does not answer."""
        place, kind = self._places[name], self.store(name).kind
        return Location(
            name=name,
            path=place.root,
            kind=kind,
            shared=place.shared,
            default=name == self._default,
            fault="it does not answer",
        )


def _store(place: Place) -> Store:
    if place.lvm is not None:
        group, _, pool = place.lvm.partition("/")
        return Volumes(group, pool)
    return Folder(place.root, place.shared)
