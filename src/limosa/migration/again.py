"""The next try of a move whose RDMA failed before the switchover, whose first stream found nobody where it was led, or
whose guest has to be slowed: everything of the try before is undone.

A move may have waited in lines for hours since its ways were tried, and a network may have died meanwhile; they are
tried again with the rest of preflight. The next try is an ordinary move on other terms, in a session of its own. What
makes that safe is the order:

1. the stream is ended here, if there is one, and the guest goes on here;
2. the destination says that it has destroyed what it had, so that there is one QEMU at most besides ours;
3. only then is anything prepared again.

The journal stays where it is meanwhile: a daemon that dies at any of these moments leaves a move that was copying
memory, and is settled as such.
"""

from __future__ import annotations

from dataclasses import replace
from enum import Enum, auto
from typing import TYPE_CHECKING

from limosa.errors import DestinationLost, LimosaError, MigrationFailed, NotConverging, QemuError, QemuGone
from limosa.migration.home import Terms
from limosa.migration.stop import stop_stream
from limosa.qemu.protocol import MachineProtocol, MigrationState
from limosa.wire.peer import DestinationState

if TYPE_CHECKING:
    from limosa.migration.source import SourceMove

#: What RDMA, or a QEMU that does it, can have failed with. Not a lost session: the same host is to be asked again.
_FAILURES = (QemuError, MigrationFailed, DestinationLost)


class Why(Enum):
    """Why a move begins again."""

    #: RDMA, by which it was to go, or went, has failed
    RDMA = auto()
    #: its first stream found nobody where it was led
    UNREACHED = auto()
    #: its guest has to be slowed, for which the stream has to begin anew
    SLOWING = auto()


def why(move: SourceMove, failure: LimosaError) -> Why | None:
    """For what a move that failed so may begin again, once."""
    if move.cancelled.done() or isinstance(failure, QemuGone):
        return None
    if move.steering is not None and failure is move.steering.must_slow:
        return Why.SLOWING
    by_rdma = move.examined is not None and move.examined.route.transport == "rdma"
    if by_rdma and isinstance(failure, _FAILURES) and not isinstance(failure, NotConverging):
        return Why.RDMA
    return Why.UNREACHED if failure is move.unreached else None


def note(why: Why, failure: LimosaError) -> str:
    """In words for people."""
    match why:
        case Why.RDMA:
            return f"RDMA failed ({failure}); starting again another way"
        case Why.UNREACHED:
            return f"{failure}; starting again another way"
        case Why.SLOWING:
            return f"{failure.why}; starting again, so that its processors can be slowed"


def terms(asked: Terms, why: Why, failure: LimosaError) -> Terms:
    """Those of the next try."""
    match why:
        case Why.RDMA:
            return replace(asked, rdma_failed=str(failure))
        case Why.UNREACHED:
            return asked
        case Why.SLOWING:
            return replace(asked, must_slow=True)


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
