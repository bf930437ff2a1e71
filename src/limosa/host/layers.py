"""Files below the disks of VMs that land here: received once, shown to be what was meant, and removed only if unused.

A layer comes before the destination's QEMU is started, because that opens the whole chain. Several VMs may come at
once above the same layer: who comes second waits until the first has it, and then finds it by its contents like any
other file of this host.

So a layer that one move has brought may be in use by another VM when that move is undone. It is then removed only if
nothing here lies above it: no VM of this host and none that lands, be it known from its ``vm.toml``, its journal or in
memory. The image of a disk names the file below it from the moment it is made, so the chains on the disk tell all; one
that cannot be read, or cannot be told to be complete, may be above anything. In a location that other hosts see, a
whole layer stays, because nobody here knows what they have found.

Where the journal that would remove it is lost, a layer is a leftover like any image: it has the mark of an unfinished
copy until its move commits. Another move that puts a disk above it takes the mark away first, so that nobody removes
it from then on (:mod:`limosa.storage.marks`).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Sequence
from pathlib import Path
from weakref import WeakValueDictionary

import msgspec

from limosa.background import apart, in_full
from limosa.errors import LimosaError, StorageError
from limosa.host.looks import Step
from limosa.host.storage import Storage
from limosa.host.vms import Vms
from limosa.migration.journal import Journal
from limosa.migration.ownership import DESTINATION_ENDED, DestinationStep
from limosa.model.migration import Side
from limosa.model.storage import BackingFile, DiskPlan, LayerPlan
from limosa.model.vm import Disk, VmConfig
from limosa.security.tls import stream_context
from limosa.storage import chains, layers
from limosa.transport.channel import Doorway
from limosa.transport.layers import Receiver
from limosa.wire.peer import LayersAwaited, StreamCredentials

_log = logging.getLogger(__name__)


class Layers:
    """All that lies below disks here and was brought by moves. ``journals``: the folder of those."""

    def __init__(self, storage: Storage, vms: Vms, journals: Path) -> None:
        self._storage = storage
        self._vms = vms
        self._journals = journals
        #: who receives a layer, by its digest
        self._arriving: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        #: held while one is removed, and by who makes sure that one is still there
        self._removing = asyncio.Lock()

    async def find(self, wanted: BackingFile) -> BackingFile | None:
        """What :meth:`limosa.host.storage.Storage.find` finds, but for disks that VMs of this host write, or will when
        they are started: those change, and go with their VMs."""
        disks = itertools.chain.from_iterable(hosted.config.disks for hosted in self._vms.all())
        return await self._storage.find(wanted, [disk.path for disk in disks if not disk.read_only])

    async def take(
        self,
        plans: Sequence[LayerPlan],
        credentials: StreamCredentials | None,
        open_door: Callable[[], Awaitable[Doorway]],
        tell: Callable[[LayersAwaited], None],
        source: str,
        disks: Collection[str] = (),
    ) -> None:
        """Receive from host ``source`` those that are not here, and those whose paths are those of ``disks`` in any
        case. Encrypted with ``credentials``, if there are any.

        Raises :class:`StorageError` and :class:`NetworkError`; :meth:`give_up` removes what is here by then.
        """
        async with self._alone(plans):
            missing = [
                at for at, plan in enumerate(plans) if plan.file.path in disks or await self.find(plan.file) is None
            ]
            if not missing:
                return
            wanted = [plans[at] for at in missing]
            for plan in wanted:
                await self._storage.make_layer(plan, source)
            with contextlib.closing(await open_door()) as door:
                address, port, token = door.address, door.port, door.token
                tell(LayersAwaited(address=address, port=port, token=token, wanted=tuple(missing)))
                await _receive(door, credentials, wanted)
            for plan in wanted:
                await self.complete(plan)

    async def complete(self, plan: LayerPlan) -> None:
        """Make a layer durable that has come, and see that it is what was meant. Raises :class:`StorageError`."""
        below = await self._found(plan.backing) if plan.backing is not None else None
        path = plan.file.path
        await apart(layers.finish, Path(path), below.path if below else "", self._storage.user)
        if (await self._storage.digest(plan.file)).digest != plan.file.digest:
            raise StorageError(
                f"{path} did not arrive as it was sent",
                why=f"its contents differ from those of {plan.origin} when the move was planned",
                todo="make sure that nothing writes to that backing file, and move the VM again",
            )
        self._storage.settle(path)

    async def make_above(self, plan: DiskPlan, brought: Collection[str], source: str) -> None:
        """Make the image of a disk, above what is to lie below it; ``brought``: what of that its move brings, from host
        ``source``.

        Raises :class:`StorageError`, and :class:`Conflict` if something below it is being removed.
        """
        if plan.backing is None:
            await self._storage.make(plan, source)
            return
        below = await self._found(plan.backing)
        await self._storage.make(msgspec.structs.replace(plan, backing=below), source)
        async with self._removing:  # from here on the image keeps what is below it from being removed
            claim = self._storage.places.claim
            await apart(layers.claim_below, plan.path, plan.format, claim, brought)
            if (await self._found(below)).path != below.path:
                raise _gone(below)

    async def use(self, disk: Disk, brought: Collection[str]) -> None:
        """Before a disk that is only read is a VM's: nobody removes it, or what lies below it, any more.

        ``brought``: what of that its move brings. Raises :class:`StorageError`, and :class:`Conflict` if it is being
        removed.
        """
        claim = self._storage.places.claim
        if disk.path not in brought:
            await apart(claim, disk.path)
        await apart(layers.claim_below, disk.path, disk.format, claim, brought)

    async def finish(self, brought: Iterable[BackingFile]) -> None:
        """What a move has brought is about to be below a VM: durably no unfinished copies any more. Raises
        :class:`StorageError`; it must not be below a VM then."""
        for one in brought:
            if await in_full(os.path.lexists, one.path):
                await self._storage.finish([one.path])

    async def give_up(self, brought: Sequence[BackingFile], migration: str) -> None:
        """Remove layers that a move has brought which is undone, unless something else lies above them. Never fails."""
        async with self._removing:
            for layer in reversed(brought):
                self._storage.settle(layer.path)
                configs, doubt = [hosted.config for hosted in self._vms.all()], self._vms.is_unsure
                if not doubt and await self._is_nobodys(layer, migration, configs):
                    await self._storage.remove(layer.path)

    async def _is_nobodys(self, layer: BackingFile, migration: str, configs: Sequence[VmConfig]) -> bool:
        try:
            await self._storage.check_answer([name] if (name := self._storage.places.of(layer.path)) else [])
            seen = {one.name for one in await self._storage.locations() if one.shared}
            if self._storage.places.of(layer.path) in seen and await self._is_whole(layer):
                return False
            return await self._storage.walks.walk(lambda step: self._is_unused(layer.path, migration, configs, step))
        except LimosaError as error:
            _log.warning("%s stays, because a VM may use it: %s", layer.path, error)
            return False

    async def _is_whole(self, layer: BackingFile) -> bool:
        try:
            return (await self._storage.digest(layer)).digest == layer.digest
        except StorageError:
            return False  # what was broken off is no sound image

    def _is_unused(self, path: str, migration: str, configs: Iterable[VmConfig], step: Step) -> bool:
        """Whether nothing lies above a file that is there. Raises :class:`LimosaError` if that cannot be told."""
        step(path)
        if not os.path.lexists(path):
            return False
        real = os.path.realpath(path)
        used = itertools.chain.from_iterable(config.disks for config in configs)
        for image in (*used, *self._landing(but=migration)):
            step(image.path)
            if real in _chain(image):
                return False
        return True

    def _landing(self, *, but: str) -> Iterable[Disk | BackingFile]:
        """Images of VMs that land here by other moves, also those of an earlier daemon, and layers these bring."""
        for path in self._journals.glob(f"*.{Side.DESTINATION}.jsonl"):
            journal = Journal.look(path)
            ended = journal.step is not None and DestinationStep(journal.step) in DESTINATION_ENDED
            if not ended and journal.header.migration != but:
                yield from journal.header.vm.disks
                yield from journal.header.layers

    async def _found(self, wanted: BackingFile) -> BackingFile:
        found = await self.find(wanted)
        if found is None:
            raise _gone(wanted)
        return found

    @contextlib.asynccontextmanager
    async def _alone(self, plans: Sequence[LayerPlan]) -> AsyncIterator[None]:
        """Nobody else receives these meanwhile."""
        async with contextlib.AsyncExitStack() as stack:
            # In one order for all, so that no two wait for each other.
            for digest in sorted({plan.file.digest for plan in plans}):
                await stack.enter_async_context(self._arriving.setdefault(digest, asyncio.Lock()))
            yield


async def _receive(door: Doorway, credentials: StreamCredentials | None, plans: Sequence[LayerPlan]) -> None:
    stream = await door.accept()
    assert stream is not None, "RDMA carries no files"
    with stream:
        context = stream_context(credentials, server=True) if credentials is not None else None
        await Receiver(stream, context).receive([(plan.file.path, plan.file.size) for plan in plans])


def _chain(image: Disk | BackingFile) -> set[str]:
    """An image and everything below it. Raises :class:`StorageError` if that cannot be told."""
    if not os.path.lexists(image.path):  # it has not been made yet
        return set()
    return {
        os.path.realpath(path) for path in (image.path, *(one for one, _ in chains.below(image.path, image.format)))
    }


def _gone(wanted: BackingFile) -> StorageError:
    return StorageError(
        f"{wanted.path} is no longer the backing file that was found",
        todo="move the VM again: it is found, or sent, anew",
    )
