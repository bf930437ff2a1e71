"""What relays say: whatever is changed, cut, repeated or exchanged on the way is noticed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from limosa.transport.relay.errors import BrokenStream
from limosa.transport.relay.frames import (
    HEADER_BYTES,
    HELLO_BYTES,
    MAX_LANE,
    MAX_RAW_BYTES,
    VERSION,
    WINDOW_BYTES,
    Form,
    FrameReader,
    FrameWriter,
    Hello,
    Kind,
    Said,
    Way,
)

payloads = st.binary(min_size=1, max_size=200)
channels = st.integers(0, 2**32 - 1)


@given(st.sampled_from(Way), st.integers(10, 31), st.integers(0, MAX_LANE))
def test_a_hello_is_read_as_it_was_said(way: Way, window_log: int, lane: int) -> None:
    assert Hello.parse(Hello(way, window_log, lane).pack()) == (way, window_log, lane)


@given(st.binary(min_size=HELLO_BYTES, max_size=HELLO_BYTES))
def test_no_other_bytes_are_a_hello(data: bytes) -> None:
    with pytest.raises(BrokenStream):
        Hello.parse(data)


def test_another_version_is_named() -> None:
    packed = bytearray(Hello(Way.FORWARD, 27).pack())
    packed[14] += 1
    with pytest.raises(BrokenStream, match=f"speaks version {VERSION + 1}, this one {VERSION}"):
        Hello.parse(bytes(packed))


@given(st.lists(st.tuples(channels, payloads), max_size=8))
def test_frames_are_read_as_they_were_written(items: list[tuple[int, bytes]]) -> None:
    writer, reader = FrameWriter(), FrameReader()
    for channel, data in items:
        header = reader.header(writer.data(channel, Form.RAW, len(data), len(data), Said(data).intdigest()))
        header.verify(Said(data).intdigest())
        assert (header.kind, header.form, header.channel, header.wire_length) == (Kind.DATA, 0, channel, len(data))
        assert reader.header(writer.sign(Kind.END, channel)).kind is Kind.END


@given(payloads, st.data())
def test_every_changed_byte_is_noticed(data: bytes, draw: st.DataObject) -> None:
    frame = bytearray(FrameWriter().data(7, Form.RAW, len(data), len(data), Said(data).intdigest()) + data)
    frame[draw.draw(st.integers(0, len(frame) - 1))] ^= draw.draw(st.integers(1, 255))
    with pytest.raises(BrokenStream):
        FrameReader().header(frame[:HEADER_BYTES]).verify(Said(bytes(frame[HEADER_BYTES:])).intdigest())


@given(st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES))
def test_arbitrary_bytes_are_no_frame(header: bytes) -> None:
    with pytest.raises(BrokenStream):
        FrameReader().header(header).verify(Said(b"x").intdigest())


@given(st.permutations(range(4)).filter(lambda order: order != [0, 1, 2, 3]))
def test_frames_out_of_order_are_noticed(order: list[int]) -> None:
    writer = FrameWriter()
    frames = [writer.sign(Kind.END, number) for number in range(4)]
    reader = FrameReader()

    def read_all() -> None:
        for place in order:
            reader.header(frames[place])

    with pytest.raises(BrokenStream, match="was due"):
        read_all()


@pytest.mark.parametrize(
    ("form", "raw", "wire"),
    [
        (Form.RAW, 0, 0),
        (Form.RAW, 10, 9),
        (Form.RAW, MAX_RAW_BYTES + 1, MAX_RAW_BYTES + 1),
        (Form.COMPRESSED, MAX_RAW_BYTES + 1, 10),
        (Form.RAW, 10, 11),
        (Form.CONDENSED, 10, 15),
        (Form.CONDENSED, 10, 0),
        (Form.COMPRESSED, 10, 15),
        (Form.COMPRESSED, 10, 0),
    ],
)
def test_impossible_lengths_are_refused_before_anything_is_read(form: Form, raw: int, wire: int) -> None:
    with pytest.raises(BrokenStream, match="impossible lengths"):
        FrameReader().header(FrameWriter().data(1, form, raw, wire, 0))


@pytest.mark.parametrize(("kind", "count"), [(Kind.CREDIT, 0), (Kind.CREDIT, WINDOW_BYTES + 1), (Kind.END, 1)])
def test_impossible_counts_are_refused(kind: Kind, count: int) -> None:
    with pytest.raises(BrokenStream, match="impossible lengths"):
        FrameReader().header(FrameWriter().sign(kind, 1, count))
