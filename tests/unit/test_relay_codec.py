"""What is compressed: exact, bounded, and refused if it is anything else."""

from __future__ import annotations

import random

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from limosa.transport.relay.codec import Compressor, Decompressor
from limosa.transport.relay.errors import BrokenStream
from limosa.transport.relay.frames import MAX_CONTENT_BYTES

NOISE = random.Random(1)


def compressed(content: bytes) -> bytes:
    return Compressor(1).compress(memoryview(content))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=3000), min_size=1, max_size=6))
def test_each_content_comes_out_by_itself(contents: list[bytes]) -> None:
    compressor, decompressor = Compressor(1), Decompressor()
    made = [compressor.compress(memoryview(content)) for content in contents]
    assert [decompressor.decompress(one) for one in reversed(made)] == contents[::-1]


def test_the_largest_comes_out_too() -> None:
    noise = NOISE.randbytes(MAX_CONTENT_BYTES)
    assert Decompressor().decompress(compressed(noise)) == noise


@pytest.mark.parametrize("size", [MAX_CONTENT_BYTES + 1, 1 << 30])
def test_memory_is_not_taken_because_a_content_says_so(size: int) -> None:
    with pytest.raises(BrokenStream, match="longer than may be"):
        Decompressor().decompress(zstandard.ZstdCompressor().compress(bytes(size)))


@pytest.mark.parametrize("left", [-4, 8])
def test_one_that_is_too_short_is_noticed(left: int) -> None:
    with pytest.raises(BrokenStream, match="cannot be read"):
        Decompressor().decompress(compressed(NOISE.randbytes(700))[:left])


def test_one_that_is_too_long_is_noticed() -> None:
    with pytest.raises(BrokenStream, match="cannot be read"):
        Decompressor().decompress(compressed(NOISE.randbytes(700)) + b"more")


@settings(max_examples=60, deadline=None)
@given(st.binary(min_size=1, max_size=400))
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(BrokenStream):
        Decompressor().decompress(data)
