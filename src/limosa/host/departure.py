"""The source's end of one move's streams: guest memory, and each disk that moves along."""

from __future__ import annotations

from functools import partial

import msgspec

from limosa.host.parts import Parts
from limosa.model.route import Route
from limosa.qemu.protocol import RdmaAddress
from limosa.transport import rdma
from limosa.transport.channel import Channel, SocketChannel, connect_all
from limosa.transport.relay.outbound import LaneShare, Seat
from limosa.wire.peer import LayersAwaited, Prepared, RelayPlace


class Departure:
    """Connects streams by the transport of a route. ``share``: of this move, see :data:`LaneShare`."""

    def __init__(self, parts: Parts, share: LaneShare) -> None:
        self._parts = parts
        self._share = share
        #: in a session of relays: of guest memory, then of each disk, then of what lies below them, if that is sent
        self._seats: list[Seat] = []

    async def seats(self, destination: str, route: Route, count: int, *, encrypt: bool) -> list[RelayPlace]:
        """Places in a session of relays for so many streams; none if the route takes no relay.

        Raises :class:`RelayFailed`.
        """
        if route.is_relayed:
            relays = self._parts.relays
            self._seats = [relays.seat(destination, route, self, self._share, encrypt=encrypt) for _ in range(count)]
            for seat in self._seats:
                await seat.open()
        return [seat.place for seat in self._seats]

    def release(self) -> None:
        """Let go of the relays. May be repeated."""
        seats, self._seats = self._seats, []
        for seat in seats:
            seat.release()

    async def connect(self, route: Route, prepared: Prepared) -> Channel:
        """The stream of guest memory. Raises :class:`DestinationLost` and :class:`NetworkError`."""
        if self._seats:
            return await self._seats[0].connect(prepared)
        if route.transport == "rdma":
            return rdma.RdmaChannel(RdmaAddress(route.paths[0].there, prepared.port))
        return await self._parts.multichannel.connect(route, prepared)

    async def connect_disks(self, route: Route, prepared: Prepared, count: int) -> list[SocketChannel]:
        """Streams for so many disks. Raises as :meth:`connect`; none is left then."""
        if self._seats:
            return await connect_all([partial(seat.connect, prepared) for seat in self._seats[1 : 1 + count]])
        # QEMU's own server is at that port, which asks for a certificate and not for a token, and at no other address.
        server = msgspec.structs.replace(prepared, port=prepared.disks_port, token="")
        return await connect_all([partial(self._parts.multichannel.connect, route, server, anywhere=False)] * count)

    async def connect_layers(self, route: Route, awaited: LayersAwaited) -> SocketChannel:
        """The stream of files below disks. Raises as :meth:`connect`."""
        door = Prepared(address=awaited.address, port=awaited.port, token=awaited.token)
        if self._seats:
            return await self._seats[-1].connect(door)
        return await self._parts.multichannel.connect(route, door)
