"""The base of all structs and the constrained scalar types they share."""

from __future__ import annotations

import re
from typing import Annotated

import msgspec
from msgspec import Meta


class Model(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A frozen value. Decoding refuses unknown fields, so that a misspelt option is never silently ignored."""


NAME_PATTERN = r"\A[A-Za-z0-9][A-Za-z0-9_.-]{0,62}\Z"

#: Name of a VM or host: letters, digits, ``_ . -``; begins with a letter or digit; at most 63 characters.
#: The alphabet leaves no way into a path, a QEMU option list or a terminal escape.
Name = Annotated[
    str,
    Meta(pattern=NAME_PATTERN, description="letters, digits, '_', '.', '-'; at most 63; first a letter or digit"),
]

#: Name of a virtual switch: a Linux bridge, so at most 15 characters (IFNAMSIZ less the NUL).
SwitchName = Annotated[
    str,
    Meta(pattern=r"\A[A-Za-z0-9][A-Za-z0-9_.-]{0,14}\Z", description="a Linux bridge's name, at most 15 characters"),
]

#: Absolute path of a host file. See :func:`is_clean_path` for what is refused.
AbsolutePath = Annotated[
    str,
    Meta(
        pattern=r"\A/[^\x00-\x1f\x7f-\x9f]*\Z", max_length=1024, description="absolute path without control characters"
    ),
]

Mac = Annotated[
    str, Meta(pattern=r"\A[0-9a-f][02468ace](:[0-9a-f]{2}){5}\Z", description="unicast MAC address in lower case")
]

Uuid = Annotated[str, Meta(pattern=r"\A[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z", description="UUID in lower case")]

_MIGRATION_PATTERN = r"\A[a-z0-9]{12}\Z"
MigrationId = Annotated[str, Meta(pattern=_MIGRATION_PATTERN, description="12 lower-case letters and digits")]


def is_migration_id(text: str) -> bool:
    """Whether it could be a :data:`MigrationId`; a VM's name may look like one."""
    return re.match(_MIGRATION_PATTERN, text) is not None


def is_clean_path(path: str) -> bool:
    """Whether an absolute path has no NUL and no empty, ``.`` or ``..`` component (so a prefix test on it is sound)."""
    parts = path.split("/")[1:]
    return path.startswith("/") and "\0" not in path and all(part not in ("", ".", "..") for part in parts)


def is_name(text: str) -> bool:
    """Whether ``text`` is a valid VM or host name."""
    return re.match(NAME_PATTERN, text) is not None
