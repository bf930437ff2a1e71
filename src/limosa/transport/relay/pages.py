"""Pages that were sent before, of whichever VM, are not sent again. Pure.

A chunk is *condensed* to a list of those of its pages that the destination has, and all other bytes: its *content*.
The destination keeps the contents that come in so much memory as was agreed, round and round (:class:`Keeper`). The
source does not: it knows where everything comes to lie there, and has a digest of each page in it (:class:`Finder`).
So contents must come in the order in which chunks were condensed; what comes otherwise is not kept.

Where pages lie in a chunk is read off QEMU's stream of guest memory (:func:`pages_in`). That is a guess, for a chunk
may begin and end anywhere; a wrong one costs what it does not find, and whatever is condensed comes out as it went in.

The digest is XXH3-128 with a seed that only the source's relay knows, so a guest cannot make pages that look like
another's. Should two look alike nevertheless, the checksum of what the channel has said differs, and the session ends.
"""

from __future__ import annotations

import mmap
import re
import secrets
import struct
from collections import deque
from contextlib import suppress

import xxhash

from limosa.transport.relay.errors import BrokenStream
from limosa.transport.relay.frames import HEAD_BYTES, MAX_CONTENT_BYTES, MAX_RAW_BYTES

PAGE_BYTES = 4096
#: How many pages are left out, before all else in a content.
_COUNT = struct.Struct("!I")
assert _COUNT.size == HEAD_BYTES
#: Of each page that is left out: how many bytes are between it and the one before, and where the destination has it.
_ENTRY = struct.Struct("!II")

# QEMU says 64 bits before each page: its address, whose low bits are 0, and flags there (RAM_SAVE_FLAG_* in
# migration/ram.c). Bit 5: it is of the same block as the page before. With bit 3 all of the page follows; with bit 1
# one byte, which fills it. What else may stand where a page may begin: with bit 3 or 1 alone, the block's name; with
# bit 4, the end of a section.
_WORD = struct.Struct("!Q")
_FLAGS = 0xFFF
_WHOLE, _FILLED = 0x28, 0x22
_POSSIBLE = frozenset((_WHOLE, _FILLED, 0x08, 0x02, 0x10))
#: QEMU's addresses within a block are smaller.
_MOST_ADDRESS = 1 << 48
_WHOLE_BYTES, _FILLED_BYTES = _WORD.size + PAGE_BYTES, _WORD.size + 1
_LOW_BYTES = re.compile(b"[" + b"".join(b"\\x%x0" % high for high in range(16)) + rb"][\x22\x28]")
#: If no page begins within so much, what comes is something else.
_LOOK_BYTES = 3 * _WHOLE_BYTES
#: So many pages in a row are looked at together.
_ROW = 128


def pages_in(data: memoryview) -> list[int]:
    """Where whole pages begin in a chunk, in order, as far as it can be told."""
    found: list[int] = []
    at = _first(data, 0)
    while at is not None:
        if whole := _row(data, at, _WHOLE, _WHOLE_BYTES):
            end = at + whole * _WHOLE_BYTES
            found.extend(range(at + _WORD.size, end, _WHOLE_BYTES))
            at = end
        elif filled := _row(data, at, _FILLED, _FILLED_BYTES):
            at += filled * _FILLED_BYTES
        else:
            at = _first(data, at)
    return found


