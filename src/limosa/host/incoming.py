"""VMs that come to this host: facts for preflight, places, landings, and what a restart finds of them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import msgspec

from limosa.background import Background, in_full
from limosa.errors import (
    Conflict,
    InvalidInput,
    LimosaError,
    NetworkError,
    NotFound,
    OwnerUnknown,
    PreflightRefused,
    QemuGone,
    StateError,
    StorageError,
    from_fault,
)
from limosa.host import audit
from limosa.host.faults import Obstacle
from limosa.host.landing import LandingHere
from limosa.host.layers import Layers
from limosa.host.looks import Step
from limosa.host.parts import Parts
from limosa.host.slots import Slots
from limosa.host.vms import HostedVm
from limosa.migration.destination import Destination
from limosa.migration.disks import image_name, on_image
from limosa.migration.journal import Header, Journal
from limosa.migration.ownership import DESTINATION_ENDED, DestinationStep
from limosa.model.facts import DestinationFacts
from limosa.model.finding import Finding
from limosa.model.migration import Migration, Outcome, Phase, Progress, Side
from limosa.model.storage import BackingFile
from limosa.model.vm import VmConfig, VmState
from limosa.network.addresses import stream_addresses
from limosa.qemu.protocol import MachineProtocol
from limosa.storage import layers
from limosa.transport import tcp, trials
from limosa.wire.peer import Inspect, Offered, Prepare

_log = logging.getLogger(__name__)

#: Between attempts to make it durable how a landing has ended.
FINISH_EVERY_S = 1.0
#: Between looks at a landing that somebody watches here, where little of it is known.
LOOK_EVERY_S = 0.25


class Incoming:
    """All landings of this host."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self.host = parts.name
        self.slots = Slots(lambda: parts.page.now.max_incoming)
        parts.page.on_change(self.slots.admit)
        self._vms = parts.vms
        self._page = parts.page
        self._files = parts.files
        self._inspector = parts.inspector
        self._storage = parts.storage
        self._boot = parts.boot
        self._layers = Layers(parts.storage, parts.vms, parts.files.migrations)
        self._landing: dict[str, Destination] = {}
        #: held while one is begun, whose journal may be there before it is among ``_landing``
        self._beginning = asyncio.Lock()
        #: migrations of which it is tried to make durable how they ended
        self._finishing: set[str] = set()
        self._background = Background()

    @property
    def under_way(self) -> int:
        """How many there are that have a place here."""
        return self.slots.taken + self._storage.arriving.taken

    async def inspect(self, asked: Inspect, reached_at: str, trial: contextlib.AsyncExitStack) -> DestinationFacts:
        """Facts for preflight. ``trial`` keeps the listener for a trial connection open.

        ``reached_at`` is the address of ours that the source called.
        """
        network = await self._inspector.network()
        addresses = stream_addresses(network, reached_at)
        port = await trial.enter_async_context(trials.trial(addresses, self._page.now.migration_ports))
        return await self._inspector.destination_facts(asked.vm, asked.accelerator, network, addresses, port)

    async def offers(self, reached_at: str) -> AsyncIterator[Offered]:
        """This host's network and its addresses for guest memory, again after each change. Raises
        :class:`NetworkError`."""
        async for network in self._inspector.networks():
            yield Offered(network=network, addresses=stream_addresses(network, reached_at))

    async def find_files(self, files: Sequence[BackingFile]) -> tuple[BackingFile | None, ...]:
        """Where this host has files with these contents; None where it has not."""
        return tuple([await self._layers.find(file) for file in files])

    async def begin(self, request: Prepare, source: str, reached_at: str) -> Destination:
        """A landing for a VM, journalled but with nothing reserved yet. Not to be cancelled."""
        if not self._page.now.live_migration:
            finding = Finding.error(
                "migration-off",
                f"live migration is off on host '{self.host}'",
                "limosa host settings live_migration true",
            )
            raise PreflightRefused((finding,), vm=request.vm.name, host=self.host)
        self._check_images(request)
        self._check_layers(request)
        await self._check_new(request)
        async with self._beginning:
            await self._finish_earlier(request.vm)
            return await self._begin(request, source, reached_at)

    async def _begin(self, request: Prepare, source: str, reached_at: str) -> Destination:
        header = Header(
            migration=request.migration,
            side=Side.DESTINATION,
            vm=request.vm,
            accelerator=request.accelerator,
            source=source,
            destination=self.host,
            address="",
            accepted_at=time.time(),
            boot=self._boot,
            was_running=request.running,
            options={"transport": request.transport},
            images=tuple(plan.path for plan in request.disks),
            layers=tuple(plan.file for plan in request.layers),
        )
        self._forget_earlier_try(request, source)
        journal = await in_full(Journal.begin, self._files.migrations, header)
        destination = self._make(journal, None, reached_at)
        self._landing[request.migration] = destination
        audit.move_changed(None, view(destination))
        return destination

    async def check_answer(self, request: Prepare) -> None:
        """Before :meth:`begin`, which looks into them: raises :class:`StorageError` if a location of what comes along
        does not answer, and :class:`NotFound`."""
        images = {plan.location for plan in request.disks}
        await self._storage.check_answer(images | {plan.location for plan in request.layers})

    def _check_images(self, request: Prepare) -> None:
        """Images are made, and removed again, only where this host has a location and under the name a move gives them.

        Raises :class:`InvalidInput` and :class:`NotFound`.
        """
        named = {disk.name: disk for disk in request.vm.disks}
        for plan in request.disks:
            name = image_name(request.vm.name, plan.disk, request.migration, plan.format)
            store = self._storage.places.store(plan.location)
            path = f"{store.root}/{name}"
            plan_fits = plan.path == path and plan.device is (store.kind == "lvm")
            if not plan_fits or plan.disk not in named or on_image(named[plan.disk], plan) != named[plan.disk]:
                raise InvalidInput(f"the image of disk {plan.disk} cannot be {plan.path}", vm=request.vm.name)
            if plan.backing is not None and not self._storage.places.of(plan.backing.path):
                raise InvalidInput(f"{plan.backing.path} cannot be shown to a guest", vm=request.vm.name)

    def _check_layers(self, request: Prepare) -> None:
        """The same of files below them. Raises as that."""
        for number, plan in enumerate(request.layers, start=1):
            file = plan.file
            name = layers.name(plan.origin, request.migration, number, file.format)
            store = self._storage.places.store(plan.location)
            if store.kind != "folder" or file.path != f"{store.root}/{name}":
                raise InvalidInput(f"the copy of {plan.origin} cannot be {file.path}", vm=request.vm.name)
            # Below a disk, or one that is only read.
            shown = bool(request.disks) or any(disk.read_only for disk in request.vm.disks)
            if not shown or (plan.backing is not None and not self._storage.places.of(plan.backing.path)):
                raise InvalidInput(f"{file.path} cannot be shown to a guest", vm=request.vm.name)

    async def _finish_earlier(self, vm: VmConfig) -> None:
        """A VM has one landing at a time that has not ended, so that a restart knows whose its QEMU is. Raises
        :class:`StateError` if that cannot be written of an earlier one."""
        for earlier in tuple(self._landing.values()):
            if earlier.is_destroyed and (earlier.vm.name == vm.name or earlier.vm.uuid == vm.uuid):
                await earlier.ended()
                self.settled(earlier)

    async def _check_new(self, request: Prepare) -> None:
        """One of them that is there already is somebody's. Raises :class:`Conflict`, and :class:`StorageError` if that
        cannot be told."""
        paths = [*(plan.path for plan in request.disks), *(plan.file.path for plan in request.layers)]

        def look(step: Step) -> None:
            for path in paths:
                step(path)
                if os.path.lexists(path):
                    raise Conflict(f"{path} exists already", vm=request.vm.name, host=self.host)

        if paths:
            await self._storage.walks.walk(look)

    def _forget_earlier_try(self, request: Prepare, source: str) -> None:
        """A source may begin a migration again that was destroyed here; any other raises :class:`Conflict`."""
        path = self._journal_of(request.migration)
        if request.migration not in self._landing:
            if not path.exists():
                return
            earlier = Journal.load(path)
            if earlier.header.source == source and earlier.step == DestinationStep.GONE:
                path.unlink()
                return
        raise Conflict(f"migration {request.migration} is known here already", vm=request.vm.name, host=self.host)

    async def find(self, migration: str, source: str) -> Destination | None:
        """The landing of an earlier migration from ``source``, also one that has ended; None if there was none."""
        destination = self._landing.get(migration)
        if destination is None:
            async with self._beginning:
                destination = self._landing.get(migration) or self._from_journal(migration)
        if destination is None or destination.journal.header.source != source:
            return None
        return destination

    async def finish(self, destination: Destination, cause: LimosaError | None = None) -> None:
        """Make it durable how a landing has ended. That is decided, so a full disk can delay but not change it."""
        migration = destination.journal.header.migration
        obstacle = Obstacle(f"how the landing of VM {destination.vm.name} has ended could not be made durable yet")
        self._finishing.add(migration)
        try:
            while True:
                try:
                    await destination.ended()
                    break
                except (StateError, StorageError) as error:
                    obstacle.met(error)
                    await asyncio.sleep(FINISH_EVERY_S)
        finally:
            self._finishing.discard(migration)
        self.settled(destination, cause)

    async def _finish_later(self, destination: Destination, cause: LimosaError | None) -> None:
        try:
            await self.finish(destination, cause)
        except LimosaError as error:
            _log.error("%s", error)  # the next daemon finds it unfinished

    def machine_of(self, destination: Destination) -> MachineProtocol:
        """The QEMU of a VM that has landed. Raises :class:`QemuGone` if it has ended, and what is wrong with it."""
        vm = destination.vm
        hosted = self._vms.find(vm.name)
        if hosted is not None and hosted.config.uuid == vm.uuid and hosted.fault is not None:
            raise from_fault(hosted.fault.fault())
        if hosted is None or hosted.config.uuid != vm.uuid or hosted.machine is None:
            raise QemuGone(f"VM '{vm.name}' is no longer running", vm=vm.name, host=self.host)
        return hosted.machine

    async def open_rest(self, reached_at: str) -> tuple[tcp.TcpDoorway, tuple[str, ...]]:
        """Where the rest of a post-copy is awaited, on all addresses that may carry guest memory: nobody knows which
        network broke. Raises :class:`NetworkError`."""
        addresses = stream_addresses(await self._inspector.network(), reached_at)
        if not addresses:
            raise NetworkError("this host has no address on a network that may carry moves", host=self.host)
        door = tcp.TcpDoorway(addresses[0], self._page.now.migration_ports, further=addresses[1:])
        return door, addresses

    def settled(self, destination: Destination, cause: LimosaError | None = None) -> None:
        """Forget a landing that has ended, by ``cause`` if that is known; its journal goes on answering for it. If that
        could not be written, it is tried again and again."""
        migration = destination.journal.header.migration
        if destination.step in DESTINATION_ENDED:
            destination.journal.close()
            if self._landing.get(migration) is destination:  # and not its second try, which has begun since
                del self._landing[migration]
                ended = view(destination)
                ended = msgspec.structs.replace(ended, total_s=time.time() - ended.accepted_at)
                audit.move_changed(None, ended, cause.code if cause is not None else "")
        elif destination.is_decided and migration not in self._finishing:
            self._background.spawn(self._finish_later(destination, cause))

    async def resolve(self, migration: str, owner: Side) -> Migration:
        """A person says who owns a VM that is held here."""
        destination = self._landing.get(migration)
        if destination is None:
            raise NotFound(f"no migration {migration} needs a decision on host '{self.host}'", host=self.host)
        try:
            await destination.resolve(here=owner is Side.DESTINATION)
        finally:
            self.settled(destination)
        return view(destination)

    async def take_up(self, journal: Journal) -> Destination | None:
        """Take up a landing that a restart found; :meth:`bring_to_end` is to follow. None if it has ended."""
        header = journal.header
        if journal.step is not None and DestinationStep(journal.step) in DESTINATION_ENDED:
            return None
        self._storage.resume(header.images)
        hosted = self._vms.find(header.vm.name)
        if hosted is None:
            hosted = await self._vms.take_up_landing(header.vm, header.migration)
        elif await self._is_its(hosted, journal):
            hosted.migration = hosted.migration or header.migration  # in which it is until it is known to have landed
        else:
            hosted = None  # it has come since: what was landing by this move was destroyed
        machine, is_silent = (hosted.machine, hosted.fault is not None) if hosted is not None else (None, False)
        destination = self._make(journal, machine, silent=is_silent)
        self._landing[header.migration] = destination
        return destination

    async def _is_its(self, hosted: HostedVm, journal: Journal) -> bool:
        """Whether a VM that a restart finds here has landed by this move, which has not ended."""
        if journal.step == DestinationStep.CONTINUING:
            return hosted.config.uuid == journal.header.vm.uuid
        if journal.header.boot == self._boot or not _has_landed(hosted, journal.header):
            return False  # what has not died with the machine is not lost, and says that it did not land
        # The guest was continued here, durably, and the line that says so was lost with the machine.
        await in_full(journal.record, DestinationStep.CONTINUING, time.time())
        return True

    async def bring_to_end(self, destination: Destination) -> None:
        """Do what is safe about a landing that was taken up. May wait for a share that does not answer."""
        try:
            await destination.abandoned()
        finally:
            hosted = self._vms.find(destination.vm.name)
            if hosted is not None and hosted.state is not VmState.INCOMING:
                self._vms.landed(hosted, destination.journal.header.migration)
            self.settled(destination)

    def stop(self) -> None:
        """This daemon ends: have what is safe decided as soon as sessions end."""
        for destination in self._landing.values():
            destination.expect_nobody()

    def show(self, migration: str) -> Migration | None:
        """The landing by that move, unless there is none or it has ended."""
        destination = self._landing.get(migration)
        return view(destination) if destination is not None else None

    def watch(self, migration: str) -> AsyncIterator[Migration] | None:
        """The same, again at each change until it has ended."""
        destination = self._landing.get(migration)
        return _watch(destination) if destination is not None else None

    def migrations(self) -> list[Migration]:
        """Landings that have not ended."""
        return [view(destination) for destination in self._landing.values()]

    def _journal_of(self, migration: str) -> Path:
        return self._files.migrations / f"{migration}.{Side.DESTINATION}.jsonl"

    def _from_journal(self, migration: str) -> Destination | None:
        path = self._journal_of(migration)
        return self._make(Journal.load(path), None) if path.exists() else None

    def _make(
        self, journal: Journal, machine: MachineProtocol | None, reached_at: str = "", *, silent: bool = False
    ) -> Destination:
        landing = LandingHere(self._parts, self._layers, journal.header, self.slots, reached_at)
        return Destination(journal, landing, self._boot, machine, silent=silent)


