"""A running QEMU in domain words.

``launch`` starts one and returns when it answers; ``attach`` takes up one that an earlier daemon left running. Between
the two lies no difference afterwards: everything is asked of QEMU itself, nothing is remembered that a crash could
lose.

Commands whose order does not matter are sent together: QEMU answers them in the order sent, and a build-up costs one
round trip instead of many.
"""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import ipaddress
import math
import os
import socket
import time
from collections.abc import Callable, Coroutine
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from limosa.errors import DestinationLost, OutcomeUnknown, QemuError, QemuGone
from limosa.qemu import credentials, folder, process, statistics
from limosa.qemu.arguments import Launch, build
from limosa.qemu.monitor import Monitor
from limosa.qemu.process import QemuProcess
from limosa.qemu.protocol import (
    Event,
    MachineProtocol,
    MigrationState,
    MigrationStatistics,
    RunState,
    StreamParameters,
)
from limosa.security.stream import SERVER_NAME

__all__ = [
    "Event",
    "Machine",
    "MachineProtocol",
    "MigrationState",
    "MigrationStatistics",
    "RunState",
    "StreamParameters",
]

LAUNCH_WITHIN_S = 30.0
QUIT_WITHIN_S = 5.0
#: After its session broke, how long a dying process may take to be seen dead.
_DYING_S = 1.0
_FINAL_FIGURES_LOOKS = 50

_CONNECT_WITHIN_S = 10.0
_TLS_ID = "stream-tls"
_STREAM_FD = "stream"
#: On both sides. Return path: the source knows what the destination has loaded. Late activation: the destination keeps
#: its hands off disks until it is continued.
_ESSENTIAL = ("events", "return-path", "late-block-activate")


