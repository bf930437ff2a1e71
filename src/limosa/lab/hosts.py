"""Where the hosts of labs are found by name. Imported by each command with ``--host``, so it imports little."""

from __future__ import annotations

import re
from pathlib import Path

from limosa.errors import InvalidInput

STATE = Path("/var/lib/limosa-lab")
RUN = Path("/run/limosa-lab")
API_SOCKET = "api.sock"

#: The lab that is meant when none is named.
DEFAULT_LAB = "limosa"

_HOST = re.compile(r"\A(?:(?P<lab>[a-z0-9]{1,10})-)?(?P<host>host[1-9][0-9]?)\Z")


def lab_of(socket: str | Path | None) -> str | None:
    """The lab one of whose hosts has that API's socket; None if none has."""
    folder = Path(socket or "").absolute().parent.parent
    return folder.name if folder.parent == RUN else None


def name_within(lab: str | None, name: str) -> str:
    """A host's name as the hosts of ``lab`` know it, which call each other ``host1``, never ``LAB-host1``. Names that
    are none of theirs are as they are."""
    match = _HOST.match(name)
    return match["host"] if match is not None and lab is not None and match["lab"] == lab else name


def socket_of(name: str, *, within: str | None = None) -> Path | None:
    """The API's socket of a lab host named ``host1`` or, in full, ``LAB-host1``; None if no lab has it.

    ``host1`` is the host of the lab ``within``, or of the default lab, or else of the only lab that has one. Raises
    :class:`InvalidInput` if several have.
    """
    match = _HOST.match(name)
    if match is None:
        return None
    lab, host = match["lab"] or within, match["host"]
    folders = [RUN / (lab or DEFAULT_LAB) / host]
    if lab is None and not folders[0].is_dir():
        folders = sorted(RUN.glob(f"*/{host}"))
    if len(folders) > 1:
        full = ", ".join(f"{folder.parent.name}-{host}" for folder in folders)
        raise InvalidInput(f"several labs have a host '{host}'", todo=f"name one in full: {full}")
    return folders[0] / API_SOCKET if folders and folders[0].is_dir() else None
