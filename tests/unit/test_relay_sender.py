"""The sending side, step by step in one thread: what its threads may do between each other's steps."""

from __future__ import annotations

import os
import random
import select
import socket
import subprocess
from collections.abc import Iterator

import pytest

from limosa.transport.relay.carrier import In, Out
from limosa.transport.relay.codec import Compressor, Decompressor
from limosa.transport.relay.errors import BrokenStream
from limosa.transport.relay.frames import HEADER_BYTES, Form, FrameReader, Kind, Said
from limosa.transport.relay.notices import Notices
from limosa.transport.relay.pages import Finder, Keeper
from limosa.transport.relay.plug import Plug
from limosa.transport.relay.queue import State
from limosa.transport.relay.sender import Sender
from limosa.transport.relay.worker import NO_SLOT, Memory, Result, Worker

KIB = 1024
WINDOW_LOG = 20
#: bytes a second, so that waiting for the worker is worth it
SLOW = 10e6


class Wire(Out, In):
    """Keeps what is sent; nothing comes."""

    def __init__(self) -> None:
        self.sent_bytes = 0
        self.data = bytearray()

    def send(self, header: bytes, payload: memoryview | bytes = b"") -> None:
        self.data += header + bytes(payload)

    def set_short(self, short: bool) -> None:
        pass

    def set_unsent(self, limit: int) -> None:
        pass

    def receive_into(self, view: memoryview) -> None:
        raise AssertionError("nobody listens here")

    def receive(self, count: int) -> bytes:
        raise AssertionError("nobody listens here")

    def unacknowledged(self) -> tuple[int, int]:
        return 0, 0


class SlowWorker(Worker):
    """Has begun with the first chunk it is offered, or when told to, and is done when it is told to be."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._compressor = Compressor(1)
        self._offered: list[tuple[int, int]] = []
        self.has_begun = True
        self._made: list[Result] = []

    def offer(self, slot: int, length: int) -> None:
        self._offered.append((slot, length))

    def fileno(self) -> int:
        return -1

    def withdraw(self) -> int | None:
        kept = 1 if self.has_begun else 0
        return self._offered.pop(kept)[0] if len(self._offered) > kept else None

    def work(self) -> None:
        if not self._offered:
            return
        slot, length = self._offered.pop(0)
        if slot == NO_SLOT:
            self._made.append(Result(slot, 0, 0.0, 0.0))
            return
        made = self._compressor.compress(self._memory.content(slot, length))
        if len(made) < length:
            self._memory.compressed(slot, len(made))[:] = made
        self._made.append(Result(slot, min(len(made), length), 0.001, 0.001))

    def result(self) -> Result | None:
        return self._made.pop(0) if self._made else None


class Bench:
    """A sender with one channel, whose QEMU says what it is told to."""

    def __init__(self, slots: int = 3, window_log: int = WINDOW_LOG) -> None:
        self.wire = Wire()
        self.memory = Memory(slots)
        self.worker = SlowWorker(self.memory)
        self._window_log = window_log
        self.daemon, control = socket.socketpair()
        finder = Finder(1 << window_log)
        self.sender = Sender(self.wire, self.wire, self.memory, finder, self.worker, Notices(control))
        self.qemu, ours = socket.socketpair()
        self.sender.open_channel(Plug(0, ours))
        self.sender._compression._line.rate = SLOW

    def read(self, data: bytes) -> None:
        """Its QEMU says something, and the pump reads it."""
        self.qemu.sendall(data)
        self.sender._read(self.sender._channels[0])

    def arrived(self, channel: int = 0) -> bytes:
        """What a channel's QEMU at the destination would get; raises if it would not."""
        frames, decompressor, keeper = FrameReader(), Decompressor(), Keeper(1 << self._window_log)
        rest, said, came = memoryview(bytes(self.wire.data)), Said(), b""
        while rest:
            header = frames.header(rest[:HEADER_BYTES])
            end = HEADER_BYTES + header.wire_length
            data, rest = bytes(rest[HEADER_BYTES:end]), rest[end:]
            content = decompressor.decompress(data) if header.form is Form.COMPRESSED else data
            if header.form is not Form.RAW:
                keeper.room(len(content))[:] = content
                data = bytes(keeper.restore(header.raw_length))
            if header.kind is Kind.DATA and header.channel == channel:
                said.update(data)
                header.verify(said.intdigest())
                came += data
        return came


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    for one in (made.qemu, made.daemon):
        one.close()


def test_a_chunk_that_is_made_just_when_it_is_not_waited_for_any_longer_goes_as_it_is(bench: Bench) -> None:
    first, second = bytes(range(251)) * 400, b"of the next" * 5000
    bench.read(first)
    chunk = bench.sender._next()  # waits for the worker, in vain
    assert chunk.state is State.LATE
    bench.worker.work()
    bench.sender._on_results()  # the pump comes between the decision and the sending
    bench.sender._transmit(chunk)
    bench.read(second)  # would go to the slot the chunk is still sent out of, if that were free
    bench.sender._queue.pop()
    bench.sender._transmit(bench.sender._next())
    assert bench.arrived() == first + second


def test_what_is_overwritten_between_reading_and_sending_is_noticed(bench: Bench) -> None:
    bench.read(b"what was said")
    chunk = bench.sender._next()
    bench.memory.raw(chunk.slot, 0, 4)[:] = b"this"
    bench.sender._transmit(chunk)
    with pytest.raises(BrokenStream, match="checksum"):
        bench.arrived()


