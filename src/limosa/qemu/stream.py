"""Both ends of a migration, as commands to one QEMU.

Commands whose order does not matter are sent together: QEMU answers them in the order sent, and a build-up costs one
round trip instead of many.
"""

from __future__ import annotations

import asyncio
import ipaddress
import math
import socket
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

from limosa.errors import DestinationLost, OutcomeUnknown, QemuError, QemuGone
from limosa.qemu import credentials, folder, statistics
from limosa.qemu.monitor import Monitor
from limosa.qemu.process import QemuProcess
from limosa.qemu.protocol import Event, MigrationState, MigrationStatistics, StreamParameters
from limosa.qemu.session import Session
from limosa.security.stream import SERVER_NAME

_CONNECT_WITHIN_S = 10.0
#: What may wait in the socket before QEMU has to wait itself (TCP_NOTSENT_LOWAT, tcp(7)).
_UNSENT_BYTES = 128 * 1024
_FINAL_FIGURES_LOOKS = 50
_TLS_ID = "stream-tls"
_STREAM_FD = "stream"
_ENDED = (MigrationState.COMPLETED, MigrationState.FAILED, MigrationState.CANCELLED)
#: On both sides. Return path: the source knows what the destination has loaded. Late activation: the destination keeps
#: its hands off disks until it is continued.
_ESSENTIAL = ("events", "return-path", "late-block-activate")


class Stream(Session):
    """What a QEMU does as source or destination of a migration."""

    def __init__(self, qemu: QemuProcess, monitor: Monitor, run_dir: Path) -> None:
        super().__init__(qemu, monitor, run_dir)
        self._owner = qemu.owner()

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
        with ExitStack() as undo:
            undo.enter_context(connection)
            await self._monitor.give_descriptor(_STREAM_FD, connection.fileno())
            undo.callback(self._shorten_queue_later(connection))
            try:
                await self._execute("migrate", {"uri": f"fd:{_STREAM_FD}"})
            except QemuError:
                with suppress(QemuError):
                    await self._monitor.execute("closefd", {"fdname": _STREAM_FD})
                raise
            undo.pop_all()

    def _shorten_queue_later(self, connection: socket.socket) -> Callable[[], None]:
        """Have little wait in the socket from the second pass on. Returns what ends that; it also ends by itself.

        QEMU takes for sent what the kernel took from it. On a link of 1 Gbit/s that is megabytes, which would then be
        sent while the guest stands still. In the first pass a short queue would cost throughput (a third, with TLS on a
        fast link) and gain nothing. Our copy of the descriptor must not outlive QEMU's, whose end is the stream's.
        """

        def end() -> None:
            unsubscribe()
            watch.cancel()
            connection.close()

        async def end_with_qemu() -> None:
            await self.gone.wait()
            end()

        def on_event(event: Event) -> None:
            if event.name == "MIGRATION_PASS" and event.data["pass"] > 1:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_BYTES)
                end()
            elif event.name == "MIGRATION" and event.data["status"] in _ENDED:
                end()

        unsubscribe = self.on_event(on_event)
        watch = asyncio.ensure_future(end_with_qemu())
        return end

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
