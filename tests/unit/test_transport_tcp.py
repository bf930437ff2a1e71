"""The door of a destination: who knows the token comes in, others do not, and nobody delays it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import closing

import pytest

from harness import descriptors
from limosa.errors import DestinationLost, NetworkError
from limosa.transport import lobby, tcp
from limosa.transport.tcp import TcpDoorway

LOOPBACK = "127.0.0.1"
ANY_PORT = (0, 0)


def play(scenario: Callable[[], Awaitable[None]]) -> None:
    async def within() -> None:
        async with asyncio.timeout(20):
            await scenario()

    asyncio.run(within())


async def admitted(door: TcpDoorway) -> None:
    """The source comes in, and what it says arrives."""
    accepting = asyncio.ensure_future(door.accept())
    channel = await tcp.connect(door.address, door.port, door.token)
    with await accepting as stream, closing(channel):
        channel.stream.setblocking(True)
        stream.setblocking(True)
        for one in (stream, channel.stream):
            assert one.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert channel.pace(10**9)
        channel.set_short(True, 1e9)
        assert channel.stream.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT) == 1_000_000
        channel.set_short(True, 0)
        assert channel.stream.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT) == 16 * 1024
        channel.stream.sendall(b"memory")
        assert stream.recv(100) == b"memory"
        stream.sendall(b"return path")
        assert channel.stream.recv(100) == b"return path"
    channel.set_short(True, 0)  # too late, and no harm
    assert not channel.pace(1)


def test_the_source_comes_in() -> None:
    async def scenario() -> None:
        with closing(TcpDoorway(LOOPBACK, ANY_PORT)) as door:
            await admitted(door)

    play(scenario)


def test_a_port_is_not_free_while_there_is_the_rest_of_a_connection() -> None:
    with tcp.listen(LOOPBACK, 0) as listener:
        listener.setblocking(True)
        port = listener.getsockname()[1]
        assert list(tcp.free_ports(LOOPBACK, [port])) == []
        with socket.create_connection((LOOPBACK, port)) as caller:
            listener.accept()[0].close()  # who closes first keeps the rest
            assert caller.recv(1) == b""
    tcp.listen(LOOPBACK, port).close()
    assert list(tcp.free_ports(LOOPBACK, [port])) == []


def test_strangers_are_turned_away_and_delay_nobody() -> None:
    async def scenario() -> None:
        with closing(TcpDoorway(LOOPBACK, ANY_PORT)) as door:
            callers = [socket.create_connection((door.address, door.port), timeout=10) for _ in range(4)]
            silent, half, wrong, gone = callers
            half.sendall(bytes.fromhex(door.token)[:8])
            wrong.sendall(bytes(16))
            gone.close()
            await admitted(door)
            for caller in (silent, half, wrong):
                with caller:
                    assert await asyncio.to_thread(hung_up, caller)

    play(scenario)


@pytest.mark.parametrize("source", [LOOPBACK, "127.0.0.2"], ids=["the same address", "another address"])
def test_more_who_say_nothing_than_may_be_asked_at_once_do_not_keep_the_source_out(source: str) -> None:
    async def scenario() -> None:
        with closing(TcpDoorway(LOOPBACK, ANY_PORT)) as door, contextlib.ExitStack() as callers:
            accepting = asyncio.ensure_future(door.accept_several(2))
            began = time.monotonic()
            flood = [await silent_caller(door, callers) for _ in range(2 * lobby.HALF_OPEN)]
            first = await tcp.connect(door.address, door.port, door.token, source)
            flood += [await silent_caller(door, callers) for _ in range(2 * lobby.HALF_OPEN)]
            second = await tcp.connect(door.address, door.port, door.token, source)
            for stream in await accepting:
                stream.close()
            assert time.monotonic() - began < tcp.TOKEN_WITHIN_S, "nobody's time was waited for"
            for channel in (first, second):
                channel.close()
            assert all(await asyncio.gather(*(asyncio.to_thread(hung_up, caller) for caller in flood)))

    play(scenario)


async def silent_caller(door: TcpDoorway, callers: contextlib.ExitStack) -> socket.socket:
    return callers.enter_context(
        await asyncio.to_thread(socket.create_connection, (door.address, door.port), timeout=10)
    )


def test_who_calls_most_sends_away_only_his_own() -> None:
    async def scenario() -> None:
        with closing(TcpDoorway(LOOPBACK, ANY_PORT)) as door, contextlib.ExitStack() as callers:
            accepting = asyncio.ensure_future(door.accept())
            slow = await tcp.call(door.address, door.port, door.token[:8], source="127.0.0.2")
            for _ in range(2 * lobby.HALF_OPEN):
                await silent_caller(door, callers)
            slow.sendall(bytes.fromhex(door.token[8:]))
            with await accepting, closing(slow):
                pass

    play(scenario)


def test_a_door_waits_until_there_is_a_descriptor_for_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        with closing(TcpDoorway(LOOPBACK, ANY_PORT)) as door, closing(socket.socket()) as caller:
            caller.setblocking(False)
            accepting = asyncio.ensure_future(door.accept())
            async with descriptors.none_left(monkeypatch):
                await loop.sock_connect(caller, (door.address, door.port))
            await loop.sock_sendall(caller, bytes.fromhex(door.token))
            (await accepting).close()

    play(scenario)


def hung_up(caller: socket.socket) -> bool:
    try:
        return caller.recv(100) == b""
    except ConnectionError:
        return True


def test_nobody_is_there() -> None:
    async def scenario() -> None:
        with closing(TcpDoorway(LOOPBACK, ANY_PORT)) as door:
            address, port, token = door.address, door.port, door.token
        with pytest.raises(DestinationLost, match="cannot be reached"):
            await tcp.connect(address, port, token)

    play(scenario)


def test_a_door_that_is_given_up_lets_go_of_everybody() -> None:
    async def scenario() -> None:
        with closing(TcpDoorway(LOOPBACK, ANY_PORT)) as door:
            accepting = asyncio.ensure_future(door.accept())
            with socket.create_connection((door.address, door.port), timeout=10) as caller:
                caller.sendall(b"\0")
                await asyncio.sleep(0)
                accepting.cancel()
                await asyncio.wait({accepting})
                door.close()
                assert await asyncio.to_thread(hung_up, caller)

    play(scenario)


def test_each_door_has_its_own_port_while_there_are_any() -> None:
    with closing(TcpDoorway(LOOPBACK, ANY_PORT)) as any_door:
        taken = any_door.port
        with pytest.raises(NetworkError, match="is free to receive"):
            TcpDoorway(LOOPBACK, (taken, taken))
