"""Pages in QEMU's stream: found wherever a chunk begins, known again, and whatever is condensed comes out as it was."""

from __future__ import annotations

import random
import struct
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limosa.transport.relay.errors import BrokenStream
from limosa.transport.relay.pages import PAGE_BYTES, Finder, Keeper, pages_in

NOISE = random.Random(2)
WHOLE, FILLED, NAMED = 0x28, 0x22, 0x08


def whole(number: int) -> bytes:
    return (number * PAGE_BYTES | WHOLE).to_bytes(8, "big") + NOISE.randbytes(PAGE_BYTES)


def filled(number: int) -> bytes:
    return (number * PAGE_BYTES | FILLED).to_bytes(8, "big") + b"\0"


def named(number: int) -> bytes:
    return (number * PAGE_BYTES | NAMED).to_bytes(8, "big") + b"\x06pc.ram" + NOISE.randbytes(PAGE_BYTES)


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


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=12), min_size=1, max_size=8), st.integers(1, 6))
def test_whatever_is_condensed_comes_out_as_it_was_however_few_pages_are_kept(
    chunks: list[list[int]], kept: int
) -> None:
    finder, keeper = Finder(kept), Keeper(kept)
    for chunk in chunks:
        said = b"".join(SOME[number] for number in chunk)
        into = bytearray(len(said))
        keeper.restore(memoryview(finder.condense(memoryview(said))), memoryview(into))
        assert into == said


SOME = [filled(number) if number % 4 == 3 else whole(number) for number in range(10)]


def test_a_page_is_sent_once() -> None:
    finder = Finder(4)
    page = whole(1)
    assert len(finder.condense(memoryview(page))) > PAGE_BYTES
    assert len(finder.condense(memoryview(page + page))) < 100


def test_the_oldest_page_is_forgotten_first() -> None:
    finder, said = Finder(2), [whole(number) for number in range(3)]
    for page in said:
        finder.condense(memoryview(page))
    sizes = [len(finder.condense(memoryview(said[number]))) > PAGE_BYTES for number in (2, 1, 0)]
    assert sizes == [False, False, True]


@pytest.mark.parametrize("place", [0, 3, 4, 0xFFFFFFFE])
def test_a_page_that_never_came_is_refused(place: int) -> None:
    condensed = struct.pack("!III", 1, 0, place)
    with pytest.raises(BrokenStream, match="was never sent"):
        Keeper(4).restore(memoryview(condensed), memoryview(bytearray(PAGE_BYTES)))


@pytest.mark.parametrize(
    "condensed",
    [
        b"",
        struct.pack("!I", 1),
        struct.pack("!I", 0xFFFFFFFF),
        struct.pack("!III", 1, 0, 0xFFFFFFFF) + bytes(100),
        struct.pack("!III", 1, 5000, 0xFFFFFFFF) + bytes(PAGE_BYTES),
        struct.pack("!I", 0) + bytes(PAGE_BYTES + 1),
    ],
)
def test_what_has_another_length_than_was_said_is_refused(condensed: bytes) -> None:
    with pytest.raises(BrokenStream):
        Keeper(4).restore(memoryview(condensed), memoryview(bytearray(PAGE_BYTES)))
