"""Who on this host has a claim to an image: a VM, an image above it, a move, a process.

All of it is looked at anew each time, on the disk where it is on the disk: what a daemon believes may be what a crash
has made wrong. What cannot be read may name any image, so it is a doubt about all of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from limosa.errors import LimosaError, StorageError
from limosa.host.vms import Vms
from limosa.migration.journal import last_step
from limosa.migration.ownership import DESTINATION_ENDED, SOURCE_ENDED, DestinationStep
from limosa.model.vm import VmConfig
from limosa.storage import chains, openers, qcow2
from limosa.storage.locations import Locations
from limosa.storage.openers import FileKey

_ENDED: frozenset[str | None] = frozenset({*SOURCE_ENDED, *DESTINATION_ENDED})


@dataclass(frozen=True)
class Claims:
    """What this host knew at one moment. Made by :meth:`look`, in a thread."""

    migrations: Path
    places: Locations
    open_files: Mapping[FileKey, str]
    #: by file, and by path for files that are not there, who names it
    named: dict[FileKey | str, str] = field(default_factory=dict)
    #: what could not be read, and so may name any image
    unread: list[str] = field(default_factory=list)

    @classmethod
    def look(cls, migrations: Path, known: Known, places: Locations) -> Claims:
        """``places`` are where images may lie, some above others. Can block where a server is gone."""
        claims = cls(migrations, places, openers.everywhere())
        claims.unread.extend(f"the file of VM '{name}' cannot be read: {why}" for name, why in known.damaged.items())
        for config in known.configs:
            claims._of_vm(config)
        for name in places.names:
            claims._of_images_in(places.path(name))
        return claims

    def on(self, image: Path, migration: str) -> str:
        """Who has a claim to the image, which that migration may have made, in words; empty if nobody."""
        return self.by_name(image, migration) or self._in_journals(migration) or self._holder(image)

    def by_name(self, image: Path, migration: str) -> str:
        """The same, only for VMs and moves of this host that work with it: then it is no leftover at all."""
        return self._name(image) or next((words for words, works in self._journals(migration) if works), "")

    def _name(self, image: Path) -> str:
        with suppress(OSError):
            return self.named.get(openers.key(os.stat(image)), "") or self.named.get(str(image), "")
        return self.named.get(str(image), "")

    def _in_journals(self, migration: str) -> str:
        return next((words for words, _ in self._journals(migration)), "")

    def _journals(self, migration: str) -> Iterator[tuple[str, bool]]:
        """What the files of a move have against removing what it made, and whether it is because the move goes on."""
        for path in sorted(self.migrations.glob(f"{migration}.*")):
            try:
                if path.suffix != ".jsonl":
                    msgspec.json.decode(path.read_bytes())
                    if not path.name.endswith(".view.json"):
                        yield f"{path} says that the move is not over", True
                elif (step := last_step(path)) == DestinationStep.OWNED:
                    yield f"{path} says that it was the disk of a VM", False
                elif step not in _ENDED:
                    yield f"{path} says that the move is not over", True
            except FileNotFoundError:
                continue  # the move is over
            except (OSError, ValueError, LimosaError) as error:
                yield f"{path} is damaged, and the move may not be over: {error}", False

    def _holder(self, image: Path) -> str:
        """A process."""
        try:
            return self.places.store_of(str(image)).unfinished.user(str(image), self.open_files)
        except StorageError as error:
            return f"it cannot be told who has it open: {error}"

    def _of_vm(self, config: VmConfig) -> None:
        for disk in config.disks:
            self._note(disk.path, f"VM '{config.name}' uses it")
            try:
                for path, _ in chains.below(disk.path, disk.format):
                    self._note(path, f"VM '{config.name}' uses it, below disk {disk.name}")
            except StorageError as error:
                self.unread.append(f"what lies below disk {disk.name} of VM '{config.name}' is not known: {error}")

    def _of_images_in(self, folder: Path) -> None:
        for image in _images(folder):
            with suppress(StorageError):  # it is none
                if backing := qcow2.read(image).backing:
                    self._note(str(image.parent / backing), f"{image} lies above it")

    def _note(self, path: str, who: str) -> None:
        self.named.setdefault(os.path.realpath(path), who)
        with suppress(OSError):
            self.named.setdefault(openers.key(os.stat(path)), who)


@dataclass(frozen=True)
class Known:
    """What the daemon knows of its VMs."""

    configs: Sequence[VmConfig]
    damaged: Mapping[str, str]

    @classmethod
    def of(cls, vms: Vms) -> Known:
        """At this moment; those that are about to land too."""
        return cls([hosted.config for hosted in vms.all()], {name: str(why) for name, why in vms.damaged.items()})


def _images(folder: Path) -> Iterator[Path]:
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_file(follow_symlinks=False):
                yield folder / entry.name
