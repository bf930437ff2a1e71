"""Trial connections: which ways to the destination are open, and whether long packets come through, before a move is
made to rely on one."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from limosa.transport.lobby import Lobby
from limosa.transport.tcp import listen

#: A trial connection that takes longer is blocked for all that matters.
REACH_WITHIN_S = 3.0
#: So much goes each way over it: some packets of full length, also of 9000 bytes each.
TRIAL_BYTES = 64 * 1024


@contextlib.asynccontextmanager
async def trial(addresses: Sequence[str], ports: tuple[int, int]) -> AsyncIterator[int]:
    """Listen on all of ``addresses`` so that the source can try which ways are open, and let long packets through.

    Gives the port, the same on all, or 0 if there is no address or every port of the range is taken.
    """
    # From the end of the range, so that trials do not take the ports that moves would take next.
    first = _listen(addresses[0], range(ports[1], ports[0] - 1, -1)) if addresses else None
    port = first.getsockname()[1] if first is not None else 0
    others = [_listen(address, range(port, port + 1)) for address in addresses[1:]] if port else []
    listeners = [listener for listener in (first, *others) if listener is not None]
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


def _listen(address: str, ports: range) -> socket.socket | None:
    for port in ports:
        with contextlib.suppress(OSError):
            return listen(address, port)
    return None
