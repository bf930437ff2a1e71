"""The end of a daemon, and when it takes the other end of a connection for gone."""

from __future__ import annotations

import asyncio
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any, cast

import pytest
import uvloop
from websockets.asyncio.client import connect

from harness.hosts import make_hosts
from limosa.host import serve
from limosa.security import ca, tls

pytestmark = pytest.mark.qemu

#: A daemon one of whose threads never ends, as one that waits for a share that does not answer.
HANGS = """
import sys, threading
from pathlib import Path
from limosa.background import Background, in_full
from limosa.host import serve

background, recover = Background(), serve.recover

async def recover_and_hang(services):
    await recover(services)
    background.spawn(in_full(threading.Event().wait))

serve.recover = recover_and_hang
serve.END_WITHIN_S = 0.2
serve.serve(Path(sys.argv[1]))
"""


def test_a_daemon_ends_also_if_something_hangs() -> None:
    with tempfile.TemporaryDirectory(prefix="limosa-") as folder:  # the path of a Unix socket must be short
        (host,) = make_hosts(Path(folder), "alpha")
        host.command = lambda: [sys.executable, "-c", HANGS, str(host.folder / "host.toml")]  # type: ignore[method-assign]
        try:
            host.start()
            assert host.process is not None
            host.process.terminate()
            assert host.process.wait(20) == 0
            assert "is left as it is" in (host.folder / "log").read_text()
        finally:
            host.end()


WITHIN_S = 10.0


@pytest.fixture
def pki(tmp_path: Path) -> Path:
    ca.create_authority(tmp_path / "ca")
    for host in ("host1", "host2"):
        ca.issue_host(tmp_path / "ca", host, [], tmp_path / host)
    return tmp_path


def test_who_has_fallen_silent_is_not_awaited_to_end_tls(pki: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "PING_EVERY_S", 0.05)
    monkeypatch.setattr(serve, "PONG_WITHIN_S", 0.05)

    async def scenario() -> None:
        is_over = asyncio.Event()

        async def app(_: Any, receive: Any, send: Any) -> None:
            await receive()
            await send({"type": "websocket.accept"})
            await receive()
            is_over.set()

        listener = socket.create_server(("127.0.0.1", 0))
        server = serve._Server(serve._config(cast(Any, app), tls.server_context(pki / "host2")))
        serving = asyncio.ensure_future(server.serve(sockets=[listener]))
        caller = await connect(
            f"wss://127.0.0.1:{listener.getsockname()[1]}",
            ssl=tls.client_context(pki / "host1", "host"),
            server_hostname="host2",
            ping_interval=None,
            proxy=None,
        )
        caller.transport.pause_reading()
        async with asyncio.timeout(WITHIN_S):
            await is_over.wait()
        caller.transport.abort()
        server.should_exit = server.force_exit = True
        await serving

    uvloop.run(scenario())
