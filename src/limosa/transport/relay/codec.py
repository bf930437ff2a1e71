"""Both ends of what is compressed: contents (``pages``), each by itself, with zstd.

zstd's own stream with a long window and long-distance matching would leave out what was sent before, too, and find
pages that are alike but for some bytes. It takes three times as long: it looks at every byte, and in memory that no
cache holds. And each piece of it would have to be waited for, since the next may refer to it.
"""

from __future__ import annotations

import zstandard

from limosa.transport.relay.errors import BrokenStream
from limosa.transport.relay.frames import MAX_CONTENT_BYTES

MIN_WINDOW_LOG = 20
MAX_WINDOW_LOG = 30


class Compressor:
    """The source's end."""

    def __init__(self, level: int) -> None:
        self._zstd = zstandard.ZstdCompressor(level, write_checksum=False)

    def compress(self, content: memoryview) -> bytes:
        """What says the same."""
        return self._zstd.compress(content)


class Decompressor:
    """The destination's end."""

    def __init__(self) -> None:
        self._zstd = zstandard.ZstdDecompressor()

    def decompress(self, data: bytes | memoryview) -> bytes:
        """The content that was compressed. Raises :class:`BrokenStream`; never takes more memory than a content may."""
        try:
            # As much memory is taken as the piece says.
            if not 0 < zstandard.frame_content_size(data) <= MAX_CONTENT_BYTES:
                raise BrokenStream("what was compressed is longer than may be, or does not say how long it is")
            return self._zstd.decompress(data, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise BrokenStream(f"what was compressed cannot be read: {error}") from error
