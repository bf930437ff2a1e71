"""Following moves to their end, over broken connections and several at once."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable, Iterator

import msgspec

from limosa.client.host import HostClient
from limosa.errors import (
    Cancelled,
    HostNotTrusted,
    HostUnreachable,
    LimosaError,
    MigrationFailed,
    OwnerUnknown,
    from_fault,
)
from limosa.model.migration import Migration, Outcome, Side
from limosa.wire.endpoints import WATCH_MIGRATION

#: How long a daemon may be away: it restarts, takes up its VMs and finishes or undoes the move by itself.
PATIENCE_S = 60.0
_RETRY_S = 0.25
#: A daemon that is away for longer is spoken of; most are back before.
_SILENT_S = 2.0

#: For moves that ended without a word.
_EXIT_CODES = {
    Outcome.UNDER_WAY: 0,
    Outcome.COMPLETED: 0,
    Outcome.FAILED: MigrationFailed.exit_code,
    Outcome.CANCELLED: Cancelled.exit_code,
    Outcome.UNRESOLVED: OwnerUnknown.exit_code,
}

#: A move as it now stands, or why it never began.
Event = Migration | LimosaError


def follow(client: HostClient, migration: Migration) -> Iterator[Migration]:
    """Each change of a move until it has ended, that first.

    A connection that breaks is made again for :data:`PATIENCE_S`, and the move's note says so; the move does not depend
    on it. Raises :class:`HostUnreachable` after that, and what the daemon raises.
    """
    yield migration
    latest, lost_at, is_told = migration, math.inf, False
    while latest.outcome is Outcome.UNDER_WAY:
        try:
            for latest in client.stream(WATCH_MIGRATION, migration=migration.id):
                lost_at, is_told = math.inf, False
                yield latest
        except HostUnreachable as error:
            lost_at = min(lost_at, now := time.monotonic())
            if isinstance(error, HostNotTrusted) or now - lost_at > PATIENCE_S:
                raise
            if now - lost_at >= _SILENT_S and not is_told:
                is_told = True
                yield _unheard(latest)
        if latest.outcome is Outcome.UNDER_WAY:
            time.sleep(_RETRY_S)


def _unheard(migration: Migration) -> Migration:
    """A move as it was when its daemon was heard last; how fast it goes is not known."""
    host = migration.source if migration.side is Side.SOURCE else migration.destination
    progress = msgspec.structs.replace(
        migration.progress,
        rate_bytes_per_s=0.0,
        dirty_rate_bytes_per_s=0.0,
        remaining_s=None,
        note=f"the daemon of host '{host}' does not answer; trying again",
    )
    return msgspec.structs.replace(migration, place=None, progress=progress)


def follow_all(names: list[str], begin: Callable[[str], Iterator[Migration]]) -> Iterator[tuple[str, Event]]:
    """Run ``begin(name)`` for every name at once and give what comes of all, until all have ended.

    Each runs in a thread of its own; an error ends that name only and is its last event.
    """
    events: queue.SimpleQueue[tuple[str, Event | None]] = queue.SimpleQueue()

    def work(name: str) -> None:
        try:
            for migration in begin(name):
                events.put((name, migration))
        except LimosaError as error:
            error.vm = error.vm or name
            events.put((name, error))
        except Exception as error:  # noqa: BLE001 - the edge of a thread: whoever waits for events must hear of it
            events.put(
                (name, LimosaError("an internal error of this command", why=repr(error), todo="please report it"))
            )
        finally:
            events.put((name, None))

    for name in names:
        # Daemon threads: a move goes on without us, so nobody waits for them after Ctrl-C.
        threading.Thread(target=work, args=(name,), daemon=True).start()
    under_way = len(names)
    while under_way:
        name, event = events.get()
        if event is None:
            under_way -= 1
        else:
            yield name, event


def has_ended(event: Event) -> bool:
    """Whether it is the last event of its move."""
    return isinstance(event, LimosaError) or event.outcome is not Outcome.UNDER_WAY


def exit_code(event: Event) -> int:
    """0 for a move that was completed, or is under way, else that of its error."""
    if isinstance(event, LimosaError):
        return event.exit_code
    return from_fault(event.fault).exit_code if event.fault is not None else _EXIT_CODES[event.outcome]
