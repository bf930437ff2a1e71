"""Multipath TCP with the kernel's own path manager, both ends in one network namespace: what goes over which path, and
that strangers and addresses that were not announced have no part in it."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Awaitable, Callable, Hashable
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
import uvloop
from pyroute2 import IPRoute

from harness import descriptors
from limosa.errors import DestinationLost, NetworkError
from limosa.host.multichannel import Multichannel
from limosa.lab import namespaces
from limosa.model.route import Path as RoutePath
from limosa.model.route import Route
from limosa.network.changes import changes
from limosa.network.mptcp import Limits, PathManager
from limosa.transport import multichannel, trials
from limosa.transport.channel import Doorway, SocketChannel, Used
from limosa.transport.multichannel import MultichannelDoorway
from limosa.wire.peer import Prepared

pytestmark = pytest.mark.lab

OURS, THEIRS, LATER = "10.78.0.1", ("10.78.0.2", "10.79.0.2"), "10.80.0.2"
PORTS = (49152, 49160)
ROUTE = Route(transport="multichannel", paths=tuple(RoutePath(here=OURS, there=there) for there in THEIRS))
CHUNK = bytes(1024 * 1024)


def play(scenario: Callable[[], Awaitable[None]]) -> None:
    """In a namespace whose loopback interface stands for the NICs of both, in a loop as the daemon's."""

    def inside() -> None:
        with IPRoute() as netlink:
            netlink.link("set", index=1, state="up")
            for address in (OURS, *THEIRS):
                netlink.addr("add", index=1, address=address, prefixlen=32)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(asyncio.wait_for(scenario(), 20))

    name = f"limosa-mptcp-{os.getpid()}"
    namespaces.create(name)
    try:
        namespaces.inside(name, inside)
    finally:
        namespaces.remove(name)


async def add_address(address: str) -> None:
    await _change_address("add", address)


async def remove_address(address: str) -> None:
    await _change_address("del", address)


async def _change_address(how: str, address: str) -> None:
    def change() -> None:
        with IPRoute() as netlink:
            netlink.addr(how, index=1, address=address, prefixlen=32)

    await asyncio.to_thread(change)


class Ends:
    """A connection with both its ends, and who made it."""

    def __init__(self, folder: Path) -> None:
        self.multichannel = Multichannel(PathManager(), folder)
        self.permitted = list(THEIRS)
        self.channel: SocketChannel
        self.door: Doorway
        self.stream: socket.socket

    async def connect(self) -> None:
        await self.open_door()
        await self.call()

    async def open_door(self) -> None:
        async def permitted() -> list[str]:
            return self.permitted

        self.door = await self.multichannel.open_door(THEIRS, PORTS, permitted, ())
        self.prepared = Prepared(address=self.door.address, port=self.door.port, token=self.door.token)
        self.accepting = asyncio.ensure_future(self.door.accept())

    async def call(self, route: Route = ROUTE, address: str = THEIRS[0]) -> None:
        prepared = msgspec.structs.replace(self.prepared, address=address)
        self.channel = await self.multichannel.connect(route, prepared)
        stream = await self.accepting
        assert stream is not None
        self.stream = stream
        self.channel.stream.setblocking(False)
        self.stream.setblocking(False)

    async def until_used(self, *addresses: str) -> None:
        """Send until every address has got something."""
        loop, buffer = asyncio.get_running_loop(), bytearray(len(CHUNK))

        async def drain() -> None:
            while await loop.sock_recv_into(self.stream, buffer):
                pass

        draining = asyncio.ensure_future(drain())
        try:
            while {used.there for used in self.channel.used() if used.sent_bytes > len(CHUNK)} != set(addresses):
                await loop.sock_sendall(self.channel.stream, CHUNK)
        finally:
            draining.cancel()

    async def close(self) -> None:
        self.channel.close()
        self.stream.close()
        self.door.close()
        self.door.close()
        await self.multichannel.endpoints.idle()


def test_all_announced_paths_are_used_and_nothing_is_left(tmp_path: Path) -> None:
    async def scenario() -> None:
        ends = Ends(tmp_path)
        await ends.connect()
        await ends.until_used(*THEIRS)
        before = ends.channel.used()
        assert all(used.alive for used in before)
        await ends.close()
        assert [(used.there, used.alive) for used in ends.channel.used()] == [(one, False) for one in THEIRS]
        manager = PathManager()
        assert (await manager.endpoints(), await manager.limits()) == ((), Limits(2, 0))
        assert list(tmp_path.iterdir()) == []

    play(scenario)


