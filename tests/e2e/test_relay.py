"""Two relay processes on loopback, with sockets in place of QEMUs: what goes in comes out, or nothing does."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
import socket
import sys
import threading
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
import uvloop

from harness.relays import SO_MAX_PACING_RATE, WINDOW_LOG, Pair, carriers, pair
from limosa.errors import InvalidInput, RelayFailed
from limosa.security.stream import make_credentials
from limosa.transport.relay import client
from limosa.transport.relay.client import Relay
from limosa.transport.relay.control import MAX_LANES, ChannelStatistics
from limosa.transport.relay.frames import HELLO_BYTES, VERSION, Form, FrameWriter, Hello, Said, Way
from limosa.transport.tcp import TcpChannel

MIB = 1024 * 1024
NOISE = random.Random(5).randbytes(8 * MIB)
#: As QEMU sends memory, which is what is found again.
PAGES = b"".join((at | 0x28).to_bytes(8, "big") + NOISE[at : at + 4096] for at in range(0, len(NOISE), 4096))
TEXT = b"".join(b"line %d of a program's heap\n" % number for number in range(300_000))[: 6 * MIB]
SLOW = 60 * MIB
#: By it the whole of the noise takes eight seconds.
CAP = MIB
WITHIN_S = 60


def run(work: Coroutine[None, None, None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(WITHIN_S):
            await work

    uvloop.run(limited())


def write(sock: socket.socket, data: bytes) -> None:
    with suppress(OSError), sock:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(65536):
            pass


def read(sock: socket.socket, into: list[bytes]) -> None:
    with suppress(OSError), sock:
        while data := sock.recv(MIB):
            into.append(data)


async def move(relays: Pair, data: bytes) -> tuple[bytes, ChannelStatistics]:
    """One stream from beginning to end: what came out, and the source's figures."""
    figures: asyncio.Future[ChannelStatistics] = asyncio.get_running_loop().create_future()
    number = len(relays.numbers)
    before = relays.source.on_channel_ended

    def on_ended(statistics: ChannelStatistics) -> None:
        before(statistics)
        if statistics.channel == number and not figures.done():
            figures.set_result(statistics)

    relays.source.on_channel_ended = on_ended
    here, there = await relays.channel()
    came: list[bytes] = []
    await asyncio.gather(asyncio.to_thread(read, there, came), asyncio.to_thread(write, here, data))
    return b"".join(came), await figures


@pytest.mark.parametrize("tls", [True, False])
def test_what_goes_in_comes_out(tls: bool) -> None:
    async def work() -> None:
        async with pair(tls=tls) as relays:
            for data in (NOISE, TEXT, b"x"):
                came, figures = await move(relays, data)
                assert came == data
                assert figures.raw_bytes == len(data)

    run(work())


def test_on_a_slow_line_alike_streams_cost_almost_nothing() -> None:
    async def work() -> None:
        async with pair(bytes_per_s=SLOW) as relays:
            while True:  # until a processor was free for it, as often as others let it
                came, figures = await move(relays, PAGES)
                assert came == PAGES
                if figures.wire_bytes < figures.raw_bytes / 4:  # noise, of which only what was sent before is left out
                    break
            assert figures.compressed_chunks > 0
            assert (await relays.source.statistics()).compression.cpu_s > 0

    run(work())


def test_without_compression_everything_goes_raw() -> None:
    async def work() -> None:
        async with pair(bytes_per_s=SLOW, level=None) as relays:
            came, figures = await move(relays, TEXT)
            assert came == TEXT
            assert figures.compressed_chunks == 0

    run(work())


