"""One VM that lands here: its places, images, QEMU and doors, and giving all of that back."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Callable
from functools import partial

from limosa.errors import Conflict, InvalidInput, LimosaError
from limosa.host.arrival import Arrival
from limosa.host.layers import Layers
from limosa.host.parts import Parts
from limosa.host.slots import Place, Slots
from limosa.host.vms import HostedVm
from limosa.migration.journal import Header
from limosa.qemu.protocol import MachineProtocol
from limosa.transport.channel import Doorway
from limosa.wire.peer import LayersAwaited, Prepare


class LandingHere:
    """This host's :class:`limosa.migration.destination.Landing`: what the daemon has, from slots to leases, as the
    script of one move in needs it."""

    def __init__(self, parts: Parts, layers: Layers, header: Header, slots: Slots, reached_at: str) -> None:
        self._vms = parts.vms
        self._storage = parts.storage
        self._layers = layers
        self._header = header
        # As at the source: who copies disks takes no place from a move of memory alone.
        self._place = Place(parts.storage.arriving if header.images or header.layers else slots)
        self._arrival = Arrival(parts, header.source, reached_at)
        self._hosted: HostedVm | None = None
        self._leasing = parts.leasing
        self._leases = parts.leasing.landing(header.vm, header.source, header.migration, header.images)
        #: the journal may have lost the lines that say that the guest was continued here
        self._is_unsure = header.boot != parts.boot

    async def reserve(self, in_line: Callable[[int], None]) -> None:
        """See :class:`limosa.migration.destination.Landing`."""
        await self._place.take(in_line)
        try:
            self._hosted = self._vms.reserve(self._header.vm, self._header.migration)
        except LimosaError:
            self._place.give_back()
            raise

    async def take_layers(self, request: Prepare, tell: Callable[[LayersAwaited], None]) -> None:
        """See :class:`limosa.migration.destination.Landing`."""
        # So too little space refuses the move before a byte is sent, and not when what lies below the disks is here.
        await self._storage.hold(request.disks)
        credentials = request.disk_credentials if request.layers_relay is None else None
        open_door = partial(self._arrival.open_layers, request)
        await self._layers.take(
            request.layers, credentials, open_door, tell, self._header.source, self._only_read(request)
        )

    async def launch(self, request: Prepare) -> MachineProtocol:
        """See :class:`limosa.migration.destination.Landing`."""
        assert self._hosted is not None
        self._arrival.begin(request)
        brought = {plan.file.path for plan in request.layers}
        for plan in request.disks:
            await self._layers.make_above(plan, brought, self._header.source)
        for disk in request.vm.disks:
            if disk.path in self._only_read(request):
                await self._layers.use(disk, brought)
        await self._leases.prepare()
        return await self._vms.launch_incoming(self._hosted, request.accelerator, carried_files(request.files))

    async def open_door(self, request: Prepare, machine: MachineProtocol) -> Doorway:
        """See :class:`limosa.migration.destination.Landing`."""
        return await self._arrival.open_door(request, machine)

    async def open_disks(self, request: Prepare, machine: MachineProtocol) -> Doorway | None:
        """See :class:`limosa.migration.destination.Landing`."""
        return await self._arrival.open_disks(request, machine)

    async def claim(self) -> None:
        """See :class:`limosa.migration.destination.Landing`."""
        await self._leases.claim()

    async def adopt(self, *, running: bool) -> None:
        """See :class:`limosa.migration.destination.Landing`."""
        hosted = self._vms.get(self._header.vm.name)
        if hosted.config.uuid != self._header.vm.uuid:
            raise Conflict(
                f"VM '{hosted.config.name}' has landed, but another has its name by now",
                todo="move or delete that one and restart the daemon",
                vm=hosted.config.name,
                host=self._header.destination,
            )
        await self._storage.finish(self._header.images)
        await self._layers.finish(self._header.layers)
        await self._vms.adopt(hosted, running=running)
        await self._leases.settle()
        if hosted.machine is None and hosted.fault is None:
            await self._leasing.give_back(hosted.config)
        for path in self._header.images:
            self._storage.settle(path)
        self._place.give_back()

    def free(self) -> None:
        """See :class:`limosa.migration.destination.Landing`."""
        self._vms.landed(self._vms.get(self._header.vm.name), self._header.migration)

    async def release(self, machine: MachineProtocol | None) -> None:
        """See :class:`limosa.migration.destination.Landing`."""
        self._arrival.close()
        hosted = self._hosted or self._vms.find_landing(self._header.vm, self._header.migration)
        if hosted is not None:
            await asyncio.shield(self._vms.discard(hosted))
        await self._leases.hand_back()
        if self._is_unsure:
            # The guest may have written them. Who knows that it has not finds them among the leftovers.
            for path in (*self._header.images, *(layer.path for layer in self._header.layers)):
                self._storage.settle(path)
        else:
            for path in self._header.images:
                await self._storage.remove(path)
            await self._layers.give_up(self._header.layers, self._header.migration)
        self._place.give_back()

    def _only_read(self, request: Prepare) -> set[str]:
        """Disks of the VM that are only read and lie where moves put files."""
        places = self._storage.places
        return {disk.path for disk in request.vm.disks if disk.read_only and places.of(disk.path)}


def carried_files(files: dict[str, str]) -> dict[str, bytes]:
    """What came along with a VM, decoded. Raises :class:`InvalidInput` for anything that is not taken as it is."""
    if unknown := files.keys() - {"seed.iso"}:
        raise InvalidInput(f"the source sent a file '{min(unknown)}' that this host does not know")
    try:
        return {name: base64.b64decode(contents, validate=True) for name, contents in files.items()}
    except binascii.Error as error:
        raise InvalidInput("a file sent by the source is damaged", why=str(error)) from error
