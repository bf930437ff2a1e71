"""What the networks of this host have carried, remembered over restarts.

Of each path only the last move's figure is kept, so that a network that was mended is soon known for what it is.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable
from pathlib import Path

import msgspec

from limosa.model import reading
from limosa.model.network import Carried

_log = logging.getLogger(__name__)
#: The least recently used are forgotten: addresses come and go.
MOST = 1000


class Goodputs:
    """Kept in ``path``. A file that cannot be read or written costs what was measured, and nothing else."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[tuple[str, str], Carried] = {}
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            self._take(reading.decode(path.read_bytes(), tuple[Carried, ...]))

    @property
    def known(self) -> tuple[Carried, ...]:
        """Of all paths, the newest last."""
        return tuple(self._known.values())

    def learn(self, measured: Iterable[Carried]) -> None:
        """Remember what a move has measured."""
        self._take(measured)
        for path in list(self._known)[:-MOST]:
            del self._known[path]
        try:
            self._path.write_bytes(msgspec.json.encode(self.known))
        except OSError as error:
            _log.warning("what networks carry is not remembered: %s", error)

    def _take(self, measured: Iterable[Carried]) -> None:
        for one in measured:
            path = one.here, one.there
            self._known.pop(path, None)
            self._known[path] = one
