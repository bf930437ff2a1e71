"""The source's side of a session: QEMUs' streams go in, one carrier goes out.

Three threads share what :class:`Sender` holds, under one lock:

- the *pump* reads from QEMUs into the queue, writes the return path to them, and takes the worker's results;
- the *sending* thread takes the head of the queue, compressed if the worker has done it or is about to;
- the *backward* thread takes what the destination's relay says.

Memory is bounded by the slots. A channel is read only while it has credit, so a destination's QEMU that does not read
stops its own stream and no other.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from functools import partial

from limosa.transport.relay.carrier import In, Out
from limosa.transport.relay.compression import SHORT_WAITING_BYTES, Compression
from limosa.transport.relay.control import ChannelStatistics, Statistics
from limosa.transport.relay.errors import BrokenStream
from limosa.transport.relay.frames import (
    HEADER_BYTES,
    WINDOW_BYTES,
    Form,
    FrameReader,
    FrameWriter,
    Header,
    Kind,
    Said,
)
from limosa.transport.relay.notices import Notices
from limosa.transport.relay.pace import Throttle
from limosa.transport.relay.pages import Finder
from limosa.transport.relay.plug import Plug
from limosa.transport.relay.pump import Interest, Pump
from limosa.transport.relay.queue import Chunk, Queue, State
from limosa.transport.relay.worker import Memory, Worker

#: Of one channel, before others have their turn.
_READS_AT_ONCE = 4
#: What may be on its way to a destination's QEMU once its guest is about to stand still.
_SHORT_WINDOW_BYTES = 4 * SHORT_WAITING_BYTES


class _Channel:
    """One VM's stream."""

    def __init__(self, plug: Plug) -> None:
        self.plug = plug
        self.credit = WINDOW_BYTES
        self.broken = False
        self.throttle = Throttle()
        #: by its QEMU, and by the destination's
        self.said, self.heard = Said(), Said()
        self.statistics = ChannelStatistics(channel=plug.number)

    @property
    def over(self) -> bool:
        """Whether nothing will come or go any more."""
        return self.broken or (self.plug.input_ended and self.plug.output_ended)


