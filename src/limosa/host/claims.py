"""Who on this host has a claim to an image: a VM, an image above it, a move, a process.

All of it is looked at anew each time, on the disk where it is on the disk: what a daemon believes may be what a crash
has made wrong. What cannot be read may name any image, so it is a doubt about all of them.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from limosa.errors import LimosaError, StorageError
from limosa.host.looks import Step
from limosa.host.vms import Vms
from limosa.migration.disks import read_name
from limosa.migration.journal import Journal
from limosa.migration.ownership import DESTINATION_ENDED, SOURCE_ENDED, DestinationStep
from limosa.model import reading
from limosa.model.vm import VmConfig
from limosa.storage import chains, layers, marks, mounts, openers, qcow2
from limosa.storage.locations import Locations
from limosa.storage.openers import FileKey, OpenFiles

#: So many files and folders below a location are looked at; where there are more it may hold any image.
MOST_FILES = 10_000
#: What the file system itself keeps; on a share often not even root may look into it.
_ITS_OWN = "lost+found"
_ENDED: frozenset[str | None] = frozenset({*SOURCE_ENDED, *DESTINATION_ENDED})


@dataclass(frozen=True)
class Claims:
    """What this host knew at one moment. Made by :meth:`look`, in a thread."""

    migrations: Path
    places: Locations
    open_files: OpenFiles
    #: by file, and by path for files that are not there, who names it
    named: dict[FileKey | str, str] = field(default_factory=dict)
    #: in the same way, which unfinished copies lie above it that no move works with; they may be nobody's themselves
    copies_above: dict[FileKey | str, set[Path]] = field(default_factory=dict)
    #: what could not be read, and so may name any image
    unread: list[str] = field(default_factory=list)
    #: folders that were looked into, by their real names
    _seen: set[str] = field(default_factory=set)

    @classmethod
    def look(
        cls,
        migrations: Path,
        known: Known,
        places: Locations,
        images: Iterable[str] = (),
        step: Step = lambda _: None,
    ) -> Claims:
        """Images that lie above others are looked for in ``places``, and beside ``images``, which may be in none of
        them; also in folders below. Blocks where a server is gone: ``step`` is told where, and may raise."""
        claims = cls(migrations, places, openers.everywhere())
        claims.unread.extend(f"the file of VM '{name}' cannot be read: {why}" for name, why in known.damaged.items())
        for config in known.configs:
            claims._of_vm(config, step)
        for name in sorted(places.names):
            if (store := places.store(name)).kind == "folder":  # a logical volume stands alone
                claims._of_images_below(Path(store.root), step)
        for image in images:
            step(image)
            for folder in _beside(image, places):
                claims._of_images_below(folder, step)
        return claims

    def on(self, image: Path, migration: str, but: Collection[Path] = ()) -> str:
        """Who has a claim to the image, which that migration may have made, in words; empty if nobody. Unfinished
        copies above it have one, ``but`` for these."""
        return (
            self.by_name(image, migration)
            or self.of_move(migration)
            or self._copy_above(image, but)
            or self._holder(image)
        )

    def besides(self, image: Path, *, in_use: bool) -> str:
        """Who has a claim to the image of a VM that was left out of what is known, in words; empty if nobody. Of one
        that the VM has ``in_use`` it does not count who has it open; nor of a logical volume, where that may be udev
        for a moment: LVM waits for it, and removes none that is open. What could not be read may name it, too."""
        who = self._name(image) or self._copy_above(image, ()) or "; ".join(self.unread)
        if who or in_use or self.places.store_of(str(image)).kind == "lvm":
            return who
        return self._holder(Path(os.path.realpath(image)))

    def by_name(self, image: Path, migration: str) -> str:
        """The same, only for VMs and moves of this host that work with it: then it is no leftover at all."""
        return self._name(image) or self._worker(migration)

    def _name(self, image: Path) -> str:
        return next((self.named[key] for key in _keys(image) if key in self.named), "")

    def _copy_above(self, image: Path, but: Collection[Path]) -> str:
        above = {copy for key in _keys(image) for copy in self.copies_above.get(key, ())}.difference(but)
        return f"it is the backing file of {min(above)}, an unfinished copy" if above else ""

    def _worker(self, migration: str) -> str:
        return next((words for words, works in self._journals(migration) if works), "")

    def is_under_way(self, migration: str) -> bool:
        """Whether a move of this host is not over, as far as this host knows."""
        return bool(self._worker(migration))

    def of_move(self, migration: str) -> str:
        """What the files of a move have against removing what it made, on whichever host; empty if nothing."""
        return next((words for words, _ in self._journals(migration)), "")

    def _journals(self, migration: str) -> Iterator[tuple[str, bool]]:
        """What the files of a move have against removing what it made, and whether it is because the move goes on."""
        for path in sorted(self.migrations.glob(f"{migration}.*")):
            try:
                if path.suffix != ".jsonl":
                    reading.decode(path.read_bytes(), object)
                    if not path.name.endswith(".view.json"):
                        yield f"{path} says that the move is not over", True
                    continue
                journal = Journal.look(path)
                if journal.step == DestinationStep.OWNED:
                    yield f"{path} says that a VM of this host has used it", False
                elif journal.step not in _ENDED:
                    yield f"{path} says that the move is not over", True
                elif journal.rests_on_a_word:
                    yield f"{path} says that the move ended only by an administrator's decision", False
            except FileNotFoundError:
                continue  # the move is over
            except (OSError, msgspec.DecodeError, LimosaError) as error:
                yield f"{path} is damaged, and the move may not be over: {error}", False

    def _holder(self, image: Path) -> str:
        """A process."""
        try:
            return self.places.store_of(str(image)).unfinished.user(str(image), self.open_files)
        except StorageError as error:
            return f"which process has it open is unknown: {error}"

    def _of_vm(self, config: VmConfig, step: Step) -> None:
        for disk in config.disks:
            step(f"{disk.path} of VM '{config.name}'")
            self._note(disk.path, f"VM '{config.name}' uses it")
            try:
                for path, _ in chains.below(disk.path, disk.format):
                    step(f"{path} of VM '{config.name}'")
                    self._note(path, f"VM '{config.name}' uses it as a backing file of disk {disk.name}")
            except StorageError as error:
                if not self._is_to_be_made(Path(disk.path)):
                    self.unread.append(
                        f"the backing files of disk {disk.name} of VM '{config.name}' are unknown: {error}"
                    )

    def _of_images_below(self, folder: Path, step: Step) -> None:
        try:
            images = self._files(folder, step)
        except OSError as error:
            self.unread.append(f"the contents of {error.filename or folder} are unknown: {error.strerror or error}")
            return
        for image in images:
            step(str(image))
            if layers.arrives(image) and self._is_to_be_made(image):
                continue
            try:
                header = qcow2.read_if_any(image)
            except StorageError as error:
                self.unread.append(f"the backing file of {image} is unknown: {error}")
                continue
            if header is not None and header.backing:
                self._lies_above(image, image.parent / header.backing)

    def _files(self, top: Path, step: Step) -> list[Path]:
        """Those in a folder and below it, but for what was looked at before. Links are not followed, and what is
        mounted there is left to who names it: its server may be gone.

        Raises ``OSError`` if not all of them are known.
        """
        step(str(top))
        real, mounted = os.path.realpath(top), mounts.points()
        found: list[Path] = []
        folders = [top]
        for folder in folders:  # while those in it are added
            if (name := _below(real, top, folder)) in self._seen:
                continue
            self._seen.add(name)
            step(str(folder))
            try:
                with os.scandir(folder) as entries:
                    for entry in entries:
                        path = folder / entry.name
                        if entry.is_file(follow_symlinks=False):
                            found.append(path)
                        elif (
                            entry.is_dir(follow_symlinks=False)
                            and entry.name != _ITS_OWN
                            and _below(real, top, path) not in mounted
                        ):
                            folders.append(path)
            except FileNotFoundError:
                if folder == top:
                    raise
                continue  # it was removed meanwhile
            if len(found) + len(folders) > MOST_FILES:
                raise OSError(errno.EFBIG, f"it holds more than {MOST_FILES} files", str(top))
        return found

    def _lies_above(self, image: Path, below: Path) -> None:
        if not self._is_given_up(image):
            self._note(below, f"it is the backing file of {image}")
            return
        for key in _keys(below):
            self.copies_above.setdefault(key, set()).add(image)

    def _is_given_up(self, image: Path) -> bool:
        """Whether it is an unfinished copy that no move works with."""
        made = read_name(image.name)
        return made is not None and marks.has(str(image)) and not self._worker(made.migration)

    def _is_to_be_made(self, image: Path) -> bool:
        """Whether a move is about to make it, or receives it, and it lies above nothing yet; the move looks whether
        what is to lie below it is there when it does."""
        made = read_name(image.name)
        is_unmade = _is_nothing(image) or layers.arrives(image)
        return made is not None and is_unmade and bool(self._worker(made.migration))

    def _note(self, path: str | Path, who: str) -> None:
        for key in _keys(path):
            self.named.setdefault(key, who)


@dataclass(frozen=True)
class Known:
    """What the daemon knows of its VMs."""

    configs: Sequence[VmConfig]
    damaged: Mapping[str, str]

    @classmethod
    def of(cls, vms: Vms, *, but: str = "") -> Known:
        """At this moment; those that are about to land too. ``but``: the UUID of one to leave out."""
        configs = [hosted.config for hosted in vms.all() if hosted.config.uuid != but]
        return cls(configs, {name: str(why) for name, why in vms.damaged.items()})


def _keys(path: str | Path) -> list[FileKey | str]:
    """By what a file is known, also where it is not there."""
    keys: list[FileKey | str] = [os.path.realpath(path)]
    with suppress(OSError):
        keys.insert(0, openers.key(os.stat(path)))
    return keys


def _below(real: str, top: Path, path: Path) -> str:
    """The real name of what is at ``path`` without a link below ``top``, which is really ``real``."""
    return os.path.normpath(os.path.join(real, path.relative_to(top)))


def _beside(image: str, places: Locations) -> list[Path]:
    """Where others may lie that know it by a relative path: where it is, and where it is named. A device stands
    alone."""
    real = Path(os.path.realpath(image))
    if places.store_of(image).kind != "folder" or real.is_block_device():
        return []
    return [Path(image).parent, real.parent]


def _is_nothing(image: Path) -> bool:
    try:
        return image.stat().st_size == 0
    except OSError as error:
        return isinstance(error, FileNotFoundError)
