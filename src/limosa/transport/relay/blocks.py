"""One stream of bytes over several lanes: which block goes over which lane, again if need be, and in order at the other
end. Pure: no sockets, no locks, and times come in as numbers.

A *lane* is a connection that keeps order, has a speed of its own, and may stand still or break. A block is known by its
place in the stream. :class:`Outgoing` gives each lane a block when it asks for one, so each carries what it can;
:class:`Incoming` puts them in order at the other end. Two things come back:

- how many blocks came over a lane, which frees our copies of them;
- how far the stream was read, which bounds what is under way to :data:`WINDOW_BYTES`, and so the memory of both ends.

A lane from which nothing came back for longer than it usually takes is *late*: what it has goes again over others, and
it is given nothing before it gets on. What a *lost* lane had goes again too. The last lane that is not late is not
called so, because there is nothing better to do than to wait for it.

Lanes come and go at any time. A number stands for one lane and is never used again, so that what is still heard of a
lost one is not taken for another's.
"""

from __future__ import annotations

import heapq
import struct
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

import xxhash

from limosa.transport.relay.errors import BrokenStream

#: The most one block carries.
BLOCK_BYTES = 256 * 1024
#: From what was read at the other end to the end of what may be sent.
WINDOW_BYTES = 8 * 1024 * 1024
#: A lane is late when nothing came back for this, and so many times what it usually takes, but no longer than the last.
_LATE_S = 0.1
_LATE_TIMES = 4
_LATE_AT_MOST_S = 1.0
#: What it takes is expected to be this at first, and then by so much what was seen last.
_USUAL_S = 0.25
_WEIGHT = 0.2

_FIELDS = struct.Struct("!QQII")
_CHECKSUM = struct.Struct("!Q")
HEADER_BYTES = _FIELDS.size + _CHECKSUM.size
_COUNT_MASK = 0xFFFFFFFF


class Header(NamedTuple):
    """What is said before a block. Without one, ``length`` is 0 and ``place`` says nothing."""

    place: int
    #: so much of the stream the other way was read
    read: int
    #: so many blocks came over this lane the other way, modulo 2^32
    came: int
    length: int

    def pack(self) -> bytes:
        """The bytes to send."""
        fields = _FIELDS.pack(self.place, self.read, self.came & _COUNT_MASK, self.length)
        return fields + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(fields))

    @classmethod
    def parse(cls, data: bytes) -> Header:
        """Raises :class:`BrokenStream` if it cannot be one."""
        fields = data[: _FIELDS.size]
        # Frames would not notice a wrong place: its bytes would be waited for, for ever.
        if _CHECKSUM.unpack_from(data, _FIELDS.size) != (xxhash.xxh3_64_intdigest(fields),):
            raise BrokenStream("what is said of a block is not what was sent: checksum differs")
        header = cls(*_FIELDS.unpack(fields))
        if header.length > BLOCK_BYTES:
            raise BrokenStream(f"a block of {header.length} bytes")
        return header


@dataclass(slots=True, eq=False)
class Block:
    """Bytes of the stream that begin at ``place``."""

    place: int
    data: bytes
    #: it came to the other end
    arrived: bool = False


@dataclass(slots=True, eq=False)
class _Flight:
    """A block on a lane. ``again``: it was given to others, too."""

    block: Block
    since: float
    again: bool = False


@dataclass(slots=True, eq=False)
class _Lane:
    flights: deque[_Flight] = field(default_factory=deque)
    came: int = 0
    came_at: float = 0.0
    usual_s: float = _USUAL_S
    late: bool = False

    def late_at(self) -> float | None:
        """When it will be late if nothing comes back; None: there is nothing to come."""
        if not self.flights:
            return None
        patience = min(_LATE_AT_MOST_S, _LATE_S + _LATE_TIMES * self.usual_s)
        return max(self.flights[0].since, self.came_at) + patience


