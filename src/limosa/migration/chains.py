"""What becomes of the files below disks that are copied; pure.

What the destination has stays there and is used there, found by its contents. Everything above that is sent: each file
once, however many disks lie above it, as one of its own below them. So a chain is at the destination what it was here.
Only a disk that is itself such a file has one for itself, since no VM has two disks on one file.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import PurePosixPath

import msgspec

from limosa.model.storage import BackingFile, DiskAction, DiskFacts, DiskPlan, LayerPlan, Location
from limosa.storage import layers

#: The location of the destination for something that lies in the location of that name here, or in none.
Choice = Callable[[str], Location]


class Chains:
    """Plans chains, one disk after another. ``found``: what the destination has, by digest."""

    def __init__(self, found: Mapping[str, BackingFile], tag: str) -> None:
        self._found = found
        self._tag = tag
        #: by digest, and disk if it is for that alone
        self._layers: dict[tuple[str, str], LayerPlan] = {}

    @property
    def layers(self) -> tuple[LayerPlan, ...]:
        """The files that are sent so far, each after the one below it."""
        return tuple(self._layers.values())

    def keep(self, whole: DiskPlan, fact: DiskFacts, choose: Choice) -> DiskPlan:
        """The plan for a disk of which only the image itself is copied; ``whole`` if nothing lies below it."""
        nearest: BackingFile | None = None
        for file in reversed(fact.below):
            nearest = self._found.get(file.digest) or self._sent(file, nearest, choose)
        return above(whole, fact, nearest, sent=self._is_sent(nearest)) if nearest is not None else whole

    def bring(self, fact: DiskFacts, location: Location, taken: Collection[str]) -> DiskPlan:
        """The plan for a disk that is only read: ``fact.below`` has itself first. ``taken``: what other disks of the VM
        are there."""

        def choose(_: str) -> Location:
            return location

        itself, *below = fact.below
        nearest: BackingFile | None = None
        for file in reversed(below):
            nearest = self._found.get(file.digest) or self._sent(file, nearest, choose)
        there = self._found.get(itself.digest)
        if there is None or there.path in taken:
            there = self._sent(itself, nearest, choose)
        if there.path in taken:
            there = self._sent(itself, nearest, choose, of=fact.name)
        sent = self._is_sent(there)
        return DiskPlan(
            disk=fact.name,
            action=DiskAction.STAY,
            path=there.path,
            format=fact.format,
            virtual_bytes=fact.virtual_bytes,
            location=there.location,
            why=f"read-only, {'sent' if sent else 'already there with the same contents'} as {there.path}",
        )

    def _is_sent(self, there: BackingFile) -> bool:
        return any(layer.file is there for layer in self._layers.values())

    def _sent(self, file: BackingFile, backing: BackingFile | None, choose: Choice, of: str = "") -> BackingFile:
        if (file.digest, of) not in self._layers:
            self._layers[file.digest, of] = self._plan(file, backing, choose)
        return self._layers[file.digest, of].file

    def _plan(self, file: BackingFile, backing: BackingFile | None, choose: Choice) -> LayerPlan:
        location = choose(file.location)
        name = layers.name(file.path, self._tag, len(self._layers) + 1, file.format)
        there = BackingFile(
            path=str(PurePosixPath(location.path) / name),
            format=file.format,
            size=file.size,
            digest=file.digest,
            location=location.name,
            location_path=name,
        )
        return LayerPlan(
            origin=file.path,
            file=there,
            backing=backing,
            expected_bytes=min(file.allocated_bytes, file.size),
            location=location.name,
            why=f"into location '{location.name}'"
            + (f", on its backing file {backing.path}" if backing is not None else ""),
        )


def above(whole: DiskPlan, fact: DiskFacts, below: BackingFile, *, sent: bool) -> DiskPlan:
    """The plan for a disk that is copied without what lies ``below`` it, where it will be."""
    return msgspec.structs.replace(
        whole,
        action=DiskAction.COPY_OVERLAY,
        expected_bytes=fact.allocated_bytes,
        needed_bytes=None,
        backing=below,
        why=f"{whole.why}, without its backing file, which is {'sent' if sent else 'already there'} as {below.path}",
    )
