"""What others see of the moves of this host: the newest view of each, watchers, and what a restart remembers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec

from limosa.errors import NotFound, OutcomeUnknown, StateError
from limosa.host import audit
from limosa.model import reading
from limosa.model.migration import Migration, Outcome
from limosa.settings import toml

#: From a person's cancel to words about it, if it cannot be done by then.
CANCEL_WITHIN_S = 1.5
_ENDED = frozenset({Outcome.COMPLETED, Outcome.FAILED, Outcome.CANCELLED})


class Views:
    """All moves from this host and on it. Views of those that ended, or wait for a person, are kept as ``ID.view.json``
    in ``folder``."""

    def __init__(self, host: str, folder: Path) -> None:
        self._host = host
        self._folder = folder
        self._views: dict[str, Migration] = {}
        self._watchers: dict[str, set[asyncio.Queue[Migration]]] = {}

    def list(self) -> list[Migration]:
        """Moves under way and ended, newest first."""
        return sorted(self._views.values(), key=lambda view: -view.accepted_at)

    def show(self, migration: str) -> Migration:
        """One move. Raises :class:`NotFound`."""
        if migration not in self._views:
            raise NotFound(f"no migration {migration} is known on host '{self._host}'", host=self._host)
        return self._views[migration]

    async def watch(self, migration: str) -> AsyncIterator[Migration]:
        """One move as it is, and again at each change, until it has ended."""
        view = self.show(migration)
        queue: asyncio.Queue[Migration] = asyncio.Queue()
        self._watchers.setdefault(migration, set()).add(queue)
        try:
            yield view
            while view.outcome is Outcome.UNDER_WAY:
                view = await queue.get()
                yield view
        finally:
            watchers = self._watchers[migration]
            watchers.discard(queue)
            if not watchers:
                del self._watchers[migration]

    async def ended(self, migration: str) -> Migration:
        """One move when it has ended."""
        return [view async for view in self.watch(migration)][-1]

    def publish(self, view: Migration) -> None:
        """A move has changed. One that has ended, or waits for a person, is remembered over a restart from now on,
        though it may be long until its destination has heard of that."""
        audit.move_changed(self._views.get(view.id), view)
        self._views[view.id] = view
        for queue in self._watchers.get(view.id, ()):
            queue.put_nowait(view)
        if view.outcome is not Outcome.UNDER_WAY:
            self._keep(view)

    def _keep(self, view: Migration) -> None:
        """Write it down, if that can be; else what was kept of it stays."""
        # Not synced, which would hold up the event loop: how the move ended is in its journal.
        with contextlib.suppress(OSError, StateError):
            toml.write_atomically(self._path(view.id), msgspec.json.encode(view), durable=False)

    def kept(self, migration: str) -> Migration | None:
        """A move as an earlier daemon has kept it; None if none has, or it cannot be read."""
        try:
            return reading.decode(self._path(migration).read_bytes(), Migration)
        except (OSError, msgspec.DecodeError):
            return None

    def recall(self, migration: str) -> bool:
        """Know again a move that has ended, as an earlier daemon has kept it. Returns whether one has."""
        view = self.kept(migration)
        if view is None or view.outcome not in _ENDED:
            return False
        self._views[migration] = view
        return True

    def recall_others(self) -> None:
        """The same of all that no journal tells of, such as moves of disks. To be called when journals have told
        theirs: they know better."""
        for path in sorted(self._folder.glob("*.view.json")):
            migration = path.name.removesuffix(".view.json")
            if migration not in self._views:
                self.recall(migration)

    def forget(self, migration: str) -> None:
        """Of a move that ended long ago nothing is left but what is here."""
        self._views.pop(migration, None)

    def _path(self, migration: str) -> Path:
        return self._folder / f"{migration}.view.json"


def not_cancelled_yet(view: Migration, what: str, awaited: str, host: str) -> OutcomeUnknown:
    """What is to be said of a cancel that takes longer than :data:`CANCEL_WITHIN_S`. ``what`` moves, ``awaited``: what
    has not happened meanwhile."""
    return OutcomeUnknown(
        f"the move of {what} is not cancelled yet",
        why=f"{awaited} within {CANCEL_WITHIN_S:g} s",
        todo=f"it is cancelled as soon as possible, if it still can be: see 'limosa migration show {view.id}'",
        vm=view.vm,
        host=host,
    )
