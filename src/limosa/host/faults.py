"""Faults of Limosa's own: what was being done ends in an error as any other, and the log has the rest."""

from __future__ import annotations

import logging

from limosa.errors import LimosaError

_log = logging.getLogger(__name__)


def internal(fault: Exception, during: str, *, vm: str = "", host: str = "") -> LimosaError:
    """The error for people that stands for an exception nobody foresaw. Its traceback goes to the log, with what was
    done ``during`` it."""
    _log.error("an internal error: %s", during, exc_info=fault)
    return LimosaError(
        "an internal error",
        why=repr(fault),
        todo="see the daemon's log ('journalctl -u limosa-host'), and report it",
        vm=vm,
        host=host,
    )
