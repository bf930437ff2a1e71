"""What Limosa sets in the kernel's path manager while multichannel moves run, and how it is taken away again.

The rules:

- The first move raises the limits, the last one to end puts them back: never lower than they were, and only if nobody
  has changed them meanwhile. They are raised to the most there is, because the kernel lets a connection that has
  reached its limit never use a NIC that appears later.
- An address is announced by the first move that needs it and withdrawn after the last: to withdraw one closes the
  connections to it. One that an administrator has
  made an endpoint is used as it is and left alone: one without the flag ``signal`` is not announced, and keeps the
  kernel from taking another for its address, so that moves have a path less.
- Where a team of NICs spreads connections by their ports, an address is announced several times, with ports on which
  the kernel itself listens; who calls there without belonging to a connection is heard by nobody. Moves share those.
- The kernel itself notes each address from which it has connected to an announced one (an implicit endpoint). Those
  that came while moves ran go with the last move.
- What is about to be made is written down first, in the run folder. A daemon that was killed leaves that file, and the
  next one takes away what it says; a restart of the machine takes away both.

One thing is done after another, by a task of its own, so that whoever lets go does not have to wait.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec

from limosa.background import Background
from limosa.errors import LimosaError
from limosa.model import reading
from limosa.model.base import Model
from limosa.network.mptcp import FLAG_IMPLICIT, FLAG_SIGNAL, MOST, Endpoint, Limits
from limosa.settings import toml

_log = logging.getLogger(__name__)

Answer = TypeVar("Answer")


_NOT_SIGNALLED = (
    "%s is not announced, so that a move has one path less: somebody made it an endpoint without 'signal' "
    "(ip mptcp endpoint show)"
)

#: An address and a port, 0 for the connection's own.
Place = tuple[str, int]


class PathManager(Protocol):
    """What is used of :class:`limosa.network.mptcp.PathManager`."""

    async def endpoints(self) -> tuple[Endpoint, ...]:
        """All there are, whoever made them."""

    async def announce(self, address: str, port: int = 0) -> Endpoint:
        """Make an endpoint that is announced to the other end of all connections."""

    async def withdraw(self, endpoint: Endpoint) -> None:
        """Remove an endpoint."""

    async def limits(self) -> Limits:
        """The limits in force."""

    async def set_limits(self, limits: Limits) -> None:
        """Set both limits."""


class Record(Model, frozen=True):
    """The file: which places were made endpoints, the limits before and after they were raised, and the implicit
    endpoints there were before the first move. ``before`` is null while no move runs."""

    endpoints: tuple[Place, ...] = ()
    before: tuple[int, int] | None = None
    raised: tuple[int, int] | None = None
    implicit: tuple[str, ...] = ()


class Hold:
    """One move's claim. Made by :meth:`Endpoints.hold`."""

    def __init__(self, endpoints: Endpoints) -> None:
        self.places: set[Place] = set()
        self._endpoints = endpoints
        self.released = False

    def release(self) -> None:
        """Let go of everything, soon. May be repeated."""
        if not self.released:
            self.released = True
            self._endpoints.let_go(self)