class Machine:
    """One QEMU process with its QMP session. Made by :meth:`launch` or :meth:`attach`."""

    def __init__(self, qemu: QemuProcess, monitor: Monitor, run_dir: Path) -> None:
        self.process = qemu
        self.run_dir = run_dir
        self._monitor = monitor
        self._owner = qemu.owner()
        #: until it is known that no VM state is on its way in, or that it has arrived; see resume()
        self._may_be_incoming = True
        monitor.on_event(self._note_arrival)

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

    @classmethod
    async def launch(
        cls, program: Path, make: Callable[[int, int], Launch], run_dir: Path, log: Path, user: str | None
    ) -> Machine:
        """Start QEMU; it waits, paused, and answers. ``make`` is given the descriptors of the QMP and console sockets.

        ``run_dir`` is made (its parent must exist), ``log`` receives what QEMU writes, ``user`` is whom it runs as
        (None: as we do). Raises :class:`QemuError` with QEMU's own words; nothing runs and no socket is left then.
        """
        owner = process.owner_of(user)
        folder.create(run_dir, owner)
        try:
            qemu = _spawn(program, make, run_dir, log, user)
            try:
                async with asyncio.timeout(LAUNCH_WITHIN_S):
                    monitor = await Monitor.connect(run_dir / folder.QMP, f"QEMU ({qemu.pid})")
            except (QemuGone, TimeoutError, asyncio.CancelledError) as error:
                await qemu.kill()
                if isinstance(error, asyncio.CancelledError):
                    raise
                why = qemu.exit_text() or f"no answer within {LAUNCH_WITHIN_S:.0f} s"
                raise QemuError("QEMU did not start", why=why, todo=f"see {log}") from error
        except BaseException:
            folder.remove(run_dir)
            raise
        return cls(qemu, monitor, run_dir)

    @classmethod
    async def attach(cls, run_dir: Path, pid: int, start_time: int) -> Machine:
        """Take up a QEMU that is running already. Raises :class:`QemuGone` if it has ended, :class:`QemuError` if it
        runs but does not answer; it is left as it is then."""
        qemu = QemuProcess.attach(pid, start_time)
        try:
            async with asyncio.timeout(LAUNCH_WITHIN_S):
                monitor = await Monitor.connect(run_dir / folder.QMP, f"QEMU ({pid})")
        except (QemuGone, TimeoutError) as error:
            if await _ends(qemu, _DYING_S):
                raise QemuGone(f"QEMU with pid {pid} has ended", why=qemu.exit_text()) from error
            qemu.release()
            raise QemuError(f"QEMU with pid {pid} does not answer", why=str(error)) from error
        return cls(qemu, monitor, run_dir)

    async def detach(self) -> None:
        """Let go of QEMU, which goes on; :meth:`attach` takes it up again."""
        await self._monitor.close()
        self.process.release()

    def on_event(self, callback: Callable[[Event], None]) -> Callable[[], None]:
        """Have ``callback`` called with each event at once, in order. Returns what ends that."""
        return self._monitor.on_event(callback)

    # --- the guest ---

    async def status(self) -> RunState:
        """QEMU's run state."""
        return RunState((await self._execute("query-status"))["status"])

    async def pause(self) -> None:
        """Stop the guest; no effect if it is stopped."""
        await self._execute("stop")

    async def resume(self) -> float:
        """Let the guest run. Returns since when (seconds since the epoch, by QEMU's RESUME event; now, if it ran).

        Refused with :class:`QemuError` while the state of the VM has not arrived completely: QEMU's ``cont`` would
        then be taken as a standing order and the guest run as soon as it can, whoever owns it by then.
        """
        if self._may_be_incoming and await self.status() is RunState.INMIGRATE:
            raise QemuError("the guest cannot run yet", why="its state has not arrived completely")
        resumed: list[float] = []
        unsubscribe = self.on_event(lambda event: resumed.append(event.at) if event.name == "RESUME" else None)
        try:
            await self._execute("cont")
        except (QemuGone, OutcomeUnknown):
            # QEMU says RESUME before the guest's first instruction (vm_prepare_start in system/cpus.c): if it did, the
            # guest ran, whatever became of it.
            if not resumed:
                raise
        finally:
            unsubscribe()
        return resumed[-1] if resumed else time.time()

    async def resume_if_stopped(self) -> None:
        """Let the guest run unless it does."""
        if await self.status() is not RunState.RUNNING:
            await self.resume()

    async def press_power_button(self) -> None:
        """Ask the guest to shut down (ACPI); what it does is its own affair."""
        await self._execute("system_powerdown")

    async def announce(self) -> None:
        """Have switches learn anew where the VM's NICs are: five packets from each in about half a second."""
        await self._execute("announce-self", {"initial": 20, "max": 200, "rounds": 5, "step": 50})

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

    # --- both ends of a migration ---

    async def migration(self) -> MigrationStatistics:
        """How the migration stands, as seen from this side."""
        for _ in range(_FINAL_FIGURES_LOOKS):
            answer = await self._execute("query-migrate")
            if answer.get("status") != MigrationState.COMPLETED or answer.get("total-time") != 0:
                break
            # Before 9.1 the source set this state a moment before the final figures.
            await asyncio.sleep(0.001)
        return statistics.parse(answer)

    async def forget_stream(self) -> None:
        """Drop the credentials of the last stream. May be repeated."""
        with suppress(OutcomeUnknown):
            await self._together(
                self._execute("migrate-set-parameters", {"tls-creds": "", "tls-hostname": ""}), self._drop_credentials()
            )

    # --- source ---

    async def prepare_outgoing(self, parameters: StreamParameters) -> None:
        """Set everything up for :meth:`migrate`. May be repeated.

        Auto-converge is always on, because it cannot be switched on later, but kept from slowing the guest by more than
        1 % until :meth:`set_throttle` allows more.
        """
        settings = {
            "downtime-limit": _whole_ms(parameters.downtime_limit_ms),
            **_bandwidth(parameters.bandwidth_bytes_per_s),
            **_throttle(1, 1),
        }
        await self._prepare("client", parameters, settings, wanted={"auto-converge"})

    async def migrate(self, address: str, port: int) -> None:
        """Start to send the VM to ``address`` (IPv4 or IPv6). Returns as soon as QEMU has accepted.

        We connect and hand the connection over, because QEMU leaves Nagle's algorithm on: the last small piece of the
        VM's state then waits for the acknowledgement of the one before, and the guest stands still for up to 40 ms
        more. Raises :class:`DestinationLost` if there is no connection; nothing is sent then.
        """
        connection = await _connected(address, port)
        with connection:
            await self._monitor.give_descriptor(_STREAM_FD, connection.fileno())
        try:
            await self._execute("migrate", {"uri": f"fd:{_STREAM_FD}"})
        except QemuError:
            with suppress(QemuError):
                await self._monitor.execute("closefd", {"fdname": _STREAM_FD})
            raise

    async def cancel_migration(self) -> None:
        """Ask QEMU to end the migration; its ``cancelled`` event says when that is done."""
        await self._execute("migrate_cancel")

    async def set_downtime_limit(self, milliseconds: float) -> None:
        """The blackout QEMU may plan for, from now on; rounded up to whole milliseconds."""
        await self._set({"downtime-limit": _whole_ms(milliseconds)})

    async def set_bandwidth(self, bytes_per_s: int) -> None:
        """Cap what is sent, from now on; 0: no cap."""
        await self._set(_bandwidth(bytes_per_s))

    async def set_throttle(self, max_percent: int, step_percent: int) -> None:
        """Let QEMU slow the guest's processors, in steps of ``step_percent``, up to ``max_percent`` (1 to 99)."""
        await self._set(_throttle(max_percent, step_percent))

    async def start_post_copy(self) -> None:
        """Switch over now and send the rest behind. There is no way back."""
        await self._execute("migrate-start-postcopy")

    # --- destination ---

    async def prepare_incoming(self, parameters: StreamParameters) -> None:
        """Set everything up for :meth:`listen`."""
        await self._prepare("server", parameters, {}, wanted=set())

    async def listen(self, address: str, ports: tuple[int, int]) -> int:
        """Wait for the source on the first port of the range that is free; returns it.

        Raises :class:`QemuError` if none is.
        """
        first, last = ports
        await self._execute("migrate-incoming", {"uri": f"tcp:{_host(address)}:{first},to={last}"})
        for socket_address in (await self._execute("query-migrate")).get("socket-address", []):
            if socket_address["type"] == "inet":
                return int(socket_address["port"])
        raise QemuError("QEMU does not tell on which port it listens")

    # --- inside ---

    async def _prepare(
        self,
        endpoint: credentials.Endpoint,
        parameters: StreamParameters,
        settings: dict[str, object],
        wanted: set[str],
    ) -> None:
        essential = {*_ESSENTIAL, *(["postcopy-ram"] if parameters.post_copy else [])}
        tls = parameters.credentials
        settings |= {"tls-creds": _TLS_ID if tls else "", "tls-hostname": SERVER_NAME if tls else ""}
        with ExitStack() as files:
            steps = [self._set_capabilities(essential, wanted), self._set(settings), self._drop_credentials()]
            if tls is not None:
                stream = self.run_dir / folder.STREAM
                files.enter_context(credentials.written(stream, tls, endpoint, self._owner))
                steps.append(self._add_credentials(stream, endpoint))
            await self._together(*steps)

    async def _set_capabilities(self, essential: set[str], wanted: set[str]) -> None:
        """Switch exactly these on, of all that Limosa ever switches. Raises :class:`QemuError` if an essential one is
        not known to this QEMU; others are left out then."""
        answer = await self._execute("query-migrate-capabilities")
        known = {item["capability"] for item in answer}
        missing = essential - known
        if missing:
            raise QemuError(f"this QEMU is too old to migrate: it lacks {', '.join(sorted(missing))}")
        ours = {*_ESSENTIAL, "auto-converge", "postcopy-ram"} & known
        switches = [{"capability": name, "state": name in essential | wanted} for name in sorted(ours)]
        await self._execute("migrate-set-capabilities", {"capabilities": switches})

    async def _set(self, parameters: dict[str, object]) -> None:
        await self._execute("migrate-set-parameters", parameters)

    async def _add_credentials(self, stream: Path, endpoint: credentials.Endpoint) -> None:
        await self._execute(
            "object-add",
            {
                "qom-type": "tls-creds-x509",
                "id": _TLS_ID,
                "dir": str(stream),
                "endpoint": endpoint,
                "verify-peer": True,
            },
        )

    async def _drop_credentials(self) -> None:
        try:
            await self._execute("object-del", {"id": _TLS_ID})
        except (QemuGone, OutcomeUnknown):
            raise
        except QemuError:
            return  # there were none

    async def _execute(self, command: str, arguments: dict[str, object] | None = None) -> Any:
        try:
            return await self._monitor.execute(command, arguments)
        except (QemuGone, OutcomeUnknown) as error:
            if await _ends(self.process, _DYING_S):
                raise QemuGone(f"QEMU with pid {self.pid} has ended", why=self.process.exit_text()) from error
            raise

    async def _together(self, *steps: Coroutine[Any, Any, None]) -> None:
        """Send all commands at once, in order; raise the first failure when all have been answered."""
        results = await asyncio.gather(*steps, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result

    def _note_arrival(self, event: Event) -> None:
        arrived = event.name == "MIGRATION" and event.data["status"] == MigrationState.COMPLETED
        if arrived or event.name == "RESUME":
            self._may_be_incoming = False


def _spawn(
    program: Path, make: Callable[[int, int], Launch], run_dir: Path, log: Path, user: str | None
) -> QemuProcess:
    with folder.listen(run_dir / folder.QMP) as qmp, folder.listen(run_dir / folder.CONSOLE) as console:
        launch = make(qmp.fileno(), console.fileno())
        buffered = frozenset(disk.path for disk in launch.config.disks if not _does_direct_io(disk.path))
        _touch(launch.console_log, process.owner_of(user))
        return process.spawn(
            [str(program), *build(dataclasses.replace(launch, buffered=launch.buffered | buffered))],
            pass_fds=(qmp.fileno(), console.fileno(), *launch.tap_fds),
            log=log,
            user=user,
            kvm=launch.accelerator == "kvm",
        )


def _does_direct_io(path: str) -> bool:
    """Whether the file system of an image takes ``O_DIRECT`` (some, as older tmpfs, do not)."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC))
    except OSError as error:
        return error.errno != errno.EINVAL
    return True


def _touch(path: Path, owner: tuple[int, int] | None) -> None:
    """Make sure the console's log exists and QEMU may write it."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "ab") as stream:
            if owner is not None:
                os.fchown(stream.fileno(), *owner)
    except OSError as error:
        raise QemuError(f"cannot write the console's log {path}", why=error.strerror or str(error)) from error


async def _connected(address: str, port: int) -> socket.socket:
    """A connection without Nagle's algorithm to a destination's QEMU. Raises :class:`DestinationLost`."""
    family = socket.AF_INET6 if ipaddress.ip_address(address).version == 6 else socket.AF_INET
    connection = socket.socket(family, socket.SOCK_STREAM)
    try:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        async with asyncio.timeout(_CONNECT_WITHIN_S):
            await asyncio.get_running_loop().sock_connect(connection, (address, port))
        connection.setblocking(True)
    except BaseException as error:
        connection.close()
        if isinstance(error, OSError):  # TimeoutError is one
            why = error.strerror or f"no answer within {_CONNECT_WITHIN_S:.0f} s"
            raise DestinationLost(f"QEMU at {address} port {port} cannot be reached", why=why) from error
        raise
    return connection


async def _ends(qemu: QemuProcess, within_s: float) -> bool:
    with suppress(TimeoutError):
        async with asyncio.timeout(within_s):
            await qemu.gone.wait()
    return qemu.gone.is_set()


def _host(address: str) -> str:
    """An IP address as QEMU's URIs have it. Nothing but an address gets through, so nothing can be smuggled in."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError as error:
        raise QemuError(f"'{address[:64]}' is no IP address to migrate over") from error
    return f"[{parsed}]" if parsed.version == 6 else str(parsed)


def _whole_ms(milliseconds: float) -> int:
    return max(1, math.ceil(milliseconds))


def _bandwidth(bytes_per_s: int) -> dict[str, object]:
    return {"max-bandwidth": bytes_per_s, "max-postcopy-bandwidth": bytes_per_s}


def _throttle(max_percent: int, step_percent: int) -> dict[str, object]:
    return {"cpu-throttle-initial": 1, "cpu-throttle-increment": step_percent, "max-cpu-throttle": max_percent}
