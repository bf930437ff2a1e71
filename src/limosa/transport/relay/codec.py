"""The two ends of one compressed stream, chunk by chunk.

What was sent before is left out first (``pages``), however long ago that was; the rest is compressed by itself, with
zstd at level 1.

zstd's own stream with a window as long and long-distance matching would do both at once, and find pages that are alike
but for some bytes, too. It takes three times as long: it looks at every byte, and in memory that no cache holds.

Memory: ``window_log`` bounds what the destination keeps of pages; the source has a digest of each, a 25th of that.
"""

from __future__ import annotations

import zstandard

from limosa.transport.relay.errors import BrokenStream
from limosa.transport.relay.pages import MAX_CONDENSED_BYTES, Finder, Keeper

MIN_WINDOW_LOG = 20
MAX_WINDOW_LOG = 30


class Compressor:
    """Makes the stream."""

    def __init__(self, window_log: int, level: int) -> None:
        self._finder = Finder(1 << window_log)
        self._zstd = zstandard.ZstdCompressor(level, write_checksum=False)

    def compress(self, data: memoryview) -> bytes:
        """The next piece of the stream."""
        return self._zstd.compress(self._finder.condense(data))


class Decompressor:
    """Reads the stream. Never makes more than it is asked for, whatever comes in."""

    def __init__(self, window_log: int) -> None:
        self._zstd = zstandard.ZstdDecompressor()
        self._keeper = Keeper(1 << window_log)

    def decompress(self, data: bytes | memoryview, length: int) -> memoryview:
        """The next ``length`` bytes, from the next piece of the stream; they are there until the next call.

        Raises :class:`BrokenStream`; no more can be read then.
        """
        try:
            # As much memory is taken as the piece says.
            if not 0 < zstandard.frame_content_size(data) <= MAX_CONDENSED_BYTES:
                raise BrokenStream("what was compressed is longer than may be, or does not say how long it is")
            condensed = self._zstd.decompress(data, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise BrokenStream(f"what was compressed cannot be read: {error}") from error
        return self._keeper.restore(condensed, length)
