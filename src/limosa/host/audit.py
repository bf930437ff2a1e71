"""Who did what: a line in the daemon's log for each request that takes an operator, and for each beginning and end of a
move.

Of a request's body only the fields in :data:`SAID` are told, none of which holds a secret. What comes from outside is
written so that it cannot pass for another line, nor move a terminal's cursor.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

import msgspec

from limosa.errors import LimosaError
from limosa.model.base import Model
from limosa.model.migration import Migration, Outcome
from limosa.security.identity import Identity
from limosa.wire.endpoints import Role

_log = logging.getLogger(__name__)

#: Fields of requests that say what was asked for.
SAID = ("name", "vm", "destination", "location", "owner", "image", "dead", "paths", "bandwidth_mbit_per_s", "values")
_LONGEST = 500


class Asked:
    """A request; :attr:`body` is set when it is known."""

    def __init__(self, scope: Any, identity: Identity | None) -> None:
        self.body: Model | None = None
        self._who = _who(scope, identity)
        self._what = request_line(scope)

    def is_answered(self, how: str) -> None:
        """Write the line."""
        _log.info("%s: %s%s: %s", self._who, self._what, _said(self.body), how)


@contextmanager
def asked(scope: Any, identity: Identity | None, role: Role) -> Iterator[Asked]:
    """Of what takes the ``role`` operator write a line when that has been done inside: it ends with ``ok``, the code of
    the error that was raised, or ``broke off`` if the daemon ended first."""
    request, how = Asked(scope, identity), "ok"
    try:
        yield request
    except BaseException as error:
        how = LimosaError.code if isinstance(error, Exception) else "broke off"
        if isinstance(error, LimosaError):
            how = error.code
        raise
    finally:
        if role is Role.OPERATOR:
            request.is_answered(how)


def request_line(scope: Any) -> str:
    """Method and path of a request, or of a WebSocket."""
    return f"{scope.get('method', 'GET')} {quote(scope['path'])[:_LONGEST]}"


def move_changed(before: Migration | None, now: Migration, code: str = "") -> None:
    """Write a line if a move has begun or ended, as ``before`` and ``now`` say; ``code``: of the error that ended it,
    where ``now`` does not say."""
    if before is not None and before.outcome is now.outcome:
        return
    how = str(now.outcome)
    if now.outcome is Outcome.UNDER_WAY:
        how = "begins" if before is None else "goes on"
    elif now.total_s is not None:
        how = f"{now.outcome} after {now.total_s:.3f} s"
    if now.fault is not None:
        code = now.fault.code
    what = f"disks of VM {now.vm}" if now.source == now.destination else f"VM {now.vm}"
    _log.info(
        "move %s of %s from host %s to host %s: %s%s",
        now.id,
        what,
        now.source,
        now.destination,
        how,
        f" ({code})" if code else "",
    )


def _who(scope: Any, identity: Identity | None) -> str:
    client = scope.get("client")
    where = f"at {client[0]}" if client else "by the Unix socket"
    return f"{identity.role.name.lower()} {identity.name} {where}" if identity is not None else f"somebody {where}"


def _said(body: Model | None) -> str:
    fields = msgspec.to_builtins(body) if body is not None else {}
    words = " ".join(f"{name}={fields[name]!r}" for name in SAID if fields.get(name) is not None)
    return f" ({words[:_LONGEST]})" if words else ""
