"""What a transport gives to the two ends of a move: a connected socket for each QEMU, and nothing of how it came about.

The daemons make the connection and hand it to their QEMUs, which know neither addresses nor ports. So every transport
looks the same to them, nobody listens in QEMU, and whoever calls a port by mistake or malice is turned away by the
destination's daemon before QEMU has read a byte: the caller must first say the token that the destination gave to the
source in the session between the daemons.

RDMA alone is otherwise: no socket of ours can carry it, so that QEMU is given an address, and listens or calls itself.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from limosa.errors import LimosaError
from limosa.model.route import Compressed
from limosa.qemu.protocol import RdmaAddress


@dataclass(frozen=True)
class Used:
    """How much went from one address to another: payload the other end has acknowledged.

    ``alive``: a connection between the two is open; ``connections``: how many are. ``busy_s``: seconds in which
    something was under way and the receiver had room for more. ``overdue``: a connection waits for an acknowledgement
    for longer than it ever should, as when a cable has been pulled.
    """

    here: str
    there: str
    sent_bytes: int
    alive: bool = True
    busy_s: float = 0.0
    connections: int = 1
    overdue: bool = False


def by_path(parts: Iterable[Used]) -> tuple[Used, ...]:
    """All that went from one address to another as one. Of a connection that has ended nothing is overdue."""
    sums: dict[tuple[str, str], Used] = {}
    for one in parts:
        ends = one.here, one.there
        before = sums.get(ends, Used(*ends, 0, alive=False, connections=0))
        sums[ends] = Used(
            *ends,
            before.sent_bytes + one.sent_bytes,
            alive=before.alive or one.alive,
            busy_s=max(before.busy_s, one.busy_s),
            connections=before.connections + one.connections,
            overdue=before.overdue or (one.overdue and one.connections > 0),
        )
    return tuple(sums.values())


class Channel(Protocol):
    """The source's end."""

    @property
    def stream(self) -> socket.socket | RdmaAddress:
        """Connected to the destination, and QEMU is to get a duplicate; or where QEMU is to call."""

    def set_short(self, short: bool, pace: float) -> None:
        """Whether little may wait between QEMU and the network from now on, at some cost of throughput. Never raises.

        QEMU takes for sent what was taken from it. What waits would be sent while the guest stands still. ``pace``:
        bytes a second that the stream makes, by which what is little can be told.
        """

    @property
    def connections(self) -> Sequence[SocketChannel]:
        """Those to the other host, which other streams may share: what they have used is that of all."""

    def spread_over(self, ways: Iterable[tuple[str, str]]) -> None:
        """If it is spread over connections of its own, have one over each of these paths, from an address here to one
        there, as soon as that can be. Never raises."""

    def used(self) -> tuple[Used, ...]:
        """What went which way since the beginning, also over paths that are gone. Never raises."""

    async def compressed(self) -> Compressed | None:
        """What compression has made of it so far; None if nobody compresses. Never raises."""

    async def fault(self) -> LimosaError | None:
        """What broke the stream, if it was something between the two QEMUs that can say so. Waits for it a moment."""

    def close(self) -> None:
        """Close what is ours; QEMU's duplicate goes on. May be repeated."""


class SocketChannel(Channel, Protocol):
    """One whose stream is a socket, as all are but RDMA's."""

    @property
    def stream(self) -> socket.socket:
        """Connected to the destination; QEMU is to get a duplicate."""

    def pace(self, bytes_per_s: int) -> bool:
        """Let it send so much from now on, 0: as much as it can. Whether it keeps to that: TCP and relays do; Multipath
        TCP goes on as it does. Never raises."""


async def connect_all(connects: Iterable[Callable[[], Awaitable[SocketChannel]]]) -> list[SocketChannel]:
    """Several connections, one after another. If one cannot be made, the others are closed and that is raised."""
    made: list[SocketChannel] = []
    try:
        for connect in connects:
            made.append(await connect())
    except BaseException:
        for channel in made:
            channel.close()
        raise
    return made


class Doorway(Protocol):
    """The destination's end: where the source is awaited."""

    @property
    def address(self) -> str:
        """The IP address to call."""

    @property
    def port(self) -> int:
        """The TCP port to call."""

    @property
    def token(self) -> str:
        """What the caller has to say first, in hexadecimal digits."""

    async def accept(self) -> socket.socket | None:
        """Wait for the source, however long; others are turned away, then and later. The socket is the caller's.

        None, at once, where QEMU listens itself and has its stream already.
        """

    def announce(self, addresses: Iterable[str]) -> None:
        """The source has a way to these addresses of ours now: let it use them, if the transport can. Never raises."""

    def close(self) -> None:
        """The stream has ended, or nobody is awaited any more. May be repeated."""
