"""One move by the command line, and its progress as the daemon streams it to anybody who watches."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from rich.console import Console

from demo.stage import LAB, VM, DemoFailed, limosa, on
from limosa.client.host import HostClient
from limosa.errors import LimosaError
from limosa.model.migration import Migration, Outcome
from limosa.wire.endpoints import LIST_MIGRATIONS, WATCH_MIGRATION

_LOOK_EVERY_S = 0.02


@dataclass(frozen=True)
class Sighting:
    """The move as it stood at a moment."""

    at: float
    move: Migration


@dataclass(frozen=True)
class WatchedMove:
    """A move that was completed, from the command to its end."""

    began_at: float
    ended_at: float
    sightings: tuple[Sighting, ...]

    @property
    def last(self) -> Migration:
        """The move as it ended."""
        return self.sightings[-1].move


def move(screen: Console, source: str, destination: str) -> WatchedMove:
    """Move the VM with ``limosa move``, whose display is on the terminal meanwhile. Raises :class:`DemoFailed`."""
    watcher = _Watcher(HostClient(str(LAB.socket(source))))
    began_at = time.monotonic()
    watcher.start()
    try:
        limosa(screen, *on(source), "move", VM, "--to", destination)
    finally:
        watcher.finish()
    ended_at = time.monotonic()
    if not watcher.sightings or watcher.sightings[-1].move.outcome is not Outcome.COMPLETED:
        raise DemoFailed(f"the move to {destination} was not seen to its end: {watcher.fault or 'the stream ended'}")
    return WatchedMove(began_at, ended_at, tuple(watcher.sightings))


class _Watcher(threading.Thread):
    """Collects what the daemon tells of the VM's next move, on a connection of its own."""

    def __init__(self, client: HostClient) -> None:
        super().__init__(daemon=True)
        self.sightings: list[Sighting] = []
        self.fault: LimosaError | None = None
        self._client = client
        self._known = self._ids()
        self._over = threading.Event()

    def run(self) -> None:
        try:
            if found := self._wait_for_move():
                for migration in self._client.stream(WATCH_MIGRATION, migration=found):
                    self.sightings.append(Sighting(time.monotonic(), migration))
        except LimosaError as error:
            self.fault = error
        finally:
            self._client.close()

    def finish(self) -> None:
        """The command has ended, and with it the move, or it goes on without being watched."""
        self._over.set()
        self.join(1.0)

    def _wait_for_move(self) -> str | None:
        """The command's display does not tell the move's number, so the list is looked at until it has a new one."""
        while not (new := self._ids() - self._known):
            if self._over.wait(_LOOK_EVERY_S):
                return None
        return min(new)

    def _ids(self) -> set[str]:
        return {one.id for one in self._client.call(LIST_MIGRATIONS).migrations if one.vm == VM}
