"""What waits for the carrier, in order, and what of it is worth compressing. Pure: no sockets, no clock, no locks.

The bytes lie in slots, one for each chunk. A read from a QEMU goes where :meth:`Queue.room` says and becomes (part of)
a chunk with :meth:`Queue.append`: as long as nobody has begun with the last chunk, what follows on the same channel is
added to it, so chunks are small when the carrier is idle and large when it is not, and no byte waits for a chunk to
fill.

A channel whose guest is about to stand still is *hurried*: what is read from it goes ahead of all other channels'
chunks, and little of it waits.

Pages that the destination has are left out of a chunk when it is *condensed* (``pages``), which is done in the order of
the queue, for that is the order in which the destination keeps things. What got ahead of chunks that are condensed
already goes as it is. A chunk that is condensed does not grow any more.

A condensed chunk may be *offered* to the worker, and withdrawn as long as the worker has not begun with it. If it has,
and does not get on, the chunk goes as it is and is *late*: its slot stays taken as long as the worker reads it.

Which chunk is offered follows from one thought: no chunk may arrive later because it was compressed.
:meth:`Queue.worth` gives the first chunk that is over the carrier, by its measured rate, sooner if the worker is waited
for than if it goes as it is. On a fast carrier that is none, or one far back in the queue; on a slow one every chunk.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto
from itertools import takewhile

from limosa.transport.relay.frames import MAX_RAW_BYTES, Kind

#: A chunk that has less room than this does not grow any more.
_LEAST_READ_BYTES = 16 * 1024
#: The least that may wait: the worker needs something to be at while something is sent.
_LEAST_WAITING_BYTES = 64 * 1024
#: What it takes to wake the worker and to hear from it.
_TELLING_S = 0.0001
#: It is planned to take longer than it does on average by so much: what is late was in vain.
_SAFETY = 1.5
#: Where it begins anew it begins with a lead: this part of all that waits. Others may take so much time from it before
#: anything is late.
_LEAD = 0.1
_LEAST_CHUNK_BYTES = 32 * 1024
#: What is left of a chunk may be too little to tell anybody of.
_LEAST_CONTENT_BYTES = 2048
#: What hurries finds a slot.
_KEPT_SLOTS = 1
_NO_SLOT = -1


class State(Enum):
    """How a chunk stands with the worker."""

    WAITING = auto()
    OFFERED = auto()
    DONE = auto()
    #: begun, but not waited for: it goes as it is, and the worker reads its slot
    LATE = auto()
    #: was late, and the worker is done with it
    LEFT = auto()


_WITH_WORKER = (State.OFFERED, State.DONE)


@dataclass(slots=True, eq=False)
class Chunk:
    """Bytes of one channel that go into one frame, or the mark that the channel ended (``kind``)."""

    channel: int
    kind: Kind
    slot: int = _NO_SLOT
    length: int = 0
    state: State = State.WAITING
    #: the checksum of all its channel has said up to its end
    said: int = 0
    #: of its content in the slot, once it is condensed
    content_length: int = 0
    #: of what the worker has made of that, if it is done
    compressed_length: int = 0


class Queue:
    """Chunks in the order in which they will be sent, in so many slots of :data:`MAX_RAW_BYTES`."""

    def __init__(self, slots: int) -> None:
        #: bytes that wait, the chunk being sent included
        self.waiting_bytes = 0
        self._free = list(range(slots))
        self._chunks: deque[Chunk] = deque()
        self._waiting_limit: int | None = None
        self._hurried: set[int] = set()
        self._hurried_limit = _LEAST_WAITING_BYTES
        self._chunk_limit = MAX_RAW_BYTES
        self._sending = False
        #: a read is under way: behind this chunk, or to this slot
        self._growing: Chunk | None = None
        self._filling = _NO_SLOT

    def __len__(self) -> int:
        return len(self._chunks)

    def __iter__(self) -> Iterator[Chunk]:
        return iter(self._chunks)

    def set_waiting_limit(self, limit: int | None) -> None:
        """How much may wait from now on, within reason; None: all there are slots for. What waits already stays."""
        self._waiting_limit = max(_LEAST_WAITING_BYTES, limit) if limit is not None else None

    def set_hurried_limit(self, limit: int) -> None:
        """How much of each hurried channel may wait from now on, within reason."""
        self._hurried_limit = max(_LEAST_WAITING_BYTES, limit)

    def set_hurried(self, channel: int, hurried: bool) -> None:
        """Whether what is read from this channel goes ahead of what others have waiting, from now on."""
        if hurried:
            self._hurried.add(channel)
        else:
            self._hurried.discard(channel)

    def hurries(self, channel: int) -> bool:
        """Whether this channel does."""
        return channel in self._hurried

    @property
    def any_hurries(self) -> bool:
        """Whether there is a channel that does."""
        return bool(self._hurried)

    def set_chunk_limit(self, limit: int) -> None:
        """How large a chunk may grow from now on, within reason."""
        most = MAX_RAW_BYTES if self._waiting_limit is None else min(MAX_RAW_BYTES, self._waiting_limit // 2)
        self._chunk_limit = max(_LEAST_CHUNK_BYTES, min(limit, most))

    # --- filling ---

    def has_room(self, channel: int) -> bool:
        """Whether something may be read from ``channel`` now."""
        return self._behind(channel) is not None or self._room_anew(channel) > 0

    def room(self, channel: int) -> tuple[int, int, int]:
        """Where, and how much, may be read from ``channel`` now: slot, offset in it and length, which is 0 if nothing
        may.

        Each read must be followed by :meth:`append` before the next.
        """
        if (growing := self._behind(channel)) is not None:
            self._growing = growing
            return growing.slot, growing.length, self._room_in(growing)
        if length := self._room_anew(channel):
            self._filling = self._free.pop()
        return self._filling, 0, length

    def append(self, channel: int, length: int, said: int = 0) -> None:
        """``length`` bytes were read to where :meth:`room` said, which makes ``said`` the checksum of all the channel
        has said; 0: none came."""
        growing, self._growing = self._growing, None
        slot, self._filling = self._filling, _NO_SLOT
        if growing is not None and length:
            growing.length += length
            growing.said = said
        elif length:
            self._chunks.insert(self._place(channel), Chunk(channel, Kind.DATA, slot, length, said=said))
        elif slot != _NO_SLOT:
            self._free.append(slot)
        self.waiting_bytes += length

    def mark(self, channel: int, kind: Kind) -> None:
        """Say that a channel ended, behind what was read from it."""
        self._chunks.append(Chunk(channel, kind))

    # --- emptying ---

    def head(self) -> Chunk | None:
        """What is next to be sent; None also while something is being read into it."""
        return self._chunks[0] if self._chunks and self._chunks[0] is not self._growing else None

    def begin(self) -> Chunk:
        """The head is being sent from now on, and not changed any more."""
        self._sending = True
        return self._chunks[0]

    def pop(self) -> Chunk:
        """The head was sent; its slot is free, unless the worker still reads it."""
        chunk = self._chunks.popleft()
        self._sending = False
        self.waiting_bytes -= chunk.length
        if chunk.state is not State.LATE:
            self._release(chunk)
        return chunk

    def leave(self, chunk: Chunk) -> None:
        """The worker is done with a late chunk: its slot is free, unless the chunk is being sent out of it."""
        chunk.state = State.LEFT
        if chunk not in self._chunks:
            self._release(chunk)

    # --- compressing ---

    def to_condense(self, until: Chunk | None = None) -> list[Chunk]:
        """Those that are next to be condensed, in order: up to ``until``, or those that would not grow any more."""
        behind = takewhile(lambda chunk: not chunk.content_length, reversed(self._chunks))
        able = [chunk for chunk in behind if self._is_free(chunk)][::-1]
        if until is None:
            return list(takewhile(lambda chunk: self._behind(chunk.channel) is not chunk, able))
        return able[: able.index(until) + 1] if until in able else []

    def worth(self, idle_after_s: float, rate: float, pace: float, remainder: float) -> Chunk | None:
        """The next chunk to offer to the worker, or None; it may have to be condensed before.

        ``idle_after_s``: for so long the carrier is busy with what was sent already. ``rate``: what it carries, bytes a
        second. ``pace``: seconds the worker takes for a byte. ``remainder``: what compression left of a byte of others.
        """
        found: Chunk | None = None
        reached_after_s = idle_after_s
        is_ahead = any(chunk.state in _WITH_WORKER for chunk in self._chunks)
        done_after_s = 0.0 if is_ahead else _LEAD * (idle_after_s + self.waiting_bytes / rate)
        for chunk in self._chunks:
            if chunk.state is State.DONE:
                found = None
                reached_after_s += chunk.compressed_length / rate
                continue
            length = chunk.content_length or chunk.length
            plain_after_s = reached_after_s + length / rate
            made_after_s = done_after_s + _TELLING_S + _SAFETY * length * pace
            compressed_after_s = max(reached_after_s, made_after_s) + length * remainder / rate
            if chunk.state is State.OFFERED:
                # The worker does them in the order in which they are offered.
                found = None
                done_after_s, reached_after_s = made_after_s, compressed_after_s
                continue
            if chunk.content_length and found is not None and not found.content_length:
                found = None  # that one is condensed no more
            is_enough = not 0 < chunk.content_length <= _LEAST_CONTENT_BYTES
            if found is None and compressed_after_s < plain_after_s and is_enough and self._is_free(chunk):
                found = chunk
            reached_after_s = plain_after_s
        return found

    def _is_free(self, chunk: Chunk) -> bool:
        """Whether a chunk has data, and nobody is at it."""
        is_taken = chunk.state is not State.WAITING or chunk is self._growing or self._is_sent(chunk)
        return chunk.kind is Kind.DATA and not is_taken

    def _is_sent(self, chunk: Chunk) -> bool:
        """Whether it is just being sent."""
        return self._sending and chunk is self._chunks[0]

    # --- inside ---

    def _release(self, chunk: Chunk) -> None:
        if chunk.slot != _NO_SLOT:
            self._free.append(chunk.slot)
            chunk.slot = _NO_SLOT

    def _behind(self, channel: int) -> Chunk | None:
        """The chunk to which more of a channel may be added."""
        chunk = self._last(channel)
        return chunk if chunk is not None and self._grows(chunk) and self._room_in(chunk) > 0 else None

    def _room_in(self, chunk: Chunk) -> int:
        """What may be added to a chunk that grows."""
        return _enough(min(self._chunk_limit - chunk.length, self._allowed(chunk.channel)))

    def _room_anew(self, channel: int) -> int:
        """What a new chunk may hold."""
        kept = 0 if channel in self._hurried else _KEPT_SLOTS
        return _enough(min(self._chunk_limit, self._allowed(channel))) if len(self._free) > kept else 0

    def _allowed(self, channel: int) -> int:
        """How much more of a channel may wait."""
        if channel in self._hurried:
            return self._hurried_limit - sum(chunk.length for chunk in self._chunks if chunk.channel == channel)
        return MAX_RAW_BYTES if self._waiting_limit is None else self._waiting_limit - self.waiting_bytes

    def _last(self, channel: int) -> Chunk | None:
        """The chunk behind which bytes of a channel go, if it is of that channel."""
        if channel in self._hurried:
            return next((chunk for chunk in reversed(self._chunks) if chunk.channel == channel), None)
        return self._chunks[-1] if self._chunks and self._chunks[-1].channel == channel else None

    def _place(self, channel: int) -> int:
        """Where in the queue a new chunk of a channel goes."""
        if channel not in self._hurried:
            return len(self._chunks)
        own = [place for place, chunk in enumerate(self._chunks) if chunk.channel == channel]
        return own[-1] + 1 if own else int(self._sending)

    def _grows(self, chunk: Chunk) -> bool:
        """Whether bytes can be added to ``chunk``."""
        return chunk.kind is Kind.DATA and not chunk.content_length and not self._is_sent(chunk)


def _enough(length: int) -> int:
    return length if length >= _LEAST_READ_BYTES else 0
