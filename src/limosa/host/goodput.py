"""What the networks of this host have carried, remembered over restarts.

Of each path only the last move's figure is kept, so that a network that was mended is soon known for what it is. A path
that was found slow may not be taken any more, so a figure is told to be old after a day: then its NICs are believed
again, and the next move finds out.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterable
from pathlib import Path

import msgspec

from limosa.model import reading
from limosa.model.base import Model
from limosa.model.network import Carried

_log = logging.getLogger(__name__)
#: The least recently used are forgotten: addresses come and go.
MOST = 1000
#: What was measured longer ago is old.
FRESH_S = 24 * 3600.0


class _Measured(Model, frozen=True):
    """One figure in the file, and when it was measured, in seconds since 1970."""

    path: Carried
    at: float


class Goodputs:
    """Kept in ``path``. A file that cannot be read or written costs what was measured, and nothing else."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[tuple[str, str], _Measured] = {}
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            self._take(reading.decode(path.read_bytes(), tuple[_Measured, ...]))

    @property
    def known(self) -> tuple[Carried, ...]:
        """Of all paths, the newest last."""
        now = time.time()  # a clock that was put back makes old, too, what it has not come to yet
        return tuple(msgspec.structs.replace(one.path, old=abs(now - one.at) > FRESH_S) for one in self._known.values())

    def learn(self, measured: Iterable[Carried]) -> None:
        """Remember what a move has measured."""
        now = time.time()
        self._take(_Measured(path=one, at=now) for one in measured)
        for path in list(self._known)[:-MOST]:
            del self._known[path]
        try:
            self._path.write_bytes(msgspec.json.encode(tuple(self._known.values())))
        except OSError as error:
            _log.warning("what networks carry is not remembered: %s", error)

    def _take(self, measured: Iterable[_Measured]) -> None:
        for one in measured:
            path = one.path.here, one.path.there
            self._known.pop(path, None)
            self._known[path] = one
