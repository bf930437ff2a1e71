"""How two hosts agree on what they say to each other.

Each side names the oldest and newest version of the peer protocol it speaks; the newest both know is used, and both
ends of a session keep it. A release speaks the version of its neighbours too, so that hosts are upgraded one at a time.

A new field that has a default needs no new version (:mod:`limosa.wire.encoding`); see ``docs/design/012-versions.md``.
"""

from __future__ import annotations

from limosa.errors import HostUnreachable

OLDEST = 1
NEWEST = 1


def agree(ours: tuple[int, int], theirs: tuple[int, int], *, host: str) -> int:
    """The newest version both speak. Raises :class:`HostUnreachable` if there is none."""
    version = min(ours[1], theirs[1])
    if version < max(ours[0], theirs[0]):
        raise HostUnreachable(
            f"host '{host}' speaks no version of the peer protocol that this host knows",
            why=f"this host speaks {ours[0]} to {ours[1]}, '{host}' {theirs[0]} to {theirs[1]}",
            todo="upgrade the older host by one release at a time",
            host=host,
        )
    return version
