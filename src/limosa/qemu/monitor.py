"""A QMP session with one QEMU: commands, and events the moment they arrive.

Thin on purpose: ``qemu.qmp`` does the protocol. What is added is the mapping of its errors to ours and event callbacks
that run inside the task that reads the socket, so that between QEMU's event and the reaction to it lies no queue and
no other task. A callback must therefore be short and must not raise.

What is known when a command fails:

- ``QemuError``: QEMU answered no; the command had no effect.
- ``QemuGone``: the session had ended before; the command was not sent.
- ``OutcomeUnknown``: the session ended between sending and answer; nobody can tell.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qemu.qmp import ConnectError, EventListener, ExecInterruptedError, Message, QMPClient, QMPError
from qemu.qmp import StateError as SessionStateError
from qemu.qmp.error import ProtocolError
from qemu.qmp.qmp_client import ExecuteError

from limosa.errors import OutcomeUnknown, QemuError, QemuGone
from limosa.qemu.protocol import Event

_log = logging.getLogger(__name__)

EventCallback = Callable[[Event], None]


class Monitor:
    """A QMP session. Made by :meth:`connect`."""

    def __init__(self, client: QMPClient, connection: socket.socket, name: str) -> None:
        self._client = client
        self._connection = connection
        self._name = name
        self._callbacks: list[EventCallback] = []
        client.register_listener(_Forwarder(self._forward))

    @classmethod
    async def connect(cls, path: Path, name: str) -> Monitor:
        """A session over the Unix socket ``path``. ``name`` is what errors and logs call it.

        Waits as long as nobody accepts, so the socket may be connected to before QEMU has begun to listen on it.
        Once this returns QEMU has built its machine: commands are answered from its main loop only.
        Raises :class:`QemuGone`.
        """
        connection = socket.socket(socket.AF_UNIX)
        connection.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(connection, str(path))
        except OSError as error:
            connection.close()
            raise QemuGone(f"no QMP session with {name}", why=str(error)) from error
        return await cls.over(connection, name)

    @classmethod
    async def over(cls, connection: socket.socket, name: str) -> Monitor:
        """A session over a connection that stands; it is ours from now on. Raises :class:`QemuGone`."""
        client = QMPClient(name)
        # The default listener keeps every event for a reader that does not exist here.
        client.events.event_filter = _nothing
        connection.setblocking(False)
        # Ours besides the client's: only a plain socket can carry descriptors under every event loop.
        monitor = cls(client, connection.dup(), name)
        try:
            await client.connect(connection)
        except BaseException as error:
            # Both at once, also if it was given up: a QEMU that hung takes the oldest connection first when it wakes,
            # and one that nobody has closed is all that it listens to from then on.
            connection.close()
            monitor._connection.close()
            if isinstance(error, OSError | ConnectError):
                raise QemuGone(f"no QMP session with {name}", why=str(error)) from error
            raise
        return monitor

    def on_event(self, callback: EventCallback) -> Callable[[], None]:
        """Have ``callback`` called with each event as it arrives. Returns what ends that (may be called again)."""
        self._callbacks.append(callback)

        def unsubscribe() -> None:
            with contextlib.suppress(ValueError):
                self._callbacks.remove(callback)

        return unsubscribe

    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, out_of_band: bool = False
    ) -> Any:
        """QEMU's answer to ``command``. See the module's text for what the errors mean.

        ``out_of_band``: also from a QEMU whose main loop stands still, for the few commands it takes so.
        """
        try:
            return await self._client.execute(command, arguments, oob=out_of_band)
        except ExecuteError as error:
            raise QemuError(f"{self._name} refused {command}", why=str(error)) from error
        except ExecInterruptedError as error:
            raise OutcomeUnknown(f"{self._name} did not answer {command}", why="the QMP session ended") from error
        except SessionStateError as error:
            raise QemuGone(f"no QMP session with {self._name}", why="it has ended") from error
        except QMPError as error:
            raise OutcomeUnknown(f"{self._name} answered {command} with nonsense", why=str(error)) from error

    async def give_descriptor(self, name: str, descriptor: int) -> None:
        """Give QEMU a copy of ``descriptor`` under ``name``. Raises as :meth:`execute`."""
        try:
            socket.send_fds(self._connection, [b" "], [descriptor])
        except OSError as error:
            raise QemuGone(f"no QMP session with {self._name}", why=str(error)) from error
        await self.execute("getfd", {"fdname": name})

    async def close(self) -> None:
        """End the session; QEMU goes on. Commands that wait for an answer raise ``OutcomeUnknown``."""
        self._connection.close()
        # The session may have ended before, for any reason: disconnect() then repeats that reason.
        with contextlib.suppress(EOFError, OSError, ProtocolError):
            await self._client.disconnect()

    def _forward(self, message: Message) -> None:
        stamp: Any = message["timestamp"]
        at = stamp["seconds"] + stamp["microseconds"] / 1e6
        data: Any = message.get("data", {})
        event = Event(str(message["event"]), data, at)
        for callback in tuple(self._callbacks):
            try:
                callback(event)
            except Exception:  # noqa: BLE001 - a faulty subscriber must not end the session of a VM
                _log.exception("a callback for %s of %s failed", event.name, self._name)


class _Forwarder(EventListener):
    """Hands each event on instead of queueing it."""

    def __init__(self, forward: Callable[[Message], None]) -> None:
        super().__init__()
        self._hand_on = forward

    async def put(self, event: Message) -> None:
        self._hand_on(event)


def _nothing(_event: Message) -> bool:
    return False
