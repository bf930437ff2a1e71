"""Pages in QEMU's stream: found wherever a chunk begins, known again, and whatever is condensed comes out as it was."""

from __future__ import annotations

import random
import struct
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limosa.transport.relay.errors import BrokenStream
from limosa.transport.relay.frames import HEAD_BYTES, MAX_CONTENT_BYTES
from limosa.transport.relay.pages import PAGE_BYTES, Finder, Keeper, pages_in

NOISE = random.Random(2)
WHOLE, FILLED, NAMED = 0x28, 0x22, 0x08


def whole(number: int) -> bytes:
    return (number * PAGE_BYTES | WHOLE).to_bytes(8, "big") + NOISE.randbytes(PAGE_BYTES)


def filled(number: int) -> bytes:
    return (number * PAGE_BYTES | FILLED).to_bytes(8, "big") + b"\0"


def named(number: int) -> bytes:
    return (number * PAGE_BYTES | NAMED).to_bytes(8, "big") + b"\x06pc.ram" + NOISE.randbytes(PAGE_BYTES)


def test_rows_of_pages_longer_than_are_looked_at_together_are_found() -> None:
    said = whole(0) * 300 + filled(1) * 300 + whole(0) * 2
    assert len(pages_in(memoryview(said))) == 302


def test_whole_pages_are_found_behind_empty_ones_and_others() -> None:
    said = [whole(1), filled(2), filled(3), whole(4), named(5), whole(6), struct.pack("!Q", 0x10)]
    ends = [sum(map(len, said[: count + 1])) for count in range(len(said))]
    assert pages_in(memoryview(b"".join(said))) == [ends[place] - PAGE_BYTES for place in (0, 3, 5)]


@pytest.mark.parametrize("cut", [1, 7, 8, 9, 100, 4095, 4103, 4104, 4110])
def test_it_does_not_matter_where_a_chunk_begins(cut: int) -> None:
    said = b"".join(whole(number) for number in range(5))
    expected = [begin for begin in range(8 - cut, len(said) - cut, PAGE_BYTES + 8) if begin >= 8]
    assert pages_in(memoryview(said)[cut:]) == expected


@pytest.mark.parametrize("data", [b"", b"short", bytes(100_000), bytes(range(256)) * 1000, b"\x28" * 50_000])
def test_what_is_no_memory_has_no_pages(data: bytes) -> None:
    assert pages_in(memoryview(data)) == []


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=20_000))
def test_pages_lie_within_the_chunk_and_not_over_one_another(data: bytes) -> None:
    found = pages_in(memoryview(data))
    assert all(begin + PAGE_BYTES <= len(data) for begin in found)
    assert all(begin + PAGE_BYTES <= following for begin, following in pairwise(found))


def condensed(finder: Finder, said: bytes) -> bytes:
    room = bytearray(b"what" + said)
    return bytes(room[: finder.condense(memoryview(room))])


def restored(keeper: Keeper, content: bytes, length: int) -> bytes:
    keeper.room(len(content))[:] = content
    return bytes(keeper.restore(length))


#: As little as goes: a chunk of the largest size, and hardly more.
WINDOW = MAX_CONTENT_BYTES + 3 * PAGE_BYTES
SOME = [filled(number) if number % 4 == 3 else whole(number) for number in range(40)]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 39), min_size=1, max_size=12), min_size=1, max_size=12), st.integers(0, 40))
def test_whatever_is_condensed_comes_out_as_it_was_however_little_is_kept(chunks: list[list[int]], more: int) -> None:
    window = WINDOW + more * PAGE_BYTES
    finder, keeper = Finder(window), Keeper(window)
    for chunk in chunks:
        said = b"".join(SOME[number] for number in chunk)
        assert restored(keeper, condensed(finder, said), len(said)) == said


def test_pages_are_found_again_until_what_came_later_took_their_place() -> None:
    window = 2 * MAX_CONTENT_BYTES
    finder, keeper = Finder(window), Keeper(window)
    pages = [whole(number) for number in range(window // PAGE_BYTES)]
    left_out = 0
    for number, page in enumerate(pages * 2):
        again = pages[max(0, number - 100) % len(pages)]
        for said in (page, again):
            content = condensed(finder, said)
            left_out += len(content) < 100
            assert restored(keeper, content, len(said)) == said
    assert left_out == len(pages * 2)


def test_a_page_is_sent_once() -> None:
    finder = Finder(1 << 20)
    page = whole(1)
    assert condensed(finder, page) == bytes(HEAD_BYTES) + page
    assert len(condensed(finder, page + page)) < 100


def test_a_page_that_is_twice_in_a_chunk_is_found_again_after_it() -> None:
    finder, keeper = Finder(WINDOW), Keeper(WINDOW)
    said = whole(1) * 2 + whole(2)
    for _ in range(400):
        assert restored(keeper, condensed(finder, said), len(said)) == said


def test_what_came_first_is_forgotten_first() -> None:
    finder, said = Finder(WINDOW), [whole(number) for number in range(5)]
    for page in said:
        condensed(finder, page)
    sizes = [len(condensed(finder, said[number])) > PAGE_BYTES for number in (4, 3, 0)]
    assert sizes == [False, False, True]


@pytest.mark.parametrize("place", [13, 4096, WINDOW - PAGE_BYTES, WINDOW, 0xFFFFFFFF])
def test_a_page_that_never_came_is_refused(place: int) -> None:
    content = struct.pack("!III", 1, 0, place)
    with pytest.raises(BrokenStream, match="never sent"):
        restored(Keeper(WINDOW), content, PAGE_BYTES)


@settings(max_examples=200, deadline=None)
@given(st.binary(min_size=1, max_size=400), st.integers(1, 5000))
def test_what_was_condensed_by_somebody_else_is_refused_or_exactly_as_long(content: bytes, length: int) -> None:
    try:
        restored(Keeper(WINDOW), content, length)
    except BrokenStream:
        return
    assert content[:HEAD_BYTES] == bytes(HEAD_BYTES)
    assert len(content) == HEAD_BYTES + length


@pytest.mark.parametrize(
    "content",
    [
        b"",
        struct.pack("!I", 1),
        struct.pack("!I", 0xFFFFFFFF),
        struct.pack("!III", 1, 100, 0) + bytes(PAGE_BYTES),
        struct.pack("!III", 1, 0, 0) + bytes(PAGE_BYTES),
        struct.pack("!III", 1, 5000, 0) + bytes(PAGE_BYTES),
        struct.pack("!IIIII", 2, 0, 0, 0, 0) + bytes(PAGE_BYTES),
        struct.pack("!I", 0) + bytes(PAGE_BYTES - 1),
        struct.pack("!I", 0) + bytes(PAGE_BYTES + 1),
    ],
)
def test_what_has_another_length_than_was_said_is_refused(content: bytes) -> None:
    with pytest.raises(BrokenStream):
        restored(Keeper(WINDOW), content, PAGE_BYTES)
