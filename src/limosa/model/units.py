"""Sizes, rates and durations: reading what people type, showing what people read."""

from __future__ import annotations

import re

_SIZE = re.compile(r"\A\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*\Z", re.IGNORECASE)
_POWER = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
KIB, MIB = 1024, 1024 * 1024


def parse_size(text: str, *, default_unit: str = "") -> int:
    """Bytes from ``2G``, ``512M``, ``1.5GiB`` or a bare number (of ``default_unit``); powers of 1024, as QEMU has it.

    Raises ``ValueError`` with a sentence for the user.
    """
    match = _SIZE.match(text)
    if match is None or len(text) > 32:
        raise ValueError(f"'{text[:40]}' is not a size; write for example 512M, 2G or 1.5G")
    number, unit = match.groups()
    size = float(number) * 1024 ** _POWER[(unit or default_unit).upper()]
    if size < 1 or size > 2**60:
        raise ValueError(f"the size '{text}' is out of range")
    return int(size)


def format_bytes(count: float) -> str:
    """``1.5 GiB``, ``12 MiB``, ``17 B``."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def format_rate(bytes_per_s: float) -> str:
    """``112 MiB/s``."""
    return format_bytes(bytes_per_s) + "/s"


def format_seconds(seconds: float) -> str:
    """``8.2 ms``, ``3.4 s``, ``2 min 05 s``, ``1 h 02 min``."""
    if seconds < 1:
        return f"{seconds * 1000:.1f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
