"""Plain TCP: one stream, QEMU to QEMU, on an address and port the destination chose."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Sequence

#: A trial connection that takes longer is blocked for all that matters.
REACH_WITHIN_S = 3.0


@contextlib.asynccontextmanager
async def trial(addresses: Sequence[str], ports: tuple[int, int]) -> AsyncIterator[int]:
    """Listen on the first of ``addresses`` so that the source can try whether the way is open.

    Gives the port, or 0 if there is no address or every port of the range is taken.
    """
    listener = _listen(addresses[0], ports) if addresses else None
    try:
        yield listener.getsockname()[1] if listener is not None else 0
    finally:
        if listener is not None:
            listener.close()


async def reachable(address: str, port: int) -> bool:
    """Whether a connection to ``address`` can be made."""
    try:
        async with asyncio.timeout(REACH_WITHIN_S):
            _, writer = await asyncio.open_connection(address, port)
    except (OSError, TimeoutError):
        return False
    writer.transport.abort()
    return True


def _listen(address: str, ports: tuple[int, int]) -> socket.socket | None:
    # From the end of the range, so that the trial does not take the port QEMU would take next.
    for port in range(ports[1], ports[0] - 1, -1):
        try:
            return socket.create_server(
                (address, port), family=socket.AF_INET6 if ":" in address else socket.AF_INET, backlog=4
            )
        except OSError:
            continue
    return None
