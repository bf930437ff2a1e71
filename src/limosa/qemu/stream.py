"""Both ends of a migration, as commands to one QEMU.

Commands whose order does not matter are sent together: QEMU answers them in the order sent, and a build-up costs one
round trip instead of many.
"""

from __future__ import annotations

import asyncio
import math
import socket
from contextlib import suppress

from limosa.errors import OutcomeUnknown, QemuError, QemuGone
from limosa.qemu import folder, statistics
from limosa.qemu.credentials import Endpoint
from limosa.qemu.protocol import MigrationState, MigrationStatistics, RdmaAddress, StreamParameters
from limosa.qemu.session import Session, greeted_in_time, together
from limosa.qemu.splice import splice
from limosa.security.tls import SERVER_NAME

_FINAL_FIGURES_LOOKS = 50
#: A destination in post-copy that was told to give its stream up does so within milliseconds.
_PAUSED_LOOKS, _PAUSED_LOOK_S = 100, 0.05
_TLS_ID = "stream-tls"
_STREAM_FD = "stream"
#: On both sides. Return path: the source knows what the destination has loaded. Late activation: the destination keeps
#: its hands off disks until it is continued.
_ESSENTIAL = ("events", "return-path", "late-block-activate")
#: Bytes per second by which the limit of a blackout is counted; 0: what was measured.
_FORESEEN = "avail-switchover-bandwidth"
#: Not with RDMA: when its other end is gone without a word, as behind a cable that was cut, QEMU's main loop waits for
#: the return path's thread for ever, and the guest with it (QEMU 10.0, measured; close_return_path_on_source joins a
#: thread that polls a completion channel). Whether a destination has loaded everything, it is asked itself.
_NOT_BY_RDMA = "return-path"
_SLOWS = "auto-converge"
_ENDED = (MigrationState.FAILED, MigrationState.CANCELLED)
#: For the end of a stream that nobody reads.
_FAILED_LOOKS, _FAILED_LOOK_S = 100, 0.02
#: The first release whose auto-converge looks at memory beside the migration.
_LOOKS_BESIDES = (9, 2)


