"""The bandwidth of this host's moves: the caps of the settings, shared by the moves that send at the time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping

from limosa.errors import LimosaError
from limosa.host.page import Page
from limosa.migration import disks
from limosa.migration.source import SourceMove
from limosa.model.migration import Phase
from limosa.settings.host import HostSettings
from limosa.transport import shares
from limosa.transport.shares import Caps, Claim, Kind

MBIT_BYTES = 1_000_000 // 8
#: Phases in which a cap means something.
_SENDING = (Phase.BUILD_UP, Phase.STORAGE, Phase.COPY, Phase.SYNCHRONISE)


class Bandwidth:
    """Shares it between ``moves``, which are those under way by their identity."""

    def __init__(self, page: Page, moves: Mapping[str, SourceMove]) -> None:
        self._page = page
        self._moves = moves

    def allowance(self, migration: str) -> int:
        """Bytes per second a move may use now, 0: no cap."""
        claims = {name: claim for name, move in self._moves.items() if (claim := _claim(move)) is not None}
        mine = claims.get(migration)
        return shares.allowance(mine, list(claims.values()), _caps(self._page.now)) if mine is not None else 0

    def alone(self, kind: Kind, addresses: Iterable[str]) -> int:
        """Bytes per second a move to these addresses could use if there were no other, 0: no cap."""
        claim = Claim(kind, tuple(addresses))
        return shares.allowance(claim, [claim], _caps(self._page.now))

    async def share(self) -> None:
        """Give each move its share. A machine that refuses is about to end anyway."""
        for move in list(self._moves.values()):
            if move.machine is not None and move.report.now.phase in _SENDING:
                with contextlib.suppress(LimosaError):
                    allowed = move.home.bandwidth()
                    await move.machine.set_bandwidth(allowed)
                    if move.mirrors is not None:
                        await move.mirrors.cap(allowed)


def _claim(move: SourceMove) -> Claim | None:
    """What a move sends now; None if it does not."""
    view = move.report.now
    if view.phase not in _SENDING:
        return None
    copies = (disks.copies(view.disks) or view.layers) and view.phase in (Phase.BUILD_UP, Phase.STORAGE)
    addresses = tuple(path.there for path in view.route.paths) if view.route is not None else ()
    return Claim(Kind.STORAGE if copies else Kind.MEMORY, addresses, move.home.own_cap)


def _caps(settings: HostSettings) -> Caps:
    kinds = {Kind.MEMORY: settings.bandwidth_mbit_per_s, Kind.STORAGE: settings.storage_bandwidth_mbit_per_s}
    return Caps(
        kinds={kind: cap * MBIT_BYTES for kind, cap in kinds.items()},
        networks={network: cap * MBIT_BYTES for network, cap in settings.network_bandwidth_mbit_per_s.items()},
    )
