"""The disks of one VM of this host: what is to know before they are copied, and deleting the images they have left.

That a QEMU has an image open says only that nobody else writes it now. Another VM that does not run may name it, an
image may lie above it, LVM may have snapshots of it; and where it lies on shared storage, all that may be so on other
hosts. So this is asked before a move, which is refused then unless the images are to be kept, and again before they are
deleted: what is needed by then stays. What cannot be read, or does not answer, may lie above any image, or name it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from limosa.errors import StorageError
from limosa.host.claims import Claims, Known
from limosa.host.looks import Step
from limosa.host.neighbours import sought
from limosa.host.parts import Parts
from limosa.host.proof import Elsewhere, doubts_elsewhere
from limosa.host.vms import HostedVm
from limosa.migration.disks import not_deleted
from limosa.migration.journal import new_identity
from limosa.model.finding import Finding
from limosa.model.storage import BackingFile, DiskFacts, ImageSought
from limosa.model.vm import Disk

_log = logging.getLogger(__name__)


class OwnDisks:
    """Those of ``hosted``; None if the VM is not here any more."""

    def __init__(self, parts: Parts, hosted: HostedVm | None) -> None:
        self._hosted = hosted
        self._vms = parts.vms
        self._storage = parts.storage
        self._leasing = parts.leasing
        self._neighbours = parts.neighbours
        self._migrations = parts.files.migrations

    async def facts(self, disks: Iterable[Disk]) -> tuple[DiskFacts, ...]:
        """See :class:`limosa.migration.examination.DisksHere`."""
        facts = await self._storage.facts(disks)
        runs = self._hosted is not None and self._hosted.machine is not None
        needed = await self._needed_or_doubted([fact.path for fact in facts], in_use=runs)
        return tuple(msgspec.structs.replace(fact, needed=fact.needed or needed.get(fact.path, "")) for fact in facts)

    async def digest(self, backing: BackingFile) -> BackingFile:
        """See :class:`limosa.migration.examination.DisksHere`."""
        return await self._storage.digest(backing)

    async def leave(self, images: Sequence[str], *, keep: bool = False) -> tuple[Finding, ...]:
        """The VM has left these images: delete them, unless they are to be kept, or somebody else needs them by now.
        What is not deleted without being asked for is logged, and returned in words. What does not answer stays, with
        its lease."""
        left: dict[str, Finding] = {}
        for path, who in ({} if keep else await self._needed_or_doubted(images, in_use=False)).items():
            _log.error("%s is left: %s", path, who)
            left[path] = not_deleted(path, who)
        for path in images:
            if not keep and path not in left and (why := await self._storage.remove(path)):
                left[path] = not_deleted(path, why)
        staying = [path for path in (images if keep else left) if await self._storage.answers(path)]
        if self._hosted is not None and staying:
            await self._leasing.give_back(self._hosted.config, staying)
        return tuple(left.values())

    async def _needed_or_doubted(self, images: Sequence[str], *, in_use: bool) -> dict[str, str]:
        """As :meth:`_needed`; where that cannot be told all are."""
        try:
            return await self._needed(images, in_use=in_use)
        except StorageError as error:
            return dict.fromkeys(images, str(error))

    async def _needed(self, images: Sequence[str], *, in_use: bool) -> dict[str, str]:
        """Who but the VM needs which of these images, in words. Of those that the VM has ``in_use`` it is not asked who
        has them open. Raises :class:`StorageError` if that cannot be told because something does not answer."""
        if not images:
            return {}
        await self._storage.check_answer()
        known = Known.of(self._vms, but=self._hosted.config.uuid if self._hosted is not None else "")
        shared = {one.name for one in await self._storage.locations() if one.shared}
        places = self._storage.places

        def look(step: Step) -> tuple[dict[str, str], dict[str, ImageSought]]:
            claims = Claims.look(self._migrations, known, places, images, step)
            here: dict[str, str] = {}
            seen: dict[str, ImageSought] = {}
            for image in images:
                step(image)
                here[image] = claims.besides(Path(image), in_use=in_use)
                # They are a VM's: no journal of the move that once made them is to speak for them.
                asked = sought(image, new_identity(), places)
                if not here[image] and (asked.share or asked.location in shared):
                    seen[image] = asked
            return here, seen

        here, seen = await self._storage.walks.walk(look)
        elsewhere = await self._neighbours.uses(seen)
        found = here | {image: _words(others, in_use=in_use) for image, others in elsewhere.items()}
        return {image: who for image, who in found.items() if who}


def _words(others: Elsewhere, *, in_use: bool) -> str:
    """What other hosts say. Of an image ``in_use`` here they may see just that."""
    uses = {host: use for host, use in others.uses.items() if use.named or not in_use}
    away = [f"host '{host}', which may need it, cannot be asked: {why}" for host, why in others.silent.items()]
    return "; ".join([*doubts_elsewhere(Elsewhere(uses, {})), *away])
