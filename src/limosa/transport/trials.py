"""Trial connections: which ways to the destination are open, and whether long packets come through, before a move is
made to rely on one."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass

from limosa.transport.lobby import Lobby
from limosa.transport.tcp import free_ports, listen

#: A trial connection that takes longer is blocked for all that matters.
REACH_WITHIN_S = 3.0
#: So much goes each way over it: some packets of full length, also of 9000 bytes each.
TRIAL_BYTES = 64 * 1024


@contextlib.asynccontextmanager
async def trial(addresses: Sequence[str], ports: tuple[int, int]) -> AsyncIterator[int]:
    """Listen on all of ``addresses`` so that the source can try which ways are open, and let long packets through.

    Gives the port, the same on all, or 0 if no address has one of the range free. If none is free on all of them, it is
    one that is on most.
    """
    # From the end of the range, so that trials do not take the ports that moves would take next.
    listeners = _listen_on_most(addresses, range(ports[1], ports[0] - 1, -1))
    port = listeners[0].getsockname()[1] if listeners else 0
    lobby = Lobby(_answer_trial, socket.socket.close)
    answering = [asyncio.ensure_future(lobby.serve(listener)) for listener in listeners]
    try:
        yield port
    finally:
        for one in answering:
            one.cancel()
        await asyncio.gather(*answering, return_exceptions=True)
        await lobby.close()
        for listener in listeners:
            listener.close()


async def _answer_trial(caller: socket.socket) -> bool:
    """Say and hear what the source wants to see arrive; whether it has."""
    loop, came = asyncio.get_running_loop(), 0
    async with asyncio.timeout(REACH_WITHIN_S):
        await loop.sock_sendall(caller, bytes(TRIAL_BYTES))
        while came < TRIAL_BYTES and (more := await loop.sock_recv(caller, TRIAL_BYTES)):
            came += len(more)
    return came == TRIAL_BYTES


@dataclass(frozen=True)
class Reached:
    """A trial connection: the address of ours it was made from, and whether what long packets carry arrived, too."""

    own: str
    whole: bool


async def reach(address: str, port: int, source: str = "", *, answers: bool = True) -> Reached | None:
    """Make a trial connection to ``address``, from ``source`` if that is given; None if none can be made.

    ``answers``: the other end is a :func:`trial` that sends and takes what long packets are needed for.
    """
    try:
        async with asyncio.timeout(REACH_WITHIN_S):
            reader, writer = await asyncio.open_connection(address, port, local_addr=(source, 0) if source else None)
    except (OSError, TimeoutError):
        return None
    try:
        own = str(writer.get_extra_info("sockname")[0])
        return Reached(own, not answers or await _goes_both_ways(reader, writer))
    finally:
        writer.transport.abort()


async def _goes_both_ways(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
    """Whether all arrives that both ends say: the other closes when it has all of ours."""
    try:
        async with asyncio.timeout(REACH_WITHIN_S):
            writer.write(bytes(TRIAL_BYTES))
            await reader.readexactly(TRIAL_BYTES)
            return not await reader.read(1)
    except (OSError, TimeoutError, asyncio.IncompleteReadError):
        return False


def _listen_on_most(addresses: Sequence[str], ports: Iterable[int]) -> list[socket.socket]:
    """Listeners on the first port that is free on each address, or else on one that is on most.

    An address may have its own ports of the range taken: the kernel listens on those with which it announces one.
    """
    there = [address for address in addresses if next(free_ports(address, (0,)), None) is not None]  # one may have gone
    best: list[socket.socket] = []
    for port in ports:
        found = []
        for address in there:
            with contextlib.suppress(OSError):
                found.append(listen(address, port))
        if len(found) > len(best):
            best, found = found, best
        for listener in found:
            listener.close()
        if len(best) == len(there):
            break
    return best
