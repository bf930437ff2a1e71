"""Where a host is reached, as people write it: in ``host.toml``, in ``hosts.toml``, in the setting ``peers`` and after
``--host`` and ``--to``. One reading serves them all, so that what one of them takes the others take too.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated

from msgspec import Meta

from limosa.errors import InvalidInput

PeerAddress = Annotated[
    str,
    Meta(pattern=r"\A[A-Za-z0-9._:\[\]-]{1,255}\Z", description="HOST or HOST:PORT of another host's API"),
]

_LABEL = re.compile(r"\A[A-Za-z0-9_-]{1,63}\Z")
_BRACKETED = re.compile(r"\A\[([0-9A-Fa-f:.]+)\](?::([0-9]{1,5}))?\Z")
_PLAIN = re.compile(r"\A([^:\[\]]+)(?::([0-9]{1,5}))?\Z")


def split_address(text: str) -> tuple[str, int | None]:
    """``NAME``, ``NAME:PORT``, ``1.2.3.4:PORT``, ``fd00::1`` or ``[fd00::1]:PORT``. Raises :class:`InvalidInput`."""
    try:
        return parse_address(text)
    except ValueError as fault:
        raise InvalidInput(f"'{text[:80]}' is not a host", why=str(fault), todo="write NAME or NAME:PORT") from fault


def parse_address(text: str) -> tuple[str, int | None]:
    """:func:`split_address` for those who validate: raises ``ValueError`` with a sentence for the user."""
    if _is_ipv6(text):
        return text, None
    match = _BRACKETED.match(text) or _PLAIN.match(text)
    name, digits = match.groups() if match else ("", None)
    if not (_is_ipv6(name) if text.startswith("[") else _is_host_name(name)):
        raise ValueError("it is neither a name nor an address")
    port = int(digits) if digits is not None else None
    if port is not None and not 0 < port < 65536:
        raise ValueError(f"{port} is not a port")
    return name, port


def _is_ipv6(text: str) -> bool:
    try:
        return ipaddress.IPv6Address(text).scope_id is None
    except ValueError:
        return False


def _is_host_name(text: str) -> bool:
    """Whether it may be looked up: an IPv4 address is a name too."""
    return 0 < len(text) <= 253 and all(_LABEL.match(label) for label in text.split("."))
