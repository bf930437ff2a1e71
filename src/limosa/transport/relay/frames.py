"""What two relays say to each other, byte by byte. Pure; ``docs/relay-format.md`` is the page about it.

After the TLS handshake, if there is one, the source's relay says a :class:`Hello` on each of its connections, of which
each path has two, and the destination's answers with one on the backward connection. From then on each connection is
used one way, for frames: a header of 28 bytes and, for data, a payload. Where there may be several paths, the stream of
frames is cut into blocks (``blocks``).

A header is numbered and covered by the frame's checksum, so a frame that was cut, repeated, left out, exchanged or
changed is noticed. That of data is over all its channel has said so far (:class:`Said`), and is taken as soon as the
bytes were read, so bytes that a relay itself loses, exchanges or overwrites are noticed too. Whatever is noticed raises
:class:`BrokenStream`: nothing behind it can be trusted, and the session ends.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple

import xxhash

from limosa.transport.relay.errors import BrokenStream

VERSION = 7
#: The most one frame carries, before compression.
MAX_RAW_BYTES = 512 * 1024
#: What a content has before a chunk's bytes if none of them are left out (``pages``).
HEAD_BYTES = 4
MAX_CONTENT_BYTES = HEAD_BYTES + MAX_RAW_BYTES
#: How much of one channel may be on its way until the destination's QEMU has taken it.
WINDOW_BYTES = 8 * 1024 * 1024
#: Channels are numbered by the source's daemon, upwards, and no number is used twice in a session.
MAX_CHANNEL = 2**32 - 1
#: So are lanes, from 0.
MAX_LANE = 65535

_MAGIC = b"limosa-relay"
_HELLO = struct.Struct("!12sHBBB")
_FIELDS = struct.Struct("!BBHIIII")
_CHECKSUM = struct.Struct("!Q")
HELLO_BYTES = _HELLO.size
HEADER_BYTES = _FIELDS.size + _CHECKSUM.size
_SEQUENCE_MASK = 0xFFFFFFFF
_NOTHING = xxhash.xxh3_64_intdigest(b"")

#: What was said on a channel one way: ``update`` it with what follows, ``intdigest`` is the checksum of all so far.
Said = xxhash.xxh3_64


class Way(IntEnum):
    """What a connection is for, as its :class:`Hello` says."""

    FORWARD = 1
    BACKWARD = 2
    ANSWER = 3


class Hello(NamedTuple):
    """First words on a connection. ``window_log`` is what is wished for, and in the answer what will be used.

    ``lane``: the path's number, which is used once in a session.
    """

    way: Way
    window_log: int
    lane: int = 0

    def pack(self) -> bytes:
        """The bytes to send."""
        return _HELLO.pack(_MAGIC, self.lane, VERSION, self.way, self.window_log)

    @classmethod
    def parse(cls, data: bytes) -> Hello:
        """Raises :class:`BrokenStream` if it is no hello of a version we know."""
        magic, lane, version, way, window_log = _HELLO.unpack(data)
        if magic != _MAGIC:
            raise BrokenStream("what was connected is no relay")
        if version != VERSION:
            raise BrokenStream(f"the other relay speaks version {version}, this one {VERSION}")
        if way not in list(Way):
            raise BrokenStream(f"unknown way {way}")
        return cls(Way(way), window_log, lane)


class Kind(IntEnum):
    """What a frame means."""

    #: bytes of a channel
    DATA = 1
    #: this side's QEMU sends no more on the channel
    END = 2
    #: the channel broke on this side; nothing of it will be sent or taken any more
    ABORT = 3
    #: the destination's QEMU has taken ``raw_length`` more bytes
    CREDIT = 4


class Form(IntEnum):
    """How the payload of a frame is written."""

    #: the bytes themselves, of which the destination keeps nothing
    RAW = 0
    #: the next content
    CONDENSED = 1
    #: the next content, compressed
    COMPRESSED = 2


class Header(NamedTuple):
    """A frame without its payload."""

    kind: Kind
    form: Form
    channel: int
    raw_length: int
    wire_length: int
    checksum: int

    @property
    def has_payload(self) -> bool:
        """Whether bytes of a stream follow."""
        return self.kind is Kind.DATA

    def verify(self, raw_digest: int) -> None:
        """Raises :class:`BrokenStream` if ``raw_digest``, of all the channel has said up to the end of this frame's
        data, is not what was sent."""
        if raw_digest != self.checksum:
            raise BrokenStream(f"data of channel {self.channel} is not what was sent: checksum differs")

    def verify_next(self, said: Said, data: memoryview) -> None:
        """:meth:`verify` data that follows what the channel has ``said`` before, which is brought up to date."""
        said.update(data)
        self.verify(said.intdigest())


class FrameWriter:
    """Makes the headers of one direction, in order."""

    def __init__(self) -> None:
        self._sequence = 0

    def data(self, channel: int, form: Form, raw_length: int, wire_length: int, raw_digest: int) -> bytes:
        """The header of a payload that follows it; ``raw_digest`` is of all the channel has said up to its end."""
        return self._header(Kind.DATA, form, channel, raw_length, wire_length, raw_digest)

    def sign(self, kind: Kind, channel: int, count: int = 0) -> bytes:
        """A frame without payload; ``count`` is the bytes of a credit."""
        return self._header(kind, Form.RAW, channel, count, 0, _NOTHING)

    def _header(self, kind: Kind, form: Form, channel: int, raw: int, wire: int, raw_digest: int) -> bytes:
        fields = _FIELDS.pack(kind, form, 0, channel, self._sequence, raw, wire)
        self._sequence = (self._sequence + 1) & _SEQUENCE_MASK
        return fields + _CHECKSUM.pack(raw_digest ^ xxhash.xxh3_64_intdigest(fields))


class FrameReader:
    """Checks the headers of one direction, in order."""

    def __init__(self) -> None:
        self._sequence = 0

    def header(self, data: bytes | bytearray | memoryview) -> Header:
        """The next header. Raises :class:`BrokenStream` if it is not valid.

        Frames without payload are verified then; for others, call :meth:`Header.verify` before anything is passed on.
        """
        fields = bytes(data[: _FIELDS.size])
        kind, form, reserved, channel, sequence, raw_length, wire_length = _FIELDS.unpack(fields)
        if sequence != self._sequence:
            raise BrokenStream(f"frame {sequence} came where {self._sequence} was due")
        self._sequence = (self._sequence + 1) & _SEQUENCE_MASK
        if kind not in _KINDS or form not in _FORMS or reserved:
            raise BrokenStream(f"unknown frame: kind {kind}, form {form}, {reserved}")
        (checksum,) = _CHECKSUM.unpack(data[_FIELDS.size : HEADER_BYTES])
        expected = checksum ^ xxhash.xxh3_64_intdigest(fields)
        header = Header(Kind(kind), Form(form), channel, raw_length, wire_length, expected)
        _check_lengths(header)
        if not header.has_payload:
            header.verify(_NOTHING)
        return header


_KINDS = frozenset(Kind)
_FORMS = frozenset(Form)


def _check_lengths(header: Header) -> None:
    if header.has_payload:
        most = header.raw_length + (HEAD_BYTES if header.form is not Form.RAW else 0)
        least = most if header.form is Form.RAW else 1
        sound = 0 < header.raw_length <= MAX_RAW_BYTES and least <= header.wire_length <= most
    elif header.kind is Kind.CREDIT:
        sound = header.form is Form.RAW and 0 < header.raw_length <= WINDOW_BYTES and header.wire_length == 0
    else:
        sound = header.form is Form.RAW and header.raw_length == 0 and header.wire_length == 0
    if not sound:
        raise BrokenStream(f"impossible lengths: {header.raw_length} raw, {header.wire_length} on the wire")