def test_several_streams_share_a_session_and_the_return_path_works() -> None:
    async def work() -> None:
        async with pair() as relays:
            parts = [bytes([number]) * MIB + NOISE[: number * 100_000] for number in range(1, 6)]
            assert [came for came, _ in await asyncio.gather(*[move(relays, part) for part in parts])] == parts
            here, there = await relays.channel()
            with here, there:
                here.sendall(b"page")
                assert await asyncio.to_thread(there.recv, 100) == b"page"
                there.sendall(b"taken")
                assert await asyncio.to_thread(here.recv, 100) == b"taken"
                here.shutdown(socket.SHUT_WR)
                assert await asyncio.to_thread(there.recv, 100) == b""
                there.sendall(b"bye")
                assert await asyncio.to_thread(here.recv, 100) == b"bye"

    run(work())


def test_a_session_carries_what_64_moves_with_three_disks_each_have_at_once() -> None:
    async def work() -> None:
        async with pair() as relays:
            most = [await relays.channel() for _ in range(64 * 4)]
            assert len((await relays.source.statistics()).channels) == len(most)
            for here, there in (most[0], most[-1]):
                here.sendall(b"page")
                assert await asyncio.to_thread(there.recv, 100) == b"page"
            with pytest.raises(InvalidInput, match="open already"):
                await relays.channel()
            for here, there in most:
                here.close()
                there.close()

    run(work())


def test_shortened_streams_come_out_too() -> None:
    async def work() -> None:
        async with pair(bytes_per_s=SLOW) as relays:
            here, there = await relays.channel()
            await relays.source.set_short(0, short=True)
            came: list[bytes] = []
            await asyncio.gather(asyncio.to_thread(read, there, came), asyncio.to_thread(write, here, TEXT + NOISE))
            assert b"".join(came) == TEXT + NOISE

    run(work())


def test_a_qemu_that_does_not_read_stops_its_own_stream_only() -> None:
    async def work() -> None:
        async with pair() as relays:
            here, there = await relays.channel()
            stuck = threading.Thread(target=write, args=(here, NOISE * 2))
            stuck.start()
            for _ in range(3):
                assert (await move(relays, TEXT))[0] == TEXT
            assert stuck.is_alive()
            came: list[bytes] = []
            await asyncio.to_thread(read, there, came)
            assert b"".join(came) == NOISE * 2
            await asyncio.to_thread(stuck.join)

    run(work())


