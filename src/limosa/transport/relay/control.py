"""What a daemon and its relay say to each other: JSON messages, each one packet of a Unix socket, with descriptors.

The daemon asks, the relay answers in the order asked. Besides, the relay says unasked that the session is up, that a
lane was lost, that a channel ended, and why the session failed, as its last words.
"""

from __future__ import annotations

import array
import socket
from collections.abc import Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from limosa.transport.relay.codec import MAX_WINDOW_LOG, MIN_WINDOW_LOG
from limosa.transport.relay.frames import MAX_CHANNEL, MAX_LANE
from limosa.wire.peer import StreamCredentials

MAX_MESSAGE_BYTES = 64 * 1024
#: A session's paths at one time; each has a connection for each way.
MAX_LANES = 8
CARRIERS = 2
#: Streams that one relay carries at once: of as many moves as a host may have at once, 64 of memory alone and 64 with
#: two disks each. The figures of so many fit into a message.
MAX_CHANNELS = 256

Channel = Annotated[int, Meta(ge=0, le=MAX_CHANNEL)]
WindowLog = Annotated[int, Meta(ge=MIN_WINDOW_LOG, le=MAX_WINDOW_LOG)]


class Message(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type"):
    """Base of all messages."""


class Open(Message):
    """Be one side of a session. Comes with two sockets that are connected to the other relay, or, if it is striped,
    without: it is up with its first lane then.

    ``credentials``: null for no TLS. ``window_log``: how many bytes of what was sent the destination may keep, as far
    as this side allows, as a power of two. ``striped``: the session may go over several paths, of which more may join
    at any time.
    """

    credentials: StreamCredentials | None
    window_log: WindowLog
    striped: bool


class OpenSender(Open, tag="open-sender"):
    """Be the source's side. ``level``: zstd's; null for no compression."""

    level: Annotated[int, Meta(ge=-7, le=3)] | None


class OpenReceiver(Open, tag="open-receiver"):
    """Be the destination's side."""


class AddLane(Message, tag="add-lane"):
    """At the source: have a path join. Comes with two sockets. The answer does not wait for it.

    ``lane``: higher than all before.
    """

    lane: Annotated[int, Meta(ge=0, le=MAX_LANE)]


class AddConnection(Message, tag="add-connection"):
    """At the destination: the source has made another connection, which says itself of which lane it is. Comes with its
    socket."""


class LaneLost(Message, tag="lane-lost"):
    """Said unasked: a lane broke, or did not come about."""

    lane: int
    why: str


class Opened(Message, tag="opened"):
    """Said unasked: the session is up. The window is the smaller of what both sides allow."""

    window_log: int


class OpenChannel(Message, tag="open-channel"):
    """Carry a stream. Comes with a socket whose other end QEMU gets. First at the destination, then at the source.

    The destination's may come before there is a session, so that no frame of the source's comes before it.
    """

    channel: Channel


class SetShort(Message, tag="set-short"):
    """Whether this channel's guest is about to stand still: have little wait then."""

    channel: Channel
    short: bool


class SetPace(Message, tag="set-pace"):
    """At the source: take so much from this channel's QEMU, bytes a second; 0: no cap."""

    channel: Channel
    bytes_per_s: Annotated[int, Meta(ge=0)]


class Done(Message, tag="done"):
    """The answer to what needs no other."""


class Refused(Message, tag="refused"):
    """The answer to what makes no sense. Nothing was changed."""

    why: str


class AskStatistics(Message, tag="ask-statistics"):
    """How is it going?"""


class ChannelStatistics(Message, tag="channel-statistics"):
    """Of one channel, in the direction of guest memory. At the destination nothing is counted."""

    channel: int
    raw_bytes: int = 0
    #: less what TLS adds
    wire_bytes: int = 0
    raw_chunks: int = 0
    compressed_chunks: int = 0
    #: processor time that went into compressing it
    cpu_s: float = 0.0


class CompressionStatistics(Message, tag="compression-statistics"):
    """Of the worker of a session."""

    #: processor time
    cpu_s: float = 0.0
    #: chunks it was given and did not come to begin with
    withdrawn: int = 0
    #: chunks it had begun with that were not waited for
    late: int = 0


class Statistics(Message, tag="statistics"):
    """The answer to :class:`AskStatistics`: the open channels."""

    channels: list[ChannelStatistics]
    compression: CompressionStatistics


class ChannelEnded(Message, tag="channel-ended"):
    """Both QEMUs are done with the channel, or it broke. Its last figures."""

    statistics: ChannelStatistics


class Failed(Message, tag="failed"):
    """The session failed, and the relay ends."""

    why: str


FromDaemon = OpenSender | OpenReceiver | AddLane | AddConnection | OpenChannel | SetShort | SetPace | AskStatistics
Answer = Done | Refused | Statistics
FromRelay = Answer | Opened | LaneLost | ChannelEnded | Failed

_encoder = msgspec.json.Encoder()


def send(sock: socket.socket, message: Message, descriptors: Sequence[int] = ()) -> None:
    """Send a message. Raises ``OSError``."""
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
    sock.sendmsg([_encoder.encode(message)], ancillary, socket.MSG_NOSIGNAL)


def receive(sock: socket.socket) -> tuple[bytes, list[socket.socket]]:
    """The next packet, empty at the end, and the sockets that came with it. Raises ``OSError``."""
    data, descriptors, flags, _ = socket.recv_fds(sock, MAX_MESSAGE_BYTES, CARRIERS)
    sockets = [socket.socket(fileno=descriptor) for descriptor in descriptors]
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        for each in sockets:
            each.close()
        raise OSError("a message is too long")
    return data, sockets
