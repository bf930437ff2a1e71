"""A machine without QEMU, for tests of everything that moves VMs.

It keeps to :class:`limosa.qemu.protocol.MachineProtocol` and behaves as QEMU 10 does: the same run states, the same
events in the same order, the same refusals, the destination's process ending when its stream breaks. The contract test
runs the same questions against it and a real QEMU. The guest is a list of pages (see ``guest``) that are really copied,
so a test can compare memory; time and network are the ``wire``'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import socket
from collections.abc import Callable, Sequence

from limosa.errors import QemuError, QemuGone
from limosa.qemu.machine import RESUME_WITHIN_S
from limosa.qemu.protocol import (
    POST_COPY,
    PRE_COPY,
    Event,
    MigrationState,
    MigrationStatistics,
    RdmaAddress,
    RunState,
    StreamParameters,
)
from limosa.testing.disks import FakeDisks
from limosa.testing.guest import PAGE_BYTES, FakeGuest
from limosa.testing.wire import Stage, StreamBroken, Wire

_BROKEN = (RunState.INTERNAL_ERROR, RunState.SHUTDOWN)
_STOPPED_BY_MIGRATION = (RunState.FINISH_MIGRATE, RunState.POSTMIGRATE)


class FakeMachine(FakeDisks):
    """A pretended QEMU. ``incoming`` makes it wait for the state of a VM."""

    def __init__(self, wire: Wire, guest: FakeGuest | None = None, *, incoming: bool = False) -> None:
        super().__init__()
        self.wire = wire
        self.guest = guest or FakeGuest(1024 * 1024)
        self.gone = asyncio.Event()
        #: all events so far
        self.events: list[Event] = []
        #: what :meth:`slows_safely` says
        self.is_slowed_safely = True
        #: how often it was told to announce the VM's NICs
        self.announced = 0
        self.parameters: StreamParameters | None = None
        self._run_state = RunState.INMIGRATE if incoming else RunState.PRELAUNCH
        self._callbacks: list[Callable[[Event], None]] = []
        self._statistics = MigrationStatistics()
        self._stream: asyncio.Task[None] | None = None
        self._meeting: asyncio.Task[None] | None = None
        self._post_copy = asyncio.Event()
        self._continued = asyncio.Event()
        self._max_throttle = self._throttle_step = 1
        self._exit_text = ""
        self._answers = asyncio.Event()
        self._answers.set()

    # --- the protocol ---

    def on_event(self, callback: Callable[[Event], None]) -> Callable[[], None]:
        """See the protocol."""
        self._callbacks.append(callback)

        def unsubscribe() -> None:
            with contextlib.suppress(ValueError):
                self._callbacks.remove(callback)

        return unsubscribe

    def exit_text(self) -> str:
        """See the protocol."""
        return self._exit_text

    async def status(self) -> RunState:
        """See the protocol."""
        await self._answer()
        return self._run_state

    async def pause(self) -> None:
        """See the protocol."""
        await self._answer()
        if self._run_state is RunState.RUNNING:
            self._enter(RunState.PAUSED)

    async def resume(self) -> float:
        """See the protocol."""
        await self._answer()
        if self._run_state is RunState.INMIGRATE:
            raise QemuError("the guest cannot run yet", why="its state has not arrived completely")
        if self._run_state is RunState.FINISH_MIGRATE:
            raise QemuError("QEMU refused cont", why="Migration is not finalized yet")
        if self._run_state in _BROKEN:
            raise QemuError("QEMU refused cont", why="Resetting the Virtual Machine is required")
        if self._run_state is not RunState.RUNNING:
            self._enter(RunState.RUNNING)
        return self.wire.now

    async def resume_if_stopped(self) -> None:
        """See the protocol."""
        if await self.status() is RunState.FINISH_MIGRATE and self._stream is not None:
            await asyncio.wait({self._stream}, timeout=RESUME_WITHIN_S)
        await self.resume()

    async def quit(self) -> None:
        """See the protocol."""
        await self.kill()

    async def kill(self) -> None:
        """See the protocol."""
        await asyncio.sleep(0)
        self.die("")

    async def announce(self) -> None:
        """See the protocol."""
        await self._answer()
        self.announced += 1

    async def slows_safely(self) -> bool:
        """See the protocol."""
        await self._answer()
        return self.is_slowed_safely

    async def prepare_outgoing(self, parameters: StreamParameters) -> None:
        """See the protocol."""
        await self._answer()
        self.parameters = parameters
        self._max_throttle = self._throttle_step = 1

    async def migrate(self, stream: socket.socket | RdmaAddress) -> None:
        """See the protocol."""
        await self._answer()
        if self._stream is not None and not self._stream.done():
            raise QemuError("QEMU refused migrate", why="There's a migration process in progress")
        self._post_copy.clear()
        self._continued.clear()
        self._statistics = MigrationStatistics()
        self._migration_is(MigrationState.SETUP)
        try:
            connection = self.wire.dial(stream)
        except QemuError:
            self._migration_is(MigrationState.FAILED)
            raise
        self._stream = asyncio.create_task(self._send(connection))

    async def cancel_migration(self) -> None:
        """See the protocol."""
        await self._answer()
        if self._stream is not None and self._statistics.state in PRE_COPY:
            self._migration_is(MigrationState.CANCELLING)
            self._stream.cancel()

    async def set_downtime_limit(self, milliseconds: float) -> None:
        """See the protocol."""
        await self._change(downtime_limit_ms=float(math.ceil(milliseconds)))

    async def set_bandwidth(self, bytes_per_s: int) -> None:
        """See the protocol."""
        await self._change(bandwidth_bytes_per_s=bytes_per_s)

    async def set_throttle(self, max_percent: int, step_percent: int) -> None:
        """See the protocol."""
        await self._answer()
        self._max_throttle, self._throttle_step = max_percent, step_percent

    async def start_post_copy(self) -> None:
        """See the protocol."""
        await self._answer()
        if not self._terms().post_copy:
            raise QemuError("QEMU refused migrate-start-postcopy", why="post-copy was not enabled")
        self._post_copy.set()

    async def send_rest(self, stream: socket.socket) -> None:
        """See the protocol."""
        await self._answer()
        if self._statistics.state is not MigrationState.POSTCOPY_PAUSED:
            raise QemuError("QEMU refused migrate", why="Cannot resume if there is no paused migration")
        self._migration_is(MigrationState.POSTCOPY_RECOVER_SETUP)
        self._stream = asyncio.create_task(self._send_rest(self.wire.dial(stream)))

    async def continue_migration(self) -> None:
        """See the protocol."""
        await self._answer()
        if self._statistics.state is not MigrationState.PRE_SWITCHOVER:
            raise QemuError("QEMU refused migrate-continue", why="Migration not in expected state: pre-switchover")
        self._continued.set()

    async def prepare_incoming(self, parameters: StreamParameters) -> None:
        """See the protocol."""
        await self._answer()
        self.parameters = parameters

    async def receive(self, stream: socket.socket | RdmaAddress) -> None:
        """See the protocol."""
        await self._answer()
        if self._meeting is not None or self._statistics.state is not MigrationState.NONE:
            raise QemuError("QEMU refused migrate-incoming", why="The incoming migration has already been started")
        self._migration_is(MigrationState.SETUP)
        if isinstance(stream, RdmaAddress):
            stream = self.wire.listen(stream)
        self._meeting = asyncio.create_task(self._meet(stream.dup()))

    async def receive_rest(self, stream: socket.socket) -> None:
        """See the protocol."""
        await asyncio.sleep(0)
        if self.gone.is_set():
            raise QemuGone("QEMU has ended", why=self._exit_text)
        if self._statistics.state is not MigrationState.POSTCOPY_PAUSED:
            raise QemuError(
                "QEMU refused migrate-recover", why="Migrate recover can only be run when postcopy is paused."
            )
        self._meeting = asyncio.create_task(self._meet_again(stream))

    async def migration(self) -> MigrationStatistics:
        """See the protocol."""
        await self._answer()
        return self._statistics

    async def forget_stream(self) -> None:
        """See the protocol."""
        await self._answer()
        if self.parameters is not None:
            self.parameters = dataclasses.replace(self.parameters, credentials=None)

    # --- what only a fake can do ---

    def hang(self) -> None:
        """It lives, but answers nothing any more."""
        self._answers.clear()

    def answer_again(self) -> None:
        """It goes on after :meth:`hang`."""
        self._answers.set()

    def die(self, words: str) -> None:
        """The process ends, with these last words."""
        self._answers.set()
        if self.gone.is_set():
            return
        self._exit_text = words or "ended by SIGKILL"
        for task in (self._stream, self._meeting):
            if task is not None:
                task.cancel()
        self.gone.set()

    # --- the migration ---

    async def _send(self, stream: socket.socket) -> None:
        was_running = self._run_state is RunState.RUNNING
        began = self.wire.now
        destination: FakeMachine | None = None
        try:
            with stream:
                destination = await self.wire.call(stream)
            await self._connect(destination)
            await self._copy_until_little_is_left(destination)
            if self._post_copy.is_set():
                await self._post_copy_to(destination)
            else:
                await self._switch_over_to(destination)
        except (StreamBroken, asyncio.CancelledError) as end:
            await self._break_off(destination, str(end), was_running=was_running)
            return
        self._count(total_s=self.wire.now - began, remaining_bytes=0)
        self._migration_is(MigrationState.COMPLETED)
        await asyncio.sleep(0)  # QEMU, too, enters the state a moment after the event
        self._enter(RunState.POSTMIGRATE)

    async def _send_rest(self, stream: socket.socket) -> None:
        destination: FakeMachine | None = None
        try:
            with stream:
                destination = await self.wire.call(stream)
            for state in (MigrationState.POSTCOPY_RECOVER, MigrationState.POSTCOPY_ACTIVE):
                self._migration_is(state)
                destination._migration_is(state)
            await self.wire.arrive(Stage.LOADED)
            destination._migration_is(MigrationState.COMPLETED)
        except StreamBroken as end:
            await self._break_off(destination, str(end), was_running=True)
            return
        self._migration_is(MigrationState.COMPLETED)
        await asyncio.sleep(0)  # QEMU, too, enters the state a moment after the event
        self._enter(RunState.POSTMIGRATE)

    async def _connect(self, destination: FakeMachine) -> None:
        await self.wire.arrive(Stage.SETUP)
        ours, theirs = self._terms().credentials, destination._terms().credentials
        if (ours and ours.authority) != (theirs and theirs.authority):
            raise StreamBroken("TLS handshake failed: the certificate is not trusted")
        await self._pass_begins()
        self._migration_is(MigrationState.ACTIVE)
        destination._migration_is(MigrationState.ACTIVE)
        await self.wire.arrive(Stage.COPY)

    async def _copy_until_little_is_left(self, destination: FakeMachine) -> None:
        self.guest.take_dirty()
        destination.guest.pages = [0] * len(self.guest.pages)
        destination.guest.dirty_rate_bytes_per_s = self.guest.dirty_rate_bytes_per_s
        self._count(total_bytes=len(self.guest.pages) * PAGE_BYTES)
        pages: Sequence[int] = range(len(self.guest.pages))
        while True:
            await self._copy(pages, destination)
            limit_bytes = self._terms().downtime_limit_ms / 1000 * self._rate()
            if self.guest.dirty_bytes <= limit_bytes or self._post_copy.is_set():
                return
            pages = self.guest.take_dirty()
            throttle = min(self._max_throttle, self._statistics.throttle_percent + self._throttle_step)
            self._count(throttle_percent=throttle)
            await self._pass_begins()

    async def _switch_over_to(self, destination: FakeMachine) -> None:
        self._enter(RunState.FINISH_MIGRATE)
        if self._terms().pause:
            self._migration_is(MigrationState.PRE_SWITCHOVER)
            await self._continued.wait()
        self._migration_is(MigrationState.DEVICE)
        await self.wire.arrive(Stage.SWITCHOVER)
        destination._take()
        stopped_at = self.wire.now
        await self._pass_begins()
        await self._copy(self.guest.take_dirty(), destination)
        destination._loaded(MigrationState.COMPLETED)
        await self.wire.arrive(Stage.LOADED)
        self._count(downtime_ms=1000 * (self.wire.now - stopped_at))

    async def _post_copy_to(self, destination: FakeMachine) -> None:
        self._enter(RunState.FINISH_MIGRATE)
        if self._terms().pause:
            self._migration_is(MigrationState.PRE_SWITCHOVER)
            await self._continued.wait()
        self._migration_is(MigrationState.DEVICE)
        await self.wire.arrive(Stage.SWITCHOVER)
        destination._take()
        self._migration_is(MigrationState.POSTCOPY_ACTIVE)
        destination._loaded(MigrationState.POSTCOPY_ACTIVE)
        await self._copy(self.guest.take_dirty(), destination)
        await self.wire.arrive(Stage.LOADED)
        destination._migration_is(MigrationState.COMPLETED)

    async def _copy(self, pages: Sequence[int], destination: FakeMachine) -> None:
        """Send pages at the wire's or the cap's rate, while the guest goes on if it runs."""
        sent, allowance = 0, 0.0
        while sent < len(pages):
            seconds = await self.wire.step()
            destination._take()
            allowance += seconds * self._rate() / PAGE_BYTES
            upto = min(len(pages), math.floor(allowance))
            for page in pages[sent:upto]:
                destination.guest.pages[page] = self.guest.pages[page]
            self._sent((upto - sent) * PAGE_BYTES, (len(pages) - upto) * PAGE_BYTES)
            sent = upto
            if self._run_state is RunState.RUNNING:
                self.guest.run(seconds, self._statistics.throttle_percent)

    async def _meet(self, stream: socket.socket) -> None:
        """Let the sender at the other end of the stream know who is here; its migration does the rest."""
        try:
            with stream:
                await self.wire.answer(self, stream)
        except StreamBroken as end:
            self.die(f"load of migration failed: {end}")

    async def _meet_again(self, stream: socket.socket) -> None:
        with contextlib.suppress(StreamBroken), stream:
            await self.wire.answer(self, stream)

    async def _break_off(self, destination: FakeMachine | None, error: str, *, was_running: bool) -> None:
        """The stream ended early. A destination without the whole state ends; here the guest goes on."""
        if self._statistics.state in POST_COPY:
            if destination is not None:
                destination._migration_is(MigrationState.POSTCOPY_PAUSED)
            self._migration_is(MigrationState.POSTCOPY_PAUSED)
            return
        if destination is not None and destination._run_state is RunState.INMIGRATE:
            destination.die("load of migration failed: Input/output error")
        if self.gone.is_set():
            return
        self._count(error=error)
        if self._statistics.state is MigrationState.CANCELLING:
            self._run_as_before(was_running=was_running)
            self._migration_is(MigrationState.CANCELLED)
        else:
            self._migration_is(MigrationState.FAILED)
            await asyncio.sleep(0)  # QEMU, too, enters the state a moment after the event
            self._run_as_before(was_running=was_running)

    def _run_as_before(self, *, was_running: bool) -> None:
        if self._run_state in _STOPPED_BY_MIGRATION:
            self._enter(RunState.RUNNING if was_running else RunState.PAUSED)

    # --- inside ---

    async def _answer(self) -> None:
        await asyncio.sleep(0)
        await self._answers.wait()
        if self.gone.is_set():
            raise QemuGone("QEMU has ended", why=self._exit_text)

    async def _change(self, **values: float) -> None:
        await self._answer()
        self.parameters = dataclasses.replace(self._terms(), **values)  # type: ignore[arg-type]

    def _terms(self) -> StreamParameters:
        return self.parameters or StreamParameters()

    def _rate(self) -> float:
        cap = self._terms().bandwidth_bytes_per_s
        return min(cap, self.wire.bandwidth_bytes_per_s) if cap else self.wire.bandwidth_bytes_per_s

    async def _pass_begins(self) -> None:
        self._count(iteration=self._statistics.iteration + 1)
        self._emit("MIGRATION_PASS", {"pass": self._statistics.iteration})
        await self.wire.step()

    def _sent(self, count: int, remaining: int) -> None:
        self._count(
            transferred_bytes=self._statistics.transferred_bytes + count,
            remaining_bytes=remaining,
            rate_bytes_per_s=self._rate(),
            dirty_rate_bytes_per_s=self.guest.dirty_rate_bytes_per_s,
        )

    def _count(self, **values: float | str) -> None:
        self._statistics = dataclasses.replace(self._statistics, **values)  # type: ignore[arg-type]

    def _take(self) -> None:
        if self.gone.is_set():
            raise StreamBroken("Unable to write to socket: Broken pipe")

    def _loaded(self, state: MigrationState) -> None:
        self._run_state = RunState.PAUSED
        self._migration_is(state)

    def _migration_is(self, state: MigrationState) -> None:
        self._statistics = dataclasses.replace(self._statistics, state=state)
        self._emit("MIGRATION", {"status": state.value})

    def _enter(self, state: RunState) -> None:
        was, self._run_state = self._run_state, state
        if state is RunState.RUNNING:
            self._emit("RESUME", {})
        elif was is RunState.RUNNING:
            self._emit("STOP", {})

    def _emit(self, name: str, data: dict[str, object]) -> None:
        event = Event(name, data, self.wire.now)
        self.events.append(event)
        for callback in tuple(self._callbacks):
            callback(event)
