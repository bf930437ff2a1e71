"""Multipath TCP on this host: what both ends of a move have the kernel do, and NICs that come and go meanwhile."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path

from limosa.errors import LimosaError
from limosa.model.route import Route
from limosa.network.changes import changes
from limosa.transport import multichannel, tcp
from limosa.transport.channel import SocketChannel
from limosa.transport.choice import is_allowed
from limosa.transport.endpoints import Endpoints, Hold, PathManager
from limosa.transport.multichannel import MultichannelDoorway
from limosa.wire.peer import Prepared

_log = logging.getLogger(__name__)

#: Between two ports that are announced: a kernel that hears of one while it takes up another forgets it (of seven
#: announced at once it connected to five; measured with Linux 6.1).
ONE_BY_ONE_S = 0.1

#: Gives this host's addresses on which a move may arrive, as they are now.
Addresses = Callable[[], Awaitable[Sequence[str]]]


class Multichannel:
    """All multichannel moves of this host."""

    def __init__(self, manager: PathManager, run: Path) -> None:
        self.endpoints = Endpoints(manager, run / "mptcp.json")

    async def connect(self, route: Route, prepared: Prepared, *, anywhere: bool = True) -> SocketChannel:
        """The source's end, by plain TCP where the route is. By Multipath TCP it is called ``anywhere``: if the address
        that the destination gave does not answer, at the others of the route.

        Raises :class:`DestinationLost` and :class:`NetworkError`.
        """
        if not route.is_multipath:
            return await tcp.connect(prepared.address, prepared.port, prepared.token, route.paths[0].here)
        hold = await self.endpoints.hold()
        try:
            ways = _ways(route, prepared)
            return await multichannel.connect(
                ways if anywhere else ways[:1], prepared.port, prepared.token, hold.release
            )
        except BaseException:
            hold.release()
            raise

    async def open_door(
        self,
        chosen: Sequence[str],
        ports: tuple[int, int],
        permitted: Addresses,
        networks: Sequence[str],
        streams: Mapping[str, int] | None = None,
    ) -> MultichannelDoorway:
        """The destination's end, at the addresses the source has chosen. Raises :class:`NetworkError`.

        An address that appears later is announced if it lies in one of ``networks``, which the source is on, or if
        the source asks for it. ``streams`` says to which addresses several connections are to be made, and how many.
        """
        landing = _Landing(self.endpoints, await self.endpoints.hold(), permitted, networks)
        try:
            wanted = {address: count for address, count in (streams or {}).items() if address in chosen}
            await landing.open(chosen, ports, wanted)
        except BaseException:
            landing.close()
            raise
        return landing.door


def _ways(route: Route, prepared: Prepared) -> list[tuple[str, str]]:
    """From an address here to one there: to the address that the destination gave, then to the others of the route."""
    here = {path.there: path.here for path in route.paths}
    first = here.pop(prepared.address, route.paths[0].here), prepared.address
    return [first, *((own, there) for there, own in here.items())]


class _Landing:
    """The kernel's part of one door."""

    door: MultichannelDoorway

    def __init__(self, endpoints: Endpoints, hold: Hold, permitted: Addresses, networks: Sequence[str]) -> None:
        self._endpoints = endpoints
        self._hold = hold
        self._permitted = permitted
        self._networks = networks
        self._tasks: list[asyncio.Task[None]] = []

    async def open(self, chosen: Sequence[str], ports: tuple[int, int], streams: Mapping[str, int]) -> None:
        """Listen, announce, and watch for further addresses."""
        self.door = MultichannelDoorway(chosen, ports, self._announce_later, self.close)
        try:
            await self._announce(chosen)
        except BaseException:
            self.door.close()
            raise
        self._tasks = [
            asyncio.ensure_future(self._follow()),
            asyncio.ensure_future(self._spread(chosen[0], streams, ports)),
        ]

    async def _spread(self, first: str, streams: Mapping[str, int], ports: tuple[int, int]) -> None:
        """When the first connection stands, have further ones made to addresses that want several, one by one; and to
        the first address, if the source has come to another."""
        await self.door.connected.wait()
        if self.door.listen_on(first):
            self._endpoints.later(lambda: self._announce([first]))
        for count in range(1, max(streams.values(), default=1)):
            for address in [address for address, wanted in streams.items() if count < wanted]:
                # From the end of the range, so that those are not taken that other moves would take next.
                free = tcp.free_ports(address, range(ports[1], ports[0] - 1, -1))
                await self._endpoints.announce_ports(self._hold, address, count, free)
                await asyncio.sleep(ONE_BY_ONE_S)

    def close(self) -> None:
        """Let go of everything."""
        for task in self._tasks:
            task.cancel()
        self._hold.release()

    def _announce_later(self, addresses: Iterable[str]) -> None:
        wanted = list(addresses)
        self._endpoints.later(lambda: self._announce(wanted, again=True))

    async def _announce(self, addresses: Iterable[str], *, again: bool = False) -> None:
        permitted = await self._permitted()
        wanted = [address for address in addresses if address in permitted and self.door.listen_on(address)]
        await self._endpoints.announce(self._hold, wanted, again=again)

    async def _follow(self) -> None:
        """Announce addresses that appear. What was there before and was not chosen, was not chosen for a reason."""
        known: set[str] | None = None
        try:
            async for _ in changes():
                now = {address for address in await self._permitted() if is_allowed(address, self._networks)}
                if known is not None and (appeared := sorted(now - known)):
                    await self._announce(appeared, again=True)
                known = now
        except LimosaError as error:
            _log.error("addresses that appear are not used: %s", error)
