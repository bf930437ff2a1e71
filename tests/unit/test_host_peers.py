"""Calling another host that is not there: why, in words."""

from __future__ import annotations

import asyncio
import socket
import ssl

import pytest

from limosa.errors import HostUnreachable
from limosa.host import peers


def test_nobody_is_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(HostUnreachable) as caught:
        asyncio.run(peers.dial("host9", f"127.0.0.1:{port}", "host1", ssl.create_default_context()))
    assert str(caught.value) == f"host 'host9' cannot be reached at 127.0.0.1:{port}: Connection refused"


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        (socket.gaierror(-2, "Name or service not known"), "its name cannot be looked up (Name or service not known)"),
        (TimeoutError(), "no answer in time"),
    ],
)
def test_other_reasons(fault: OSError, why: str) -> None:
    assert peers._why_unreachable(fault) == why