class Stream(Session):
    """What a QEMU does as source or destination of a migration."""

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
            await together(
                self._execute("migrate-set-parameters", {"tls-creds": "", "tls-hostname": ""}),
                self._drop_credentials(_TLS_ID),
            )
        with suppress(QemuError):
            if not await self.slows_safely():
                await self._end_looks()

    async def _end_looks(self) -> None:
        """Have QEMU look no more at what the guest writes, if it may still, see :meth:`slows_safely`: a migration that
        fails at once ends that. The next look, which QEMU might not survive, is up to 5 s away. May be repeated."""
        slows = {"capability": _SLOWS, "state": True}
        if slows not in await self._execute("query-migrate-capabilities"):
            return
        if (await self.migration()).state not in _ENDED or (await self._execute("query-status"))["status"] != "running":
            return
        ours, theirs = socket.socketpair()
        theirs.close()
        with ours:
            await self._with_descriptor(ours, "migrate", {})
            for _ in range(_FAILED_LOOKS):
                if (await self.migration()).state in _ENDED:
                    break
                await asyncio.sleep(_FAILED_LOOK_S)
        await self._execute("migrate-set-capabilities", {"capabilities": [slows | {"state": False}]})

    # --- source ---

    async def slows_safely(self) -> bool:
        """Whether auto-converge does no harm. From 9.2 on it has QEMU's main loop look every 5 s what the guest has
        written, where a pass over memory takes longer (``cpu_throttle_dirty_sync_timer_tick``,
        migration/cpu-throttle.c). For that it takes a lock which the migration holds while it waits for the network:
        when that dies the guest stands still, and QMP is silent, until the stream is ended. Where guests are emulated
        that look is begun anew besides when the migration has ended, and then QEMU aborts.
        """
        version = (await self._execute("query-version"))["qemu"]
        return (version["major"], version["minor"]) < _LOOKS_BESIDES

    async def prepare_outgoing(self, parameters: StreamParameters) -> None:
        """Set everything up for :meth:`migrate`. May be repeated.

        Auto-converge is on where the guest may be slowed, because it cannot be switched on later, but kept from slowing
        it by more than 1 % until :meth:`set_throttle` allows more.
        """
        settings = {
            **await self._downtime_limit(parameters.downtime_limit_ms),
            **_bandwidth(parameters.bandwidth_bytes_per_s),
            **_throttle(1, 1),
        }
        await self._prepare("client", parameters, settings, wanted={_SLOWS} if parameters.slows else set())

    async def migrate(self, stream: socket.socket | RdmaAddress) -> None:
        """Start to send the VM into ``stream``. Returns as soon as QEMU has accepted, and has a TLS session if there is
        to be one; nothing is sent if it refuses. Raises :class:`QemuError` also if the other end does not answer."""
        if isinstance(stream, RdmaAddress):
            await self._execute("migrate", {"uri": stream.uri})
        else:
            await self._send(stream, {})

    async def send_rest(self, stream: socket.socket) -> None:
        """Go on over ``stream`` with a post-copy whose own broke. As :meth:`migrate`."""
        await self._send(stream, {"resume": True})

    async def _send(self, stream: socket.socket, options: dict[str, object]) -> None:
        try:
            async with greeted_in_time(stream):
                await self._with_descriptor(stream, "migrate", options)
        except TimeoutError:
            raise QemuError("memory could not be sent", why="the destination's QEMU does not answer") from None

    async def cancel_migration(self) -> None:
        """Ask QEMU to end the migration; its ``cancelled`` event says when that is done."""
        await self._execute("migrate_cancel")

    async def set_downtime_limit(self, milliseconds: float) -> None:
        """The blackout QEMU may plan for, from now on; rounded up to whole milliseconds. With 0 it stops the guest
        only when it has looked and nothing remains to be sent."""
        await self._set(await self._downtime_limit(milliseconds))

    async def set_bandwidth(self, bytes_per_s: int) -> None:
        """Cap what is sent, from now on; 0: no cap."""
        await self._set(_bandwidth(bytes_per_s))

    async def set_throttle(self, max_percent: int, step_percent: int) -> None:
        """Let QEMU slow the guest's processors, in steps of ``step_percent``, up to ``max_percent`` (1 to 99)."""
        await self._set(_throttle(max_percent, step_percent))

    async def start_post_copy(self) -> None:
        """Switch over now and send the rest behind. There is no way back."""
        await self._execute("migrate-start-postcopy")

    async def continue_migration(self) -> None:
        """Go on with a migration that waits before its switchover."""
        await self._execute("migrate-continue", {"state": "pre-switchover"})

    # --- destination ---

    async def prepare_incoming(self, parameters: StreamParameters) -> None:
        """Set everything up for :meth:`receive`."""
        await self._prepare("server", parameters, {}, wanted=set())

    async def receive(self, stream: socket.socket | RdmaAddress) -> None:
        """Load the VM from ``stream``. Returns as soon as QEMU has accepted."""
        if isinstance(stream, RdmaAddress):
            await self._execute("migrate-incoming", {"uri": stream.uri})
        else:
            await self._with_descriptor(stream, "migrate-incoming", {})

    async def receive_rest(self, stream: socket.socket) -> None:
        """Take the rest of a post-copy from ``stream``, which is this machine's from now on.

        The main loop may wait for a page of the guest that has not come, and with it whatever it answers. So QEMU is
        asked out of band, for which it takes no descriptors (docs/devel/migration/postcopy.rst), and the stream is
        carried into a socket of its own.
        """
        path = self.run_dir / folder.REST
        path.unlink(missing_ok=True)
        with suppress(QemuError):  # it has noticed by itself
            await self._execute("migrate-pause", out_of_band=True)
        for last in (*[False] * _PAUSED_LOOKS, True):
            try:
                await self._execute("migrate-recover", {"uri": f"unix:{path}"}, out_of_band=True)
                break
            except QemuError as error:
                if last or isinstance(error, QemuGone | OutcomeUnknown):
                    raise
                await asyncio.sleep(_PAUSED_LOOK_S)
        inner = socket.socket(socket.AF_UNIX)
        try:
            inner.connect(str(path))
        except OSError as error:
            inner.close()
            raise QemuError("QEMU does not take the rest of a post-copy", why=error.strerror or str(error)) from error
        path.unlink(missing_ok=True)
        splice(stream, inner)

    # --- inside ---

    async def _with_descriptor(self, stream: socket.socket, command: str, options: dict[str, object]) -> None:
        stream.setblocking(True)  # the flag is shared by both descriptors, and QEMU sets it as it needs it
        await self._monitor.give_descriptor(_STREAM_FD, stream.fileno())
        try:
            await self._execute(command, {"uri": f"fd:{_STREAM_FD}", **options})
        except QemuError:
            with suppress(QemuError):
                await self._monitor.execute("closefd", {"fdname": _STREAM_FD})
            raise

    async def _prepare(
        self,
        endpoint: Endpoint,
        parameters: StreamParameters,
        settings: dict[str, object],
        wanted: set[str],
    ) -> None:
        asked = {"postcopy-ram": parameters.post_copy, "pause-before-switchover": parameters.pause}
        essential = {*_ESSENTIAL, *(name for name, is_asked in asked.items() if is_asked)}
        if parameters.rdma:
            essential.remove(_NOT_BY_RDMA)
            wanted = wanted | ({"rdma-pin-all"} if parameters.rdma_pin_all else set())
            self.process.let_lock_memory()
        tls = parameters.credentials
        settings |= {"tls-creds": _TLS_ID if tls else "", "tls-hostname": SERVER_NAME if tls else ""}
        steps = [self._set_capabilities(essential, wanted), self._set(settings)]
        if tls is not None:
            steps.append(self._hold_credentials(_TLS_ID, folder.STREAM, tls, endpoint))
        else:
            steps.append(self._drop_credentials(_TLS_ID))
        await together(*steps)

    async def _set_capabilities(self, essential: set[str], wanted: set[str]) -> None:
        """Switch exactly these on, of all that Limosa ever switches. Raises :class:`QemuError` if an essential one is
        not known to this QEMU; others are left out then."""
        answer = await self._execute("query-migrate-capabilities")
        known = {item["capability"] for item in answer}
        missing = essential - known
        if missing:
            raise QemuError(f"this QEMU is too old to migrate: it lacks {', '.join(sorted(missing))}")
        ours = {*_ESSENTIAL, _SLOWS, "postcopy-ram", "pause-before-switchover", "rdma-pin-all"} & known
        switches = [{"capability": name, "state": name in essential | wanted} for name in sorted(ours)]
        await self._execute("migrate-set-capabilities", {"capabilities": switches})

    async def _downtime_limit(self, milliseconds: float) -> dict[str, object]:
        """QEMU looks what the guest has written when what it knows of would take less than the limit, and stops the
        guest without a look when it knows of nothing (migration_iteration_run, migration/migration.c). So for 0 it has
        to take the limit for a single byte: at this bandwidth that is 1 ms. Without this parameter, before 8.2, it also
        looks with a limit of 0."""
        limit = math.ceil(milliseconds)
        if _FORESEEN not in await self._execute("query-migrate-parameters"):
            return {"downtime-limit": limit}
        return {"downtime-limit": max(1, limit), _FORESEEN: 0 if limit else 1000}

    async def _set(self, parameters: dict[str, object]) -> None:
        await self._execute("migrate-set-parameters", parameters)


def _bandwidth(bytes_per_s: int) -> dict[str, object]:
    return {"max-bandwidth": bytes_per_s, "max-postcopy-bandwidth": bytes_per_s}


def _throttle(max_percent: int, step_percent: int) -> dict[str, object]:
    return {"cpu-throttle-initial": 1, "cpu-throttle-increment": step_percent, "max-cpu-throttle": max_percent}