@pytest.mark.parametrize("speeds", [None, (None,)], ids=["two carriers", "a lane"])
def test_a_stream_is_kept_to_its_cap_until_that_is_lifted_and_no_other(speeds: tuple[None] | None) -> None:
    async def work() -> None:
        async with pair(bytes_per_s=speeds) as relays:
            here, there = await relays.channel()
            await relays.source.set_pace(0, CAP)
            began = time.monotonic()
            writing = asyncio.ensure_future(asyncio.to_thread(write, here, NOISE))
            first = await asyncio.to_thread(there.recv, CAP // 4, socket.MSG_WAITALL)
            # But for what one takes at once.
            assert time.monotonic() - began > 0.15
            assert (await move(relays, NOISE))[0] == NOISE
            assert not writing.done()
            assert len(NOISE) > CAP * (time.monotonic() - began), "the other was not waited for"
            await relays.source.set_pace(0, 0)
            came = [first]
            await asyncio.to_thread(read, there, came)
            assert b"".join(came) == NOISE
            await writing

    run(work())


def test_when_the_destinations_qemu_dies_the_sources_sees_the_end_and_others_go_on() -> None:
    async def work() -> None:
        async with pair() as relays:
            here, there = await relays.channel()
            there.close()
            with here, suppress(BrokenPipeError, ConnectionResetError):
                assert await asyncio.to_thread(here.recv, 100) == b""
                await asyncio.to_thread(here.sendall, NOISE * 4)
                pytest.fail("somebody took it")
            assert (await move(relays, TEXT))[0] == TEXT

    run(work())


@pytest.mark.parametrize("level", [1, None], ids=["compressed", "raw"])
@pytest.mark.parametrize("tls", [True, False])
@pytest.mark.parametrize("paths", [2, 4])
def test_over_several_paths_what_goes_in_comes_out(paths: int, tls: bool, level: int | None) -> None:
    async def work() -> None:
        async with pair(tls=tls, level=level, bytes_per_s=[SLOW] * paths) as relays:
            for data in (NOISE, b"x", TEXT):
                came, figures = await move(relays, data)
                assert came == data
                assert figures.raw_bytes == len(data)
            parts = [bytes([number]) * MIB + NOISE[: number * 100_000] for number in range(1, 6)]
            assert [came for came, _ in await asyncio.gather(*[move(relays, part) for part in parts])] == parts

    run(work())


def test_unequal_paths_carry_in_proportion() -> None:
    async def work() -> None:
        async with pair(level=None, bytes_per_s=[SLOW // 2, SLOW // 10], hold=True) as relays:
            assert (await move(relays, NOISE * 4))[0] == NOISE * 4
            fast, slow = [TcpChannel(sock).used()[0].sent_bytes for sock in relays.near[::2]]
            assert 3 < fast / slow < 7, (fast, slow)

    run(work())


@pytest.mark.parametrize("path", [0, 1])
@pytest.mark.parametrize("way", [0, 1], ids=["forward", "backward"])
@pytest.mark.parametrize("how", ["broken", "standing still"])
def test_a_path_that_is_cut_costs_speed_and_no_byte(path: int, way: int, how: str) -> None:
    async def work() -> None:
        async with pair(level=None, bytes_per_s=[SLOW // 4] * 2, hold=True) as relays:
            victim = (relays.near, relays.far)[way][2 * path + way]

            def cut(came: list[bytes]) -> None:
                while sum(map(len, came)) < MIB:
                    time.sleep(0.001)
                if how == "broken":
                    victim.shutdown(socket.SHUT_RDWR)
                else:
                    victim.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, 1)

            here, there = await relays.channel()
            came: list[bytes] = []
            works = (partial(read, there, came), partial(write, here, NOISE * 2), partial(cut, came))
            await asyncio.gather(*[asyncio.to_thread(each) for each in works])
            assert b"".join(came) == NOISE * 2
            assert (await move(relays, TEXT))[0] == TEXT

    run(work())


def test_the_little_that_is_said_on_a_path_that_stands_still_goes_over_another() -> None:
    async def work() -> None:
        async with pair(level=None, bytes_per_s=[SLOW] * 2, hold=True) as relays:
            here, there = await relays.channel()
            for sock in relays.near[:1] + relays.far[1:2]:
                sock.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, 1)
            with here, there:
                for _ in range(10):
                    here.sendall(b"page")
                    assert await asyncio.to_thread(there.recv, 100) == b"page"
                    there.sendall(b"taken")
                    assert await asyncio.to_thread(here.recv, 100) == b"taken"

    run(work())


def test_when_the_last_path_is_cut_every_stream_ends() -> None:
    async def work() -> None:
        async with pair(level=None, bytes_per_s=[SLOW] * 2, hold=True) as relays:
            here, there = await relays.channel()
            for sock in (*relays.near, *relays.far):
                with suppress(OSError):  # the other end has shut it already
                    sock.shutdown(socket.SHUT_RDWR)
            with here, there:
                assert await asyncio.to_thread(there.recv, 100) == b""
                assert await asyncio.to_thread(here.recv, 100) == b""
            await asyncio.gather(relays.source.ended.wait(), relays.destination.ended.wait())
            assert "the connection" in relays.source.why()

    run(work())


async def carries(relays: Pair, sock: socket.socket) -> None:
    """Send until the connection that ``sock`` is an end of has carried something of a stream."""
    channel = TcpChannel(sock)
    before = channel.used()[0].sent_bytes
    while channel.used()[0].sent_bytes < before + MIB:
        assert (await move(relays, NOISE))[0] == NOISE


@contextmanager
def lane(bytes_per_s: int | None = None) -> Iterator[tuple[list[socket.socket], list[socket.socket]]]:
    """The connections of another lane: their near and their far ends."""
    near, far = carriers(bytes_per_s)
    try:
        yield near, far
    finally:
        for one in (*near, *far):
            one.close()


@pytest.mark.parametrize("tls", [True, False])
def test_a_lane_that_joins_in_mid_session_carries(tls: bool) -> None:
    async def work() -> None:
        async with pair(tls=tls, level=None, bytes_per_s=[SLOW // 4]) as relays:
            here, there = await relays.channel()
            came: list[bytes] = []
            streams = [asyncio.to_thread(read, there, came), asyncio.to_thread(write, here, NOISE * 4)]
            going = asyncio.gather(*streams)
            with lane(SLOW // 4) as (near, far):
                await relays.join(1, near, far)
                await going
                assert b"".join(came) == NOISE * 4
                await carries(relays, near[0])

    run(work())


def test_a_lost_lane_is_told_and_another_takes_its_place() -> None:
    async def work() -> None:
        async with pair(level=None, bytes_per_s=[SLOW // 4] * 2, hold=True) as relays:
            await carries(relays, relays.near[2])  # else the first one may be the only one still
            newest = relays.near[:2]
            for number, lost in ((2, 0), (3, 2), (4, 3)):
                newest[number % 2].shutdown(socket.SHUT_RDWR)
                assert await relays.lost.get() == lost
                newest, far = carriers(SLOW // 4)
                relays.near += newest
                relays.far += far
                await relays.join(number, newest, far)
                await carries(relays, newest[0])

    run(work())


def test_lanes_come_and_go_while_a_stream_flows() -> None:
    async def work() -> None:
        async with pair(bytes_per_s=[SLOW // 8, SLOW // 8], hold=True) as relays:
            here, there = await relays.channel()
            came: list[bytes] = []
            going = asyncio.gather(
                asyncio.to_thread(read, there, came), asyncio.to_thread(write, here, NOISE * 4 + TEXT)
            )
            lanes = {0: relays.near[:2], 1: relays.near[2:]}
            for number in itertools.count(2):
                near, far = carriers(SLOW // 8)
                relays.near += near
                relays.far += far
                await relays.join(number, near, far)
                before = TcpChannel(near[0])
                while before.used()[0].sent_bytes < MIB // 2 and not going.done():  # noqa: ASYNC110 - a kernel tells nobody
                    await asyncio.sleep(0.001)
                if going.done():
                    break
                lanes[number] = near
                oldest = min(lanes)
                lanes.pop(oldest)[number % 2].shutdown(socket.SHUT_RDWR)
                assert await relays.lost.get() == oldest
            await going
            assert number > 3
            assert b"".join(came) == NOISE * 4 + TEXT

    run(work())


def hello(number: int, way: Way) -> bytes:
    return Hello(way, WINDOW_LOG, number).pack()


WRONG = {
    "nothing": (b"", b""),
    "a half": (hello(1, Way.FORWARD), b""),
    "garbage": (os.urandom(64), os.urandom(64)),
    "cut short": (hello(1, Way.FORWARD)[:9], b""),
    "twice the same way": (hello(1, Way.FORWARD), hello(1, Way.FORWARD)),
    "an answer": (hello(1, Way.ANSWER), hello(1, Way.BACKWARD)),
    "two lanes": (hello(1, Way.FORWARD), hello(2, Way.BACKWARD)),
    "a lane that is there": (hello(0, Way.FORWARD), hello(0, Way.BACKWARD)),
    "another version": tuple(
        hello(1, way).replace(bytes([VERSION]), bytes([VERSION + 1])) for way in (Way.FORWARD, Way.BACKWARD)
    ),
}


@pytest.mark.parametrize("words", WRONG.values(), ids=WRONG.keys())
def test_first_words_that_are_none_cost_their_connections_and_nothing_else(words: tuple[bytes, bytes]) -> None:
    async def work() -> None:
        async with pair(tls=False, level=None, bytes_per_s=[None]) as relays:
            with lane() as (near, far):
                for sock, said, end in zip(near, words, far[::-1], strict=True):
                    sock.sendall(said)
                    await relays.destination.add_connection(end)
                    end.close()
                assert (await move(relays, TEXT))[0] == TEXT
                for sock in near:
                    with suppress(OSError):  # it is closed already
                        sock.shutdown(socket.SHUT_WR)
                    assert await asyncio.to_thread(closed, sock)
            with lane() as (near, far):
                await relays.join(3, near, far)
                await carries(relays, near[0])

    run(work())


def closed(sock: socket.socket) -> bool:
    """Whether the other end closes it without a word."""
    try:
        return sock.recv(100) == b""
    except ConnectionError:
        return True


def test_a_destination_that_gives_no_answer_costs_the_source_one_lane() -> None:
    async def work() -> None:
        async with pair(tls=False, level=None, bytes_per_s=[None]) as relays:
            with lane() as (near, far):
                await relays.source.add_lane(1, near)
                far[0].sendall(Hello(Way.ANSWER, WINDOW_LOG, 7).pack())
                assert await relays.lost.get() == 1
            with lane() as (near, far):
                await relays.source.add_lane(2, near)
                far[0].sendall(Hello(Way.ANSWER, WINDOW_LOG - 1, 2).pack())
                assert await relays.lost.get() == 2
            with lane() as (near, far):
                await relays.source.add_lane(3, near)
                for one in far:
                    one.close()
                assert await relays.lost.get() == 3
            assert (await move(relays, TEXT))[0] == TEXT

    run(work())


def test_a_stranger_with_other_credentials_does_not_join() -> None:
    async def work() -> None:
        _, stranger = make_credentials()
        async with pair(level=None, bytes_per_s=[None]) as relays:
            other, lost = await Relay.start(), asyncio.Queue[int]()
            other.on_lane_lost = lambda number, _: lost.put_nowait(number)
            await other.call_lanes(credentials=stranger, window_log=WINDOW_LOG)
            with lane() as (near, far):
                for one in far:
                    await relays.destination.add_connection(one)
                    one.close()
                await other.add_lane(0, near)
                assert await lost.get() == 0
            await other.end()
            assert (await move(relays, TEXT))[0] == TEXT

    run(work())


def test_more_lanes_than_there_may_be_are_refused() -> None:
    async def work() -> None:
        async with pair(tls=False, level=None, bytes_per_s=[None] * MAX_LANES) as relays:
            with lane() as (near, _), pytest.raises(InvalidInput, match="8 lanes already"):
                await relays.source.add_lane(MAX_LANES, near)
        async with pair(tls=False, level=None, bytes_per_s=[None, None]) as relays:
            with lane() as (near, _), pytest.raises(InvalidInput, match="was there before"):
                await relays.source.add_lane(1, near)
        async with pair(tls=False) as relays:
            with lane() as (near, far):
                with pytest.raises(InvalidInput, match="no lane joins"):
                    await relays.source.add_lane(1, near)
                with pytest.raises(InvalidInput, match="awaits no lanes"):
                    await relays.destination.add_connection(far[0])

    run(work())


@pytest.mark.parametrize("victim", ["source", "destination"])
def test_when_a_relay_is_killed_every_stream_ends_and_both_daemons_know(victim: str) -> None:
    async def work() -> None:
        async with pair() as relays:
            here, there = await relays.channel()
            os.kill(getattr(relays, victim).pid, signal.SIGKILL)
            with here, there:
                assert await asyncio.to_thread(there.recv, 100) == b""
                assert await asyncio.to_thread(here.recv, 100) == b""
            await asyncio.gather(relays.source.ended.wait(), relays.destination.ended.wait())
            assert getattr(relays, victim).why() == "ended by signal 9"
            survivor = relays.source if victim == "destination" else relays.destination
            assert "the connection" in survivor.why()
            with pytest.raises(RelayFailed):
                await survivor.open_channel(9)

    run(work())


def test_a_relay_that_stands_still_is_given_up_by_who_joins_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        async with pair() as relays:
            await relays.source.statistics()
            monkeypatch.setattr(client, "ANSWERS_WITHIN_S", 0.2)
            os.kill(relays.source.pid, signal.SIGSTOP)
            asked = asyncio.ensure_future(relays.source.statistics())
            with pytest.raises(RelayFailed, match="did not answer within"):
                await relays.source.open_channel(7)
            with pytest.raises(RelayFailed, match="did not answer within"):
                await asked
            assert relays.source.ended.is_set()

    run(work())


def test_a_relay_that_stands_still_is_given_up_though_nobody_waits_for_its_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def work() -> None:
        async with pair() as relays:
            await relays.source.statistics()
            monkeypatch.setattr(client, "ANSWERS_WITHIN_S", 0.2)
            os.kill(relays.source.pid, signal.SIGSTOP)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await relays.source.statistics()
            await relays.source.ended.wait()
            assert "did not answer within" in relays.source.why()

    run(work())


def test_a_worker_that_is_killed_costs_compression_only() -> None:
    async def work() -> None:
        async with pair(bytes_per_s=SLOW) as relays:
            await move(relays, TEXT)
            (worker,) = children(relays.source.pid)
            os.kill(worker, signal.SIGKILL)
            assert (await move(relays, TEXT + NOISE))[0] == TEXT + NOISE

    run(work())


def test_a_worker_that_stands_still_is_done_without() -> None:
    async def work() -> None:
        async with pair(bytes_per_s=SLOW) as relays:
            await move(relays, TEXT)
            (worker,) = children(relays.source.pid)
            watched = os.pidfd_open(worker)
            os.kill(worker, signal.SIGSTOP)
            assert (await move(relays, NOISE))[0] == NOISE
        await ends(watched)

    run(work())


DAEMON = """
import asyncio, socket, sys
from limosa.transport.relay.client import Relay
from harness.relays import pair
async def main():
    async with pair(tls=False) as relays:
        await relays.channel()
        print(relays.source.pid, relays.destination.pid, flush=True)
        await asyncio.sleep(600)
asyncio.run(main())
"""


def test_relays_and_workers_end_with_a_daemon_that_is_killed() -> None:
    async def work() -> None:
        daemon = await asyncio.create_subprocess_exec(
            *[sys.executable, "-c", DAEMON],
            stdout=asyncio.subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert daemon.stdout is not None
        pids = [int(word) for word in (await daemon.stdout.readline()).split()]
        watched = [os.pidfd_open(pid) for pid in [*pids, *[child for pid in pids for child in children(pid)]]]
        daemon.kill()
        await daemon.wait()
        for pidfd in watched:
            await ends(pidfd)

    run(work())


def test_a_relay_with_other_credentials_is_not_accepted() -> None:
    async def work() -> None:
        (server, _), (_, stranger) = make_credentials(), make_credentials()
        near, far = carriers()
        source, destination = await asyncio.gather(Relay.start(), Relay.start())
        results = await asyncio.gather(
            destination.open_receiver(far, credentials=server, window_log=WINDOW_LOG),
            source.open_sender(near, credentials=stranger, window_log=WINDOW_LOG),
            return_exceptions=True,
        )
        assert [type(result) for result in results] == [RelayFailed, RelayFailed]
        for relay in (source, destination):
            await relay.end()
        for one in (*near, *far):
            one.close()

    run(work())


def test_the_smaller_window_counts() -> None:
    async def work() -> None:
        near, far = carriers()
        source, destination = await asyncio.gather(Relay.start(), Relay.start())
        agreed = await asyncio.gather(
            destination.open_receiver(far, credentials=None, window_log=22),
            source.open_sender(near, credentials=None, window_log=30),
        )
        assert tuple(agreed) == (22, 22)
        for relay in (source, destination):
            await relay.end()
        for one in (*near, *far):
            one.close()

    run(work())


def test_a_channel_may_be_known_at_the_destination_before_the_session_is_open() -> None:
    async def work() -> None:
        near, far = carriers()
        source, destination = await asyncio.gather(Relay.start(), Relay.start())
        there = await destination.open_channel(0)
        await asyncio.gather(
            destination.open_receiver(far, credentials=None, window_log=WINDOW_LOG),
            source.open_sender(near, credentials=None, window_log=WINDOW_LOG),
        )
        with await source.open_channel(0) as here, there:
            here.sendall(b"page")
            assert await asyncio.to_thread(there.recv, 100) == b"page"
        with pytest.raises(InvalidInput, match="opened before"):
            await destination.open_channel(0)
        for relay in (source, destination):
            await relay.end()
        for one in (*near, *far):
            one.close()

    run(work())


def test_a_channel_that_ends_before_the_destination_knows_it_harms_no_other() -> None:
    """Its move was cancelled early, before the session was open or since."""

    async def work() -> None:
        near, far = carriers()
        source, destination = await asyncio.gather(Relay.start(), Relay.start())
        (await source.open_channel(0)).close()
        await asyncio.gather(
            destination.open_receiver(far, credentials=None, window_log=WINDOW_LOG),
            source.open_sender(near, credentials=None, window_log=WINDOW_LOG),
        )
        (await source.open_channel(1)).close()
        there = await destination.open_channel(2)
        with await source.open_channel(2) as here, there:
            here.sendall(b"page")
            assert await asyncio.to_thread(there.recv, 100) == b"page"
        for relay in (source, destination):
            assert not relay.ended.is_set()
            await relay.end()
        for one in (*near, *far):
            one.close()

    run(work())


@pytest.mark.parametrize("garbage", [b"\0" * 28, os.urandom(4096), b"\x01"], ids=["zeroes", "random", "cut"])
def test_garbage_on_the_carrier_ends_the_session_and_reaches_no_qemu(garbage: bytes) -> None:
    async def work() -> None:
        (forward, backward), far = carriers()
        destination = await Relay.start()
        with forward, backward:
            for sock, way in ((forward, Way.FORWARD), (backward, Way.BACKWARD)):
                sock.sendall(Hello(way, 24).pack())
            await destination.open_receiver(far, credentials=None, window_log=24)
            for one in far:
                one.close()
            assert len(backward.recv(HELLO_BYTES)) == HELLO_BYTES
            with await destination.open_channel(3) as qemu:
                forward.sendall(FrameWriter().data(3, Form.RAW, 4, 4, Said(b"good").intdigest()) + b"good" + garbage)
                forward.shutdown(socket.SHUT_WR)
                assert await asyncio.to_thread(qemu.recv, 100) == b"good"
                assert await asyncio.to_thread(qemu.recv, 100) == b""
            await destination.ended.wait()
            assert destination.why()

    run(work())


def test_requests_that_make_no_sense_are_refused() -> None:
    async def work() -> None:
        relay = await Relay.start()
        with pytest.raises(InvalidInput, match="no session yet"):
            await relay.statistics()
        await relay.end()
        async with pair() as relays:
            here, there = await relays.channel()
            with here, there, pytest.raises(InvalidInput, match="opened before"):
                await relays.source.open_channel(0)

    run(work())


def test_it_gives_up_its_rights_and_lets_nobody_look_into_it() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root has rights to give up")

    async def work() -> None:
        async with pair(user="nobody", bytes_per_s=SLOW) as relays:
            for pid in (relays.source.pid, relays.destination.pid, *children(relays.source.pid)):
                status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
                assert set(status["Uid"].split()) == {"65534"}
                assert int(status["CapEff"], 16) == 0
                assert status["Groups"].strip() == ""
                assert os.stat(f"/proc/{pid}/mem").st_uid == 0
            assert (await move(relays, TEXT))[0] == TEXT

    run(work())


async def ends(pidfd: int) -> None:
    """Wait until that process has ended."""
    gone = asyncio.Event()
    asyncio.get_running_loop().add_reader(pidfd, gone.set)
    await gone.wait()
    asyncio.get_running_loop().remove_reader(pidfd)
    os.close(pidfd)


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
