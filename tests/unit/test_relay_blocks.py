"""Blocks over lanes: whatever is delayed, lost or broken on the way, the other end reads the exact bytes or fails."""

from __future__ import annotations

import random
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limosa.transport.relay.blocks import BLOCK_BYTES, HEADER_BYTES, WINDOW_BYTES, Block, Header, Incoming, Outgoing
from limosa.transport.relay.errors import BrokenStream

MOST_LANES = 4
NOISE = random.Random(3).randbytes(256 * 1024)
LATE_S = 2.0


def header(*, came: int = 0, read: int = 0) -> Header:
    return Header(0, read, came, 0)


def over(lanes: int) -> Outgoing:
    outgoing = Outgoing()
    for number in range(lanes):
        outgoing.join(number)
    return outgoing


def filled(outgoing: Outgoing, count: int) -> None:
    for number in range(count):
        outgoing.add(bytes([number]))


def taken(outgoing: Outgoing, lane: int, now: float = 0.0) -> bytes | None:
    block = outgoing.take(lane, now)
    return block.data if block else None


class Network:
    """Two ends with lanes between them, on each of which blocks and what is said of them keep their order."""

    def __init__(self, lanes: int) -> None:
        self.now = 0.0
        self.outgoing, self.incoming = Outgoing(), Incoming()
        self.there: list[deque[Block]] = []
        self.back: list[deque[Header]] = []
        self.came: list[int] = []
        self.alive: list[int] = []
        self.sent, self.read = bytearray(), bytearray()
        for _ in range(lanes):
            self.join()

    def do(self, act: int, number: int) -> None:
        """One of the things that can happen, on one of the lanes that are left."""
        lane = self.alive[number % len(self.alive)]
        acts = [self.send, self.take, self.take, self.arrive, self.arrive, self.hear]
        if act < len(acts):
            acts[act](lane)
        elif number % 8:
            self.consume()
        elif number % 16:
            self.now += LATE_S
        elif number % 32:
            self.join()
        else:
            self.break_(lane)

    def join(self) -> None:
        if len(self.alive) < MOST_LANES:
            lane = len(self.there)
            self.there.append(deque())
            self.back.append(deque())
            self.came.append(0)
            self.alive.append(lane)
            self.outgoing.join(lane)

    def send(self, lane: int) -> None:
        if self.outgoing.has_room():
            data = NOISE[len(self.sent) :][: 100 * (lane % MOST_LANES) + 1]
            self.outgoing.add(data)
            self.sent += data

    def take(self, lane: int) -> None:
        if (block := self.outgoing.take(lane, self.now)) is not None:
            self.there[lane].append(block)

    def arrive(self, lane: int) -> None:
        if self.there[lane]:
            block = self.there[lane].popleft()
            self.incoming.put(block.place, block.data)
            self.came[lane] += 1
            self.back[lane].append(header(came=self.came[lane], read=self.incoming.read))

    def hear(self, lane: int) -> None:
        if self.back[lane]:
            self.outgoing.on_header(lane, self.back[lane].popleft(), self.now)

    def consume(self) -> None:
        if (data := self.incoming.take()) is not None:
            self.read += data
            assert self.sent.startswith(self.read)

    def break_(self, lane: int) -> None:
        """What was on its way to one end is lost, and what was on its way to the other may come still."""
        if len(self.alive) > 1:
            self.alive.remove(lane)
            self.outgoing.lose(lane)
            for said in self.back[lane]:
                self.outgoing.on_header(lane, said, self.now)

    def come_to_rest(self) -> None:
        """Let the lanes that are left bring what they can."""
        before: tuple[int, ...] = ()
        while before != (before := self._state()):
            for lane in self.alive:
                for act in (self.take, self.arrive, self.hear):
                    act(lane)
            self.consume()

    def _state(self) -> tuple[int, ...]:
        unheard = sum(len(said) for said in self.back)  # that a block came twice changes nothing else
        return sum(self.came), len(self.read), self.outgoing.under_way_bytes, unheard