@pytest.mark.parametrize("kernel", ["since 6.5", "before"])
def test_what_each_path_carries_is_told_by_every_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: str
) -> None:
    def unknown(_: socket.socket) -> dict[Hashable, Used]:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    if kernel == "before":
        monkeypatch.setattr(multichannel, "_numbered", unknown)

    async def scenario() -> None:
        ends = Ends(tmp_path)
        await ends.connect()
        await ends.until_used(*THEIRS)
        used = ends.channel.used()
        assert {(one.there, one.alive, one.connections) for one in used} == {(there, True, 1) for there in THEIRS}
        await ends.close()
        assert [(one.there, one.alive) for one in ends.channel.used()] == [(there, False) for there in THEIRS]

    play(scenario)


def test_both_ways_of_asking_find_the_same(tmp_path: Path) -> None:
    async def scenario() -> None:
        ends = Ends(tmp_path)
        await ends.connect()
        await ends.until_used(*THEIRS)
        stream = ends.channel.stream
        assert isinstance(stream, socket.socket)
        numbered, by_ends = (list(ask(stream).values()) for ask in (multichannel._numbered, multichannel._by_ends))
        assert [(one.here, one.there, one.sent_bytes) for one in numbered] == [
            (one.here, one.there, one.sent_bytes) for one in by_ends
        ]
        await ends.close()

    play(scenario)


def test_an_address_that_appears_is_used_if_it_is_permitted(tmp_path: Path) -> None:
    async def scenario() -> None:
        ends = Ends(tmp_path)
        await ends.connect()
        await ends.until_used(*THEIRS)
        await add_address(LATER)
        ends.door.announce([LATER])  # not permitted: the source may say what it likes
        await ends.multichannel.endpoints.idle()
        assert LATER not in {one.address for one in await PathManager().endpoints()}
        ends.permitted.append(LATER)
        ends.door.announce([LATER])
        await ends.until_used(*THEIRS, LATER)
        await ends.close()

    play(scenario)


def test_a_door_has_a_port_that_is_free_on_each_address(tmp_path: Path) -> None:
    async def scenario() -> None:
        with socket.create_server((THEIRS[1], PORTS[0])):
            ends = Ends(tmp_path)
            await ends.connect()
            assert ends.door.port == PORTS[0] + 1
            await ends.until_used(*THEIRS)
            await ends.close()

    play(scenario)


def test_the_source_comes_to_another_address_if_the_first_does_not_answer(tmp_path: Path) -> None:
    async def scenario() -> None:
        ends = Ends(tmp_path)
        await ends.open_door()
        await remove_address(THEIRS[0])
        await ends.call()
        assert [used.there for used in ends.channel.used()] == [THEIRS[1]]
        await ends.until_used(THEIRS[1])
        await add_address(THEIRS[0])
        ends.door.announce([THEIRS[0]])  # as the source asks whose NIC is there again
        await ends.until_used(*THEIRS)
        await ends.close()
        assert await PathManager().endpoints() == ()

    play(scenario)


