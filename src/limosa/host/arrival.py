"""The destination's end of one move's streams: guest memory, and each disk that moves along."""

from __future__ import annotations

import asyncio
import socket
import tempfile
from collections.abc import Sequence

from limosa.background import then
from limosa.errors import Conflict, InvalidInput, NetworkError
from limosa.host.parts import Parts
from limosa.network.addresses import stream_addresses
from limosa.qemu.protocol import MachineProtocol
from limosa.transport import rdma, tcp
from limosa.transport.channel import Doorway
from limosa.wire.peer import Prepare, RelayPlace


class Arrival:
    """Opens doors by the transport that was asked for. ``reached_at`` is the address of ours ``source`` called."""

    def __init__(self, parts: Parts, source: str, reached_at: str) -> None:
        self._parts = parts
        self._source = source
        self._reached_at = reached_at
        #: for guest memory, until it is taken
        self._door: asyncio.Task[Doorway] | None = None

    def begin(self, request: Prepare) -> None:
        """Begin to open the door for guest memory, which takes as long as to start a QEMU if that needs a relay.

        :meth:`close` gives it up, unless :meth:`open_door` has taken it. Raises :class:`Conflict`, with nothing begun,
        if the memory would come in clear and this host's settings forbid that.
        """
        self._check_encrypted(request)
        if request.transport != "rdma":
            self._door = asyncio.ensure_future(self._open(request, request.relay))

    def close(self) -> None:
        """Give up what was begun. May be repeated."""
        begun, self._door = self._door, None
        if begun is not None:
            begun.cancel()
            then(begun, lambda door: door.close())

    async def open_door(self, request: Prepare, machine: MachineProtocol) -> Doorway:
        """Where the source is awaited for guest memory. Raises :class:`NetworkError`."""
        if request.transport == "rdma":
            chosen = await self._chosen(request)
            return await rdma.open_door(machine, chosen[0], self._parts.page.now.migration_ports)
        assert self._door is not None
        door = await asyncio.shield(self._door)
        self._door = None
        return door

    async def open_layers(self, request: Prepare) -> Doorway:
        """Where the source is awaited for files below disks. Raises :class:`NetworkError`."""
        if request.layers_relay is None and request.disk_credentials is None:
            raise InvalidInput("disks come along without credentials", vm=request.vm.name)
        return await self._open(request, request.layers_relay)

    async def open_disks(self, request: Prepare, machine: MachineProtocol) -> Doorway | None:
        """Have QEMU await the disks that come along. Returns the door at which it does, None if relays bring them."""
        names = [plan.disk for plan in request.disks]
        if request.disk_relays:
            await self._join_relays(request.disk_relays, machine, names)
            return None
        if request.disk_credentials is None:
            raise InvalidInput("disks come along without credentials", vm=request.vm.name)
        door = await self._open_bare(request)
        try:
            await machine.export_disks(names, door.hand_over(), request.disk_credentials)
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
                    await self._parts.relays.carry(self._source, place, stream)

    async def _open(self, request: Prepare, place: RelayPlace | None) -> Doorway:
        if place is None:
            return await self._open_bare(request)
        chosen = await self._chosen(request)
        return await self._parts.relays.open_door(
            self._source, place, chosen, self._offered, request.networks, _streams(request)
        )

    async def _open_bare(self, request: Prepare) -> tcp.TcpDoorway:
        ports = self._parts.page.now.migration_ports
        chosen = await self._chosen(request)
        if request.transport != "multichannel":
            return tcp.TcpDoorway(chosen[0], ports)
        return await self._parts.multichannel.open_door(
            chosen, ports, self._offered, request.networks, _streams(request)
        )

    def _check_encrypted(self, request: Prepare) -> None:
        credentials = request.credentials if request.relay is None else request.relay.credentials
        if credentials is None and self._parts.page.now.encrypt:
            vm, host = request.vm.name, self._parts.name
            raise Conflict(
                f"the memory of VM '{vm}' would arrive unencrypted, but 'encrypt' is on at host '{host}'",
                todo=f"switch it on at host '{self._source}' too, or off at both",
                vm=vm,
                host=host,
            )

    async def _chosen(self, request: Prepare) -> list[str]:
        """The addresses the source wants, of those we offer. Raises :class:`NetworkError` if none is left."""
        offered = await self._offered()
        chosen = [address for address in request.addresses or offered if address in offered]
        if not chosen:
            raise NetworkError("this host has no address on a network that may carry moves", host=self._parts.name)
        return chosen

    async def _offered(self) -> tuple[str, ...]:
        return stream_addresses(await self._parts.inspector.network(), self._reached_at)


def _streams(request: Prepare) -> dict[str, int]:
    """How many connections the source wants to each address: several where one would use one member of a team."""
    return dict(zip(request.addresses, request.streams, strict=False))
