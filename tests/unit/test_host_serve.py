"""The end of a daemon."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import pytest

from harness.hosts import make_hosts

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