def _has_landed(hosted: HostedVm, header: Header) -> bool:
    """Whether the VM is this host's, with the images of that landing, and not about to leave or be forgotten."""
    paths = {disk.path for disk in hosted.config.disks}
    is_ours = hosted.migration is None and hosted.config.uuid == header.vm.uuid
    return is_ours and paths.issuperset(header.images)


async def _watch(destination: Destination) -> AsyncIterator[Migration]:
    told = None
    while told is None or told.outcome is Outcome.UNDER_WAY:
        if (now := view(destination)) == told:
            await asyncio.sleep(LOOK_EVERY_S)
            continue
        told = now
        yield told


def view(destination: Destination) -> Migration:
    """A landing as people see it. The source knows more."""
    header = destination.journal.header
    outcome, fault, note = Outcome.UNDER_WAY, None, "see the source for its progress"
    if destination.step is DestinationStep.OWNED:
        outcome = Outcome.COMPLETED
    elif destination.is_destroyed or destination.step is DestinationStep.GONE:
        outcome, note = Outcome.FAILED, "see the source for why it ended"
    elif destination.is_unresolved:
        outcome, fault, note = Outcome.UNRESOLVED, _held(header).fault(), ""
    return Migration(
        id=header.migration,
        vm=header.vm.name,
        source=header.source,
        destination=header.destination,
        side=Side.DESTINATION,
        transport=str(header.options.get("transport", "")),
        phase=Phase.BUILD_UP if destination.step is None else Phase.COPY,
        outcome=outcome,
        progress=Progress(note=note),
        accepted_at=header.accepted_at,
        fault=fault,
    )


def _held(header: Header) -> OwnerUnknown:
    """What is to be said of a VM that arrived whole, and whose source then went away."""
    return OwnerUnknown(
        f"nobody can know whether VM '{header.vm.name}' is to run here; it waits, paused",
        why=f"all of it has arrived, and host '{header.source}' went away before it said who goes on",
        todo=f"it is settled as soon as '{header.source}' is back; if '{header.source}' is certainly dead: "
        f"limosa migration resolve {header.migration} --owner destination",
        vm=header.vm.name,
        host=header.destination,
    )