def test_an_address_that_has_no_room_for_a_door_costs_its_path_and_is_named(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        with socket.create_server((THEIRS[1], PORTS[0])):
            door = MultichannelDoorway([*THEIRS, LATER], (PORTS[0], PORTS[0]), lambda _: None, lambda: None)
            assert (door.address, door.port) == (THEIRS[0], PORTS[0])
            assert not door.listen_on(LATER)
            door.close()

    play(scenario)
    assert [record.getMessage().split()[0] for record in caplog.records] == [THEIRS[1], LATER, LATER]


def test_the_first_address_is_announced_when_the_source_has_come_to_another(tmp_path: Path) -> None:
    async def scenario() -> None:
        ends = Ends(tmp_path)
        await ends.open_door()
        await ends.call(msgspec.structs.replace(ROUTE, paths=ROUTE.paths[1:]), address=THEIRS[1])
        await ends.until_used(*THEIRS)
        await ends.close()

    play(scenario)


def test_the_source_may_come_to_an_address_that_has_appeared_while_it_was_awaited(tmp_path: Path) -> None:
    async def scenario() -> None:
        ends = Ends(tmp_path)
        await ends.open_door()
        await asyncio.sleep(0)  # it is awaited
        await add_address(LATER)
        ends.permitted.append(LATER)
        ends.door.announce([LATER])
        await ends.multichannel.endpoints.idle()
        await ends.call(Route(transport="multichannel", paths=(RoutePath(here=OURS, there=LATER),)), address=LATER)
        await ends.until_used(*THEIRS, LATER)
        await ends.close()

    play(scenario)


def test_strangers_at_any_address_do_not_keep_the_source_out(tmp_path: Path) -> None:
    async def scenario() -> None:
        ends = Ends(tmp_path)
        await ends.open_door()
        loop = asyncio.get_running_loop()
        for address in THEIRS:
            with closing(socket.socket()) as caller:
                caller.setblocking(False)
                await loop.sock_connect(caller, (address, ends.door.port))
                await loop.sock_sendall(caller, bytes(16))
                assert await loop.sock_recv(caller, 1) == b""
        await ends.call()
        await ends.until_used(*THEIRS)
        await ends.close()

    play(scenario)


def test_where_no_address_answers_it_says_what_was_wrong_with_the_first(tmp_path: Path) -> None:
    async def scenario() -> None:
        ends = Ends(tmp_path)
        await ends.open_door()
        ends.accepting.cancel()
        ends.door.close()
        for route in (ROUTE, msgspec.structs.replace(ROUTE, paths=ROUTE.paths[::-1])):
            with pytest.raises(DestinationLost, match=f"at {THEIRS[0]} port"):
                await ends.multichannel.connect(route, ends.prepared)
        await ends.multichannel.endpoints.idle()
        assert await PathManager().limits() == Limits(2, 0)

    play(scenario)


def test_a_server_that_is_at_one_address_is_called_at_no_other(tmp_path: Path) -> None:
    async def scenario() -> None:
        ends = Ends(tmp_path)
        await ends.open_door()
        await remove_address(THEIRS[0])
        with pytest.raises(DestinationLost):
            await ends.multichannel.connect(ROUTE, ends.prepared, anywhere=False)
        ends.accepting.cancel()
        ends.door.close()

    play(scenario)


def test_a_door_that_is_another_servers_has_several_connections_made_to_it_too(tmp_path: Path) -> None:
    async def scenario() -> None:
        address, count = THEIRS[0], 3

        async def permitted() -> tuple[str, ...]:
            return THEIRS

        multichannel = Multichannel(PathManager(), tmp_path)
        door = await multichannel.open_door([address], PORTS, permitted, (), {address: count})
        assert door.hand_over().getsockname()[1] == door.port
        # The kernel is asked: nobody tells.
        while sum(one.port > 0 for one in await PathManager().endpoints()) < count - 1:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        door.close()
        await multichannel.endpoints.idle()
        assert await PathManager().endpoints() == ()

    play(scenario)


def test_ports_that_trial_connections_have_used_are_not_those_that_are_announced(tmp_path: Path) -> None:
    async def scenario() -> None:
        address = THEIRS[0]

        async def permitted() -> tuple[str, ...]:
            return THEIRS

        async with trials.trial([address], PORTS) as tried:
            assert await trials.reach(address, tried) is not None
        multichannel = Multichannel(PathManager(), tmp_path)
        door = await multichannel.open_door([address], PORTS, permitted, (), {address: 2})
        door.hand_over().close()
        # The kernel is asked: nobody tells.
        while not (made := [one.port for one in await PathManager().endpoints()]):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert tried not in made
        door.close()
        await multichannel.endpoints.idle()

    play(scenario)


def test_strangers_at_the_open_door_are_hung_up_on(tmp_path: Path) -> None:
    async def scenario() -> None:
        ends = Ends(tmp_path)
        await ends.connect()
        loop = asyncio.get_running_loop()
        for _ in range(20):  # more than the listener has places for
            for address in THEIRS:
                with closing(socket.socket()) as caller:
                    caller.setblocking(False)
                    await loop.sock_connect(caller, (address, ends.door.port))
                    assert await loop.sock_recv(caller, 1) == b""
        await ends.until_used(*THEIRS)
        await ends.close()

    play(scenario)


def test_strangers_are_hung_up_on_also_after_the_kernel_had_no_descriptor_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        ends = Ends(tmp_path)
        await ends.connect()
        loop = asyncio.get_running_loop()
        with closing(socket.socket()) as caller, closing(socket.socket()) as second:
            async with descriptors.none_left(monkeypatch):
                # By the kernel alone: the loop would look the address up, for which it opens files.
                caller.connect((THEIRS[0], ends.door.port))
            second.connect((THEIRS[0], ends.door.port))
            for one in (caller, second):
                one.setblocking(False)
                assert await loop.sock_recv(one, 1) == b""
        await ends.close()

    play(scenario)


def test_an_endpoint_that_somebody_removes_at_once_is_a_failure_with_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing(*_: object) -> tuple[()]:
        return ()

    manager = PathManager()
    monkeypatch.setattr(manager, "_ask", nothing)
    with pytest.raises(NetworkError, match="removed by somebody else"):
        asyncio.run(manager.announce("10.0.0.1"))


def test_changes_of_the_network_are_heard_of(tmp_path: Path) -> None:
    async def scenario() -> None:
        word = changes()
        await anext(word)  # it watches now
        await add_address(LATER)
        await anext(word)
        again = asyncio.ensure_future(anext(word))
        done, _ = await asyncio.wait({again}, timeout=0.3)
        assert not done, "one burst is one word"
        again.cancel()
        await asyncio.wait({again})

    play(scenario)
