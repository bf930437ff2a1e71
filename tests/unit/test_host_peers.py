"""Calling another host that is not there: why, in words."""

from __future__ import annotations

import asyncio
import socket
import ssl
from pathlib import Path

import pytest

from limosa.errors import HostNotTrusted, HostUnreachable
from limosa.host import peers
from limosa.security import ca, tls


def test_nobody_is_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(HostUnreachable) as caught:
        asyncio.run(peers.dial("host9", f"127.0.0.1:{port}", "host1", ssl.create_default_context()))
    assert str(caught.value) == f"host 'host9' cannot be reached at 127.0.0.1:{port}: Connection refused"


def test_its_certificate_has_expired(tmp_path: Path) -> None:
    ca.create_authority(tmp_path / "ca")
    ca.issue_host(tmp_path / "ca", "host1", [], tmp_path / "host1")
    ca.issue_host(tmp_path / "ca", "host2", [], tmp_path / "host2", life=-ca.BACK / 2)

    async def scenario() -> None:
        context = tls.server_context(tmp_path / "host2")
        async with await asyncio.start_server(lambda *_: None, "127.0.0.1", ssl=context) as server:
            address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
            with pytest.raises(HostNotTrusted, match=r"certificate of host 'host2' at .* has expired") as no:
                await peers.dial("host2", address, "host1", tls.client_context(tmp_path / "host1", "host"))
            assert "limosa ca issue host2" in no.value.todo

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        (socket.gaierror(-2, "Name or service not known"), "its name cannot be looked up (Name or service not known)"),
        (TimeoutError(), "no answer in time"),
    ],
)
def test_other_reasons(fault: OSError, why: str) -> None:
    assert peers._why_unreachable(fault) == why
