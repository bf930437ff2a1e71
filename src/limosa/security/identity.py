"""Who speaks: a name and a role, from a peer's certificate or from the credentials of a Unix socket.

A certificate speaks for exactly one identity, in a URI among its subject alternative names. A certificate with none,
or with two, is refused even though our own authority signed it: it was made for something else.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from limosa.errors import NotPermitted
from limosa.model.base import is_name
from limosa.wire.endpoints import Role

_PREFIX = "urn:limosa:"


@dataclass(frozen=True)
class Identity:
    """Who speaks, and as what."""

    name: str
    role: Role

    @property
    def uri(self) -> str:
        """How the identity stands in a certificate."""
        return f"{_PREFIX}{self.role.name.lower()}:{self.name}"

    def role_at(self, host: str) -> Role:
        """What they may do at the daemon of that host. Who has the key of a host is root there, so an operator; and
        nowhere else, lest one host that is broken into command all of them."""
        return Role.OPERATOR if self == Identity(host, Role.HOST) else self.role


def from_peer_certificate(certificate: Mapping[str, Any] | None) -> Identity:
    """The identity in what ``SSLSocket.getpeercert()`` gave, which has verified the signature and the dates.

    Raises :class:`NotPermitted` if there is no certificate or it names not exactly one identity.
    """
    names = (certificate or {}).get("subjectAltName", ())
    return from_uris(value for kind, value in names if kind == "URI")


def from_uris(uris: Iterable[str]) -> Identity:
    """The one identity among the URIs of a certificate. Raises :class:`NotPermitted`."""
    ours = [uri for uri in uris if uri.startswith(_PREFIX)]
    if len(ours) == 1:
        role, _, name = ours[0].removeprefix(_PREFIX).partition(":")
        if role in ("viewer", "operator", "host") and is_name(name):
            return Identity(name, Role[role.upper()])
    raise NotPermitted(
        "the certificate names no Limosa host or person",
        why=f"it has {len(ours)} names of the form {_PREFIX}ROLE:NAME and must have exactly one that is valid",
        todo="use a certificate made by 'limosa ca issue'",
    )


def from_unix_peer(uid: int, *, daemon_uid: int | None = None) -> Identity:
    """The identity of a process at the other end of a Unix socket (``SO_PEERCRED``).

    Root and the daemon's own user are operators; everybody else raises :class:`NotPermitted`, also if the socket's
    mode let them in.
    """
    if uid not in (0, os.getuid() if daemon_uid is None else daemon_uid):
        raise NotPermitted(
            f"user {uid} may not use this host's socket",
            why="only root and the daemon's own user may",
            todo="use sudo, or connect with a certificate made by 'limosa ca issue'",
        )
    return Identity("root" if uid == 0 else f"uid-{uid}", Role.OPERATOR)
