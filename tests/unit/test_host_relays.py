"""Landings that share a session of relays: one that ends takes nothing away from the others."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from limosa.host.page import Page
from limosa.host.relays import Relays
from limosa.model.route import Path as Way
from limosa.model.route import Route
from limosa.settings.host import HostSettings
from limosa.transport.channel import Doorway
from limosa.transport.relay.inbound import Inbound
from limosa.wire.peer import RelayPlace


class Process:
    """A relay process whose session nobody opens."""

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


class Door:
    """A door at which nobody arrives."""

    address, port, token = "10.0.0.1", 49152, "00"

    async def accept_several(self, _count: int) -> list[socket.socket]:
        await asyncio.Event().wait()
        raise AssertionError

    def close(self) -> None:
        pass


class Host:
    """Relays of a host, each of which starts when it may."""

    def __init__(self, folder: Path) -> None:
        self.relays = Relays(cast(Any, None), Page(folder / "settings.toml"), None)
        cast(Any, self.relays)._await = self._await
        self.started: list[Process] = []
        self.may_start = asyncio.Event()

    def landing(self, channel: int) -> asyncio.Task[Doorway]:
        place = RelayPlace(session="s", channel=channel, window_log=24, credentials=None, several=False, striped=False)
        return asyncio.ensure_future(self.relays.open_door("host1", place, ["10.0.0.1"], cast(Any, None), ()))

    async def _await(self, place: RelayPlace, *_: object) -> Inbound:
        await self.may_start.wait()
        process = Process()
        self.started.append(process)
        return Inbound(cast(Any, process), cast(Any, Door()), place, 24)


@pytest.mark.parametrize(("alone", "mib", "log"), [(False, 512, 29), (True, 512, 24), (True, 4, 22)])
def test_the_window_of_a_session_for_one_move_is_small(tmp_path: Path, alone: bool, mib: int, log: int) -> None:
    relays = Host(tmp_path).relays
    relays._page.now = HostSettings(compression_window_mib=mib)
    route = Route(transport="compression", paths=(Way(here="10.0.0.2", there="10.0.0.1"),), alone=alone)
    assert relays.seat("host2", route, "a move", encrypt=False).place.window_log == log


def play(tmp_path: Path, scenario: Callable[[Host], Awaitable[None]]) -> None:
    async def within() -> None:
        await scenario(Host(tmp_path))

    asyncio.run(asyncio.wait_for(within(), 20))


async def turns() -> None:
    """Let everything happen that waits for nothing."""
    for _ in range(20):
        await asyncio.sleep(0)


@contextmanager
def closing(door: Doorway) -> Iterator[None]:
    try:
        yield
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
        if is_told:
            await turns()
        assert ending.is_told is is_told
        with closing(await host.landing(1)):
            ending.may_end.set()
            await turns()
            assert [process.ended.is_set() for process in host.started] == [True, False]
            with closing(await host.landing(2)):
                assert len(host.started) == 2
        await turns()
        assert host.started[1].ended.is_set()
        assert host.relays._inbound == {}

    play(tmp_path, scenario)
