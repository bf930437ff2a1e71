"""For processes that are waited for while they start: commands, and relays. It must itself load nothing."""

from __future__ import annotations

import sys


def import_msgspec_quickly() -> None:
    """Import msgspec without ``typing_extensions``, which costs a quarter of a short command's time.

    msgspec prefers it where it is installed and takes ``typing`` otherwise; from Python 3.11 on both are the same for
    what Limosa uses. Other libraries may need it, so the bar is lifted again.
    """
    if "typing_extensions" in sys.modules or "msgspec" in sys.modules:
        return
    sys.modules["typing_extensions"] = None  # type: ignore[assignment]
    try:
        import msgspec  # noqa: F401, PLC0415
    finally:
        del sys.modules["typing_extensions"]
