"""The door of a destination: who knows the token comes in, others do not, and nobody delays it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from contextlib import closing

import pytest

from limosa.errors import DestinationLost, NetworkError
from limosa.transport import tcp
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
        channel.set_short(True, 1e9)
        assert channel.stream.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT) == 1_000_000
        channel.set_short(True, 0)
        assert channel.stream.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT) == 16 * 1024
        channel.stream.sendall(b"memory")
        assert stream.recv(100) == b"memory"
        stream.sendall(b"return path")
        assert channel.stream.recv(100) == b"return path"
    channel.set_short(True, 0)  # too late, and no harm
    channel.pace(1)


def test_the_source_comes_in() -> None:
    async def scenario() -> None:
        with closing(TcpDoorway(LOOPBACK, ANY_PORT)) as door:
            await admitted(door)

    play(scenario)


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