class Outgoing:
    """What one end sends over its lanes, of which it has none at first."""

    def __init__(self) -> None:
        #: those that are not lost
        self._lanes: dict[int, _Lane] = {}
        self._end = 0
        self._read = 0
        #: not given to any lane yet
        self._new: deque[Block] = deque()
        #: by place, to be given again
        self._again: list[tuple[int, Block]] = []
        #: added and not arrived
        self.under_way_bytes = 0

    @property
    def lanes_left(self) -> int:
        """How many are not lost."""
        return len(self._lanes)

    @property
    def waiting_bytes(self) -> int:
        """What no lane has taken."""
        return sum(len(block.data) for block in self._new)

    def has_room(self) -> bool:
        """Whether another block may be added: one for each lane may wait, as far as the window reaches."""
        return len(self._new) < self.lanes_left and self._end + BLOCK_BYTES <= self._read + WINDOW_BYTES

    def add(self, data: bytes) -> None:
        """The next bytes of the stream, of which there is a copy here until they have arrived."""
        self._new.append(Block(self._end, data))
        self._end += len(data)
        self.under_way_bytes += len(data)

    def join(self, number: int) -> None:
        """Another lane, which has carried nothing yet."""
        self._lanes[number] = _Lane()

    def take(self, number: int, now: float) -> Block | None:
        """The next block for a lane that has room; None: there is none for it now."""
        self._look(now)
        lane = self._lanes.get(number)
        if lane is None or lane.late or (block := self._next()) is None:
            return None
        lane.flights.append(_Flight(block, now))
        return block

    def look_again_at(self) -> float | None:
        """When :meth:`take` may find something although nothing has happened; None: never."""
        good = self._good()
        times = [at for lane in good if (at := lane.late_at()) is not None]
        return min(times, default=None) if len(good) > 1 else None

    def on_header(self, number: int, header: Header, now: float) -> None:
        """The other end said this on a lane. Raises :class:`BrokenStream` if it cannot be so."""
        lane = self._lanes.get(number)
        # What a lane has brought before it was lost was given to others already.
        count = (header.came - lane.came) & _COUNT_MASK if lane is not None else 0
        if header.read > self._end or (lane is not None and count > len(lane.flights)):
            raise BrokenStream("the other relay has had more than was sent")
        self._read = max(self._read, header.read)
        if lane is not None and count:
            lane.came += count
            lane.came_at, lane.late = now, False
            for _ in range(count):
                self._arrived(lane, lane.flights.popleft(), now)

    def lose(self, number: int) -> None:
        """A lane has broken: it takes no more, and what it had goes again over others."""
        self._give_again(self._lanes.pop(number))

    def _look(self, now: float) -> None:
        """See which lanes are late."""
        for lane in self._good():
            at = lane.late_at()
            if at is not None and at < now and len(self._good()) > 1:
                lane.late = True
                self._give_again(lane)

    def _good(self) -> list[_Lane]:
        return [lane for lane in self._lanes.values() if not lane.late]

    def _give_again(self, lane: _Lane) -> None:
        for flight in lane.flights:
            if not flight.again and not flight.block.arrived:
                flight.again = True
                heapq.heappush(self._again, (flight.block.place, flight.block))

    def _next(self) -> Block | None:
        while self._again:
            _, block = heapq.heappop(self._again)
            if not block.arrived:
                return block
        return self._new.popleft() if self._new else None

    def _arrived(self, lane: _Lane, flight: _Flight, now: float) -> None:
        lane.usual_s += _WEIGHT * (now - flight.since - lane.usual_s)
        if not flight.block.arrived:
            flight.block.arrived = True
            self.under_way_bytes -= len(flight.block.data)


class Incoming:
    """What comes over lanes, in order."""

    def __init__(self) -> None:
        #: so much was read
        self.read = 0
        self._next = 0
        self._early: dict[int, bytes | bytearray] = {}
        self._ready: deque[bytes | bytearray] = deque()

    def put(self, place: int, data: bytes | bytearray) -> bool:
        """A block came. Returns whether there is more to read. Raises :class:`BrokenStream`."""
        if place + len(data) > self.read + WINDOW_BYTES:
            raise BrokenStream("more was sent than there is room for")
        if place >= self._next:
            self._early[place] = data
        before = self._next
        while (due := self._early.pop(self._next, None)) is not None:
            self._ready.append(due)
            self._next += len(due)
        return self._next > before

    def take(self) -> bytes | bytearray | None:
        """The next bytes of the stream, which are read now; None: they have not come yet."""
        if not self._ready:
            return None
        data = self._ready.popleft()
        self.read += len(data)
        return data