@given(st.integers(1, MOST_LANES), st.binary(min_size=20, max_size=800))
@settings(max_examples=200, deadline=None)
def test_whatever_happens_the_exact_bytes_are_read(lanes: int, script: bytes) -> None:
    network = Network(lanes)
    for word in script:
        network.do(word % 7, word // 7)
    network.come_to_rest()
    assert network.read == network.sent
    assert network.outgoing.under_way_bytes == 0


@given(st.builds(Header, *[st.integers(0, 2**64 - 1)] * 2, st.integers(0, 2**32 - 1), st.integers(0, BLOCK_BYTES)))
def test_a_header_is_read_as_it_was_said(said: Header) -> None:
    assert Header.parse(said.pack()) == said
    assert len(said.pack()) == HEADER_BYTES


@given(
    st.builds(Header, *[st.integers(0, WINDOW_BYTES)] * 2, st.integers(0, 9), st.integers(0, BLOCK_BYTES)),
    st.integers(0, 8 * HEADER_BYTES - 1),
)
def test_a_header_of_which_a_bit_is_wrong_breaks_the_session(said: Header, bit: int) -> None:
    data = bytearray(said.pack())
    data[bit // 8] ^= 1 << bit % 8
    with pytest.raises(BrokenStream):
        Header.parse(bytes(data))


def test_a_block_that_is_too_long_breaks_the_session() -> None:
    with pytest.raises(BrokenStream, match="a block of"):
        Header.parse(Header(0, 0, 0, BLOCK_BYTES + 1).pack())


def test_a_lane_that_stands_still_costs_what_it_has_once_and_gets_no_more() -> None:
    outgoing = over(2)
    filled(outgoing, 6)
    assert [taken(outgoing, lane) for lane in (0, 0, 1)] == [b"\0", b"\1", b"\2"]
    outgoing.on_header(1, header(came=1), 0.1)
    at = outgoing.look_again_at()
    assert at is not None
    assert 0.1 < at < LATE_S
    assert [taken(outgoing, 1, LATE_S) for _ in range(3)] == [b"\0", b"\1", b"\3"]
    assert taken(outgoing, 0, LATE_S) is None
    outgoing.on_header(0, header(came=1), LATE_S)
    assert taken(outgoing, 0, LATE_S) == b"\4", "it gets on again"


def test_the_last_lane_is_waited_for() -> None:
    outgoing = over(2)
    filled(outgoing, 4)
    assert [taken(outgoing, lane) for lane in (0, 1)] == [b"\0", b"\1"]
    assert taken(outgoing, 0, 10.0) is None, "it was the first to be late"
    assert [taken(outgoing, 1, 10.0) for _ in range(3)] == [b"\0", b"\2", b"\3"]
    assert outgoing.look_again_at() is None


def test_of_what_a_lost_lane_had_only_what_did_not_arrive_goes_again() -> None:
    outgoing = over(2)
    filled(outgoing, 3)
    for _ in range(2):
        taken(outgoing, 0)
    outgoing.on_header(0, header(came=1), 0.0)
    outgoing.lose(0)
    assert [taken(outgoing, 1) for _ in range(3)] == [b"\1", b"\2", None]
    assert taken(outgoing, 0) is None
    assert outgoing.lanes_left == 1
    outgoing.on_header(0, header(came=2, read=1), 0.0)  # it was said before the lane broke


def test_a_lane_that_joins_takes_what_is_next_and_what_others_have_lost() -> None:
    outgoing = over(1)
    filled(outgoing, 3)
    assert taken(outgoing, 0) == b"\0"
    outgoing.join(1)
    assert taken(outgoing, 1) == b"\1"
    outgoing.lose(0)
    assert [taken(outgoing, 1) for _ in range(2)] == [b"\0", b"\2"]
    outgoing.on_header(1, header(came=3, read=3), 0.0)
    assert outgoing.under_way_bytes == 0


def test_a_lane_that_joins_one_that_is_late_goes_on_with_everything() -> None:
    outgoing = over(1)
    filled(outgoing, 2)
    assert taken(outgoing, 0) == b"\0"
    outgoing.join(1)
    assert [taken(outgoing, 1, LATE_S) for _ in range(2)] == [b"\0", b"\1"]
    assert taken(outgoing, 0, LATE_S) is None


def test_without_a_lane_nothing_is_taken_and_nothing_more_than_there_is_room_for() -> None:
    outgoing = Outgoing()
    assert not outgoing.has_room()
    outgoing.join(0)
    assert outgoing.has_room()


def test_no_more_is_sent_than_the_window_has_room_for() -> None:
    outgoing, incoming = over(1), Incoming()
    block, count = bytes(BLOCK_BYTES), 0
    while outgoing.has_room():
        outgoing.add(block)
        sent = outgoing.take(0, 0.0)
        assert sent is not None
        incoming.put(sent.place, sent.data)
        count += 1
        outgoing.on_header(0, header(came=count), 0.0)
    assert count == WINDOW_BYTES // BLOCK_BYTES
    with pytest.raises(BrokenStream, match="more was sent"):
        incoming.put(count * BLOCK_BYTES, b"x")
    assert incoming.take() == block
    outgoing.on_header(0, header(came=count, read=incoming.read), 0.0)
    assert outgoing.has_room()


@pytest.mark.parametrize("said", [header(came=2), header(read=2), header(came=2**32 - 1)])
def test_to_have_had_more_than_was_sent_breaks_the_session(said: Header) -> None:
    outgoing = over(1)
    filled(outgoing, 1)
    taken(outgoing, 0)
    with pytest.raises(BrokenStream, match="more than was sent"):
        outgoing.on_header(0, said, 0.0)
