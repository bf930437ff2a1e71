"""Pages that were sent before, of whichever VM, are not sent again. Pure.

Both ends give the new pages that go through the compressed stream places in so much memory as was agreed, round and
round: the source keeps a digest of each (:class:`Finder`), the destination the page itself (:class:`Keeper`). A chunk
is *condensed* to a list of its pages, each new or the place of one that the destination has, and the bytes that are not
of known pages. Places are given in the order of the stream, so both ends give the same without a word.

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

import xxhash

from limosa.transport.relay.errors import BrokenStream

PAGE_BYTES = 4096
_COUNT = struct.Struct("!I")
#: Of each page: how many bytes lie between it and the one before, and its place, or that it is new.
_ENTRY = struct.Struct("!II")
_NEW = 0xFFFFFFFF

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


def pages_in(data: memoryview) -> list[int]:
    """Where whole pages begin in a chunk, in order, as far as it can be told."""
    found: list[int] = []
    at = _first(data, 0)
    while at is not None and at + _WORD.size <= len(data):
        (word,) = _WORD.unpack_from(data, at)
        if word & _FLAGS == _WHOLE:
            if at + _WHOLE_BYTES > len(data):
                break
            found.append(at + _WORD.size)
            at += _WHOLE_BYTES
        elif word & _FLAGS == _FILLED:
            at += _FILLED_BYTES
        else:
            at = _first(data, at)
    return found


def _first(data: memoryview, begin: int) -> int | None:
    """The first place from ``begin`` that looks like the words before a page, with others where the page ends."""
    for low in _LOW_BYTES.finditer(data, begin, min(begin + _LOOK_BYTES, len(data))):
        at = low.end() - _WORD.size
        if at >= begin and _is_possible(data, at):
            following = at + (_WHOLE_BYTES if data[at + 7] == _WHOLE else _FILLED_BYTES)
            if following + _WORD.size > len(data) or _is_possible(data, following):
                return at
    return None


def _is_possible(data: memoryview, at: int) -> bool:
    (word,) = _WORD.unpack_from(data, at)
    return word & _FLAGS in _POSSIBLE and word < _MOST_ADDRESS


class Finder:
    """The source's end: knows which of the last ``pages`` new ones are kept where."""

    def __init__(self, pages: int) -> None:
        self._seed = secrets.randbits(64)
        self._places: dict[bytes, int] = {}
        #: by place
        self._digests: list[bytes] = []
        self._pages = pages
        self._next = 0

    def condense(self, data: memoryview) -> bytes:
        """What to send instead of a chunk."""
        entries: list[bytes] = []
        rest: list[memoryview] = []
        done = sent = 0
        for begin in pages_in(data):
            end = begin + PAGE_BYTES
            digest = xxhash.xxh3_128_digest(data[begin:end], self._seed)
            place = self._places.get(digest)
            if place is None:
                self._keep(digest)
                entries.append(_ENTRY.pack(begin - done, _NEW))
            else:
                entries.append(_ENTRY.pack(begin - done, place))
                rest.append(data[sent:begin])
                sent = end
            done = end
        rest.append(data[sent:])
        return b"".join((_COUNT.pack(len(entries)), *entries, *rest))

    def _keep(self, digest: bytes) -> None:
        if len(self._digests) < self._pages:
            self._digests.append(digest)
        else:
            del self._places[self._digests[self._next]]
            self._digests[self._next] = digest
        self._places[digest] = self._next
        self._next = (self._next + 1) % self._pages


class Keeper:
    """The destination's end: keeps the last ``pages`` new ones."""

    def __init__(self, pages: int) -> None:
        # It takes no memory before it is written; and private memory comes faster than shared, or huge pages of it.
        memory = mmap.mmap(-1, pages * PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._memory = memoryview(memory)
        self._pages = pages
        self._kept = 0

    def restore(self, condensed: memoryview, into: memoryview) -> None:
        """Fill ``into`` with what was condensed. Raises :class:`BrokenStream`; no more can be restored then."""
        try:
            self._restore(condensed, into)
        except (struct.error, ValueError) as error:
            raise BrokenStream("what was condensed has another length than was said") from error

    def _restore(self, condensed: memoryview, into: memoryview) -> None:
        (count,) = _COUNT.unpack_from(condensed)
        read = _COUNT.size + count * _ENTRY.size
        entries = _ENTRY.iter_unpack(condensed[_COUNT.size : read])
        written = 0
        for gap, place in entries:
            end = written + gap
            into[written:end] = condensed[read : read + gap]
            read += gap
            written = end + PAGE_BYTES
            if place == _NEW:
                page = condensed[read : read + PAGE_BYTES]
                read += PAGE_BYTES
                self._keep(page)
            else:
                page = self._page(place)
            into[end:written] = page
        into[written:] = condensed[read:]

    def _page(self, place: int) -> memoryview:
        if place >= min(self._kept, self._pages):
            raise BrokenStream(f"page {place} was never sent")
        return self._memory[place * PAGE_BYTES : (place + 1) * PAGE_BYTES]

    def _keep(self, page: memoryview) -> None:
        begin = self._kept % self._pages * PAGE_BYTES
        self._memory[begin : begin + PAGE_BYTES] = page
        self._kept += 1
