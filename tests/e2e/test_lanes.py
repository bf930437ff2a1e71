"""Both daemons' ends of a session over several connections, with real relays, and addresses of loopback in place of
networks.

Paths that cannot be connected at first, that are lost, and that appear; and a team, whose members want several.
"""

from __future__ import annotations

import asyncio
import os
import random
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from limosa.errors import DestinationLost
from limosa.host.multichannel import Multichannel
from limosa.host.page import Page
from limosa.host.relays import Relays
from limosa.model.route import Path as RoutePath
from limosa.model.route import Route
from limosa.network.mptcp import PathManager
from limosa.transport.channel import Doorway
from limosa.transport.relay.outbound import RelayChannel, Seat
from limosa.wire.peer import Prepared

MIB = 1024 * 1024
NOISE = random.Random(5).randbytes(2 * MIB)
OURS = ("127.0.1.1", "127.0.1.2", "127.0.1.3")
THEIRS = ("127.0.2.1", "127.0.2.2", "127.0.2.3")
WAYS = tuple(zip(OURS, THEIRS, strict=True))
NOWHERE = "127.0.2.9"
WITHIN_S = 60


def run(work: Coroutine[None, None, None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(WITHIN_S):
            await work

    asyncio.run(limited())


class Move:
    """A stream of which the source's and the destination's QEMU would hold the ends, and the session it is in."""

    def __init__(self, seat: Seat, channel: RelayChannel, door: Doorway, there: socket.socket) -> None:
        self.channel, self.door, self.there = channel, door, there
        self.carriers = seat._session.carriers
        self.relay = seat._session._relay
        for one in (channel.stream, there):
            one.setblocking(True)

    async def sends(self) -> None:
        """Something goes from end to end."""
        sending = asyncio.to_thread(self.channel.stream.sendall, NOISE)
        receiving = asyncio.to_thread(receive, self.there, len(NOISE))
        assert (await asyncio.gather(sending, receiving))[1] == NOISE

    def sent(self) -> dict[tuple[str, str], int]:
        """Bytes by path."""
        return {(one.here, one.there): one.sent_bytes for one in self.carriers.used()}

    async def uses(self, *ways: tuple[str, str], more: int = MIB) -> None:
        """Send until each of these paths has carried so much more."""
        before = self.sent()
        while any(self.sent().get(way, 0) < before.get(way, 0) + more for way in ways):
            await self.sends()

    async def has(self, connections: int) -> None:
        await until(lambda: self.carriers.alive() == connections)


async def announced_ports(address: str) -> list[int]:
    return [one.port for one in await PathManager().endpoints() if one.address == address and one.port]


async def until(is_so: Callable[[], bool]) -> None:
    while not is_so():  # noqa: ASYNC110 - kernels and relays tell nobody here; run() bounds it
        await asyncio.sleep(0.01)


def receive(sock: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        piece = sock.recv(count - len(data))
        assert piece
        data += piece
    return bytes(data)


@asynccontextmanager
async def moving(
    folder: Path,
    *ways: tuple[str, str],
    awaited: tuple[str, ...] = THEIRS,
    encrypt: bool = True,
    swallows: str | None = None,
    streams: int = 0,
) -> AsyncIterator[Move]:
    """A move over these paths; the destination awaits it at some of its addresses, and more may be asked for. At the
    address that ``swallows`` whoever connects is let in, and nothing that is sent gets through. With ``streams``, so
    many connections of Multipath TCP over each path instead of stripes."""
    multichannel = Multichannel(PathManager(), folder)
    relays = Relays(multichannel, Page(folder / "settings.toml"), None)
    paths = tuple(RoutePath(here=here, there=there, streams=streams or 1) for here, there in ways)
    transport = "compression" if streams else "multichannel"
    route = Route(transport=transport, paths=paths, striped=not streams, alone=True)
    seat = relays.seat("there", route, None, encrypt=encrypt)

    async def permitted() -> tuple[str, ...]:
        return THEIRS

    door: Doorway | None = None
    channel: RelayChannel | None = None
    there: socket.socket | None = None
    hole: socket.socket | None = None
    try:
        await seat.open()
        wanted = {path.there: path.streams for path in paths}
        door = await relays.open_door("here", seat.place, awaited, permitted, (), wanted)
        prepared = Prepared(address=door.address, port=door.port, token=door.token)
        hole = socket.create_server((swallows, door.port)) if swallows is not None else None
        channel = await seat.connect(prepared)
        there = await door.accept()
        assert there is not None
        yield Move(seat, channel, door, there)
    finally:
        for one in (channel, door, there, hole):
            if one is not None:
                one.close()
        seat.release()
        sessions = [one for one in (seat._session._relay,) if one is not None]
        for session in sessions:
            await session.end()
        for arriving in list(relays._inbound.values()):
            with suppress(Exception):
                await (await arriving.session).relay.end()
        await multichannel.endpoints.idle()


def test_both_paths_carry_and_the_figures_are_of_both(tmp_path: Path) -> None:
    async def work() -> None:
        async with moving(tmp_path, *WAYS[:2]) as move:
            await move.uses(*WAYS[:2])
            assert move.carriers.alive() == 4
            assert {(one.here, one.there) for one in move.channel.used()} == set(WAYS[:2])

    run(work())


def test_a_team_gets_several_connections_over_its_one_path(tmp_path: Path) -> None:
    async def work() -> None:
        async with moving(tmp_path, WAYS[0], awaited=THEIRS[:1], streams=3) as move:
            await move.sends()
            # On loopback both ends are one kernel, which connects to them from both: what counts is what is announced.
            while len(await announced_ports(THEIRS[0])) < 2:  # noqa: ASYNC110 - as in until()
                await asyncio.sleep(0.01)
        assert not await announced_ports(THEIRS[0])

    run(work())


def test_a_path_that_cannot_be_connected_at_first_is_used_when_it_can(tmp_path: Path) -> None:
    async def work() -> None:
        async with moving(tmp_path, WAYS[1], WAYS[0], awaited=THEIRS[:1]) as move:
            await move.uses(WAYS[0])
            assert WAYS[1] not in move.sent()
            move.door.announce(THEIRS[1:2])
            await move.uses(*WAYS[:2])

    run(work())


def test_without_any_path_the_move_fails_and_says_why(tmp_path: Path) -> None:
    async def work() -> None:
        with pytest.raises(DestinationLost, match=f"{NOWHERE} .*cannot be reached"):
            async with moving(tmp_path, (OURS[0], NOWHERE), (OURS[1], NOWHERE)):
                pytest.fail("it was connected")

    run(work())


def test_a_path_that_is_there_and_lets_nothing_through_keeps_nothing_up(tmp_path: Path) -> None:
    async def work() -> None:
        async with moving(tmp_path, *WAYS[:2], awaited=THEIRS[1:2], swallows=THEIRS[0]) as move:
            await move.uses(WAYS[1])
            assert move.sent()[WAYS[0]] < MIB

    run(work())


@pytest.mark.parametrize("lane", [0, 1])
def test_a_lost_lane_is_dialled_again_and_its_bytes_count_on(tmp_path: Path, lane: int) -> None:
    async def work() -> None:
        async with moving(tmp_path, *WAYS[:2]) as move:
            await move.uses(*WAYS[:2])
            before = move.sent()
            move.carriers.forward[lane].stream.shutdown(socket.SHUT_RDWR)
            await until(lambda: len(move.carriers.forward) == 3)
            await move.uses(*WAYS[:2])
            await move.has(4)
            assert all(move.sent()[way] >= before[way] + MIB for way in WAYS[:2])

    run(work())


def test_a_session_over_one_path_grows_when_another_appears(tmp_path: Path) -> None:
    async def work() -> None:
        async with moving(tmp_path, WAYS[0], awaited=THEIRS[:1]) as move:
            await move.uses(WAYS[0])
            move.door.announce([*THEIRS, NOWHERE])
            move.channel.spread_over(WAYS)
            await move.uses(*WAYS)
            assert move.carriers.alive() == 6

    run(work())


def test_strangers_at_the_door_in_mid_session_are_turned_away(tmp_path: Path) -> None:
    async def work() -> None:
        async with moving(tmp_path, *WAYS[:2], encrypt=False) as move:
            await move.uses(*WAYS[:2])
            address, port = move.channel.connections[0].stream.getpeername()
            for said in (b"", os.urandom(64), bytes(16)):
                with socket.create_connection((address, port), timeout=10) as stranger:
                    stranger.sendall(said)
                    await move.sends()
            await move.uses(*WAYS[:2])
            assert move.carriers.alive() == 4

    run(work())


def test_the_door_closes_with_the_session(tmp_path: Path) -> None:
    async def work() -> None:
        async with moving(tmp_path, *WAYS[:2]) as move:
            address, port = move.channel.connections[0].stream.getpeername()
            assert move.relay is not None
            await move.relay.end()
            await until(lambda: refused(address, port))

    run(work())


def refused(address: str, port: int) -> bool:
    with socket.socket() as caller:
        return caller.connect_ex((address, port)) != 0
