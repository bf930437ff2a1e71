"""The paths a move really takes: asked of its connection, named by their NICs, and shown with what each has carried.

Which NICs there are may change while the move runs. A NIC that appears here may lead to an address of the destination
that was announced when nothing led there yet, so the destination is asked to announce it again. Where relays spread
the stream, paths are ours to choose and to connect: the destination is asked to listen, and tells what appears there.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Collection, Iterable, Iterator, Sequence
from dataclasses import replace

import msgspec

from limosa.errors import LimosaError
from limosa.migration.peer import Peer
from limosa.model.network import Carried, HostNetwork
from limosa.model.route import Compressed, Path, Route
from limosa.transport.channel import Channel, Used, by_path
from limosa.transport.choice import MOST_PATHS, Ends, direct_path, spread
from limosa.transport.goodput import Goodput

_log = logging.getLogger(__name__)


class Paths:
    """The paths of one move. ``blocked``: addresses of the destination to which no connection could be made before."""

    def __init__(
        self, route: Route, ends: Ends, channels: Sequence[Channel], blocked: Collection[str] = frozenset()
    ) -> None:
        self._route = route
        self._ends = ends
        self._channels = channels
        self._goodput = Goodput()
        chosen = {(path.here, path.there) for path in route.paths}
        #: what could be used and was not chosen, for whatever reason, as long as it is there
        self._refused = {way for way in self._possible() - chosen if way[1] not in blocked}

    @property
    def addresses(self) -> frozenset[str]:
        """Those of the destination that it leads to, by the last look."""
        return frozenset(path.there for path in self._route.paths)

    async def look(self, by_rdma: int = 0) -> Route:
        """The route as it is now; what has carried nothing yet is in it as it was chosen. ``by_rdma``: bytes QEMU says
        it has sent, which nobody else counts if that is by RDMA."""
        compressed = together([await channel.compressed() for channel in self._channels])
        paths = {(path.here, path.there): path for path in self._route.paths}
        used = self._used()
        # Streams may share connections, and with other moves; how fast these are is seen when each counts once.
        connections = {id(one): one for channel in self._channels for one in channel.connections}
        routed = [pair for pair in paths if not pair[0] and used]
        open_ = by_path(used for one in connections.values() for used in one.used())
        self._goodput.saw(time.monotonic(), open_)
        for one in used:
            paths[one.here, one.there] = self._path(one, paths.get((one.here, one.there)))
        for one in open_:
            if (ends := (one.here, one.there)) in paths:
                paths[ends] = msgspec.structs.replace(paths[ends], connections=one.connections)
        if self._route.transport == "rdma":
            paths = {ends: msgspec.structs.replace(path, sent_bytes=by_rdma) for ends, path in paths.items()}
        for pair in routed:
            del paths[pair]  # by now it is known which address of ours it was
        self._route = msgspec.structs.replace(self._route, paths=tuple(paths.values()), compressed=compressed)
        return self._route

    def carried(self) -> tuple[Carried, ...]:
        """How fast the networks were; nothing is known of those whose speed was not what the move waited for."""
        # Relays that spread a stream give each path what it takes, which is less than it could where others are faster.
        spread = self._route.is_relayed and len(self._route.paths) > 1
        return () if spread else self._goodput.best()

    def _used(self) -> tuple[Used, ...]:
        """What all streams of the move have sent over each path."""
        return by_path(used for channel in self._channels for used in channel.used())

    def _path(self, used: Used, known: Path | None) -> Path:
        if known is None:
            direct = direct_path(self._ends.here, self._ends.there, used.there)
            known = direct if direct is not None and direct.here == used.here else self._named(used)
        return msgspec.structs.replace(known, sent_bytes=used.sent_bytes)

    def _named(self, used: Used) -> Path:
        near, far = self._ends.here.nic_of(used.here), self._ends.there.nic_of(used.there)
        names = [nic.name if nic is not None else "" for nic in (near, far)]
        return Path(here=used.here, there=used.there, nic_here=names[0], nic_there=names[1])

    async def follow(self, networks: AsyncIterator[HostNetwork], peer: Peer) -> None:
        """Have NICs used that appear, until cancelled."""
        if self._route.striped:
            async with asyncio.TaskGroup() as both:
                both.create_task(self._follow_here(networks, peer))
                both.create_task(self._follow_there(peer))
            return
        if self._route.transport not in ("multichannel", "compression"):
            return
        known = self._possible()
        async for network in networks:
            self._ends = replace(self._ends, here=network)
            now = self._possible()
            alive = {used.there for used in self._used() if used.alive}
            if appeared := [address for here, address in now - known if address not in alive]:
                with contextlib.suppress(LimosaError):  # the move itself notices that the session is lost
                    await peer.announce(appeared[:MOST_PATHS])
            known = now

    async def _follow_here(self, networks: AsyncIterator[HostNetwork], peer: Peer) -> None:
        with _logged():
            async for network in networks:
                await self._spread(replace(self._ends, here=network), peer)

    async def _follow_there(self, peer: Peer) -> None:
        with _logged():
            async for offered in peer.offers():
                await self._spread(replace(self._ends, there=offered.network, offered=offered.addresses), peer)

    async def _spread(self, ends: Ends, peer: Peer) -> None:
        """Have relays use what is possible between the two ends now."""
        self._ends = ends
        self._refused &= self._possible()
        alive = [self._named(used) for used in self._used() if used.alive]
        # A path whose NIC is gone may not be noticed by its connections for a minute, and must not keep its place.
        paths = spread(ends, [path for path in alive if path.nic_here and path.nic_there], self._refused)
        ways = list(_pairs(paths))
        used = set(_pairs(alive))
        if appeared := [there for here, there in ways if (here, there) not in used]:
            with contextlib.suppress(LimosaError):  # the move itself notices that the session is lost
                await peer.announce(appeared)
        if self._ends is not ends:
            return  # there was news meanwhile
        for channel in self._channels:
            channel.spread_over(ways)

    def _possible(self) -> set[tuple[str, str]]:
        return set(_pairs(direct_path(self._ends.here, self._ends.there, one) for one in self._ends.offered))


@contextlib.contextmanager
def _logged() -> Iterator[None]:
    """What one end cannot be asked any more is no reason not to follow the other."""
    try:
        yield
    except LimosaError as error:
        _log.warning("NICs that appear from now on are not used: %s", error)


def together(parts: Iterable[Compressed | None]) -> Compressed | None:
    """The figures of several streams as one; None if none was compressed."""
    known = [part for part in parts if part is not None]
    if not known:
        return None
    raw, sent = sum(part.raw_bytes for part in known), sum(part.sent_bytes for part in known)
    return Compressed(
        raw_bytes=raw,
        sent_bytes=sent,
        ratio=round(raw / sent, 3) if sent else None,
        cpu_s=round(sum(part.cpu_s for part in known), 3),
        connections=max(part.connections for part in known),
    )


def _pairs(paths: Iterable[Path | None]) -> Iterable[tuple[str, str]]:
    return ((path.here, path.there) for path in paths if path is not None)