def test_channels_take_turns_at_what_room_there_is(bench: Bench) -> None:
    other, ours = socket.socketpair()
    with other:
        bench.sender.open_channel(Plug(1, ours))
        first = [bench.sender._interests()[1].descriptor for _ in range(4)]  # behind the worker's
    assert first[:2] == first[2:]
    assert set(first) == {ours.fileno(), bench.sender._channels[0].plug.fileno()}


def test_what_hurries_while_the_worker_is_waited_for_goes_first(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    other, ours = socket.socketpair()
    with other:
        bench.sender.open_channel(Plug(1, ours))
        bench.sender.set_short(1, True)
        bench.read(bytes(range(250)) * 200)
        other.sendall(b"in a hurry" * 1000)

        def wait_for(_done: object, _timeout: float) -> None:
            bench.sender._lock.release()
            bench.sender._read(bench.sender._channels[1])
            bench.sender._lock.acquire()

        monkeypatch.setattr(bench.sender._done, "wait_for", wait_for)
        sent = [bench.sender._next()]
        bench.sender._transmit(sent[0])
        bench.sender._queue.pop()
        sent.append(bench.sender._next())
    assert [chunk.channel for chunk in sent] == [1, 0]


def test_pages_that_are_known_are_left_out_though_the_worker_has_no_time(bench: Bench) -> None:
    said = b"".join(PAGES[:10])
    for _ in range(2):
        bench.read(said)
        chunk = bench.sender._next()
        assert chunk.state is not State.DONE
        bench.sender._transmit(chunk)
        bench.sender._queue.pop()
    assert bench.arrived() == 2 * said
    assert len(bench.wire.data) < 1.1 * len(said)


def test_on_a_line_that_is_faster_than_pages_are_found_they_are_not_looked_for(bench: Bench) -> None:
    bench.sender._compression._line.rate = 100e9
    bench.read(b"".join(PAGES[:20]))
    assert not bench.sender._next().content_length


def test_a_worker_that_died_before_the_session_costs_compression_only(bench: Bench) -> None:
    with subprocess.Popen(["true"]) as process:
        pidfd = os.pidfd_open(process.pid)
    offers, tickets = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    results, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.close()
    dead = Worker(pidfd, offers, tickets, results)
    dead.begin(1)
    bench.sender._compression._worker = dead
    said = b"what was said" * 1000
    bench.read(said)
    bench.sender._transmit(bench.sender._next())
    assert bench.arrived() == said
    assert bench.sender._compression._worker is None
    os.close(pidfd)


#: Pages as QEMU says them, more than the window has room for, so that they are known, forgotten and known again.
PAGES = [(4096 * number | 0x28).to_bytes(8, "big") + number.to_bytes(2, "big") * 2048 for number in range(400)]
FEW_PAGES_LOG = 20


class Crowd:
    """Two channels and a worker, of whom any does something whenever another may: reproducible by its seed."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.bench = Bench(slots=6, window_log=FEW_PAGES_LOG)
        other, ours = socket.socketpair()
        self.sender = self.bench.sender
        self.sender.open_channel(Plug(1, ours))
        self.qemus, self.said = [self.bench.qemu, other], [b"", b""]
        work, hear = self.bench.worker.work, self.hear
        self.meanwhile = [self.say, self.hurry, self.begin, work, work, work, hear, hear]

    def act(self) -> None:
        self.chance.choice(self.meanwhile)()
        self.read()

    def say(self) -> None:
        channel = self.chance.randrange(2)
        if self.sender._queue.has_room(channel):
            words = b"".join(self.chance.choices(PAGES, k=self.chance.randrange(1, 24)))
            self.qemus[channel].sendall(words)
            self.said[channel] += words

    def read(self) -> None:
        for channel in self.sender._channels.values():
            if self.sender._queue.has_room(channel.plug.number):
                self.sender._read(channel)

    def hurry(self) -> None:
        self.sender.set_short(self.chance.randrange(2), self.chance.choice((False, True)))

    def begin(self) -> None:
        self.bench.worker.has_begun = self.chance.choice((False, True))

    def hear(self) -> None:
        self.sender._on_results()

    def send(self) -> None:
        if self.sender._queue.head() is None:
            return
        chunk = self.sender._next()
        self.act()
        self.sender._transmit(chunk)
        self.sender._grant(self.sender._channels[chunk.channel], chunk.length)
        self.act()
        self.sender._queue.pop()

    def finish(self) -> None:
        self.meanwhile = [self.bench.worker.work, self.hear]
        while self.sender._queue.head() is not None or self._unread():
            self.act()
            self.send()

    def close(self) -> None:
        for end in (*self.qemus, self.bench.daemon):
            end.close()
        for channel in self.sender._channels.values():
            channel.plug.close()

    def _unread(self) -> bool:
        poll = select.poll()
        for channel in self.sender._channels.values():
            poll.register(channel.plug.fileno(), select.POLLIN)
        return bool(poll.poll(0))

    def wait_for(self, _done: object, _timeout: float) -> None:
        self.sender._lock.release()
        for _ in range(self.chance.randrange(8)):
            self.act()
        self.sender._lock.acquire()


@pytest.mark.parametrize("seed", range(200))
def test_whoever_is_first_meanwhile_everything_arrives(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    crowd = Crowd(seed)
    monkeypatch.setattr(crowd.sender._done, "wait_for", crowd.wait_for)
    for _ in range(crowd.chance.randrange(1, 250)):
        crowd.chance.choice((crowd.act, crowd.send))()
    crowd.finish()
    assert [crowd.bench.arrived(0), crowd.bench.arrived(1)] == crowd.said
    crowd.close()
