"""The compressed stream: exact, bounded, and what was sent before costs almost nothing."""

from __future__ import annotations

import random

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from limosa.transport.relay.codec import Compressor, Decompressor
from limosa.transport.relay.errors import BrokenStream
from limosa.transport.relay.frames import MAX_GROWTH_BYTES, MAX_RAW_BYTES
from limosa.transport.relay.pages import PAGE_BYTES

WINDOW_LOG = 22
NOISE = random.Random(1)


def qemu_says(pages: list[bytes]) -> bytes:
    """Pages one behind the other, as QEMU sends them."""
    return b"".join((number * PAGE_BYTES | 0x28).to_bytes(8, "big") + page for number, page in enumerate(pages))


def decompress(decompressor: Decompressor, data: bytes, length: int) -> bytes:
    return bytes(decompressor.decompress(data, length))


def pages(count: int) -> list[bytes]:
    return [NOISE.randbytes(PAGE_BYTES) for _ in range(count)]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=3000), min_size=1, max_size=6))
def test_each_chunk_comes_out_as_soon_as_it_is_in(chunks: list[bytes]) -> None:
    compressor, decompressor = Compressor(WINDOW_LOG, 1), Decompressor(WINDOW_LOG)
    for chunk in chunks:
        assert decompress(decompressor, compressor.compress(memoryview(chunk)), len(chunk)) == chunk


def test_pages_that_were_sent_before_cost_almost_nothing_and_the_incompressible_hardly_grows() -> None:
    compressor, decompressor = Compressor(WINDOW_LOG, 1), Decompressor(WINDOW_LOG)
    chunks = [qemu_says(pages(MAX_RAW_BYTES // (PAGE_BYTES + 8))) for _ in range(3)]
    sizes = []
    for chunk in chunks * 2:
        made = compressor.compress(memoryview(chunk))
        assert decompress(decompressor, made, len(chunk)) == chunk
        sizes.append(len(made))
    assert all(len(chunks[0]) < size <= len(chunks[0]) + MAX_GROWTH_BYTES for size in sizes[:3])
    assert all(size < MAX_RAW_BYTES / 100 for size in sizes[3:])


def test_what_is_no_page_may_grow_no_more_than_was_allowed() -> None:
    noise = NOISE.randbytes(MAX_RAW_BYTES)
    made = Compressor(WINDOW_LOG, 1).compress(memoryview(noise))
    assert len(made) <= MAX_RAW_BYTES + MAX_GROWTH_BYTES
    assert decompress(Decompressor(WINDOW_LOG), made, MAX_RAW_BYTES) == noise


def test_never_more_is_made_than_was_asked_for() -> None:
    bomb = Compressor(WINDOW_LOG, 1).compress(memoryview(bytes(MAX_RAW_BYTES)))
    with pytest.raises(BrokenStream, match="another length"):
        decompress(Decompressor(WINDOW_LOG), bomb, 1000)


def test_memory_is_not_taken_because_a_chunk_says_so() -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(MAX_RAW_BYTES + MAX_GROWTH_BYTES + 1))
    with pytest.raises(BrokenStream, match="longer than may be"):
        decompress(Decompressor(WINDOW_LOG), bomb, 1000)


@pytest.mark.parametrize("left", [-4, 8])
def test_a_chunk_that_is_too_short_is_noticed(left: int) -> None:
    made = Compressor(WINDOW_LOG, 1).compress(memoryview(NOISE.randbytes(700)))
    with pytest.raises(BrokenStream, match="cannot be read"):
        decompress(Decompressor(WINDOW_LOG), made[:left], 700)


def test_a_chunk_that_is_too_long_is_noticed() -> None:
    made = Compressor(WINDOW_LOG, 1).compress(memoryview(NOISE.randbytes(700)))
    with pytest.raises(BrokenStream, match="cannot be read"):
        decompress(Decompressor(WINDOW_LOG), made + b"more", 700)


@settings(max_examples=60, deadline=None)
@given(st.binary(min_size=1, max_size=400), st.integers(1, 5000))
def test_garbage_is_refused(data: bytes, length: int) -> None:
    with pytest.raises(BrokenStream):
        decompress(Decompressor(WINDOW_LOG), data, length)


@settings(max_examples=200, deadline=None)
@given(st.binary(min_size=1, max_size=400), st.integers(1, 5000))
def test_what_was_condensed_by_somebody_else_is_refused_or_exactly_as_long(condensed: bytes, length: int) -> None:
    made = zstandard.ZstdCompressor().compress(condensed)
    try:
        decompress(Decompressor(WINDOW_LOG), made, length)
    except BrokenStream:
        return
    assert condensed[:4] == bytes(4)
    assert len(condensed) == length + 4
