"""What is remembered of moves that have ended, for people and for other hosts, and for how long.

Journals and views of the newest moves stay for :data:`KEPT_S`. Longer stay, because something rests on them: what has
not ended; at the destination journals of VMs that landed, since a source that lost the end of its move, and was off for
weeks, must hear whose the VM is, and never guess; at the source those of moves that a person's word ended, since the
images at the destination may be all there is of the VM; and one journal for each pair of hosts, by which they know each
other (:mod:`limosa.host.neighbours`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from limosa.errors import StateError
from limosa.host.neighbours import met
from limosa.host.views import Views
from limosa.migration.journal import Journal
from limosa.migration.ownership import DestinationStep, SourceStep

_log = logging.getLogger(__name__)

DAY_S = 24 * 60 * 60.0
KEPT_S = 30 * DAY_S
#: More are not kept, however new they are.
MOST = 1000
_NOTHING_RESTS_ON = frozenset({SourceStep.FINISHED, SourceStep.UNDONE, DestinationStep.GONE})


async def keep_bounded(folder: Path, views: Views) -> None:
    """Forget, now and once a day, the moves that ended too long ago or are too many."""
    while True:
        for migration in await asyncio.to_thread(forget_old, folder, time.time()):
            views.forget(migration)
        await asyncio.sleep(DAY_S)


def forget_old(folder: Path, now: float) -> list[str]:
    """Remove journals and views from ``folder``; returns of which moves nothing is left."""
    forgotten = []
    try:
        _forget_journals(_old(folder.glob("*.jsonl"), now))
        for path in _old(folder.glob("*.view.json"), now):
            migration = path.name.removesuffix(".view.json")
            if list(folder.glob(f"{migration}.*")) == [path]:
                path.unlink()
                forgotten.append(migration)
    except OSError as error:
        _log.error("moves of long ago are not forgotten: %s", error)
    return forgotten


def _forget_journals(old: Iterable[Path]) -> None:
    acquainted = set()
    for path in old:
        hosts = met(path)
        with suppress(StateError):  # it is for a person
            journal = Journal.look(path)
            if hosts in acquainted and journal.step in _NOTHING_RESTS_ON and not journal.rests_on_a_word:
                path.unlink()
        acquainted.add(hosts)


def _old(paths: Iterable[Path], now: float) -> Iterator[Path]:
    """Those last written too long ago, or beyond the newest; newest first."""
    written = sorted(((path.stat().st_mtime, path) for path in paths), reverse=True)
    for number, (at, path) in enumerate(written):
        if number >= MOST or at < now - KEPT_S:
            yield path
