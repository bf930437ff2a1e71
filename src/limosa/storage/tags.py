"""The mark of a logical volume that a move is making: an LVM tag, ``limosa.copy.HOST``, or ``limosa.copy.HOST/SOURCE``
where the VM comes from another host.

It says what the mark beside a file says (:mod:`limosa.storage.marks`) and is held to the same rules. The volume gets it
by the very change of its group's metadata that makes the volume, so neither is ever without the other, and it is taken
away durably before the volume is a VM's.

Who wants to remove the volume has LVM exchange the tag for ``limosa.removal.HOST``, which LVM does only if the volume
has it still, and with its lock on the group: so of a removal and a VM that is given the volume, one comes first. A
volume that is open LVM does not remove: the kernel counts who has it open, whoever that is.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import PurePosixPath

from limosa.storage import lvm
from limosa.storage.marks import Mark, being_removed
from limosa.storage.openers import OpenFiles
from limosa.storage.unfinished import Found

_COPY, _REMOVAL = "limosa.copy.", "limosa.removal."


def tag(mark: Mark) -> str:
    """What a volume bears that is being made. When it was made LVM notes by itself."""
    return f"{_COPY}{mark.host}/{mark.source}".rstrip("/")


@dataclass(frozen=True)
class UnfinishedVolumes:
    """See :class:`limosa.storage.unfinished.Unfinished`: images are logical volumes of a group."""

    group: str

    def finish(self, image: str) -> None:
        """See :class:`limosa.storage.unfinished.Unfinished`."""
        if copy := self._tag(image, _COPY):
            lvm.retag(self.group, self._name(image), copy)

    def claim(self, image: str) -> None:
        """See :class:`limosa.storage.unfinished.Unfinished`."""
        self.finish(image)
        if self._tag(image, _REMOVAL):
            raise being_removed(image)

    def condemn(self, image: str) -> bool:
        """See :class:`limosa.storage.unfinished.Unfinished`."""
        return self._exchange(image, _COPY, _REMOVAL)

    def spare(self, image: str) -> None:
        """See :class:`limosa.storage.unfinished.Unfinished`."""
        self._exchange(image, _REMOVAL, _COPY)

    def find(self) -> Iterator[Found]:
        """See :class:`limosa.storage.unfinished.Unfinished`."""
        for volume in lvm.volumes(self.group):
            marked = _of(volume, _COPY) or _of(volume, _REMOVAL)
            host, _, source = marked.removeprefix(_COPY).removeprefix(_REMOVAL).partition("/")
            mark = Mark(host=host, at=volume.lv_time, source=source) if host else None
            yield Found(f"/dev/{self.group}/{volume.lv_name}", volume.taken_bytes, volume.lv_time, mark)

    def user(self, image: str, open_files: OpenFiles) -> str:
        """See :class:`limosa.storage.unfinished.Unfinished`."""
        volume = lvm.find(self.group, self._name(image))
        if volume is None:
            return ""
        if not volume.is_active:
            return f"it has no device, so it cannot be told who names it; see lvchange --activate y {self.group}"
        return volume.takes_along or (_opener(image, open_files) if volume.lv_device_open else "")

    def remove(self, image: str) -> None:
        """See :class:`limosa.storage.unfinished.Unfinished`."""
        lvm.remove(self.group, self._name(image))

    def _exchange(self, image: str, old: str, new: str) -> bool:
        """Whether the volume has the new tag then."""
        if has := self._tag(image, old):
            lvm.retag(self.group, self._name(image), has, has.replace(old, new, 1))
        return bool(self._tag(image, new))

    def _tag(self, image: str, prefix: str) -> str:
        """The tag that begins so; empty if the volume has none, or is not there."""
        volume = lvm.find(self.group, self._name(image))
        return _of(volume, prefix) if volume is not None else ""

    def _name(self, image: str) -> str:
        return str(PurePosixPath(image).relative_to(f"/dev/{self.group}"))


def _of(volume: lvm.Volume, prefix: str) -> str:
    return next((one for one in volume.tags if one.startswith(prefix)), "")


def _opener(image: str, open_files: OpenFiles) -> str:
    with suppress(OSError):
        descriptor = os.open(image, os.O_PATH | os.O_CLOEXEC)
        try:
            return open_files.who_has(descriptor) or "somebody has it open"
        finally:
            os.close(descriptor)
    return "somebody has it open"
