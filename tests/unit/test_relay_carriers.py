"""The connections of a session: which are made, made again, and when; with a relay that only takes note."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest

from limosa.errors import RelayFailed
from limosa.transport import tcp
from limosa.transport.channel import Used
from limosa.transport.relay import carriers
from limosa.transport.relay.carriers import Carriers
from limosa.wire.peer import Prepared

FIRST, SECOND, THIRD = (("10.0.0.1", "10.0.0.2"), ("10.1.0.1", "10.1.0.2"), ("10.2.0.1", "10.2.0.2"))
PREPARED = Prepared(address="10.0.0.2", port=1, token="0" * 32)


class Connection:
    """A connection over a path."""

    def __init__(self, way: tuple[str, str]) -> None:
        self.stream = socket.socket()
        self.way = way
        self.closed = False

    @property
    def pace(self) -> int:
        """What the kernel was told, 0: no cap."""
        (pace,) = struct.unpack("=Q", self.stream.getsockopt(socket.SOL_SOCKET, tcp._SO_MAX_PACING_RATE, 8))
        return int(pace) if pace != tcp._NO_PACE else 0

    def used(self) -> tuple[Used, ...]:
        return (Used(*self.way, 0, alive=not self.closed),)

    def close(self) -> None:
        self.closed = True
        self.stream.close()


class Relay:
    """Opens its session with the first lane that is not ``deaf``; of those it says nothing by itself."""

    def __init__(self) -> None:
        self.deaf: set[int] = set()
        self._opened = asyncio.Event()
        self.on_lane: Callable[[int], None] = lambda _: None

    async def add_lane(self, number: int, connections: Any) -> None:
        self.on_lane(number)
        if number not in self.deaf:
            self._opened.set()

    async def opened(self) -> None:
        await self._opened.wait()

    def why(self) -> str:
        return "it was killed"


class World:
    """A session over two paths; ``dialled`` has those that were connected, in order."""

    def __init__(self) -> None:
        self.relay = Relay()
        self.dialled: list[tuple[str, str]] = []
        self.made: list[Connection] = []
        #: bytes per second by the destination's address
        self.paces: dict[str, int] = {}
        self.carriers = Carriers(
            cast(Any, self._dial),
            (FIRST, SECOND),
            striped=True,
            is_used=lambda: True,
            pace=lambda address: self.paces.get(address, 0),
        )

    async def _dial(self, _prepared: Prepared, way: tuple[str, str]) -> list[Connection]:
        self.dialled.append(way)
        pair = [Connection(way), Connection(way)]
        self.made += pair
        return pair

    async def open(self) -> None:
        await self.carriers.open_lanes(PREPARED, cast(Any, self.relay))

    async def until_lanes(self, count: int) -> None:
        """Return when it has so many lanes."""
        await self.until(lambda: len(self.carriers.forward) >= count)

    async def until(self, what: Callable[[], bool]) -> None:
        while not what():  # noqa: ASYNC110 - anything may make it true
            await asyncio.sleep(0.001)


def play(monkeypatch: pytest.MonkeyPatch, scenario: Callable[[World], Awaitable[None]], lives_s: float = 60) -> None:
    monkeypatch.setattr(carriers, "DIAL_EVERY_S", 0.01)
    monkeypatch.setattr(carriers, "_LIVES_S", lives_s)
    monkeypatch.setattr(carriers, "_DIAL_AT_LEAST_EVERY_S", 3600)

    async def within_time() -> None:
        world = World()
        async with asyncio.timeout(20):
            await scenario(world)
            world.carriers.close()
            await world.until(lambda: all(one.closed for one in world.made))

    asyncio.run(within_time())


def test_a_path_that_has_lost_its_lane_is_connected_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(world: World) -> None:
        await world.open()
        await world.until(lambda: len(world.dialled) == 2)
        for lanes in range(2, 6):
            await world.until_lanes(lanes)
            world.carriers.lose(lanes - 1, "the cable was cut")
        await world.until(lambda: len(world.dialled) == 6)

    play(monkeypatch, scenario, lives_s=0)


def test_a_path_whose_lanes_do_not_live_is_connected_less_and_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(world: World) -> None:
        await world.open()
        while len(world.carriers.forward) < 8:
            world.carriers.lose(len(world.carriers.forward) - 1, "no relay answers there")
            lost = len(world.carriers.forward)
            await world.until_lanes(lost + 1)
        pauses = [pause_s for _, pause_s in world.carriers._resting.values()]
        assert max(pauses) > 4 * carriers.DIAL_EVERY_S
        world.carriers.want(1, (FIRST, SECOND))
        assert not world.carriers._resting, "the NICs have changed"

    play(monkeypatch, scenario)


def test_each_lane_is_kept_to_its_own_pace_from_the_beginning_and_when_that_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario(world: World) -> None:
        world.paces = {FIRST[1]: 1_000_000, THIRD[1]: 3_000_000}
        await world.open()
        await world.until(lambda: len(world.carriers.forward) == 2)
        world.carriers.want(1, (FIRST, SECOND, THIRD))
        await world.until(lambda: len(world.carriers.forward) == 3)
        # A lane's second connection goes the other way and carries next to nothing.
        forward = {one.way: one for one in world.made[::2]}
        assert {way: one.pace for way, one in forward.items()} == {FIRST: 1_000_000, SECOND: 0, THIRD: 3_000_000}
        world.paces = {SECOND[1]: 5_000_000_000}
        world.carriers.lose(2, "the cable was cut")
        world.carriers.pace()
        assert (forward[FIRST].pace, forward[SECOND].pace) == (0, 5_000_000_000)

    play(monkeypatch, scenario)


def test_what_one_move_does_not_want_another_may(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(world: World) -> None:
        await world.open()
        world.carriers.want(1, (FIRST, THIRD))
        world.carriers.want(2, (FIRST,))
        await world.until(lambda: THIRD in world.dialled)
        world.carriers.leave(1)
        world.carriers.lose(world.dialled.index(THIRD), "the cable was cut")
        await world.until(lambda: world.carriers._keeping is not None)
        assert THIRD not in world.carriers._missing()

    play(monkeypatch, scenario, lives_s=0)


def test_a_relay_that_ends_while_its_session_opens_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(world: World) -> None:
        world.relay.on_lane = lambda _: world.carriers.close()
        with pytest.raises(RelayFailed):
            await world.open()
        assert world.carriers._keeping is None

    play(monkeypatch, scenario)


def test_a_session_opens_over_any_path_that_can_and_without_waiting_for_the_best(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario(world: World) -> None:
        world.relay.deaf = {0}
        await world.open()
        world.carriers.lose(0, "no TLS gets through")
        await world.until(lambda: world.dialled.count(FIRST) > 1)

    play(monkeypatch, scenario, lives_s=0)


def test_a_session_that_opens_over_no_path_says_what_is_wrong_with_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(world: World) -> None:
        world.relay.deaf = {0, 1}
        opening = asyncio.ensure_future(world.open())
        await world.until(lambda: len(world.carriers.forward) == 2)
        world.carriers.lose(1, "the cable was cut")
        world.carriers.lose(0, "no TLS gets through")
        with pytest.raises(RelayFailed, match=f"from {FIRST[0]} to {FIRST[1]}.*no TLS gets through"):
            await opening
        assert world.carriers._keeping is None

    play(monkeypatch, scenario)