class Endpoints:
    """The endpoints and limits of this host that are Limosa's."""

    def __init__(self, manager: PathManager, file: Path) -> None:
        self._manager = manager
        self._file = file
        self._record = Record()
        self._moves = 0
        self._users: Counter[Place] = Counter()
        self._ours: dict[Place, Endpoint] = {}
        self._lock = asyncio.Lock()
        self._background = Background()

    async def clean(self) -> None:
        """Take away what an earlier daemon left. Never raises: what cannot be done is logged."""
        try:
            left = reading.decode(self._file.read_bytes(), Record)
        except FileNotFoundError:
            return
        except (OSError, msgspec.MsgspecError) as error:
            _log.error("%s cannot be read: %s", self._file, error)
            return
        await self._undo(left)
        self._forget()

    async def hold(self, addresses: Iterable[str] = ()) -> Hold:
        """Have the limits raised and ``addresses`` announced, as far as the kernel has room for them.

        Raises :class:`NetworkError`; nothing is kept then.
        """
        hold = Hold(self)
        self._moves += 1
        try:
            async with self._lock:
                await self._begin()
            await self.announce(hold, addresses)
        except BaseException:
            hold.release()
            raise
        return hold

    async def announce(self, hold: Hold, addresses: Iterable[str], *, again: bool = False) -> None:
        """Announce addresses for a move. Raises :class:`NetworkError` if the kernel does not say what there is.

        What it refuses, such as more endpoints than it has room for, is logged: it costs a path and not the move.

        The other end connects to an address when it hears of it, and a new connection hears of all there are. If no NIC
        of its led there at that time, hearing of it ``again`` is what makes it try again. That costs the connections
        that are there, of any move, so it is only for what has changed.
        """
        async with self._lock:
            if hold.released:
                return
            made = {_place(one): one for one in await self._manager.endpoints() if not one.flags & FLAG_IMPLICIT}
            foreign = {place: one for place, one in made.items() if place not in self._ours}
            for place in ((address, 0) for address in addresses):
                self._use(hold, place)
                if place in foreign:
                    if not foreign[place].flags & FLAG_SIGNAL:
                        _log.warning(_NOT_SIGNALLED, place[0])
                elif again or place not in self._ours:
                    try:
                        await self._announce(place)
                    except LimosaError as error:
                        _log.warning("%s is not announced, so a move has one path less: %s", place[0], error)

    async def announce_ports(self, hold: Hold, address: str, count: int, free: Iterator[int]) -> None:
        """Announce an address with ``count`` further ports in all, so that the other end connects to each as well.

        Those of other moves are used again, others taken from ``free``. What the kernel refuses, such as more
        endpoints than it has room for, and that no port is free, is logged: it costs speed and not the move.
        """
        async with self._lock:
            if hold.released:
                return
            for place in [place for place in self._ours if place[0] == address and place[1]][:count]:
                self._use(hold, place)
            missing = count - sum(1 for place in hold.places if place[0] == address and place[1])
            for _ in range(missing):
                if (port := next(free, None)) is None:
                    _log.warning("no further port of %s is free, so that a move has fewer connections", address)
                    return
                self._use(hold, (address, port))
                try:
                    await self._announce((address, port))
                except LimosaError as error:
                    message = "%s port %d is not announced, so that a move has one connection less: %s"
                    _log.warning(message, address, port, error)

    def _use(self, hold: Hold, place: Place) -> None:
        if place not in hold.places:
            hold.places.add(place)
            self._users[place] += 1

    def let_go(self, hold: Hold) -> None:
        """See :meth:`Hold.release`."""
        self._moves -= 1
        self._users.subtract(hold.places)
        self._background.spawn(_logged(self._take_away()))

    async def idle(self) -> None:
        """Return when everything that was let go of has been taken away."""
        await self._background.idle()

    def later(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Do something with endpoints that nobody waits for; failures are logged."""
        self._background.spawn(_logged(work()))

    async def _begin(self) -> None:
        if self._record.before is not None:
            return
        before = await self._manager.limits()
        raised = before.raised_to(Limits(MOST, MOST))
        self._write(
            before=(before.subflows, before.accepted),
            raised=(raised.subflows, raised.accepted),
            implicit=tuple(one.address for one in await self._manager.endpoints() if one.flags & FLAG_IMPLICIT),
        )
        if raised != before:
            await self._manager.set_limits(raised)

    async def _announce(self, place: Place) -> None:
        if (old := self._ours.pop(place, None)) is not None:
            await _logged(self._manager.withdraw(old))  # if it is still there, the kernel refuses it a second time
        if place not in self._record.endpoints:
            self._write(endpoints=(*self._record.endpoints, place))
        self._ours[place] = await self._manager.announce(*place)

    async def _take_away(self) -> None:
        async with self._lock:
            unused = [place for place in self._record.endpoints if self._users[place] <= 0]
            kept = tuple(place for place in self._record.endpoints if place not in unused)
            over = self._moves == 0
            await self._undo(self._record if over else Record(endpoints=tuple(unused)))
            for place in unused:
                self._ours.pop(place, None)
                del self._users[place]
            if over:
                self._record = Record()
                self._forget()
            elif unused:
                self._write(endpoints=kept)

    async def _undo(self, record: Record) -> None:
        await _logged(self._withdraw(record))
        await _logged(self._put_back(record))

    async def _withdraw(self, record: Record) -> None:
        for one in await self._manager.endpoints():
            # With other flags it is not the one we made.
            made = _place(one) in record.endpoints and one.flags == FLAG_SIGNAL
            over = record.before is not None
            if made or (over and one.flags & FLAG_IMPLICIT and one.address not in record.implicit):
                # Somebody else may have removed it just now, which must not keep the others there.
                await _logged(self._manager.withdraw(one))

    async def _put_back(self, record: Record) -> None:
        if record.before is None or record.raised is None or record.before == record.raised:
            return
        if await self._manager.limits() == Limits(*record.raised):
            await self._manager.set_limits(Limits(*record.before))

    def _write(self, **changes: Any) -> None:
        """Replace the file; it need not outlive the machine. Raises :class:`StateError`."""
        self._record = msgspec.structs.replace(self._record, **changes)
        toml.write_atomically(self._file, msgspec.json.encode(self._record), durable=False)

    def _forget(self) -> None:
        try:
            self._file.unlink(missing_ok=True)
        except OSError as error:
            _log.error("%s cannot be removed: %s", self._file, error)


def _place(endpoint: Endpoint) -> Place:
    return endpoint.address, endpoint.port


async def _logged(work: Coroutine[Any, Any, None]) -> None:
    """Do what nobody could do anything about if it failed."""
    try:
        await work
    except LimosaError as error:
        _log.error("%s", error)
