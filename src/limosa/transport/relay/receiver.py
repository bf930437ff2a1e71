"""The destination's side of a session: one carrier comes in, QEMUs' streams go out.

Two threads: one takes frames from the forward carrier and writes them to QEMUs, as far as those take it at once; the
*pump* writes the rest as they make room, and sends back what they say on their return paths. Nothing is written to a
QEMU before its checksum was compared. What a QEMU has not taken yet is bounded by the credit the source was given.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial

from limosa.transport.relay.carrier import In, Out
from limosa.transport.relay.codec import Decompressor
from limosa.transport.relay.control import ChannelStatistics, CompressionStatistics, Statistics
from limosa.transport.relay.errors import BrokenStream
from limosa.transport.relay.frames import (
    HEADER_BYTES,
    MAX_CONTENT_BYTES,
    MAX_RAW_BYTES,
    Form,
    FrameReader,
    FrameWriter,
    Header,
    Kind,
    Said,
)
from limosa.transport.relay.notices import Notices
from limosa.transport.relay.pages import Keeper
from limosa.transport.relay.plug import Plug
from limosa.transport.relay.pump import Interest, Pump

#: Credit is given in portions of at least this.
_GRANT_BYTES = 256 * 1024
_BACK_BYTES = 64 * 1024


class _Channel:
    """One VM's stream."""

    def __init__(self, plug: Plug) -> None:
        self.plug = plug
        #: by its QEMU, and by the source's
        self.said, self.heard = Said(), Said()
        #: taken by its QEMU, and the source was not told yet
        self.owed = 0
        self.broken = False

    @property
    def over(self) -> bool:
        """Whether nothing will come or go any more."""
        return self.broken or (self.plug.input_ended and self.plug.output_ended)


class Receiver:
    """A session as the destination's relay sees it."""

    def __init__(self, forward: In, backward: Out, window_log: int, notices: Notices) -> None:
        self._forward, self._backward = forward, backward
        self._notices = notices
        self._keeper = Keeper(1 << window_log)
        self._decompressor = Decompressor()
        self._buffer = memoryview(bytearray(MAX_RAW_BYTES))
        self._compressed = memoryview(bytearray(MAX_CONTENT_BYTES))
        self._back_buffer = memoryview(bytearray(_BACK_BYTES))
        self._channels: dict[int, _Channel] = {}
        #: numbers that were ever opened: what still comes for those that ended is dropped
        self._known: set[int] = set()
        self._frames = FrameWriter()
        #: held while a frame is numbered and sent
        self._speaking = threading.Lock()
        self._owing = threading.Lock()
        self._pump = Pump(self._interests)

    def start(self) -> None:
        """Begin; returns at once."""
        for work in (self._pump.run, self._take):
            threading.Thread(target=self._notices.guarded(work), daemon=True).start()

    def knows(self, number: int) -> bool:
        """Whether a channel of that number was ever opened."""
        return number in self._known

    @property
    def open_channels(self) -> int:
        """How many channels are open."""
        return len(self._channels)

    def open_channel(self, plug: Plug) -> None:
        """Carry another stream."""
        self._known.add(plug.number)
        self._channels[plug.number] = _Channel(plug)
        self._pump.wake()

    def set_short(self, number: int, short: bool) -> None:
        """Nothing waits here that could be shortened: the source's side does it."""

    def statistics(self) -> Statistics:
        """The source's side counts; here is nothing but which channels are open."""
        channels = [ChannelStatistics(channel=number) for number in list(self._channels)]
        return Statistics(channels=channels, compression=CompressionStatistics())

    # --- the forward thread ---

    def _take(self) -> None:
        frames = FrameReader()
        first = memoryview(bytearray(HEADER_BYTES))
        while True:
            self._forward.receive_into(first)
            header = frames.header(first)
            data = self._payload(header)
            channel = self._channels.get(header.channel)
            if channel is not None and not channel.broken:
                self._deliver(channel, header, data)
            elif header.kind is Kind.DATA and header.channel not in self._known:
                # The end alone of such a one comes if its move ended before it was prepared here.
                raise BrokenStream(f"channel {header.channel} was never opened")

    def _payload(self, header: Header) -> memoryview:
        """The raw bytes of a frame, not verified yet; they are there until the next call."""
        if not header.has_payload:
            return self._buffer[:0]
        if header.form is Form.RAW:
            data = self._buffer[: header.raw_length]
            self._forward.receive_into(data)
            return data
        if header.form is Form.CONDENSED:
            self._forward.receive_into(self._keeper.room(header.wire_length))
        else:
            compressed = self._compressed[: header.wire_length]
            self._forward.receive_into(compressed)
            content = self._decompressor.decompress(compressed)
            self._keeper.room(len(content))[:] = content
        return self._keeper.restore(header.raw_length)

    def _deliver(self, channel: _Channel, header: Header, data: memoryview) -> None:
        try:
            if header.kind is Kind.DATA:
                header.verify_next(channel.heard, data)
                taken = channel.plug.write(data)
                self._took(channel, taken)
                if taken == len(data):
                    return
            elif header.kind is Kind.END:
                channel.plug.finish()
            elif header.kind is Kind.ABORT:
                channel.broken = channel.plug.input_ended = True
            else:
                raise BrokenStream("credit comes from the destination only")
        except OSError:
            self._break(channel)
        self._pump.wake()

    # --- the pump ---

    def _interests(self) -> Iterator[Interest]:
        for number, channel in list(self._channels.items()):
            if channel.over:
                channel.plug.close()
                del self._channels[number]
                self._notices.channel_ended(ChannelStatistics(channel=number))
                continue
            descriptor = channel.plug.fileno()
            if not channel.plug.input_ended:
                yield Interest(descriptor, partial(self._read, channel))
            if channel.plug.kept_bytes:
                yield Interest(descriptor, partial(self._flush, channel), writing=True)

    def _read(self, channel: _Channel) -> None:
        number = channel.plug.number
        try:
            count = channel.plug.read_into(self._back_buffer)
        except OSError:
            self._break(channel)
            return
        if count == 0:
            channel.plug.input_ended = True
            self._say(Kind.END, number)
        elif count is not None:
            data = self._back_buffer[:count]
            channel.said.update(data)
            with self._speaking:
                self._backward.send(self._frames.data(number, Form.RAW, count, count, channel.said.intdigest()), data)

    def _flush(self, channel: _Channel) -> None:
        try:
            self._took(channel, channel.plug.flush())
        except OSError:
            self._break(channel)

    # --- both ---

    def _took(self, channel: _Channel, count: int) -> None:
        """A QEMU took ``count`` bytes: the source may send as many more."""
        with self._owing:
            channel.owed += count
            grant = channel.owed if channel.owed >= _GRANT_BYTES else 0
            channel.owed -= grant
        if grant:
            self._say(Kind.CREDIT, channel.plug.number, grant)

    def _break(self, channel: _Channel) -> None:
        """Its QEMU cannot be read or written: tell the other side, and unplug."""
        if not channel.broken:
            channel.broken = channel.plug.input_ended = True
            self._say(Kind.ABORT, channel.plug.number)

    def _say(self, kind: Kind, number: int, count: int = 0) -> None:
        with self._speaking:
            self._backward.send(self._frames.sign(kind, number, count))
