"""The queue: no byte is lost, exchanged or overwritten, little waits, and what is offered is worth it."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from limosa.transport.relay.frames import HEAD_BYTES, MAX_RAW_BYTES, Kind
from limosa.transport.relay.queue import Chunk, Queue, State

SLOTS = 5
KIB = 1024
#: bytes a second, and seconds a byte
SLOW_LINE = 12e6
GIGABIT = 119e6
FAST_LINE = 3e9
PACE, SLOW_PACE = 1 / 300e6, 1 / 140e6
LITTLE_BYTES = 256 * KIB


class Bench:
    """A queue with its slots, and a QEMU on each channel whose bytes are numbered."""

    def __init__(self) -> None:
        self.queue = Queue(SLOTS)
        self.slots = [bytearray(MAX_RAW_BYTES) for _ in range(SLOTS)]
        self.read = {1: 0, 2: 0}
        self.sent = {1: 0, 2: 0}
        self.offered: list[Chunk] = []
        self.condensed: list[Chunk] = []
        #: what slots held when the worker began with them, which must not change until it is done
        self.begun: list[tuple[Chunk, bytes]] = []
        self.sending: Chunk | None = None

    def fill(self, channel: int, wanted: int) -> int:
        has_room = self.queue.has_room(channel)
        slot, offset, length = self.queue.room(channel)
        assert bool(length) == has_room
        count = min(wanted, length)
        if count:
            self.slots[slot][offset : offset + count] = numbered(channel, self.read[channel], count)
        self.queue.append(channel, count)
        self.read[channel] += count
        return count

    def offer(self) -> None:
        if len(self.offered) + len(self.begun) < 2:
            chunk = self.queue.worth(1.0, GIGABIT, PACE, 0.3)
            if chunk is not None:
                self.condense(chunk)
                chunk.state = State.OFFERED
                self.offered.append(chunk)

    def condense(self, until: Chunk | None = None) -> None:
        for chunk in self.queue.to_condense(until):
            chunk.content_length = HEAD_BYTES + chunk.length
            self.condensed.append(chunk)

    def start(self) -> None:
        if self.offered and not self.begun:
            chunk = self.offered.pop(0)
            self.begun.append((chunk, bytes(self.slots[chunk.slot])))

    def work(self) -> None:
        self.start()
        if self.begun:
            chunk, contents = self.begun.pop()
            assert bytes(self.slots[chunk.slot]) == contents
            if chunk.state is State.LATE:
                self.queue.leave(chunk)
            else:
                chunk.state, chunk.compressed_length = State.DONE, chunk.content_length

    def send(self) -> None:
        """What the worker has begun with is not waited for; what it has not begun with is taken back."""
        head = self.queue.head()
        if head is None or self.sending is not None:
            return
        if head.state is State.OFFERED and head in self.offered:
            self.offered.remove(head)
            head.state = State.WAITING
        elif head.state is State.OFFERED:
            head.state = State.LATE
        self.condense(head)
        self.sending = self.queue.begin()

    def sent_it(self) -> None:
        """Whatever happened since, what went is what was read."""
        chunk, self.sending = self.sending, None
        if chunk is None:
            return
        assert chunk.slot in range(SLOTS)
        data = bytes(self.slots[chunk.slot][: chunk.length])
        assert data == numbered(chunk.channel, self.sent[chunk.channel], chunk.length)
        self.sent[chunk.channel] += chunk.length
        if chunk.content_length:
            assert self.condensed.pop(0) is chunk
            assert chunk.content_length == HEAD_BYTES + chunk.length
        assert self.queue.pop() is chunk


def numbered(channel: int, start: int, count: int) -> bytes:
    first = start + channel * 1000
    pattern = bytes(range(251))
    turned = pattern[first % 251 :] + pattern[: first % 251]
    return (turned * (count // 251 + 1))[:count]


ACTS = ["condense", "offer", "start", "work", "send", "sent_it", "short", "long"]
steps = st.one_of(
    st.tuples(st.just("fill"), st.sampled_from([1, 2]), st.integers(0, 600 * KIB)),
    st.tuples(st.sampled_from(["hurry", "calm"]), st.sampled_from([1, 2]), st.just(0)),
    st.tuples(st.sampled_from(ACTS), st.just(0), st.just(0)),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(steps, max_size=60))
def test_every_byte_comes_out_once_in_order_and_nothing_overlaps(history: list[tuple[str, int, int]]) -> None:
    bench = Bench()
    for step, channel, count in history:
        if step == "fill":
            bench.fill(channel, count)
        elif step in ("hurry", "calm"):
            bench.queue.set_hurried(channel, step == "hurry")
        elif step in ("short", "long"):
            bench.queue.set_waiting_limit(LITTLE_BYTES if step == "short" else None)
        else:
            getattr(bench, step)()
        check_places(bench.queue)
    while len(bench.queue):
        bench.send()
        bench.sent_it()
    assert bench.sent == bench.read
    assert bench.queue.waiting_bytes == 0


def check_places(queue: Queue) -> None:
    chunks = list(queue)
    assert sum(chunk.length for chunk in chunks) == queue.waiting_bytes
    slots = [chunk.slot for chunk in chunks]
    assert len(set(slots)) == len(slots) <= SLOTS


def test_what_is_late_keeps_its_slot_until_it_is_made() -> None:
    bench = Bench()
    for _ in range(SLOTS):
        bench.fill(1, MAX_RAW_BYTES)
    bench.offer()
    bench.start()
    late = bench.queue.head()
    assert late is not None
    bench.send()
    bench.sent_it()
    assert (late.state, bench.queue.has_room(1)) == (State.LATE, False)
    bench.work()
    assert bench.queue.has_room(1)


def test_what_is_late_keeps_its_slot_while_it_is_sent_though_it_is_made() -> None:
    bench = Bench()
    for _ in range(SLOTS):
        bench.fill(1, MAX_RAW_BYTES)
    bench.offer()
    bench.start()
    bench.send()
    bench.work()
    assert not bench.queue.has_room(1), "it is being sent out of its slot"
    bench.sent_it()
    assert bench.queue.has_room(1)


def test_what_got_ahead_of_condensed_chunks_goes_as_it_is_and_they_in_order() -> None:
    bench = Bench()
    for channel in (1, 2, 1):
        bench.fill(channel, KIB)
    first, second, third = bench.queue
    bench.condense(second)
    bench.queue.set_hurried(2, True)
    bench.queue.set_hurried(1, True)
    bench.fill(1, KIB)
    assert [chunk.content_length > 0 for chunk in (first, second, third)] == [True, True, False]
    ahead = next(iter(bench.queue))
    bench.queue.set_hurried(1, False)
    assert (bench.queue.to_condense(), bench.queue.to_condense(ahead)) == ([], [])


def test_what_may_grow_is_condensed_only_when_it_is_wanted() -> None:
    bench = Bench()
    for channel in (1, 2):
        bench.fill(channel, KIB)
    first, second = bench.queue
    assert bench.queue.to_condense() == [first]
    assert bench.queue.to_condense(second) == [first, second]


def test_neither_what_is_being_sent_nor_what_is_being_read_behind_is_condensed() -> None:
    bench = Bench()
    for channel in (1, 2):
        bench.fill(channel, KIB)
    bench.queue.begin()
    bench.queue.room(2)
    assert bench.queue.to_condense(list(bench.queue)[1]) == []


def test_what_is_condensed_does_not_grow() -> None:
    bench = Bench()
    bench.fill(1, KIB)
    bench.condense(bench.queue.head())
    bench.fill(1, KIB)
    assert [chunk.length for chunk in bench.queue] == [KIB, KIB]


def test_of_too_little_nobody_is_told() -> None:
    bench = full(2)
    chunks = list(bench.queue)
    bench.condense(chunks[0])
    chunks[0].content_length = KIB
    assert bench.queue.worth(0.0, SLOW_LINE, PACE, 0.3) is chunks[1]


def test_what_waits_grows_instead_of_multiplying() -> None:
    bench = Bench()
    for _ in range(8):
        bench.fill(1, 10 * KIB)
    assert [chunk.length for chunk in bench.queue] == [80 * KIB]


def test_what_is_being_sent_is_not_added_to() -> None:
    bench = Bench()
    bench.fill(1, 10 * KIB)
    bench.queue.begin()
    bench.fill(1, 10 * KIB)
    assert [chunk.length for chunk in bench.queue] == [10 * KIB, 10 * KIB]


def test_channels_take_turns_in_order() -> None:
    bench = Bench()
    for channel in (1, 2, 1):
        bench.fill(channel, KIB)
    bench.queue.mark(2, Kind.END)
    assert [(chunk.channel, chunk.kind) for chunk in bench.queue] == [(1, 1), (2, 1), (1, 1), (2, Kind.END)]


def test_little_waits_when_it_was_shortened() -> None:
    bench = Bench()
    bench.queue.set_waiting_limit(LITTLE_BYTES)
    while bench.fill(1, MAX_RAW_BYTES):
        pass
    assert LITTLE_BYTES - 16 * KIB < bench.queue.waiting_bytes <= LITTLE_BYTES


def test_what_hurries_goes_ahead_of_others_and_little_of_it_waits() -> None:
    bench = Bench()
    while bench.fill(1, MAX_RAW_BYTES):
        pass
    bench.queue.begin()
    bench.queue.set_hurried_limit(LITTLE_BYTES)
    bench.queue.set_hurried(2, True)
    while bench.fill(2, 100 * KIB):
        pass
    assert [chunk.channel for chunk in bench.queue] == [1, 2, 1, 1, 1]
    assert LITTLE_BYTES - 16 * KIB < list(bench.queue)[1].length <= LITTLE_BYTES


def test_what_hurries_stays_behind_what_its_channel_said_before() -> None:
    bench = Bench()
    for channel in (1, 2, 1):
        bench.fill(channel, KIB)
    bench.queue.set_hurried(2, True)
    bench.condense(list(bench.queue)[1])
    bench.fill(2, KIB)
    assert [chunk.channel for chunk in bench.queue] == [1, 2, 2, 1]


def full(chunks: int) -> Bench:
    bench = Bench()
    bench.queue.set_chunk_limit(200 * KIB)
    for _ in range(chunks):
        bench.fill(1, MAX_RAW_BYTES)
    assert [chunk.length for chunk in bench.queue] == [200 * KIB] * chunks
    return bench


def test_on_a_slow_line_every_chunk_is_worth_it() -> None:
    bench = full(3)
    for chunk in bench.queue:
        assert bench.queue.worth(0.0, SLOW_LINE, PACE, 0.3) is chunk
        chunk.state, chunk.compressed_length = State.DONE, 60 * KIB


def test_on_a_fast_line_nothing_is() -> None:
    assert full(4).queue.worth(0.0, FAST_LINE, PACE, 0.3) is None


def test_on_a_fast_line_that_is_busy_only_what_it_reaches_late_is() -> None:
    bench = full(4)
    # 200 KiB take 0.07 ms on the line; 0.68 ms with the worker, which others may make 1.02, and 0.1 ms to tell it and
    # to hear from it. A tenth of all that waits is its lead.
    chunks = list(bench.queue)
    assert bench.queue.worth(1.24e-3, FAST_LINE, PACE, 0.3) is chunks[0]
    assert bench.queue.worth(1.20e-3, FAST_LINE, PACE, 0.3) is chunks[1]
    assert bench.queue.worth(0.95e-3, FAST_LINE, PACE, 0.3) is None


def test_a_worker_that_is_ahead_needs_no_lead() -> None:
    bench = full(4)
    chunks = list(bench.queue)
    assert bench.queue.worth(0.0, GIGABIT, SLOW_PACE, 0.3) is chunks[2]
    chunks[0].state, chunks[0].compressed_length = State.DONE, 200 * KIB
    assert bench.queue.worth(0.0, GIGABIT, SLOW_PACE, 0.3) is chunks[1]


def test_offers_keep_the_order_of_the_queue() -> None:
    bench = full(4)
    chunks = list(bench.queue)
    chunks[2].state = State.OFFERED
    assert bench.queue.worth(1.0, GIGABIT, PACE, 0.3) is chunks[3]


def test_neither_what_is_being_sent_nor_what_is_being_read_behind_is_offered() -> None:
    bench = Bench()
    bench.fill(1, 100 * KIB)
    bench.queue.room(1)
    assert bench.queue.worth(1.0, GIGABIT, PACE, 0.3) is None
    bench.queue.append(1, 0)
    bench.queue.begin()
    assert bench.queue.worth(1.0, GIGABIT, PACE, 0.3) is None


def test_what_does_not_hurry_any_more_stays_in_order_and_waits_its_turn() -> None:
    bench = Bench()
    bench.queue.set_hurried(2, True)
    for channel in (1, 2, 1):
        bench.fill(channel, KIB)
    bench.queue.set_hurried(2, False)
    bench.fill(2, KIB)
    assert [chunk.channel for chunk in bench.queue] == [2, 1, 2]
    bench.queue.set_hurried(2, True)
    bench.fill(2, 2 * KIB)
    assert [(chunk.channel, chunk.length) for chunk in bench.queue] == [(2, KIB), (1, 2 * KIB), (2, 3 * KIB)]
