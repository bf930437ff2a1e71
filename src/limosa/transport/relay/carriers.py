"""The source's daemon and the connections of a session: made, made again when they are lost, and counted.

A session over one path has two, as long as it lasts. A striped one has two for each path, its lanes: it is open with
the first on which both relays agree, and the others join as they can. As long as anybody takes part, every second
each path that is wanted and has no lane is connected, whether it had one or never had. Which paths are wanted may
change at any time.

The daemon keeps duplicates of the connections to see what each path has carried. What a lane carried that was lost
counts on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from limosa.errors import LimosaError, RelayFailed
from limosa.transport import tcp
from limosa.transport.channel import SocketChannel, Used, by_path
from limosa.transport.relay.client import Relay
from limosa.transport.relay.control import MAX_LANES
from limosa.transport.relay.frames import MAX_LANE
from limosa.wire.peer import Prepared

_log = logging.getLogger(__name__)

#: A path: from an address here, empty where routing decides, to an address there.
AddressPair = tuple[str, str]
#: Makes a forward and a backward connection to the destination that is prepared. Raises :class:`LimosaError`.
Dial = Callable[[Prepared, AddressPair], Coroutine[Any, Any, Sequence[SocketChannel]]]

DIAL_EVERY_S = 1.0
#: A path whose lanes do not live for so long is dialled less and less often, up to this.
_LIVES_S, _DIAL_AT_LEAST_EVERY_S = 10.0, 30.0
#: At first sooner: where a path has appeared the destination may only be about to listen.
_SOON_S = 0.05
#: A path that takes longer is tried again; the first to be connected has as long as any connection.
DIAL_WITHIN_S = 3.0


class _Lane:
    """A path's connections."""

    def __init__(self, way: AddressPair, connections: Sequence[SocketChannel]) -> None:
        self.way = way
        self.since = asyncio.get_running_loop().time()
        self.forward, self.backward = connections
        self.lost = False

    def ways(self) -> set[AddressPair]:
        return {self.way, *((one.here, one.there) for one in self.forward.used())}

    def close(self) -> None:
        self.forward.used()  # remembers the last figures
        self.forward.close()
        self.backward.close()


