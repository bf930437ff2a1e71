"""The long-window stream: exact, bounded, and alike data costs almost nothing."""

from __future__ import annotations

import random
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limosa.transport.relay.codec import Compressor, Decompressor
from limosa.transport.relay.errors import BrokenStream
from limosa.transport.relay.frames import MAX_GROWTH_BYTES, MAX_RAW_BYTES

WINDOW_LOG = 22


def decompress(decompressor: Decompressor, data: bytes, length: int) -> bytes:
    made = bytearray(length)
    decompressor.decompress(data, memoryview(made))
    return bytes(made)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=3000), min_size=1, max_size=6))
def test_each_chunk_comes_out_as_soon_as_it_is_in(chunks: list[bytes]) -> None:
    compressor, decompressor = Compressor(WINDOW_LOG, 1), Decompressor(WINDOW_LOG)
    for chunk in chunks:
        assert decompress(decompressor, compressor.compress(memoryview(chunk)), len(chunk)) == chunk


def test_what_was_sent_before_costs_almost_nothing_and_the_incompressible_hardly_grows() -> None:
    compressor, decompressor = Compressor(WINDOW_LOG, 1), Decompressor(WINDOW_LOG)
    noise = random.Random(1)
    chunks = [noise.randbytes(MAX_RAW_BYTES) for _ in range(3)]
    sizes = []
    for chunk in chunks * 2:
        made = compressor.compress(memoryview(chunk))
        assert decompress(decompressor, made, len(chunk)) == chunk
        sizes.append(len(made))
    assert all(MAX_RAW_BYTES < size <= MAX_RAW_BYTES + MAX_GROWTH_BYTES for size in sizes[:3])
    assert all(size < MAX_RAW_BYTES / 100 for size in sizes[3:])


def test_never_more_is_made_than_was_asked_for_and_what_follows_is_not_what_was_sent() -> None:
    compressor, decompressor = Compressor(WINDOW_LOG, 1), Decompressor(WINDOW_LOG)
    bomb, following = compressor.compress(memoryview(bytes(MAX_RAW_BYTES))), compressor.compress(memoryview(b"next"))
    assert decompress(decompressor, bomb, 1000) == bytes(1000)
    # What comes next is the rest of it, so the frame's checksum or the codec tells.
    with suppress(BrokenStream):
        assert decompress(decompressor, following, 4) == bytes(4)


def test_a_chunk_that_is_too_short_is_noticed() -> None:
    made = Compressor(WINDOW_LOG, 1).compress(memoryview(b"a chunk" * 100))
    with pytest.raises(BrokenStream, match="shorter"):
        decompress(Decompressor(WINDOW_LOG), made[:-4], 700)


def test_a_window_larger_than_agreed_is_refused() -> None:
    made = Compressor(WINDOW_LOG + 1, 1).compress(memoryview(b"a chunk" * 100))
    with pytest.raises(BrokenStream, match="cannot be read"):
        decompress(Decompressor(WINDOW_LOG), made, 700)


@settings(max_examples=60, deadline=None)
@given(st.binary(min_size=1, max_size=400), st.integers(1, 5000))
def test_garbage_is_refused(data: bytes, length: int) -> None:
    with pytest.raises(BrokenStream):
        decompress(Decompressor(WINDOW_LOG), data, length)
