"""The destination's side of a move.

::

    prepare      wait for a slot; reserve name and memory; receive files below disks that are not here; start QEMU with
                 -S; await the stream
    take_over    on the source's word only: continue the guest, then make it durable that it is ours
    abort        destroy everything; the guest never ran here
    abandoned    the session broke, and no other took its place: destroy what is incomplete, hold what is whole

Every method is safe to call again. ``Destination`` is a :class:`limosa.migration.peer.Peer` itself but for the session:
in tests the source's script talks to it directly.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable
from typing import Protocol

from limosa.background import in_full
from limosa.errors import (
    Conflict,
    DestinationLost,
    LimosaError,
    OutcomeUnknown,
    OwnerUnknown,
    QemuError,
    QemuGone,
    StateError,
)
from limosa.migration.interruption import is_gone
from limosa.migration.journal import Journal
from limosa.migration.ownership import (
    DESTINATION_ENDED,
    UNRESOLVED_AFTER_S,
    DestinationAction,
    DestinationQemu,
    DestinationStep,
    decide_destination,
    destination_state,
)
from limosa.model.vm import VmConfig
from limosa.qemu.protocol import SWITCHED_OVER, Event, MachineProtocol, MigrationState, RunState, StreamParameters
from limosa.transport.channel import Doorway
from limosa.wire.peer import LayersAwaited, Prepare, Prepared, Running, Standing

#: From the source's word to a whole state here: the tail of the stream that QEMU is still loading.
LOAD_WITHIN_S = 30.0

#: From a question to the answer of a QEMU that does not hang. The source gives an abort five seconds.
ANSWER_WITHIN_S = 2.0


class Landing(Protocol):
    """What the script needs of the host on which the VM lands. Each call undoes itself if it fails."""

    async def reserve(self, in_line: Callable[[int], None]) -> None:
        """Wait for a slot; then reserve the VM's name, UUID and memory."""

    async def take_layers(self, request: Prepare, tell: Callable[[LayersAwaited], None]) -> None:
        """Receive the files below disks that are not here, when ``tell`` has said where; first hold space for disks,
        too. What came is removed by :meth:`release`, which gives that back."""

    async def launch(self, request: Prepare) -> MachineProtocol:
        """Make the images of disks that come along; start QEMU with taps and files, waiting for a migration."""

    async def open_door(self, request: Prepare, machine: MachineProtocol) -> Doorway:
        """Where the source is awaited; by ``machine`` itself where no socket can be handed over."""

    async def open_disks(self, request: Prepare, machine: MachineProtocol) -> Doorway | None:
        """Have QEMU await the disks that come along. Returns the door at which it does, None if relays bring them."""

    async def claim(self) -> None:
        """Make it known to other hosts, where they share the disks and have no other way to know, that this one writes
        them from now on. Raises if it may not; nothing is lost then."""

    async def adopt(self, *, running: bool) -> None:
        """Make the VM one of this host's, durably. If its QEMU is dead by now, it crashed here. May be repeated."""

    def free(self) -> None:
        """It is written that the VM landed: its users may do with it what they like."""

    async def release(self, machine: MachineProtocol | None) -> None:
        """Kill QEMU and give back name, memory, slot, files, images that were made. Never fails.

        After a reboot of this machine images stay: lines may be lost that say that the guest ran on them."""


