"""VMs that come to this host: facts for preflight, places, landings, and what a restart finds of them."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import logging
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from limosa.errors import (
    Conflict,
    InvalidInput,
    LimosaError,
    NetworkError,
    NotFound,
    PreflightRefused,
    StateError,
)
from limosa.host.compression import Compression
from limosa.host.files import Files
from limosa.host.inspection import Inspector
from limosa.host.multichannel import Multichannel
from limosa.host.page import Page
from limosa.host.slots import Slots
from limosa.host.storage import Storage
from limosa.host.vms import HostedVm, Vms
from limosa.migration.destination import Destination
from limosa.migration.disks import image_name
from limosa.migration.journal import Header, Journal
from limosa.migration.ownership import DESTINATION_ENDED, DestinationStep
from limosa.model.facts import DestinationFacts
from limosa.model.finding import Finding
from limosa.model.migration import Migration, Outcome, Phase, Progress, Side
from limosa.model.storage import BackingFile
from limosa.network.addresses import stream_addresses
from limosa.qemu.protocol import MachineProtocol
from limosa.transport import tcp
from limosa.transport.channel import Doorway
from limosa.wire.peer import Inspect, Prepare, RelayPlace

_log = logging.getLogger(__name__)

#: Between attempts to make it durable that a VM that runs here belongs here.
ADOPT_EVERY_S = 1.0


class Incoming:
    """All landings of this host."""

    def __init__(
        self,
        host: str,
        vms: Vms,
        page: Page,
        files: Files,
        inspector: Inspector,
        multichannel: Multichannel,
        compression: Compression,
        storage: Storage,
        boot: str,
    ) -> None:
        self.host = host
        self.slots = Slots(lambda: page.now.max_incoming)
        page.on_change(self.slots.admit)
        self._vms = vms
        self._page = page
        self._files = files
        self._inspector = inspector
        self._multichannel = multichannel
        self._storage = storage
        self._compression = compression
        self._boot = boot
        self._landing: dict[str, Destination] = {}

    async def inspect(self, asked: Inspect, reached_at: str, trial: contextlib.AsyncExitStack) -> DestinationFacts:
        """Facts for preflight. ``trial`` keeps the listener for a trial connection open.

        ``reached_at`` is the address of ours that the source called.
        """
        network = await self._inspector.network()
        addresses = stream_addresses(network, reached_at)
        port = await trial.enter_async_context(tcp.trial(addresses, self._page.now.migration_ports))
        return await self._inspector.destination_facts(asked.vm, asked.accelerator, network, addresses, port)

    async def find_files(self, files: Sequence[BackingFile]) -> tuple[BackingFile | None, ...]:
        """Where this host has files with these contents; None where it has not."""
        return tuple([await self._storage.find(file) for file in files])

    def begin(self, request: Prepare, source: str, reached_at: str) -> Destination:
        """A landing for a VM, journalled but with nothing reserved yet."""
        if not self._page.now.live_migration:
            finding = Finding.error(
                "migration-off",
                f"live migration is off on host '{self.host}'",
                "limosa host settings live_migration true",
            )
            raise PreflightRefused((finding,), vm=request.vm.name, host=self.host)
        self._check_images(request)
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
        )
        if request.migration in self._landing or self._journal_of(request.migration).exists():
            raise Conflict(f"migration {request.migration} is known here already", vm=request.vm.name, host=self.host)
        destination = self._make(Journal.begin(self._files.migrations, header), None, reached_at)
        self._landing[request.migration] = destination
        return destination

    def _check_images(self, request: Prepare) -> None:
        """Images are made, and removed again, only where this host has a location and under the name a move gives them.

        Raises :class:`InvalidInput` and :class:`NotFound`.
        """
        named = {disk.name: disk for disk in request.vm.disks}
        for plan in request.disks:
            name = image_name(request.vm.name, plan.disk, request.migration, plan.format)
            path = str(self._storage.places.path(plan.location) / name)
            disk = named.get(plan.disk)
            if plan.path != path or disk is None or (disk.path, disk.format) != (plan.path, plan.format):
                raise InvalidInput(f"the image of disk {plan.disk} cannot be {plan.path}", vm=request.vm.name)
            if plan.backing is not None and not self._storage.places.of(plan.backing.path):
                raise InvalidInput(f"{plan.backing.path} cannot be shown to a guest", vm=request.vm.name)

    def find(self, migration: str, source: str) -> Destination | None:
        """The landing of an earlier migration from ``source``, also one that has ended; None if there was none."""
        destination = self._landing.get(migration) or self._from_journal(migration)
        if destination is None or destination.journal.header.source != source:
            return None
        return destination

    async def adopt(self, destination: Destination) -> None:
        """Make it durable that the VM is ours. It runs here already, so a full disk can delay that but not end it."""
        while True:
            try:
                await destination.adopted()
                break
            except StateError as error:
                _log.error("VM %s has landed, but %s", destination.vm.name, error)
                await asyncio.sleep(ADOPT_EVERY_S)
        self.settled(destination)

    def settled(self, destination: Destination) -> None:
        """Forget a landing that has ended; its journal goes on answering for it."""
        if destination.step in DESTINATION_ENDED:
            destination.journal.close()
            self._landing.pop(destination.journal.header.migration, None)

    async def resolve(self, migration: str, owner: Side) -> Migration:
        """A person says who owns a VM that is held here."""
        destination = self._landing.get(migration)
        if destination is None:
            raise NotFound(f"no migration {migration} waits for a decision on host '{self.host}'", host=self.host)
        await destination.resolve(here=owner is Side.DESTINATION)
        self.settled(destination)
        return view(destination)

    async def recover(self, journal: Journal) -> None:
        """Take up a landing that a restart found."""
        if journal.step is not None and DestinationStep(journal.step) in DESTINATION_ENDED:
            return
        hosted = await self._vms.take_up_landing(journal.header.vm, journal.header.migration)
        destination = self._make(journal, hosted.machine)
        self._landing[journal.header.migration] = destination
        await destination.abandoned()
        self.settled(destination)

    def migrations(self) -> list[Migration]:
        """Landings that have not ended."""
        return [view(destination) for destination in self._landing.values()]

    def _journal_of(self, migration: str) -> Path:
        return self._files.migrations / f"{migration}.{Side.DESTINATION}.jsonl"

    def _from_journal(self, migration: str) -> Destination | None:
        path = self._journal_of(migration)
        return self._make(Journal.load(path), None) if path.exists() else None

    def _make(self, journal: Journal, machine: MachineProtocol | None, reached_at: str = "") -> Destination:
        landing = LandingHere(
            journal.header,
            self._vms,
            self.slots,
            self._inspector,
            self._multichannel,
            self._compression,
            self._storage,
            self._page,
            reached_at,
        )
        return Destination(journal, landing, self._boot, machine)


class LandingHere:
    """One VM's landing: a :class:`limosa.migration.destination.Landing`."""

    def __init__(
        self,
        header: Header,
        vms: Vms,
        slots: Slots,
        inspector: Inspector,
        multichannel: Multichannel,
        compression: Compression,
        storage: Storage,
        page: Page,
        reached_at: str,
    ) -> None:
        self._header = header
        self._vms = vms
        self._slots = slots
        self._inspector = inspector
        self._multichannel = multichannel
        self._storage = storage
        self._compression = compression
        self._page = page
        self._reached_at = reached_at
        self._taken: list[Slots] = []
        self._hosted: HostedVm | None = None

    async def reserve(self, in_line: Callable[[int], None]) -> None:
        """See :class:`limosa.migration.destination.Landing`."""
        for slots in (self._slots, *([self._storage.arriving] if self._header.images else [])):
            try:
                await slots.acquire(in_line)
            except BaseException:
                self._give_slots()
                raise
            self._taken.append(slots)
        try:
            self._hosted = self._vms.reserve(self._header.vm, self._header.migration)
        except LimosaError:
            self._give_slots()
            raise

    async def launch(self, request: Prepare) -> MachineProtocol:
        """See :class:`limosa.migration.destination.Landing`."""
        assert self._hosted is not None
        for plan in request.disks:
            await self._storage.make(plan)
        return await self._vms.launch_incoming(self._hosted, request.accelerator, carried_files(request.files))

    async def open_door(self, request: Prepare) -> Doorway:
        """See :class:`limosa.migration.destination.Landing`."""
        if request.relay is not None:
            chosen, source = await self._chosen(request), self._header.source
            return await self._compression.open_door(source, request.relay, chosen, self._offered, request.networks)
        return await self._open_bare(request)

    async def open_disks(self, request: Prepare, machine: MachineProtocol) -> Doorway | None:
        """See :class:`limosa.migration.destination.Landing`."""
        names = [plan.disk for plan in request.disks]
        if request.disk_relays:
            await self._join_relays(request.disk_relays, machine, names)
            return None
        if request.disk_credentials is None:
            raise InvalidInput("disks come along without credentials", vm=request.vm.name)
        door = await self._open_bare(request)
        try:
            await machine.export_disks(names, door.listener, request.disk_credentials)
        except BaseException:
            door.close()
            raise
        return door

    async def _join_relays(self, places: Sequence[RelayPlace], machine: MachineProtocol, names: Sequence[str]) -> None:
        """Connect a channel of the relays with QEMU's server for each disk, over a socket that nobody else can call."""
        with tempfile.TemporaryDirectory(prefix="limosa-") as folder, socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"{folder}/disks.sock")
            listener.listen(len(places))
            await machine.export_disks(names, listener, None)
            for place in places:
                with socket.socket(socket.AF_UNIX) as stream:
                    stream.connect(listener.getsockname())
                    await self._compression.carry(self._header.source, place, stream)

    async def _open_bare(self, request: Prepare) -> tcp.TcpDoorway:
        ports = self._page.now.migration_ports
        chosen = await self._chosen(request)
        if request.transport != "multichannel":
            return tcp.TcpDoorway(chosen[0], ports)
        return await self._multichannel.open_door(chosen, ports, self._offered, request.networks)

    async def _chosen(self, request: Prepare) -> list[str]:
        """The addresses the source wants, of those we offer. Raises :class:`NetworkError` if none is left."""
        offered = await self._offered()
        chosen = [address for address in request.addresses or offered if address in offered]
        if not chosen:
            raise NetworkError(
                "this host has no address on a network that may carry moves", host=self._header.destination
            )
        return chosen

    async def _offered(self) -> tuple[str, ...]:
        return stream_addresses(await self._inspector.network(), self._reached_at)

    async def adopt(self, *, running: bool) -> None:
        """See :class:`limosa.migration.destination.Landing`."""
        self._vms.adopt(self._vms.get(self._header.vm.name), running=running)
        for path in self._header.images:
            self._storage.settle(path)
        self._give_slots()

    async def release(self, machine: MachineProtocol | None) -> None:
        """See :class:`limosa.migration.destination.Landing`."""
        hosted = self._hosted or self._vms.find_landing(self._header.vm, self._header.migration)
        if hosted is not None:
            await asyncio.shield(self._vms.discard(hosted))
        for path in self._header.images:
            self._storage.remove(path)
        self._give_slots()

    def _give_slots(self) -> None:
        while self._taken:
            self._taken.pop().release()


def carried_files(files: dict[str, str]) -> dict[str, bytes]:
    """What came along with a VM, decoded. Raises :class:`InvalidInput` for anything that is not taken as it is."""
    if unknown := files.keys() - {"seed.iso"}:
        raise InvalidInput(f"the file '{min(unknown)}' came along and is not known here")
    try:
        return {name: base64.b64decode(contents, validate=True) for name, contents in files.items()}
    except binascii.Error as error:
        raise InvalidInput("a file that came along is damaged", why=str(error)) from error


def view(destination: Destination) -> Migration:
    """A landing as people see it. The source knows more."""
    header = destination.journal.header
    outcomes = {DestinationStep.OWNED: Outcome.COMPLETED, DestinationStep.GONE: Outcome.FAILED}
    return Migration(
        id=header.migration,
        vm=header.vm.name,
        source=header.source,
        destination=header.destination,
        side=Side.DESTINATION,
        transport=str(header.options.get("transport", "")),
        phase=Phase.BUILD_UP if destination.step is None else Phase.COPY,
        outcome=outcomes.get(destination.step, Outcome.UNDER_WAY) if destination.step else Outcome.UNDER_WAY,
        progress=Progress(note="see the source for its progress"),
        accepted_at=header.accepted_at,
    )