class Sender:
    """A session as the source's relay sees it. Without a ``finder`` everything goes raw."""

    def __init__(
        self,
        forward: Out,
        backward: In,
        memory: Memory,
        finder: Finder | None,
        worker: Worker | None,
        notices: Notices,
    ) -> None:
        self._forward, self._backward = forward, backward
        self._memory, self._notices = memory, notices
        self._frames = FrameWriter()
        self._channels: dict[int, _Channel] = {}
        self._known: set[int] = set()
        self._lock = threading.Lock()
        #: the sending thread waits for one of these, and is not woken for the other
        self._arrived = threading.Condition(self._lock)
        self._done = threading.Condition(self._lock)
        self._pump = Pump(self._interests)
        self._queue = Queue(memory.slots)
        self._compression = Compression(self._queue, forward, memory, finder, worker, self._spend)
        #: the pump found no room, or what keeps a channel from being forgotten, and wants to be told of progress
        self._held_up = False
        self._turn = 0

    def start(self) -> None:
        """Begin; returns at once."""
        for work in (self._pump.run, self._send, self._listen):
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
        with self._lock:
            self._known.add(plug.number)
            self._channels[plug.number] = _Channel(plug)
        self._pump.wake()

    def set_short(self, number: int, short: bool) -> None:
        """Whether little of this channel may wait from now on; no effect if it ended."""
        with self._lock:
            if number in self._channels:
                self._queue.set_hurried(number, short)
                self._compression.adjust()
        self._pump.wake()

    def set_pace(self, number: int, bytes_per_s: int) -> None:
        """What may be taken from this channel's QEMU from now on, 0: no cap; no effect if it ended."""
        with self._lock:
            if number in self._channels:
                self._channels[number].throttle.set(time.monotonic(), bytes_per_s)
        self._pump.wake()

    def statistics(self) -> Statistics:
        """Of the channels that are open, and of compression."""
        with self._lock:
            channels = [channel.statistics for channel in self._channels.values()]
            return Statistics(channels=channels, compression=self._compression.statistics)

    # --- the pump ---

    def _interests(self) -> list[Interest]:
        with self._lock:
            self._held_up = False
            self._pump.within_s = None
            self._forget_ended()
            interests = list(self._compression.interests(self._on_results))
            for channel in self._in_turn():
                interests.extend(self._interests_in(channel))
            return interests

    def _in_turn(self) -> list[_Channel]:
        """Another one first each time: what room there is may be enough for one of them only."""
        channels = list(self._channels.values())
        self._turn += 1
        first = self._turn % max(1, len(channels))
        return channels[first:] + channels[:first]

    def _interests_in(self, channel: _Channel) -> Iterator[Interest]:
        descriptor = channel.plug.fileno()
        if not channel.plug.input_ended and self._allowance(channel) > 0:
            if wait_s := channel.throttle.wait_s(time.monotonic()):
                self._pump.within_s = min(wait_s, self._pump.within_s or wait_s)
            elif self._queue.has_room(channel.plug.number):
                yield Interest(descriptor, partial(self._read, channel))
            else:
                self._held_up = True
        if channel.plug.kept_bytes and not channel.broken:
            yield Interest(descriptor, partial(self._flush, channel), writing=True)

    def _allowance(self, channel: _Channel) -> int:
        """What may be read from its QEMU now."""
        kept_back = WINDOW_BYTES - _SHORT_WINDOW_BYTES if self._queue.hurries(channel.plug.number) else 0
        return channel.credit - kept_back

    def _forget_ended(self) -> None:
        for number, channel in list(self._channels.items()):
            if not channel.over:
                continue
            if any(chunk.channel == number for chunk in self._queue):
                self._held_up = True
            else:
                channel.plug.close()
                del self._channels[number]
                self._queue.set_hurried(number, False)
                self._compression.adjust()
                self._notices.channel_ended(channel.statistics)

    def _read(self, channel: _Channel) -> None:
        for _ in range(_READS_AT_ONCE):
            if not self._read_once(channel):
                return

    def _read_once(self, channel: _Channel) -> bool:
        """Whether there may be more to read at once."""
        number = channel.plug.number
        with self._lock:
            slot, offset, length = self._queue.room(number)
            room = channel.throttle.room(time.monotonic())
            length = min(length, self._allowance(channel), length if room is None else room)
        count: int | None = None
        if length > 0:
            view = self._memory.raw(slot, offset, offset + length)
            try:
                count = channel.plug.read_into(view)
            except OSError:
                self._break(channel)
            if count:
                channel.said.update(view[:count])
        with self._lock:
            self._queue.append(number, count or 0, channel.said.intdigest())
            if count == 0:
                channel.plug.input_ended = True
                self._queue.mark(number, Kind.END)
            channel.credit -= count or 0
            channel.throttle.take(time.monotonic(), count or 0)
            channel.statistics.raw_bytes += count or 0
            self._arrived.notify()
        return bool(count) and count == length

    def _flush(self, channel: _Channel) -> None:
        try:
            channel.plug.flush()
        except OSError:
            self._break(channel)

    def _on_results(self) -> None:
        with self._lock:
            self._compression.take_results()
            self._done.notify()

    def _break(self, channel: _Channel) -> None:
        """Its QEMU cannot be read or written: tell the other side, and unplug."""
        with self._lock:
            if not channel.broken:
                channel.broken = channel.plug.input_ended = True
                self._queue.mark(channel.plug.number, Kind.ABORT)
                self._arrived.notify()
        self._pump.wake()

    # --- the sending thread ---

    def _send(self) -> None:
        while True:
            chunk = self._next()
            self._transmit(chunk)
            with self._lock:
                self._queue.pop()
                if self._held_up:
                    self._pump.wake()

    def _next(self) -> Chunk:
        """The head of the queue, once it is known how it will be sent."""
        with self._lock:
            while True:
                while (chunk := self._queue.head()) is None:
                    self._arrived.wait()
                self._compression.take_results()
                self._compression.decide(chunk, self._done)
                # What hurries may have gone ahead of it meanwhile.
                if self._queue.head() is chunk:
                    return self._queue.begin()

    def _transmit(self, chunk: Chunk) -> None:
        if chunk.kind is not Kind.DATA:
            self._forward.send(self._frames.sign(chunk.kind, chunk.channel))
            return
        if chunk.state is State.DONE and chunk.compressed_length < chunk.content_length:
            form = Form.COMPRESSED
            payload = self._memory.compressed(chunk.slot, chunk.compressed_length)
        elif chunk.content_length:
            form = Form.CONDENSED
            payload = self._memory.content(chunk.slot, chunk.content_length)
        else:
            form = Form.RAW
            payload = self._memory.raw(chunk.slot, 0, chunk.length)
        self._forward.send(self._frames.data(chunk.channel, form, chunk.length, len(payload), chunk.said), payload)
        self._count(chunk, len(payload))

    def _count(self, chunk: Chunk, wire_length: int) -> None:
        channel = self._channels.get(chunk.channel)
        if channel is not None:
            channel.statistics.wire_bytes += wire_length + HEADER_BYTES
            channel.statistics.compressed_chunks += wire_length < chunk.length
            channel.statistics.raw_chunks += wire_length >= chunk.length

    def _spend(self, number: int, cpu_s: float) -> None:
        if (channel := self._channels.get(number)) is not None:
            channel.statistics.cpu_s += cpu_s

    # --- the backward thread ---

    def _listen(self) -> None:
        frames = FrameReader()
        while True:
            header = frames.header(self._backward.receive(HEADER_BYTES))
            payload = memoryview(self._backward.receive(header.wire_length))
            if header.kind is Kind.DATA and header.form is not Form.RAW:
                raise BrokenStream("the return path is never compressed")
            channel = self._channels.get(header.channel)
            if channel is not None:
                self._obey(channel, header, payload)

    def _obey(self, channel: _Channel, header: Header, payload: memoryview) -> None:
        if header.kind is Kind.CREDIT:
            self._grant(channel, header.raw_length)
            return
        try:
            if header.kind is Kind.DATA:
                header.verify_next(channel.heard, payload)
                channel.plug.write(payload)
            elif header.kind is Kind.END:
                channel.plug.finish()
            else:
                channel.broken = channel.plug.input_ended = True
        except OSError:
            self._break(channel)
        self._pump.wake()

    def _grant(self, channel: _Channel, count: int) -> None:
        with self._lock:
            stood_still = self._allowance(channel) <= 0
            channel.credit += count
        if stood_still:
            self._pump.wake()
        if channel.credit > WINDOW_BYTES:
            raise BrokenStream(f"more credit for channel {channel.plug.number} than there is")
