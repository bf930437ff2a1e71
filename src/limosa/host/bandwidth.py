"""The bandwidth of this host's moves: the caps of the settings, shared by the moves that send at the time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping

from limosa.errors import LimosaError
from limosa.host.page import Page
from limosa.host.relays import Relays
from limosa.migration import disks
from limosa.migration.source import SourceMove
from limosa.model.migration import Outcome, Phase
from limosa.model.route import Route
from limosa.settings.host import HostSettings
from limosa.transport import shares
from limosa.transport.shares import Caps, Claim, Kind

MBIT_BYTES = 1_000_000 // 8
#: So long the others wait for a QEMU to take its share. It stops nobody else if it hangs.
TAKES_WITHIN_S = 1.0


class Bandwidth:
    """Shares it between ``moves``, which are those under way by their identity."""

    def __init__(self, page: Page, moves: Mapping[str, SourceMove], relays: Relays) -> None:
        self._page = page
        self._moves = moves
        self._relays = relays
        #: moves whose share may have changed since they were told, and the tasks that tell them, one for each
        self._untold: set[str] = set()
        self._telling: dict[str, asyncio.Task[None]] = {}

    def allowance(self, migration: str, kind: Kind) -> int:
        """Bytes per second a move may send of ``kind`` now, 0: no cap, or it sends none."""
        claims = self._claims()
        mine = claims.get(migration)
        if mine is None or kind not in mine.kinds:
            return 0
        return shares.allowance(kind, mine, list(claims.values()), _caps(self._page.now))

    def of_lane(self, migration: str, address: str) -> int | None:
        """Bytes per second a move may use now over a lane of relays to an address, 0: no cap, None if it sends none."""
        claims = self._claims()
        mine = claims.get(migration)
        return shares.lane(address, mine, list(claims.values()), _caps(self._page.now)) if mine is not None else None

    def alone(self, kind: Kind, route: Route) -> int:
        """Bytes per second a move by this route could use if there were no other, 0: no cap besides those by network
        where it is striped, which the speeds of its paths have."""
        claim = Claim(frozenset({kind}), tuple(path.there for path in route.paths), striped=route.striped)
        return shares.allowance(kind, claim, [claim], _caps(self._page.now))

    async def share(self) -> None:
        """Give each move its share. Returns within :data:`TAKES_WITHIN_S`: a QEMU that has not taken its share by then
        is given what it is to have as soon as it answers again."""
        self._relays.pace()
        self._untold |= self._moves.keys()
        for name in self._moves.keys() - self._telling.keys():
            self._telling[name] = asyncio.ensure_future(self._tell(name))
        if self._telling:
            await asyncio.wait(set(self._telling.values()), timeout=TAKES_WITHIN_S)

    async def _tell(self, name: str) -> None:
        """Tell a move its share until it knows the latest."""
        try:
            while name in self._untold:
                self._untold.discard(name)
                if (move := self._moves.get(name)) is not None:
                    await self._cap(name, move)
        finally:
            del self._telling[name]

    async def _cap(self, name: str, move: SourceMove) -> None:
        """A machine that refuses is about to end anyway."""
        # QEMU sends the last of a guest that stands still without a cap, and is better left alone then.
        if move.machine is None or (move.report.now.phase is Phase.SWITCHOVER and not move.in_post_copy):
            return
        caps = {kind: self.allowance(name, kind) for kind in _kinds(move)}
        with contextlib.suppress(LimosaError):
            if Kind.MEMORY in caps:
                await move.cap_memory(caps[Kind.MEMORY])
            if Kind.STORAGE in caps:
                await move.cap_copies(caps[Kind.STORAGE])

    def _claims(self) -> dict[str, Claim]:
        return {name: claim for name, move in self._moves.items() if (claim := _claim(move)).kinds}


def _claim(move: SourceMove) -> Claim:
    route = move.report.now.route
    addresses = tuple(path.there for path in route.paths) if route is not None else ()
    return Claim(_kinds(move), addresses, move.home.own_cap, striped=route is not None and route.striped)


def _kinds(move: SourceMove) -> frozenset[Kind]:
    """What a move sends now, or is about to."""
    view = move.report.now
    if view.outcome is not Outcome.UNDER_WAY:
        return frozenset()  # it waits for its destination, to have that destroy what it has
    match view.phase:
        case Phase.BUILD_UP:
            return frozenset({Kind.STORAGE if disks.copies(view.disks) or view.layers else Kind.MEMORY})
        case Phase.STORAGE:
            return frozenset({Kind.STORAGE})
        case Phase.COPY | Phase.SYNCHRONISE:
            return frozenset({Kind.MEMORY, Kind.STORAGE} if move.mirrors is not None else {Kind.MEMORY})
        case Phase.SWITCHOVER:
            return frozenset({Kind.MEMORY})
        case _:
            return frozenset({Kind.MEMORY} if move.in_post_copy else ())


def _caps(settings: HostSettings) -> Caps:
    kinds = {Kind.MEMORY: settings.bandwidth_mbit_per_s, Kind.STORAGE: settings.storage_bandwidth_mbit_per_s}
    return Caps(
        kinds={kind: cap * MBIT_BYTES for kind, cap in kinds.items()},
        networks={network: cap * MBIT_BYTES for network, cap in settings.network_bandwidth_mbit_per_s.items()},
    )
