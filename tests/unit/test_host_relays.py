"""Landings that share a session of relays: one that ends takes nothing away from the others."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from limosa.host.departure import Departure
from limosa.host.page import Page
from limosa.host.relays import Relays
from limosa.model.route import Path as Way
from limosa.model.route import Route
from limosa.settings.host import HostSettings
from limosa.transport.channel import Doorway
from limosa.transport.relay import inbound
from limosa.transport.relay.inbound import Inbound
from limosa.transport.relay.outbound import Seat, no_cap
from limosa.wire.peer import RelayPlace


class Process:
    """A relay process."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()
        #: whether it has been told to end, and whether it does
        self.is_told = False
        self.may_end = asyncio.Event()
        self.may_end.set()

    async def end(self) -> None:
        self.is_told = True
        await self.may_end.wait()
        self.ended.set()

    async def open_channel(self, _number: int) -> socket.socket:
        if self.is_told:
            raise AssertionError("it is about to end")
        return socket.socket()

    async def open_receiver(self, *_: object, **__: object) -> int:
        assert not self.is_told, "it is about to end"
        return 24

    async def statistics(self) -> None: ...


class Door:
    """A door at which the source arrives when it calls."""

    address, port, token = "10.0.0.1", 49152, "00"

    def __init__(self, source_calls: asyncio.Event) -> None:
        self._source_calls = source_calls

    async def accept_several(self, _count: int) -> list[socket.socket]:
        await self._source_calls.wait()
        return []

    def close(self) -> None:
        pass


class Host:
    """Relays of a host, each of which starts when it may."""

    def __init__(self, folder: Path) -> None:
        self.relays = Relays(cast(Any, None), Page(folder / "settings.toml"), None)
        cast(Any, self.relays)._await = self._await
        self.started: list[Process] = []
        self.may_start = asyncio.Event()
        self.source_calls = asyncio.Event()

    def session(self) -> Inbound:
        """The only one there is."""
        (arriving,) = self.relays._inbound.values()
        return arriving.session.result()

    def landing(self, channel: int) -> asyncio.Task[Doorway]:
        place = RelayPlace(session="s", channel=channel, window_log=24, credentials=None, several=False, striped=False)
        return asyncio.ensure_future(self.relays.open_door("host1", place, ["10.0.0.1"], cast(Any, None), ()))

    async def _await(self, place: RelayPlace, *_: object) -> Inbound:
        await self.may_start.wait()
        process = Process()
        self.started.append(process)
        return Inbound(cast(Any, process), cast(Any, Door(self.source_calls)), place, 24)


@pytest.mark.parametrize(("alone", "mib", "log"), [(False, 512, 29), (True, 512, 24), (True, 4, 22)])
def test_the_window_of_a_session_for_one_move_is_small(tmp_path: Path, alone: bool, mib: int, log: int) -> None:
    relays = Host(tmp_path).relays
    relays._page.now = HostSettings(compression_window_mib=mib)
    route = Route(transport="compression", paths=(Way(here="10.0.0.2", there="10.0.0.1"),), alone=alone)
    assert relays.seat("host2", route, "a move", encrypt=False).place.window_log == log


def test_a_second_try_without_relays_has_no_place_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def opened(_: Seat) -> None: ...

    async def scenario(host: Host) -> None:
        monkeypatch.setattr(Seat, "open", opened)
        departure = Departure(cast(Any, SimpleNamespace(relays=host.relays)), no_cap)
        relayed = Route(transport="compression", paths=(Way(here="10.0.0.2", there="10.0.0.1"),))
        assert len(await departure.seats("host2", relayed, 2, encrypt=False)) == 2
        departure.release()
        assert await departure.seats("host2", Route(transport="tcp"), 2, encrypt=False) == []

    play(tmp_path, scenario)


def play(tmp_path: Path, scenario: Callable[[Host], Awaitable[None]]) -> None:
    async def within() -> None:
        await scenario(Host(tmp_path))

    asyncio.run(asyncio.wait_for(within(), 20))


async def turns() -> None:
    """Let everything happen that waits for nothing."""
    for _ in range(20):
        await asyncio.sleep(0)


@contextmanager
def closing(door: Doorway) -> Iterator[Doorway]:
    try:
        yield door
    finally:
        door.close()


def test_a_landing_that_ends_while_the_relay_starts_leaves_it_to_another_that_waits(tmp_path: Path) -> None:
    async def scenario(host: Host) -> None:
        first, second = host.landing(0), host.landing(1)
        await turns()
        first.cancel()
        await turns()
        host.may_start.set()
        with closing(await second):
            await turns()
            (process,) = host.started
            assert not process.is_told

    play(tmp_path, scenario)


def test_one_that_comes_after_that_has_it_too(tmp_path: Path) -> None:
    async def scenario(host: Host) -> None:
        first = host.landing(0)
        await turns()
        first.cancel()
        await turns()
        second = host.landing(1)
        await turns()
        host.may_start.set()
        with closing(await second):
            await turns()
            (process,) = host.started
            assert not process.is_told

    play(tmp_path, scenario)


def test_a_relay_for_which_nobody_waits_any_more_is_ended(tmp_path: Path) -> None:
    async def scenario(host: Host) -> None:
        landings = host.landing(0), host.landing(1)
        await turns()
        for one in landings:
            one.cancel()
        await turns()
        host.may_start.set()
        await turns()
        (process,) = host.started
        assert process.ended.is_set()

    play(tmp_path, scenario)


@pytest.mark.parametrize("is_told", [False, True])
def test_a_landing_that_comes_while_a_session_ends_has_one_of_its_own(tmp_path: Path, is_told: bool) -> None:
    async def scenario(host: Host) -> None:
        host.may_start.set()
        door = await host.landing(0)
        (ending,) = host.started
        ending.may_end.clear()
        door.close()
        host.session().end_if_unused()
        if is_told:
            await turns()
        assert ending.is_told is is_told
        with closing(await host.landing(1)):
            ending.may_end.set()
            await turns()
            assert [process.ended.is_set() for process in host.started] == [True, False]
            with closing(await host.landing(2)):
                assert len(host.started) == 2
        host.session().end_if_unused()
        await turns()
        assert host.started[1].ended.is_set()
        assert host.relays._inbound == {}

    play(tmp_path, scenario)


def test_a_session_that_the_source_is_opening_when_its_landing_ends_is_there_for_the_next(tmp_path: Path) -> None:
    async def scenario(host: Host) -> None:
        host.may_start.set()
        (await host.landing(0)).close()
        await turns()
        host.source_calls.set()
        with closing(await host.landing(1)) as door:
            assert await door.accept() is not None
            (process,) = host.started
            assert not process.is_told
        await process.end()

    play(tmp_path, scenario)


@pytest.mark.parametrize("comes_back", [False, True])
def test_a_session_that_nobody_opens_is_kept_for_a_while_and_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, comes_back: bool
) -> None:
    monkeypatch.setattr(inbound, "OPENED_WITHIN_S", 0.0)

    async def scenario(host: Host) -> None:
        host.may_start.set()
        (await host.landing(0)).close()
        if comes_back:
            with closing(await host.landing(1)):
                await asyncio.sleep(0.001)
                assert not host.started[0].is_told
        await host.started[0].ended.wait()
        await turns()
        assert host.relays._inbound == {}

    play(tmp_path, scenario)
