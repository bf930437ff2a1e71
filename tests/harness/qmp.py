"""A word with a QEMU whose daemon is not there: it has one QMP session to give."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from harness.hosts import Host

ANSWER_WITHIN_S = 10.0


class Qmp:
    """A session. Events are passed over."""

    def __init__(self, stream: socket.socket, lines: BinaryIO) -> None:
        self._stream = stream
        self._lines = lines
        assert "QMP" in json.loads(self._lines.readline())
        self("qmp_capabilities")

    def __call__(self, command: str, **arguments: Any) -> Any:
        """The answer to a command."""
        self._stream.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
        while "return" not in (answer := json.loads(self._lines.readline())):
            assert "error" not in answer, answer
        return answer["return"]


@contextmanager
def qmp(host: Host) -> Iterator[Qmp]:
    """A session with the one QEMU of a host, whose daemon must be dead."""
    (folder,) = (host.run / "vm").iterdir()
    with socket.socket(socket.AF_UNIX) as stream:
        stream.settimeout(ANSWER_WITHIN_S)
        stream.connect(str(folder / "qmp.sock"))
        with stream.makefile("rb") as lines:
            yield Qmp(stream, lines)


def assert_no_copies(host: Host, disks: int = 1) -> None:
    """No job and no image is left in QEMU but those of the disks. The daemon is killed for it, and started again."""
    host.kill()
    try:
        with qmp(host) as ask:
            assert ask("query-block-jobs") == []
            assert ask("query-block-exports") == []
            names = sorted(node["node-name"] for node in ask("query-named-block-nodes"))
            assert len(names) == 2 * disks, names
            assert all(name.endswith("-file") for name in names[1::2]), names
    finally:
        host.start()