class Destination:
    """One VM that is to land here."""

    def __init__(
        self,
        journal: Journal,
        landing: Landing,
        boot: str,
        machine: MachineProtocol | None = None,
        *,
        silent: bool = False,
    ) -> None:
        """``silent``: there is a QEMU, but it lets nobody be its ``machine``."""
        self.journal = journal
        self.landing = landing
        self.machine = machine
        self._silent = silent
        self._boot = boot
        loop = asyncio.get_running_loop()
        #: done, with an exception, when the waiting QEMU died
        self.lost: asyncio.Future[None] = loop.create_future()
        #: the whole state is here, but for memory in post-copy
        self._arrived = asyncio.Event()
        #: all of it, memory too
        self._loaded = asyncio.Event()
        #: sessions with the source, of which it may have a new one before the end of the old one is noticed
        self._sessions = 0
        #: since when, by the monotonic clock, a state that is whole has waited for a word about whose the guest is
        self._held_since: float | None = None
        self._attended = asyncio.Event()
        #: the last of them ended, or this daemon restarted
        self._is_abandoned = False
        #: and no other is awaited any more: the source has what it needs, or it is gone
        self._given_up = asyncio.Event()
        #: this daemon ends
        self._ends = asyncio.Event()
        #: nothing is left here; the line that says so may be missing, on a full disk
        self.is_destroyed = False
        #: relays spread the stream, over NICs too that appear here if the source hears of them
        self.is_striped = False
        self._resumed_at: float | None = None
        #: QEMU has said RESUME, which it does before the guest's first instruction
        self._ran = False
        #: one act at a time: a word, an abort and a lost session may come at once
        self._lock = asyncio.Lock()
        self._watch: asyncio.Task[None] | None = None
        #: until QEMU has all of its stream
        self._door: Doorway | None = None
        self._admission: asyncio.Task[None] | None = None
        self._exports_end: asyncio.Future[None] | None = None
        #: until QEMU has whole disks
        self._disks_door: Doorway | None = None
        if machine is not None:
            self._follow(machine)

    @property
    def vm(self) -> VmConfig:
        """The VM that is to land."""
        return self.journal.header.vm

    @property
    def step(self) -> DestinationStep | None:
        """The last step of the journal."""
        return DestinationStep(self.journal.step) if self.journal.step is not None else None

    @property
    def is_decided(self) -> bool:
        """Whether it is certain how this ends, be it written or not."""
        return self.is_destroyed or self.step in (DestinationStep.CONTINUING, *DESTINATION_ENDED)

    @property
    def is_unresolved(self) -> bool:
        """Whether the guest waits here, paused and whole, for a source that has been gone for long, or for a person's
        word."""
        if self._held_since is None or self.is_decided:
            return False
        return time.monotonic() - self._held_since >= UNRESOLVED_AFTER_S

    async def prepare(
        self, request: Prepare, in_line: Callable[[int], None], tell: Callable[[LayersAwaited], None]
    ) -> Prepared:
        """Reserve and build everything; ``tell`` where files below disks are awaited. On failure nothing is kept."""
        self.is_striped = request.relay is not None and request.relay.striped
        try:
            await self.landing.reserve(in_line)
            self.journal.record(DestinationStep.RESERVED, time.time(), durable=False)
            if request.layers:
                await self.landing.take_layers(request, tell)
            self.machine = await self.landing.launch(request)
            self._follow(self.machine)
            await self.machine.prepare_incoming(
                StreamParameters(
                    credentials=request.credentials,
                    downtime_limit_ms=1,
                    bandwidth_bytes_per_s=0,
                    post_copy=request.post_copy,
                    rdma=request.transport == "rdma",
                    rdma_pin_all=request.rdma_pin_all,
                )
            )
            door = self._door = await self.landing.open_door(request, self.machine)
            if request.disks:
                self._disks_door = await self.landing.open_disks(request, self.machine)
            self._admission = asyncio.ensure_future(self._admit(door, self.machine))
        except BaseException:
            await asyncio.shield(self.abort("it could not be prepared"))
            raise
        disks_port = self._disks_door.port if self._disks_door is not None else 0
        return Prepared(address=door.address, port=door.port, token=door.token, disks_port=disks_port)

    def announce(self, addresses: Iterable[str]) -> None:
        """The source has a way to these addresses of ours now."""
        if self._door is not None:
            self._door.announce(addresses)

    def disks_whole(self) -> None:
        """The copies of our disks have ended: begin to let nobody write them any more."""
        if self.journal.header.images and self.machine is not None and self._exports_end is None:
            self._exports_end = asyncio.ensure_future(self.machine.end_exports())

    async def take_over(self) -> Running:
        """Continue the guest. The caller says by this that nobody else does, and never will.

        Raises :class:`DestinationLost` if the guest's state never was whole here, or QEMU refuses to run it; everything
        is destroyed then and the guest never ran. Raises :class:`StateError` if that could not be written: the guest is
        this host's then, and does not run. Called again, it answers as before.
        """
        return await self._take_over(is_only_copy=False)

    async def _take_over(self, *, is_only_copy: bool) -> Running:
        """``is_only_copy``: the source's may be no more, so that whatever stands in the way, this one is kept."""
        async with self._lock:
            if self.step in (DestinationStep.CONTINUING, DestinationStep.OWNED):
                return Running(resumed_at=self._resumed_at)
            try:
                machine = await self._whole()
                await self._claim()
                self._write_continuing()
                if self.journal.header.was_running:
                    self._resumed_at = await self._continue(machine, is_only_copy=is_only_copy)
            except DestinationLost as error:
                if is_only_copy and self.machine is not None and not self.machine.gone.is_set():
                    raise self._kept(error) from error
                if self.step is not DestinationStep.GONE:
                    await self._destroy()
                raise
            return Running(resumed_at=self._resumed_at)

    async def adopted(self) -> None:
        """Make it durable that the VM is ours. Returns at once if it is."""
        async with self._lock:
            if self.step is DestinationStep.CONTINUING:
                await self._own()

    async def ended(self) -> None:
        """Make it durable how this ended, if it is decided. Returns at once if it is. Raises :class:`StateError` and
        :class:`StorageError`; it may be tried again."""
        async with self._lock:
            if self.step is DestinationStep.CONTINUING:
                await self._own()
            elif self.is_destroyed:
                await self._write_gone()

    async def abort(self, reason: str) -> None:
        """Destroy everything. Raises :class:`Conflict` if the guest is ours already."""
        async with self._lock:
            if self.step in (DestinationStep.CONTINUING, DestinationStep.OWNED):
                raise Conflict(
                    f"VM '{self.vm.name}' cannot be given up: this host owns it",
                    why="the source handed it over, or an administrator decided so",
                    vm=self.vm.name,
                    host=self.journal.header.destination,
                )
            if self.step is not DestinationStep.GONE:
                await self._destroy()

    def attended(self) -> None:
        """A session with the source is about this move, until :meth:`abandoned`: the source decides, and no person."""
        self._sessions += 1
        self._attended.set()
        self._is_abandoned = False
        self._given_up.clear()
        self._held_since = None

    async def abandoned(self, *, wait_s: float = 0.0) -> None:
        """A session with the source ended or broke, or this daemon restarted: do what is safe on one's own, unless
        there is another session, or begins within ``wait_s`` while QEMU here waits for more, or for a word."""
        self._sessions = max(0, self._sessions - 1)
        ended_at = time.monotonic()
        if self._sessions == 0:
            self._attended.clear()
            self._is_abandoned = True
            if self.machine is not None and self.step is DestinationStep.RESERVED:
                await self._until_attended(self.machine, wait_s)
        async with self._lock:
            if self._attended.is_set():
                return  # its end comes, too
            self._given_up.set()
            if self.step is None:
                await self._destroy()
                return
            if self.step in (DestinationStep.OWNED, DestinationStep.GONE):
                return
            match decide_destination(self.step, await self._own_qemu()):
                case DestinationAction.DESTROY:
                    await self._destroy()
                case DestinationAction.OWN:
                    await self._continue_again()
                    await self._own()
                case DestinationAction.HOLD if self._is_abandoned:
                    self._held_since = ended_at

    async def _until_attended(self, machine: MachineProtocol, within_s: float) -> None:
        """Return when there is a session again, or none is worth waiting for any more."""
        events = (self._attended, machine.gone, self._ends)
        waiting = [asyncio.ensure_future(event.wait()) for event in events]
        try:
            await asyncio.wait(waiting, timeout=within_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in waiting:
                one.cancel()

    def expect_nobody(self) -> None:
        """This daemon ends: a session that ends now is followed by no other."""
        self._ends.set()

    async def standing(self) -> Standing:
        """How it stands, for a source that has lost track."""
        async with self._lock:
            state = destination_state(self.step, await self._own_qemu())
            rebooted = self.journal.header.boot != self._boot
            return Standing(state=state, rebooted=rebooted, resumed_at=self._resumed_at)

    async def resolve(self, *, here: bool) -> None:
        """A person says whether the guest is this host's, and answers for it.

        Raises :class:`Conflict` while the source's session lasts: the move is under way, and the source decides; and if
        the guest is to run here, while another session is awaited. What is here may be the only copy of the guest. So
        it is kept if it cannot go on: raises :class:`QemuError` if QEMU does not answer or does not run it, and
        :class:`OwnerUnknown` if something else is in the way and it can be tried again.
        """
        header = self.journal.header
        if not self._is_abandoned:
            raise Conflict(
                f"the move of VM '{self.vm.name}' needs no decision",
                why=f"host '{header.source}' controls it, and is still connected",
                todo=f"to end it: limosa --host {header.source} migration cancel {header.migration}; "
                "if that host has just died, try again in some seconds",
                vm=self.vm.name,
                host=header.destination,
            )
        if here and not self._given_up.is_set():
            raise Conflict(
                f"the owner of VM '{self.vm.name}' cannot be decided yet",
                why=f"the connection with host '{header.source}' has just broken, and it may connect again",
                todo="try again in some seconds",
                vm=self.vm.name,
                host=header.destination,
            )
        if here:
            if await self._own_qemu() is DestinationQemu.SILENT:
                raise QemuError(
                    f"VM '{self.vm.name}' cannot be continued: its QEMU does not answer",
                    todo="fix what it waits for, most likely storage, restart the daemon, and try again",
                    vm=self.vm.name,
                    host=self.journal.header.destination,
                )
            try:
                await self._take_over(is_only_copy=True)
            finally:
                await self.adopted()  # the guest is this host's by now, be it one that QEMU refuses to run
        else:
            await self.abort("an administrator gave the VM to the source")

    async def _whole(self) -> MachineProtocol:
        """The QEMU with the whole state. Raises :class:`DestinationLost`."""
        try:
            if self.machine is None or self.step is not DestinationStep.RESERVED:
                raise StateError("there is nothing to take over")
            async with asyncio.timeout(LOAD_WITHIN_S):
                if not self._loaded.is_set():
                    await self._load(self.machine)
                if self.journal.header.images:
                    await self._end_exports()
        except (LimosaError, TimeoutError) as error:
            raise self._lost(
                "its state did not arrive completely", str(error) or f"QEMU was not ready within {LOAD_WITHIN_S:.0f} s"
            ) from error
        return self.machine

    async def _claim(self) -> None:
        try:
            await self.landing.claim()
        except LimosaError as error:
            raise self._lost("it may not write the disks", str(error)) from error

    def _write_continuing(self) -> None:
        try:
            self.journal.record(DestinationStep.CONTINUING, time.time(), durable=False)
        except StateError as error:
            # What cannot be written must not be done.
            raise self._lost("that it goes on there could not be written", str(error)) from error

    async def _continue(self, machine: MachineProtocol, *, is_only_copy: bool) -> float:
        try:
            return await machine.resume()
        except OutcomeUnknown:
            raise
        except QemuGone as error:
            if is_only_copy:
                raise  # a VM that crashed here, with its disks
            # It never said RESUME, which QEMU says before the first instruction of the guest (vm_prepare_start in
            # system/cpus.c), so that this daemon, which lived and listened, can give its proof.
            raise self._lost("QEMU ended before the guest ran", error.why) from error
        except QemuError as error:
            if is_only_copy or not await self._will_not_run(machine):
                raise
            raise self._lost("QEMU refused to run it", error.why) from error

    async def _will_not_run(self, machine: MachineProtocol) -> bool:
        """Whether a guest whose ``cont`` was refused (as by ``bdrv_activate_all`` in ``qmp_cont``, if another process
        holds the lock of an image) never ran, by what this daemon heard and QEMU says, and is the source's as a whole.
        """
        try:
            stands = await machine.status() is not RunState.RUNNING
            return stands and not self._ran and (await machine.migration()).state is MigrationState.COMPLETED
        except QemuError:
            return False

    def _lost(self, what: str, why: str) -> DestinationLost:
        header = self.journal.header
        return DestinationLost(
            f"VM '{header.vm.name}' did not land on host '{header.destination}': {what}",
            why=why,
            todo=f"see the VM's qemu.log on '{header.destination}'",
            vm=header.vm.name,
            host=header.destination,
        )

    def _kept(self, lost: DestinationLost) -> OwnerUnknown:
        header = self.journal.header
        return OwnerUnknown(
            f"VM '{header.vm.name}' does not run on host '{header.destination}' yet, and is kept there as it is",
            why=lost.why,
            todo=f"mend that and say it again: limosa migration resolve {header.migration} --owner destination",
            vm=header.vm.name,
            host=header.destination,
        )

    async def _load(self, machine: MachineProtocol) -> None:
        await self._arrive(machine)
        # In post-copy QEMU says that it is active a moment before it has loaded the devices, and nothing then.
        while not self._loaded.is_set() and await machine.status() is RunState.INMIGRATE:  # noqa: ASYNC110
            await asyncio.sleep(0.001)

    async def _arrive(self, machine: MachineProtocol) -> None:
        if (await machine.migration()).state in SWITCHED_OVER:
            return
        gone = asyncio.ensure_future(machine.gone.wait())
        arrived = asyncio.ensure_future(self._arrived.wait())
        try:
            await asyncio.wait({gone, arrived}, return_when=asyncio.FIRST_COMPLETED)
            if not arrived.done():
                raise QemuError("QEMU ended while it loaded the state", why=machine.exit_text())
        finally:
            gone.cancel()
            arrived.cancel()

    async def _own(self) -> None:
        qemu = await self._own_qemu()
        # In post-copy QEMU may not answer for the same page that the guest, which was continued, waits for.
        waits = qemu is DestinationQemu.SILENT and self._resumed_at is not None
        await self.landing.adopt(running=waits or qemu is DestinationQemu.RUNNING)
        await in_full(self.journal.record, DestinationStep.OWNED, time.time(), resumed_at=self._resumed_at)
        # Not before: a restart that finds CONTINUING lets the guest run, whoever may have paused it or moved it on.
        self.landing.free()
        self._unfollow()

    async def _continue_again(self) -> None:
        """After a restart between writing CONTINUING and doing it. The word was given, so this is no guess."""
        machine = self.machine
        if machine is None or machine.gone.is_set():
            return
        if await machine.status() is not RunState.RUNNING and self.journal.header.was_running:
            self._resumed_at = await machine.resume()

    async def _admit(self, door: Doorway, machine: MachineProtocol) -> None:
        """Await the source and give its connection to QEMU; close the door when the stream has ended."""
        over = asyncio.Event()
        unsubscribe = machine.on_event(lambda event: over.set() if _is_the_end(event) else None)
        gone = asyncio.ensure_future(machine.gone.wait())
        gone.add_done_callback(lambda _: over.set())
        try:
            with contextlib.closing(door):
                if (stream := await door.accept()) is not None:
                    with stream:
                        await machine.receive(stream)
                await over.wait()
                # QEMU's last word to the source may still be under way, perhaps over a path that has just died.
                await self._given_up.wait()
        except LimosaError as error:
            self._lose("it could not receive the VM", str(error))
        finally:
            unsubscribe()
            gone.cancel()

    async def _end_exports(self) -> None:
        """Let nobody write our disks any more. The copies have ended by now, at the latest."""
        self.disks_whole()
        if self._exports_end is not None:
            await asyncio.shield(self._exports_end)
        self._close_disks()

    def _close_disks(self) -> None:
        if self._disks_door is not None:
            self._disks_door.close()
            self._disks_door = None

    async def _destroy(self) -> None:
        """Raises :class:`StateError` if it is written that the guest is continued and cannot be taken back;
        nothing was destroyed then. May be repeated: others may have the name by then."""
        if self.is_destroyed:
            with contextlib.suppress(StateError):
                await self._write_gone()
            return
        if self.step is DestinationStep.CONTINUING:
            # Else the next daemon, if the last line cannot be written, would take what is gone for a VM that crashed.
            await in_full(self.journal.record, DestinationStep.RESERVED, time.time())
        if self._admission is not None:
            self._admission.cancel()
        elif self._door is not None:
            self._door.close()  # nobody was awaited at it yet
        self._close_disks()
        self._unfollow()
        await self.landing.release(self.machine)
        self.machine, self._silent, self.is_destroyed = None, False, True
        # On a full disk the line is missing, and RESERVED with a dead QEMU says the same.
        with contextlib.suppress(StateError):
            await self._write_gone()

    async def _write_gone(self) -> None:
        if self.step is not DestinationStep.GONE:
            await in_full(self.journal.record, DestinationStep.GONE, time.time())

    async def _own_qemu(self) -> DestinationQemu:
        if self.machine is None:
            return DestinationQemu.SILENT if self._silent else DestinationQemu.DEAD
        if self.machine.gone.is_set():
            return DestinationQemu.DEAD
        try:
            async with asyncio.timeout(ANSWER_WITHIN_S):
                if await self.machine.status() is RunState.RUNNING:
                    return DestinationQemu.RUNNING
                loaded = (await self.machine.migration()).state in SWITCHED_OVER
        except (QemuError, TimeoutError):
            return DestinationQemu.DEAD if await is_gone(self.machine) else DestinationQemu.SILENT
        return DestinationQemu.LOADED if loaded else DestinationQemu.INCOMING

    def _follow(self, machine: MachineProtocol) -> None:
        self._unsubscribe = machine.on_event(self._on_event)
        self._watch = asyncio.ensure_future(self._until_gone(machine))

    def _unfollow(self) -> None:
        if self._watch is not None:
            self._unsubscribe()
            self._watch.cancel()
            self._watch = None

    def _on_event(self, event: Event) -> None:
        if event.name == "MIGRATION" and MigrationState(event.data["status"]) in SWITCHED_OVER:
            self._arrived.set()
            if event.data["status"] == MigrationState.COMPLETED:
                self._loaded.set()
                self.disks_whole()
        elif event.name == "RESUME":
            self._ran = True

    async def _until_gone(self, machine: MachineProtocol) -> None:
        await machine.gone.wait()
        self._lose("QEMU ended", machine.exit_text())

    def _lose(self, what: str, why: str) -> None:
        if not self.lost.done():
            self.lost.set_exception(self._lost(what, why))
            self.lost.exception()  # it may have no listener


def _is_the_end(event: Event) -> bool:
    """Whether all memory is here, or none will come any more."""
    return event.name == "MIGRATION" and event.data["status"] in (MigrationState.COMPLETED, MigrationState.FAILED)
