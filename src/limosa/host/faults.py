"""Faults of Limosa's own: what was being done ends in an error as any other, and the log has the rest."""

from __future__ import annotations

import logging

from limosa.errors import LimosaError

_log = logging.getLogger(__name__)


def internal(fault: Exception, during: str, *, vm: str = "", host: str = "") -> LimosaError:
    """The error for people that stands for an exception nobody foresaw. Its traceback goes to the log, with what was
    done ``during`` it."""
    _log.error("an internal error: %s", during, exc_info=fault)
    return unforeseen(fault, vm=vm, host=host)


def unforeseen(fault: Exception, *, vm: str = "", host: str = "") -> LimosaError:
    """The same for one whose traceback the log has already."""
    return LimosaError(
        "an internal error",
        why=repr(fault),
        todo="see the daemon's log ('journalctl -u limosa-host'), and report it",
        vm=vm,
        host=host,
    )


class Obstacle:
    """What keeps something from being done that is tried again and again, for hours maybe. The log has it once, until
    it is another; of an exception nobody foresaw, with its traceback. ``what``: could not be done."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._last = ""

    def met(self, error: Exception) -> None:
        """It could not be done again."""
        foreseen = isinstance(error, LimosaError)
        why = str(error) if foreseen else repr(error)
        if why != self._last:
            self._last = why
            _log.error("%s: %s", self._what, why, exc_info=None if foreseen else error)
