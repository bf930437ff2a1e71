"""The relays of this host: one session for each host and way that VMs move to or from, shared by those that do.

A relay ends with its daemon, so nothing is found again after a restart and nothing is left to clean up.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from limosa.background import then
from limosa.errors import RelayFailed
from limosa.host.multichannel import Addresses, Multichannel
from limosa.host.page import Page
from limosa.model.route import Route
from limosa.transport import tcp
from limosa.transport.channel import Doorway, SocketChannel, connect_all
from limosa.transport.relay.carriers import AddressPair
from limosa.transport.relay.client import Relay
from limosa.transport.relay.control import CARRIERS, MAX_LANES
from limosa.transport.relay.doorway import LastingDoorway
from limosa.transport.relay.inbound import CarrierDoorway, Inbound
from limosa.transport.relay.outbound import LINGER_S, LaneShare, Outbound, Seat, no_cap
from limosa.wire.peer import Prepared, RelayPlace

#: The window of a session that is one VM's, as a power of two: other VMs' pages cannot be found in it, and the
#: destination's memory is not to be filled with it by every VM that comes.
ALONE_WINDOW_LOG = 24


@dataclass(eq=False)
class _Arriving:
    """A session from another host, whose relay may still have to start."""

    session: asyncio.Task[Inbound]
    #: landings that wait for it
    awaited: int = 0

    @property
    def is_over(self) -> bool:
        """Whether nobody can land by it any more."""
        if not self.session.done():
            return False
        return self.session.cancelled() or self.session.exception() is not None or self.session.result().is_over

    def end_if_unused(self, session: Inbound) -> None:
        """End it unless somebody lands by it, or is about to."""
        if not self.awaited:
            session.end_if_unused()


class Relays:
    """All sessions of this host. Relays run as ``user``, as QEMU does."""

    def __init__(self, multichannel: Multichannel, page: Page, user: str | None) -> None:
        self._multichannel = multichannel
        self._page = page
        self._user = user
        self._outbound: dict[tuple[object, ...], Outbound] = {}
        self._inbound: dict[tuple[str, str], _Arriving] = {}

    def seat(self, destination: str, route: Route, move: object, share: LaneShare = no_cap, *, encrypt: bool) -> Seat:
        """The part of ``move``, which goes to ``destination``, in the session that takes this route."""
        way = tuple((path.here, path.there) for path in route.paths)
        key = (destination, way, route.striped, route.transport, encrypt, move if route.alone else None)
        self._outbound = {known: session for known, session in self._outbound.items() if not session.is_over}
        session = self._outbound.get(key)
        if session is None:
            session = self._outbound[key] = self._session(route, encrypt=encrypt)
        return session.seat(share)

    def pace(self) -> None:
        """Keep each lane to what those that use it may use now."""
        for session in self._outbound.values():
            session.carriers.pace()

    async def open_door(
        self,
        source: str,
        place: RelayPlace,
        chosen: Sequence[str],
        permitted: Addresses,
        networks: Sequence[str],
        streams: Mapping[str, int] | None = None,
    ) -> Doorway:
        """The door for a VM that comes from host ``source``, at the addresses that has chosen.

        ``streams``: see :meth:`Multichannel.open_door`. Raises :class:`RelayFailed` and :class:`NetworkError`.
        """
        key = (source, place.session)
        arriving = self._inbound.get(key)
        if arriving is None or arriving.is_over:
            starting = asyncio.ensure_future(self._await(place, chosen, permitted, networks, streams))
            arriving = self._inbound[key] = _Arriving(starting)
            starting.add_done_callback(lambda done: self._forget_later(key, done))
        arriving.awaited += 1
        try:
            session = await asyncio.shield(arriving.session)
        except asyncio.CancelledError:
            then(arriving.session, arriving.end_if_unused)
            raise
        finally:
            arriving.awaited -= 1
        return await session.doorway(place)

    async def carry(self, source: str, place: RelayPlace, stream: socket.socket) -> None:
        """Have a further stream of a VM, for which the door was opened before, come into ``stream``.

        Raises :class:`RelayFailed`.
        """
        arriving = self._inbound.get((source, place.session))
        if arriving is None:
            raise RelayFailed("the relay ended before the VM's disks could be received")
        await (await asyncio.shield(arriving.session)).carry(place, stream)

    def _session(self, route: Route, *, encrypt: bool) -> Outbound:
        return Outbound(
            partial(self._dial, route),
            encrypt=encrypt,
            several=route.is_multipath,
            window_log=min(self._window_log(), ALONE_WINDOW_LOG) if route.alone else self._window_log(),
            user=self._user,
            ways=[(path.here, path.there) for path in (route.paths if route.striped else route.paths[:1])],
            striped=route.striped,
            compress=route.transport == "compression",
            linger_s=0.0 if route.alone else LINGER_S,
        )

    async def _dial(self, route: Route, prepared: Prepared, way: AddressPair) -> Sequence[SocketChannel]:
        """Both carriers, over one path if the route is striped, else over all together."""
        if not route.striped:
            return await connect_all([partial(self._multichannel.connect, route, prepared)] * CARRIERS)
        here, there = way
        return await connect_all([partial(tcp.connect, there, prepared.port, prepared.token, here)] * CARRIERS)

    async def _await(
        self,
        place: RelayPlace,
        chosen: Sequence[str],
        permitted: Addresses,
        networks: Sequence[str],
        streams: Mapping[str, int] | None,
    ) -> Inbound:
        relay = await Relay.start(user=self._user)
        try:
            ports = self._page.now.migration_ports
            door: CarrierDoorway | LastingDoorway
            if place.striped:
                door = LastingDoorway(chosen[:MAX_LANES], ports, permitted)
            elif place.several:
                door = await self._multichannel.open_door(chosen, ports, permitted, networks, streams)
            else:
                door = tcp.TcpDoorway(chosen[0], ports)
        except BaseException:
            await asyncio.shield(relay.end())
            raise
        return Inbound(relay, door, place, self._window_log())

    def _forget_later(self, key: tuple[str, str], started: asyncio.Task[Inbound]) -> None:
        """A session that has ended, or did not come about, is not to be joined."""
        if started.cancelled() or started.exception() is not None:
            self._forget(key, started)
        else:
            started.result().ended.add_done_callback(lambda _: self._forget(key, started))

    def _forget(self, key: tuple[str, str], started: asyncio.Task[Inbound]) -> None:
        if key in self._inbound and self._inbound[key].session is started:
            del self._inbound[key]

    def _window_log(self) -> int:
        return (self._page.now.compression_window_mib * 1024 * 1024).bit_length() - 1