def _row(data: memoryview, at: int, flags: int, size: int) -> int:
    """How many pages of that kind follow one another from ``at``, up to :data:`_ROW`; none that is cut off."""
    low_bytes = bytes(data[at + _WORD.size - 1 :: size][:_ROW])
    alike = len(low_bytes) - len(low_bytes.lstrip(bytes((flags,))))
    return min(alike, (len(data) - at) // size)


def _first(data: memoryview, begin: int) -> int | None:
    """The first place from ``begin`` that looks like the words before a page, with others where the page ends."""
    for low in _LOW_BYTES.finditer(data, begin, min(begin + _LOOK_BYTES, len(data))):
        at = low.end() - _WORD.size
        if at >= begin and _is_possible(data, at):
            size = _WHOLE_BYTES if data[at + 7] == _WHOLE else _FILLED_BYTES
            following = at + size
            if following > len(data):
                return None
            if following + _WORD.size > len(data) or _is_possible(data, following):
                return at
    return None


def _is_possible(data: memoryview, at: int) -> bool:
    (word,) = _WORD.unpack_from(data, at)
    return word & _FLAGS in _POSSIBLE and word < _MOST_ADDRESS


class Finder:
    """The source's end: knows which pages the destination has where in its ``window`` of bytes."""

    def __init__(self, window: int) -> None:
        self._seed = secrets.randbits(64)
        #: where the destination has a page, by digest
        self._places: dict[bytes, int] = {}
        #: the same, in the order in which they came
        self._kept: deque[tuple[bytes, int]] = deque()
        self._window = window
        self._at = 0

    def condense(self, room: memoryview) -> int:
        """Put a chunk's content in its place: the length of what is to be sent from the beginning of ``room``, where
        the chunk lies behind :data:`HEAD_BYTES` that are free.

        A chunk with no page that is known stays where it is.
        """
        data = room[HEAD_BYTES:]
        begins = pages_in(data)
        digest_of, seed = xxhash.xxh3_128_digest, self._seed
        digests = [digest_of(data[begin : begin + PAGE_BYTES], seed) for begin in begins]
        self._forget(len(room))
        places = list(map(self._places.get, digests))
        known = len(places) - places.count(None)
        # Where the chunk's first byte would come to lie there, for all that is left out before what is looked at.
        base = self._at + HEAD_BYTES + known * _ENTRY.size
        new: list[tuple[bytes, int]] = []
        entries: list[bytes] = []
        rest: list[memoryview] = []
        done = 0
        for begin, digest, place in zip(begins, digests, places, strict=True):
            if place is None:
                new.append((digest, base + begin))
            else:
                entries.append(_ENTRY.pack(begin - done, place))
                rest.append(data[done:begin])
                done = begin + PAGE_BYTES
                base -= PAGE_BYTES
        # One that is twice in a chunk is kept twice, and forgotten with the first.
        self._places.update(new)
        self._kept.extend(new)
        _COUNT.pack_into(room, 0, known)
        size = len(room)
        if known:
            content = b"".join((room[:HEAD_BYTES], *entries, *rest, data[done:]))
            size = len(content)
            room[:size] = content
        self._at += size
        return size

    def _forget(self, size: int) -> None:
        """Forget pages that the destination no longer has when the next ``size`` bytes have come."""
        at = _wrapped(self._at, self._window)
        if at < self._at:
            self._drop(self._at, self._window)
        self._drop(at, at + size)
        self._at = at

    def _drop(self, begin: int, end: int) -> None:
        """Forget the oldest pages, which lie there."""
        while self._kept and begin <= self._kept[0][1] < end:
            self._places.pop(self._kept.popleft()[0], None)


class Keeper:
    """The destination's end: keeps what came last, as much as goes into a ``window`` of bytes."""

    def __init__(self, window: int) -> None:
        # It takes no memory before it is written; and private memory comes faster than shared.
        memory = mmap.mmap(-1, window, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # this kernel has none
            memory.madvise(mmap.MADV_HUGEPAGE)
        self._memory = memoryview(memory)
        self._at = 0
        #: as far as it was ever written
        self._end = 0
        self._content = self._memory[:0]
        self._buffer = memoryview(bytearray(MAX_RAW_BYTES))

    def room(self, size: int) -> memoryview:
        """Where the next content is to be written, of so many bytes, at most :data:`MAX_CONTENT_BYTES`."""
        begin = _wrapped(self._at, len(self._memory))
        self._at = begin + size
        self._end = max(self._end, self._at)
        self._content = self._memory[begin : self._at]
        return self._content

    def restore(self, length: int) -> memoryview:
        """The ``length`` bytes of the chunk whose content was written, until the next call of either.

        Raises :class:`BrokenStream`; no more can be restored then.
        """
        content = self._content
        try:
            (known,) = _COUNT.unpack_from(content)
            if not known:
                # All of it is new, and this is what it was.
                if len(content) != HEAD_BYTES + length:
                    raise ValueError(length)
                return content[HEAD_BYTES:]
            data = self._buffer[:length]
            self._fill(data, content, HEAD_BYTES + known * _ENTRY.size)
        except (struct.error, ValueError) as error:
            raise BrokenStream("what was condensed has another length than was said") from error
        return data

    def _fill(self, data: memoryview, content: memoryview, read: int) -> None:
        if read > len(content):
            raise ValueError(read)
        written = 0
        for gap, place in _ENTRY.iter_unpack(content[HEAD_BYTES:read]):
            if place + PAGE_BYTES > self._end:
                raise BrokenStream("a page is referred to that was never sent")
            begin = written + gap
            data[written:begin] = content[read : read + gap]
            read += gap
            written = begin + PAGE_BYTES
            data[begin:written] = self._memory[place : place + PAGE_BYTES]
        data[written:] = content[read:]


def _wrapped(at: int, window: int) -> int:
    """Where the next chunk comes to lie: at the beginning again if the largest would not go behind the last one."""
    return at if at + MAX_CONTENT_BYTES <= window else 0
