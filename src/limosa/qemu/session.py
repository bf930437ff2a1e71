"""One QEMU that runs: its process and its QMP session, and how both end.

Errors are sharpened here: whatever broke the session, if the process turns out to have ended the answer is
:class:`QemuGone`, with QEMU's last words.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from limosa.errors import OutcomeUnknown, QemuError, QemuGone
from limosa.qemu import folder
from limosa.qemu.credentials import Endpoint, written
from limosa.qemu.monitor import Monitor
from limosa.qemu.process import QemuProcess, owner_of
from limosa.qemu.protocol import Event
from limosa.wire.peer import StreamCredentials

LAUNCH_WITHIN_S = 30.0
QUIT_WITHIN_S = 5.0
#: After its session broke, how long a dying process may take to be seen dead.
DYING_S = 1.0
#: QEMU's main loop, and with it the guest's I/O, stands still until the other end of a stream has greeted it.
GREETED_WITHIN_S = 5.0


class Session:
    """A QEMU process with its QMP session and its run folder."""

    def __init__(self, qemu: QemuProcess, monitor: Monitor, run_dir: Path) -> None:
        self.process = qemu
        self.run_dir = run_dir
        self._monitor = monitor
        self._owner = qemu.owner()

    @property
    def pid(self) -> int:
        """Its process id; see :attr:`QemuProcess.start_time` for what makes it unique."""
        return self.process.pid

    @property
    def gone(self) -> asyncio.Event:
        """Set as soon as the process has ended."""
        return self.process.gone

    def exit_text(self) -> str:
        """Why the process ended, in QEMU's own words where it had some. Empty while it runs."""
        return self.process.exit_text()

    def on_event(self, callback: Callable[[Event], None]) -> Callable[[], None]:
        """Have ``callback`` called with each event at once, in order. Returns what ends that."""
        return self._monitor.on_event(callback)

    async def detach(self) -> None:
        """Let go of QEMU, which goes on; :meth:`attach` takes it up again."""
        await self._monitor.close()
        self.process.release()

    async def quit(self) -> None:
        """End QEMU, by force if it does not listen. Returns when its process is gone; its run folder is too."""
        with suppress(QemuError, TimeoutError):
            async with asyncio.timeout(QUIT_WITHIN_S):
                await self._monitor.execute("quit")
                await self.gone.wait()
        await self.kill()

    async def kill(self) -> None:
        """End QEMU by force. Returns when its process is gone; its run folder is too."""
        await self.process.kill()
        await self._monitor.close()
        folder.remove(self.run_dir)

    async def _execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, out_of_band: bool = False
    ) -> Any:
        try:
            return await self._monitor.execute(command, arguments, out_of_band=out_of_band)
        except (QemuGone, OutcomeUnknown) as error:
            if await self.process.ends(DYING_S):
                raise QemuGone(f"QEMU with pid {self.pid} has ended", why=self.process.exit_text()) from error
            raise

    async def _hold_credentials(
        self, name: str, folder_name: str, credentials: StreamCredentials, endpoint: Endpoint
    ) -> None:
        """Give QEMU TLS credentials as an object of that name, in place of earlier ones."""
        place = self.run_dir / folder_name
        with written(place, credentials, endpoint, self._owner):
            await together(self._drop_credentials(name), self._add_credentials(name, place, endpoint))

    async def _add_credentials(self, name: str, place: Path, endpoint: Endpoint) -> None:
        await self._execute(
            "object-add",
            {"qom-type": "tls-creds-x509", "id": name, "dir": str(place), "endpoint": endpoint, "verify-peer": True},
        )

    async def _drop_credentials(self, name: str) -> None:
        try:
            await self._execute("object-del", {"id": name})
        except (QemuGone, OutcomeUnknown):
            raise
        except QemuError:
            return  # there were none


async def together(*steps: Coroutine[Any, Any, None]) -> None:
    """Send all commands at once, in order; raise the first failure when all have been answered."""
    results = await asyncio.gather(*steps, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result


@asynccontextmanager
async def started(
    run_dir: Path, log: Path, user: str | None, spawn: Callable[[], Awaitable[QemuProcess]]
) -> AsyncIterator[tuple[QemuProcess, Monitor]]:
    """Make the run folder, ``spawn`` a QEMU that listens there, and have it answer.

    Raises :class:`QemuError` saying why it did not start. Then, and if the block fails, nothing runs and no socket is
    left.
    """
    folder.create(run_dir, owner_of(user))
    try:
        qemu = await spawn()
        try:
            yield qemu, await _first_answer(qemu, run_dir, log)
        except BaseException:
            await qemu.kill()
            raise
    except BaseException:
        folder.remove(run_dir)
        raise


async def _first_answer(qemu: QemuProcess, run_dir: Path, log: Path) -> Monitor:
    try:
        async with asyncio.timeout(LAUNCH_WITHIN_S):
            return await Monitor.connect(run_dir / folder.QMP, f"QEMU ({qemu.pid})")
    except TimeoutError as error:
        why = f"no answer within {LAUNCH_WITHIN_S:.0f} s"
        raise QemuError("QEMU did not start", why=why, todo=f"see {log}") from error
    except QemuGone as error:
        await qemu.kill()  # it is ending; afterwards its last words are known
        raise QemuError("QEMU did not start", why=qemu.exit_text(), todo=f"see {log}") from error


@asynccontextmanager
async def greeted_in_time(stream: socket.socket) -> AsyncIterator[None]:
    """Have QEMU begin a TLS session over the stream in the block. Raises ``TimeoutError`` after
    :data:`GREETED_WITHIN_S`.

    Whatever ends the block early hangs up, too: QEMU waits for the other end with all else standing still, and that may
    be cut off.
    """
    try:
        async with asyncio.timeout(GREETED_WITHIN_S):
            yield
    except BaseException:
        with suppress(OSError):  # it has ended
            stream.shutdown(socket.SHUT_RDWR)
        raise
