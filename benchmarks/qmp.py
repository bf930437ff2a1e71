"""A QMP client that blocks: the shortest way to a QEMU, for the bare script.

One thread, one socket, no event loop: a command is written and its answer read, events that come before it are kept.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Message = dict[str, Any]

CONNECT_WITHIN_S = 30.0
ANSWER_WITHIN_S = 300.0


class QmpError(Exception):
    """QEMU refused a command."""


class Qmp:
    """A session with one QEMU."""

    def __init__(self, path: Path) -> None:
        """Connect as soon as the socket is there. Raises ``OSError`` if it does not come in time."""
        self._socket = _connected(path)
        self._socket.settimeout(ANSWER_WITHIN_S)
        self._lines = self._socket.makefile("rb")
        self.events: list[Message] = []
        self._read()  # the greeting
        self.execute("qmp_capabilities")

    def execute(self, command: str, arguments: Message | None = None, descriptors: Sequence[int] = ()) -> Any:
        """Run a command and return its answer. Raises :class:`QmpError`, ``OSError``."""
        self._send(command, arguments or {}, descriptors)
        while "event" in (message := self._read()):
            self.events.append(message)
        if "error" in message:
            raise QmpError(f"{command}: {message['error']['desc']}")
        return message["return"]

    def quit(self) -> None:
        """Have QEMU end; returns when it closes the session."""
        self._send("quit", {}, ())
        while self._lines.readline():
            pass
        self.close()

    def close(self) -> None:
        """End the session; QEMU goes on."""
        self._lines.close()
        self._socket.close()

    def wait(self, wanted: Callable[[Message], bool]) -> Message:
        """The first event that is wanted, of those kept and those to come; earlier ones are dropped."""
        while True:
            if not self.events:
                self.events.append(self._read())
            event = self.events.pop(0)
            if wanted(event):
                return event

    def _send(self, command: str, arguments: Message, descriptors: Sequence[int]) -> None:
        data = json.dumps({"execute": command, "arguments": arguments}).encode()
        if descriptors:
            socket.send_fds(self._socket, [data], list(descriptors))
        else:
            self._socket.sendall(data)

    def _read(self) -> Message:
        line = self._lines.readline()
        if not line:
            raise ConnectionResetError("QEMU ended")
        message: Message = json.loads(line)
        return message


def stamp(event: Message) -> float:
    """QEMU's time stamp of an event, in seconds since the epoch."""
    at = event["timestamp"]
    return float(at["seconds"] + at["microseconds"] / 1e6)


def _connected(path: Path) -> socket.socket:
    deadline = time.monotonic() + CONNECT_WITHIN_S
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(str(path))
            return connection
        except OSError:
            connection.close()
            if time.monotonic() > deadline:
                raise
            time.sleep(0.001)
