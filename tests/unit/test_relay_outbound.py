"""A session of the source's daemon whose relay does not start, or starts too late."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import ClassVar, cast

import pytest

from limosa.errors import RelayFailed
from limosa.transport.channel import SocketChannel
from limosa.transport.relay.client import Relay
from limosa.transport.relay.outbound import Outbound, RelayChannel


class Process:
    """A relay process."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()

    async def end(self) -> None:
        self.ended.set()


def session(*, linger_s: float = 0.0) -> Outbound:
    async def dial(*_: object) -> list[SocketChannel]:
        raise AssertionError("it is not opened")

    return Outbound(dial, encrypt=False, several=False, window_log=24, user=None, linger_s=linger_s)


async def until(what: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not what():  # noqa: ASYNC110 - anything may make it true
            await asyncio.sleep(0.001)


def starts_slowly(monkeypatch: pytest.MonkeyPatch) -> tuple[Process, asyncio.Event]:
    """The relay that is started from now on, and what has to be set for it to be there."""
    process, loads = Process(), asyncio.Event()

    async def start(**_: object) -> Process:
        await loads.wait()
        return process

    monkeypatch.setattr(Relay, "start", start)
    return process, loads


def test_a_session_whose_relay_did_not_start_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    async def start(**_: object) -> Relay:
        raise RelayFailed("cannot start a relay", why="no memory")

    async def scenario() -> None:
        failing = session()
        seat = failing.seat()
        await seat.open()
        assert not failing.is_over
        await until(lambda: failing.is_over)
        seat.release()
        assert failing.is_over

    monkeypatch.setattr(Relay, "start", start)
    asyncio.run(scenario())


def test_a_relay_that_starts_when_everybody_has_left_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        process, loads = starts_slowly(monkeypatch)
        alone = session()
        seat = alone.seat()
        await seat.open()
        await asyncio.sleep(0)
        seat.release()
        await asyncio.sleep(0.001)  # it does not linger
        loads.set()
        await until(process.ended.is_set)
        assert alone.is_over

    asyncio.run(scenario())


def test_a_relay_that_starts_for_another_move_meanwhile_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        process, loads = starts_slowly(monkeypatch)
        shared = session(linger_s=3600)
        first = shared.seat()
        await first.open()
        await asyncio.sleep(0)
        first.release()
        shared.seat()
        loads.set()
        await until(lambda: shared.is_running)
        assert not process.ended.is_set()
        assert not shared.is_over

    asyncio.run(scenario())


def test_the_relay_of_a_stream_is_told_its_cap_when_that_changes() -> None:
    class Paced(Process):
        told: ClassVar[list[tuple[int, int]]] = []

        async def set_pace(self, number: int, bytes_per_s: int) -> None:
            self.told.append((number, bytes_per_s))

    async def scenario() -> None:
        with socket.socket() as connection:
            channel = RelayChannel(session(), cast(Relay, Paced()), 3, connection)
            for rate in (0, 500, 500, 0):
                channel.pace(rate)
            await until(lambda: len(Paced.told) >= 2)
            assert Paced.told == [(3, 500), (3, 0)]

    asyncio.run(scenario())
