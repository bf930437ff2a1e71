"""The two ends of one long-window zstd stream, chunk by chunk.

Each chunk is flushed, so what was compressed so far can always be decompressed, and the window reaches back over all
that was compressed before: what an earlier VM had in its memory costs a later one almost nothing. Long-distance
matching finds it (one hash for every 256 bytes on average: a finer net costs more time than it saves). The level is
1; negative ones were a tenth faster and a tenth larger on memory of real programs.

Memory: the window on each side, as it fills; the finder's table besides (a 64th of the window at the compressing end).
"""

from __future__ import annotations

from typing import IO, cast

import zstandard

from limosa.transport.relay.errors import BrokenStream

MIN_WINDOW_LOG = 20
MAX_WINDOW_LOG = 30
_HASH_RATE_LOG = 8


class Compressor:
    """Makes the stream."""

    def __init__(self, window_log: int, level: int) -> None:
        parameters = zstandard.ZstdCompressionParameters.from_level(
            level,
            window_log=window_log,
            enable_ldm=True,
            ldm_hash_rate_log=_HASH_RATE_LOG,
            write_checksum=False,
            write_content_size=False,
        )
        self._stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
        # This makes zstd set its tables up now, which takes it longer than many a chunk will.
        self._begun = self._stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)

    def compress(self, data: memoryview) -> bytes:
        """The next piece of the stream."""
        begun, self._begun = self._begun, b""
        return begun + self._stream.compress(data) + self._stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)


class Decompressor:
    """Reads the stream. Never makes more than it is asked for, whatever comes in."""

    def __init__(self, window_log: int) -> None:
        self._source = _Source()
        decompressor = zstandard.ZstdDecompressor(max_window_size=1 << window_log)
        self._stream = decompressor.stream_reader(cast(IO[bytes], self._source))

    def decompress(self, data: bytes | memoryview, into: memoryview) -> None:
        """Fill ``into`` from the next piece of the stream. Raises :class:`BrokenStream`; no more can be read then."""
        self._source.data = data
        try:
            filled = self._stream.readinto(into)
        except zstandard.ZstdError as error:
            raise BrokenStream(f"what was compressed cannot be read: {error}") from error
        if filled != len(into) or self._source.data:
            raise BrokenStream("what was compressed has another length than was said")


class _Source:
    """Gives each piece once; asked again, the piece was too short."""

    def __init__(self) -> None:
        self.data: bytes | memoryview = b""

    def read(self, _size: int) -> bytes | memoryview:
        """The piece. Raises :class:`BrokenStream` if it was taken already."""
        data, self.data = self.data, b""
        if not data:
            raise BrokenStream("what was compressed is shorter than was said")
        return data