class Carriers:
    """The connections of one session.

    ``is_used``: whether anybody takes part; ``pace``: bytes per second that a lane to an address may carry now, 0: no
    cap.
    """

    def __init__(
        self,
        dial: Dial,
        ways: Sequence[AddressPair],
        *,
        striped: bool,
        is_used: Callable[[], bool],
        pace: Callable[[str], int],
    ) -> None:
        self._dial = dial
        self._initial = tuple(ways)
        #: by who takes part
        self._wishes: dict[object, tuple[AddressPair, ...]] = {}
        #: paths that are not dialled before a time, and the pause that made it so
        self._resting: dict[AddressPair, tuple[float, float]] = {}
        self._told: set[tuple[AddressPair, str]] = set()
        self._striped = striped
        self._is_used = is_used
        self._pace = pace
        #: all there ever were, by number; of a session that is not striped one
        self._lanes: dict[int, _Lane] = {}
        self._joining: dict[AddressPair, asyncio.Task[None]] = {}
        #: what was wrong with a path that had no lane, at first
        self._faults: dict[AddressPair, Exception] = {}
        #: done, by an exception, when no lane has come about over any path, while the session opens
        self._hopeless: asyncio.Future[None] | None = None
        self._keeping: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._closed = False

    @property
    def forward(self) -> Sequence[SocketChannel]:
        """Those that guest memory goes over, or went over."""
        return [lane.forward for lane in self._lanes.values()]

    def used(self) -> tuple[Used, ...]:
        """What went over each path, all its connections together."""
        return by_path(
            replace(one, alive=False, connections=0) if lane.lost else one
            for lane in self._lanes.values()
            for one in lane.forward.used()
        )

    def alive(self) -> int:
        """How many connections there are."""
        lanes = [lane for lane in self._lanes.values() if not lane.lost]
        return sum(one.connections for lane in lanes for end in (lane.forward, lane.backward) for one in end.used())

    async def open(
        self,
        prepared: Prepared,
        relay: Relay,
        open_session: Callable[[Sequence[socket.socket]], Awaitable[object]],
    ) -> None:
        """Connect the one path, and have the session opened over it.

        Raises :class:`LimosaError`; no connection is left then.
        """
        (way,) = self._initial
        try:
            connections = await self._dial(prepared, way)
            self._add(way, connections)
            await open_session([one.stream for one in connections])
            self._check_open(relay)
        except BaseException:
            self.close()
            raise

    async def open_lanes(self, prepared: Prepared, relay: Relay) -> None:
        """Have lanes join over all paths. Returns when one has, which opens the session; the others join as they can.

        Raises :class:`LimosaError` if none can, what is wrong with the best; no connection is left then.
        """
        opened = asyncio.ensure_future(relay.opened())
        hopeless = self._hopeless = asyncio.get_running_loop().create_future()
        try:
            for way in self._initial:
                self._have_join(relay, way, partial(self._dial, prepared, way))
            done, _ = await asyncio.wait({opened, hopeless}, return_when=asyncio.FIRST_COMPLETED)
            (opened if opened in done else hopeless).result()
            self._check_open(relay)
        except BaseException:
            self.close()
            raise
        finally:
            opened.cancel()
            hopeless.cancel()
        self._keeping = asyncio.ensure_future(self._keep(prepared, relay))

    def _check_open(self, relay: Relay) -> None:
        if self._closed:
            raise RelayFailed("the relay ended as soon as its session was open", why=relay.why())

    def want(self, who: object, ways: Iterable[AddressPair]) -> None:
        """Which paths one that takes part wants used from now on. Lanes over others stay as long as they last."""
        self._wishes[who] = tuple(ways)
        self._resting.clear()
        self._changed.set()

    def leave(self, who: object) -> None:
        """It takes no part any more."""
        self._wishes.pop(who, None)

    def pace(self) -> None:
        """Keep each lane to what it may carry now."""
        for lane in self._lanes.values():
            self._keep_pace(lane)

    def lose(self, number: int, why: str) -> None:
        """The relay has lost a lane, or none came about."""
        lane = self._lanes[number]
        if lane.lost:
            return
        lane.lost = True
        lane.close()
        self._rest(lane)
        here, there = lane.way
        self._fail(lane.way, RelayFailed(f"the relays could not agree on a path from {here} to {there}", why=why))
        if (lane.way, why) not in self._told:
            self._told.add((lane.way, why))
            _log.warning("a stream has lost its path from %s to %s: %s", *(end or "any" for end in lane.way), why)

    def _rest(self, lane: _Lane) -> None:
        now = asyncio.get_running_loop().time()
        _, pause_s = self._resting.pop(lane.way, (0.0, DIAL_EVERY_S / 2))
        if now - lane.since < _LIVES_S:
            pause_s = min(2 * pause_s, _DIAL_AT_LEAST_EVERY_S)
            self._resting[lane.way] = (now + pause_s, pause_s)

    def close(self) -> None:
        """The session has ended."""
        self._closed = True
        for task in (self._keeping, *self._joining.values()):
            if task is not None:
                task.cancel()
        for lane in self._lanes.values():
            if not lane.lost:
                lane.close()

    async def _keep(self, prepared: Prepared, relay: Relay) -> None:
        pause_s = DIAL_EVERY_S
        while True:
            if self._changed.is_set():
                self._changed.clear()
                pause_s = _SOON_S
            if self._is_used():
                for way in self._missing():
                    self._have_join(relay, way, partial(self._dial_again, prepared, way))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._changed.wait()
            pause_s = min(2 * pause_s, DIAL_EVERY_S)

    def _missing(self) -> list[AddressPair]:
        """Paths that are wanted and have no lane, as many as may join."""
        alive = [lane for lane in self._lanes.values() if not lane.lost]
        # Where routing has decided, both with and without the address here.
        there = {*self._joining, *(way for lane in alive for way in lane.ways())}
        coming = len(self._joining)
        room = min(MAX_LANES - len(alive) - coming, MAX_LANE + 1 - len(self._lanes) - coming)
        now = asyncio.get_running_loop().time()
        there |= {way for way, (until, _) in self._resting.items() if now < until}
        return [way for way in self._wanted() if way not in there][: max(0, room)]

    def _wanted(self) -> Sequence[AddressPair]:
        """All that anybody wants, each once; what the session began with until somebody has said so."""
        return tuple(dict.fromkeys(way for ways in self._wishes.values() for way in ways)) or self._initial

    async def _dial_again(self, prepared: Prepared, way: AddressPair) -> Sequence[SocketChannel]:
        async with asyncio.timeout(DIAL_WITHIN_S):
            return await self._dial(prepared, way)

    def _have_join(
        self, relay: Relay, way: AddressPair, dial: Callable[[], Awaitable[Sequence[SocketChannel]]]
    ) -> None:
        self._joining[way] = asyncio.ensure_future(self._join(relay, way, dial))

    async def _join(
        self, relay: Relay, way: AddressPair, dial: Callable[[], Awaitable[Sequence[SocketChannel]]]
    ) -> None:
        try:
            connections = await dial()
            number = self._add(way, connections)
            try:
                await relay.add_lane(number, [one.stream for one in connections])
            except LimosaError as error:
                self.lose(number, str(error))
        except (LimosaError, OSError) as error:  # it is tried again; TimeoutError is one
            self._fail(way, error)
        finally:
            del self._joining[way]

    def _fail(self, way: AddressPair, fault: Exception) -> None:
        self._faults.setdefault(way, fault)
        if self._hopeless is not None and not self._hopeless.done() and self._faults.keys() >= set(self._initial):
            self._hopeless.set_exception(self._faults[self._initial[0]])
            self._hopeless.exception()  # it may have no listener any more

    def _add(self, way: AddressPair, connections: Sequence[SocketChannel]) -> int:
        number = len(self._lanes)
        lane = self._lanes[number] = _Lane(way, connections)
        self._keep_pace(lane)
        return number

    def _keep_pace(self, lane: _Lane) -> None:
        # The connection of a session that is not striped may be many, which no option reaches; QEMU keeps its cap.
        if self._striped and not lane.lost:
            tcp.pace(lane.forward.stream, self._pace(lane.way[1]))
