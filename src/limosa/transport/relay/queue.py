"""What waits for the carrier, in order, and what of it is worth compressing. Pure: no sockets, no clock, no locks.

The bytes lie in a ring. A read from a QEMU goes where :meth:`Queue.room` says and becomes (part of) a chunk with
:meth:`Queue.append`: as long as nobody has begun with the last chunk, what follows on the same channel is added to it,
so chunks are small when the carrier is idle and large when it is not, and no byte ever waits for a chunk to fill.

A chunk may be *offered* to the worker. If the worker has begun with it, it must be sent as the worker made it, because
the window of the compressed stream contains it from then on; else the offer can be withdrawn and the chunk goes raw.
Chunks are offered in the order of the queue, which is the order in which the worker makes them.

Which chunk is offered follows from one thought: no chunk may arrive later because it was compressed.
:meth:`Queue.worth` gives the first chunk that is over the carrier, by its measured rate, sooner if the worker is waited
for than if it goes raw. On a fast carrier that is none, or one far back in the queue; on a slow one every chunk.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto

from limosa.transport.relay.frames import MAX_GROWTH_BYTES, MAX_RAW_BYTES, Kind

#: A read that has less room than this waits until there is more.
_LEAST_READ_BYTES = 32 * 1024
#: What may wait once a guest is about to stand still.
SHORT_BYTES = 256 * 1024
#: What it takes to wake the worker and to hear from it.
_TELLING_S = 0.0001
_LEAST_CHUNK_BYTES = 64 * 1024


class State(Enum):
    """How a chunk stands with the worker."""

    WAITING = auto()
    OFFERED = auto()
    DONE = auto()


@dataclass(slots=True, eq=False)
class Chunk:
    """Bytes of one channel that go into one frame, or the mark that the channel ended (``kind``)."""

    channel: int
    kind: Kind
    #: position in the ring; grows for ever
    start: int
    length: int = 0
    state: State = State.WAITING
    #: once DONE: the compressed length, and the checksum of the raw bytes
    wire_length: int = 0
    digest: int = 0
    #: processor time it took
    cpu_s: float = 0.0


class Queue:
    """Chunks in the order in which they will be sent, in a ring of ``size`` bytes."""

    def __init__(self, size: int) -> None:
        self.size = size
        #: bytes that wait, the chunk being sent included
        self.waiting_bytes = 0
        self._chunks: deque[Chunk] = deque()
        self._begin = 0
        self._end = 0
        self._short = False
        self._chunk_limit = MAX_RAW_BYTES
        self._sending = False
        #: the chunk behind which a read is under way
        self._growing: Chunk | None = None

    def __len__(self) -> int:
        return len(self._chunks)

    def __iter__(self) -> Iterator[Chunk]:
        return iter(self._chunks)

    def offset(self, chunk: Chunk) -> int:
        """Where a chunk's bytes lie."""
        return chunk.start % self.size

    def set_short(self, short: bool) -> None:
        """Whether only a little may wait, from now on; what waits already stays."""
        self._short = short

    def set_chunk_limit(self, limit: int) -> None:
        """How large a chunk may grow from now on, within reason."""
        most = SHORT_BYTES // 2 if self._short else MAX_RAW_BYTES
        self._chunk_limit = max(_LEAST_CHUNK_BYTES, min(limit, most))

    # --- filling ---

    def has_room(self, channel: int) -> bool:
        """Whether something may be read from ``channel`` now."""
        return self._room_behind(channel) >= _LEAST_READ_BYTES or self._room_anew() >= _LEAST_READ_BYTES

    def room(self, channel: int) -> tuple[int, int]:
        """Where, and how much, may be read from ``channel`` now: offset and length, which is 0 if nothing may.

        Each read must be followed by :meth:`append` before the next.
        """
        behind = self._room_behind(channel)
        if behind >= _LEAST_READ_BYTES:
            self._growing = self._chunks[-1]
            return self._end % self.size, behind
        self._growing = None
        anew = self._room_anew()
        return (self._next_start() % self.size, anew) if anew >= _LEAST_READ_BYTES else (0, 0)

    def append(self, channel: int, length: int) -> None:
        """``length`` bytes were read to where :meth:`room` said; 0: none came."""
        growing, self._growing = self._growing, None
        if length == 0:
            return
        if growing is not None and self._chunks and self._grows(growing, channel):
            growing.length += length
        else:
            start = self._end if growing is not None else self._next_start()
            self._chunks.append(Chunk(channel, Kind.DATA, start, length))
            self._end = start
        self._end += length
        self.waiting_bytes += length

    def mark(self, channel: int, kind: Kind) -> None:
        """Say that a channel ended, behind what was read from it."""
        self._chunks.append(Chunk(channel, kind, self._end))

    # --- emptying ---

    def head(self) -> Chunk | None:
        """What is next to be sent."""
        return self._chunks[0] if self._chunks else None

    def begin(self) -> Chunk:
        """The head is being sent from now on, and not changed any more."""
        self._sending = True
        return self._chunks[0]

    def pop(self) -> Chunk:
        """The head was sent; its room is free."""
        chunk = self._chunks.popleft()
        self._sending = False
        self.waiting_bytes -= chunk.length
        self._begin = self._chunks[0].start if self._chunks else self._end
        return chunk

    # --- compressing ---

    def worth(self, idle_after_s: float, rate: float, pace: float, remainder: float) -> Chunk | None:
        """The next chunk to offer to the worker, or None.

        ``idle_after_s``: for so long the carrier is busy with what was sent already. ``rate``: what it carries, bytes a
        second. ``pace``: seconds the worker takes for a byte. ``remainder``: what compression left of a byte of others.
        """
        reached_after_s = idle_after_s
        done_after_s = 0.0
        # The worker's order is the queue's, so nothing before what was offered already may be offered now.
        offered = [place for place, chunk in enumerate(self._chunks) if chunk.state is not State.WAITING]
        for place, chunk in enumerate(self._chunks):
            raw_after_s = reached_after_s + chunk.length / rate
            compressed_after_s = (
                max(reached_after_s, done_after_s + _TELLING_S + chunk.length * pace) + chunk.length * remainder / rate
            )
            if chunk.state is State.OFFERED:
                done_after_s += _TELLING_S + chunk.length * pace
                reached_after_s = compressed_after_s
            elif chunk.state is State.DONE:
                reached_after_s += chunk.wire_length / rate
            elif (
                place > (offered[-1] if offered else -1)
                and self._is_free(place, chunk)
                and compressed_after_s < raw_after_s
            ):
                return chunk
            else:
                reached_after_s = raw_after_s
        return None

    def _is_free(self, place: int, chunk: Chunk) -> bool:
        """Whether a chunk that waits has data to compress, and nobody is at it."""
        return chunk.kind is Kind.DATA and chunk is not self._growing and not (place == 0 and self._sending)

    # --- inside ---

    def _room_behind(self, channel: int) -> int:
        """What may be added to the last chunk."""
        if not self._chunks or not self._grows(self._chunks[-1], channel):
            return 0
        return min(self._free(self._end), self._chunk_limit - self._chunks[-1].length)

    def _room_anew(self) -> int:
        """What a new chunk may hold."""
        return min(self._free(self._next_start()), self._chunk_limit)

    def _grows(self, chunk: Chunk, channel: int) -> bool:
        """Whether bytes of ``channel`` can be added to ``chunk``."""
        return (
            chunk is self._chunks[-1]
            and chunk.channel == channel
            and chunk.kind is Kind.DATA
            and chunk.state is State.WAITING
            and not (self._sending and len(self._chunks) == 1)
        )

    def _next_start(self) -> int:
        """Where the next chunk begins: what the last one may grow by when compressed stays free between them, and a
        chunk does not run over the end of the ring."""
        start = self._end + MAX_GROWTH_BYTES
        left = self.size - start % self.size
        return start if left >= MAX_GROWTH_BYTES + 2 * _LEAST_READ_BYTES else start + left

    def _free(self, start: int) -> int:
        """How many bytes may be read to ``start``."""
        in_ring = self._begin + self.size - start
        to_end = self.size - start % self.size
        allowed = (SHORT_BYTES if self._short else self.size) - self.waiting_bytes
        return min(min(in_ring, to_end) - MAX_GROWTH_BYTES, allowed)
