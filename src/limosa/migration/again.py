"""The second try of a move whose RDMA failed before the switchover, or whose first stream found nobody where it was
led: everything of the first try is undone.

A move may have waited in lines for hours since its ways were tried, and a network may have died meanwhile; they are
tried again with the rest of preflight. The second try is an ordinary move by another way, in a session of its own. What
makes that safe is the order:

1. the stream is ended here, if there is one, and the guest goes on here;
2. the destination says that it has destroyed what it had, so that there is one QEMU at most besides ours;
3. only then is anything prepared again.

The journal stays where it is meanwhile: a daemon that dies at any of these moments leaves a move that was copying
memory, and is settled as such.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from limosa.errors import DestinationLost, LimosaError, MigrationFailed, NotConverging, QemuError, QemuGone
from limosa.migration.stop import stop_stream
from limosa.qemu.protocol import MachineProtocol, MigrationState
from limosa.wire.peer import DestinationState

if TYPE_CHECKING:
    from limosa.migration.source import SourceMove

#: What RDMA, or a QEMU that does it, can have failed with. Not a lost session: the same host is to be asked again.
_FAILURES = (QemuError, MigrationFailed, DestinationLost)


def may_follow(move: SourceMove, failure: LimosaError) -> bool:
    """Whether a move that failed so is to be tried once more."""
    excluded = isinstance(failure, NotConverging | QemuGone) or move.cancelled.done()
    return not excluded and (failure is move.unreached or (by_rdma(move) and isinstance(failure, _FAILURES)))


def by_rdma(move: SourceMove) -> bool:
    """Whether a move was to go by RDMA, or went."""
    return move.examined is not None and move.examined.route.transport == "rdma"


async def undo(move: SourceMove, machine: MachineProtocol, failure: LimosaError) -> None:
    """Undo the first try. Raises ``failure`` if that is not possible: then the move is to be settled."""
    if failure is not move.unreached:
        await _stop(move, machine, failure)
    try:
        await _destroyed_there(move, str(failure))
    except LimosaError as error:
        raise failure from error


async def _stop(move: SourceMove, machine: MachineProtocol, failure: LimosaError) -> None:
    await stop_stream(machine)
    if (await machine.migration()).state is MigrationState.COMPLETED:
        raise failure  # everything was sent before the cancel arrived
    await machine.forget_stream()
    if move.header.was_running:
        await machine.resume_if_stopped()


async def _destroyed_there(move: SourceMove, reason: str) -> None:
    """Return when the destination has nothing left of the first try."""
    peer = await move.dial()
    try:
        standing = await peer.attach(move.header.migration)
        if standing.state is not DestinationState.UNKNOWN:
            await peer.abort(reason)  # also if its QEMU is gone by itself: there is more to give back than that
    finally:
        await peer.close()
