"""Bringing a broken move to its end, on the source's side.

Reached when the script raised (a cancel, a lost session, a dead QEMU) and when a restarted daemon finds a journal
without an end. It asks the own QEMU and, where its answer matters, the destination; ``ownership.decide_source`` says
what to do; every act is written before it is done. It repeats until the move has ended, with growing pauses while the
destination cannot be reached: no time limit turns ignorance into a guess. A person may end it with ``resolve``.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from limosa.background import Background, in_full
from limosa.errors import (
    Cancelled,
    Conflict,
    DestinationLost,
    HostNotTrusted,
    HostUnreachable,
    LimosaError,
    OwnerUnknown,
    QemuError,
    QemuGone,
    StorageError,
)
from limosa.migration import mirrors
from limosa.migration.interruption import is_gone
from limosa.migration.ownership import (
    SOURCE_ENDED,
    UNRESOLVED_AFTER_S,
    SourceAction,
    SourceQemu,
    SourceStep,
    decide_source,
)
from limosa.migration.stop import stop_stream
from limosa.model.migration import Fault, Outcome, Phase, Side
from limosa.qemu.protocol import NO_WAY_BACK, MachineProtocol, RunState
from limosa.wire.peer import DestinationState, Standing

if TYPE_CHECKING:
    from limosa.migration.source import SourceMove

_log = logging.getLogger(__name__)
ABORT_WITHIN_S = 5.0
#: Between attempts to end copies of disks that QEMU could not end yet.
DROP_EVERY_S = 5.0
#: From a question to the answer of a QEMU that does not hang.
QEMU_ANSWERS_WITHIN_S = 10.0

#: Whose the VM is has been written, and nobody has a say in it any more.
_DECIDED = (SourceStep.CONFIRMED, SourceStep.FINISHED, SourceStep.HOME, SourceStep.UNDONE)


class Settlement:
    """Settles one move. ``run`` returns when the VM's owner is known and nothing is left to undo."""

    def __init__(self, move: SourceMove, cause: LimosaError | None, *, rebooted: bool = False) -> None:
        """``rebooted``: this machine restarted since the move was accepted."""
        self.move = move
        self.cause = cause
        self._rebooted = rebooted
        #: done with the side a person named
        self.resolved: asyncio.Future[Side] = asyncio.get_running_loop().create_future()
        #: what it waits for, in words
        self.awaits = ""
        #: what the destination answered when it was asked last, None if it did not
        self._heard: DestinationState | None = None
        #: what the own QEMU had when it was asked last, None if it did not answer
        self._seen: SourceQemu | None = None
        #: what goes on after the move has ended
        self.background = Background()

    @property
    def step(self) -> SourceStep:
        """The last step of the journal; a move that wrote none waited in line."""
        step = self.move.journal.step
        return SourceStep(step) if step is not None else SourceStep.ACCEPTED

    @property
    def _is_told(self) -> bool:
        """Whether the destination may have heard of the move."""
        return any(record.step == SourceStep.PREPARING for record in self.move.journal.records)

    def resolve(self, owner: Side) -> None:
        """A person says whose the VM is. Raises :class:`Conflict` if that is known, or cannot be."""
        vm, there = self.move.header.vm.name, self.move.header.destination
        if self.step in _DECIDED:
            raise Conflict(f"the move of VM '{vm}' needs no decision", vm=vm, host=self.move.header.source)
        if owner is Side.DESTINATION and self._heard is DestinationState.GONE:
            raise Conflict(
                f"VM '{vm}' cannot be given to host '{there}'",
                why=f"host '{there}' answers that it has destroyed what it had of the VM",
                todo=f"give it to this host: limosa migration resolve {self.move.header.migration} --owner source",
                vm=vm,
                host=there,
            )
        if owner is Side.DESTINATION and self._is_held(self._seen):
            raise Conflict(
                f"VM '{vm}' cannot be given to host '{there}'",
                why="its guest is here",
                todo="the move is undone as soon as what it waits for has passed: "
                f"see 'limosa migration show {self.move.header.migration}'",
                vm=vm,
                host=self.move.header.source,
            )
        if not self.resolved.done():
            self.resolved.set_result(owner)

    def _is_held(self, qemu: SourceQemu | None) -> bool:
        """Whether the guest is certainly here, and nobody's word is needed to know that."""
        return qemu is SourceQemu.HOLDS and self.step is not SourceStep.HANDING_OVER

    async def run(self) -> None:
        """Decide and act until the move has ended."""
        began = time.monotonic()
        for pause in _pauses():
            self.awaits = "its QEMU has not answered"
            self._seen = None
            qemu = self._seen = await self._own_qemu()
            standing = await self._ask(qemu)
            self._heard = standing.state if standing is not None else None
            if self.resolved.done() and self.step not in _DECIDED:
                action = await self._as_resolved(qemu, standing, self.resolved.result())
            else:
                action = await self._act(qemu, standing)
            if self.step in SOURCE_ENDED:
                return
            if standing is None or action is SourceAction.ASK:
                self._show_waiting(standing, time.monotonic() - began)
            await self._wait(pause)

    async def _wait(self, seconds: float) -> None:
        """Until it is time to ask again, or a person has decided."""
        if self.resolved.done():
            await asyncio.sleep(seconds)
        else:
            await asyncio.wait({self.resolved}, timeout=seconds)

    async def _act(self, qemu: SourceQemu, standing: Standing | None) -> SourceAction:
        """Do what the rules say. Returns what that was."""
        state = standing.state if standing is not None else None
        rebooted = standing.rebooted if standing is not None else False
        action = decide_source(self.step, qemu, state, rebooted=rebooted, rebooted_here=self._rebooted)
        match action:
            case SourceAction.UNDO:
                await self._undo(qemu, standing)
            case SourceAction.RESUME:
                await self._resume_here()
            case SourceAction.HAND_OVER:
                await self._hand_over()
            case SourceAction.TEAR_DOWN:
                await self._tear_down()
            case SourceAction.CRASHED:
                await self._crashed()
            case SourceAction.DISMISS:
                await self._dismiss()
            case SourceAction.ASK:
                pass
        return action

    async def _own_qemu(self) -> SourceQemu:
        """Raises :class:`QemuError` if it lives and does not answer: then nobody knows what it has."""
        # A VM that was given back to its users may have any QEMU by now, which tells nothing about this move.
        if self.step is SourceStep.HOME:
            return SourceQemu.DEAD
        # Of a VM that is the destination's, what an earlier daemon left is only to be ended, whether it answers or not.
        if self.move.machine is None and self.step is not SourceStep.CONFIRMED:
            try:
                self.move.machine = await self.move.home.qemu()
            except QemuError as error:
                raise self._silent() from error
        machine = self.move.machine
        if machine is None or machine.gone.is_set():
            return SourceQemu.DEAD
        told = any(record.step == SourceStep.MIGRATING for record in self.move.journal.records)
        has_sent = False
        try:
            async with asyncio.timeout(QEMU_ANSWERS_WITHIN_S):
                has_sent = (await machine.migration()).state in NO_WAY_BACK and told
                # It says "completed" also of the move by which it came here itself, until it sends anything, and of one
                # after which the guest went on here.
                if has_sent and await machine.status() is RunState.RUNNING:
                    return SourceQemu.HOLDS
        except QemuError:
            if await is_gone(machine):
                return SourceQemu.DEAD
        except TimeoutError:
            raise self._silent() from None
        return SourceQemu.COMPLETED if has_sent else SourceQemu.HOLDS

    def _silent(self) -> QemuError:
        vm, host = self.move.header.vm.name, self.move.header.source
        return QemuError(
            f"the move of VM '{vm}' cannot be finished",
            why="its QEMU does not answer",
            todo="Limosa keeps asking it; 'limosa vm show' names its process, in case you want to end it",
            vm=vm,
            host=host,
        )

    async def _ask(self, qemu: SourceQemu) -> Standing | None:
        """How the destination stands, or None if it cannot be asked, or is not concerned."""
        if self.step in (SourceStep.ACCEPTED, SourceStep.HOME):
            return None
        if self._is_held(qemu):
            return None
        self.awaits = f"host '{self.move.header.destination}', which may have the whole VM, has not answered"
        try:
            await self._connect()
            assert self.move.peer is not None
            return await self.move.peer.attach(self.move.header.migration)
        except LimosaError as error:
            self.cause = self.cause or error
            return None

    async def _connect(self) -> None:
        if self.move.peer is not None:
            await self.move.peer.close()
            self.move.peer = None
        self.move.peer = await self.move.dial()

    async def _undo(self, qemu: SourceQemu, standing: Standing | None) -> None:
        """Stop the stream, let the guest go on here, and have the destination destroy what it has."""
        await self._record_undoing()
        if qemu is SourceQemu.COMPLETED:
            await self._destroy_there(standing)  # when it says that it has, the guest goes on here
            return
        assert self.move.machine is not None
        await stop_stream(self.move.machine)
        if await self._own_qemu() is SourceQemu.COMPLETED:
            return  # everything was sent before the cancel arrived; the destination's answer decides
        await self._home(self.move.machine)

    async def _resume_here(self) -> None:
        await self._record_undoing()
        assert self.move.machine is not None
        await self._home(self.move.machine)

    async def _home(self, machine: MachineProtocol) -> None:
        """The guest runs here as before; people may operate it again, whether or not the destination can be told."""
        try:
            await self._drop_copies(machine)
        except StorageError as error:  # its guest need not wait for that
            _log.warning("a copy of VM %s is left, and ended later: %s: %s", self.move.header.vm.name, error, error.why)
            self.background.spawn(self._drop_in_time(machine))
        await machine.forget_stream()
        # What was never promised is as it was, and may be another's: then the move was refused because of that.
        if self._is_told:
            await self.move.home.reclaim()
        why_stopped = await self._let_run(machine) if self.move.header.was_running else ""
        await in_full(self.move.journal.record, SourceStep.HOME, time.time())
        await self.move.home.vm_stays(why_stopped)
        await self._dismiss()

    async def _drop_copies(self, machine: MachineProtocol) -> None:
        await mirrors.drop(machine, self.move.header.migration, [disk.name for disk in self.move.header.vm.disks])

    async def _drop_in_time(self, machine: MachineProtocol) -> None:
        """End copies that QEMU could not end: no other move of these disks can begin before."""
        while not machine.gone.is_set():
            await asyncio.sleep(DROP_EVERY_S)
            try:
                await self._drop_copies(machine)
            except LimosaError:
                continue
            return

    async def _let_run(self, machine: MachineProtocol) -> str:
        """Let the guest go on. Returns why it does not where only its users can mend that: whose it is is certain, and
        how it fares no matter of the move. Else raises :class:`QemuError`; it may be tried again."""
        try:
            await machine.resume_if_stopped()
        except QemuGone:
            raise
        except QemuError as error:
            # An image may be locked for a moment; but QEMU runs none of these again.
            is_broken = await machine.status() in (RunState.INTERNAL_ERROR, RunState.SHUTDOWN)
            if not is_broken and not self.resolved.done():
                raise
            return f"it cannot go on: {error}"
        return ""

    async def _hand_over(self) -> None:
        assert self.move.peer is not None
        await in_full(self.move.journal.record, SourceStep.HANDING_OVER, time.time())
        self.move.note_hand_over()
        try:
            await self.move.peer.take_over()
        except LimosaError as error:
            self.cause = error
            if isinstance(error, DestinationLost):
                self._forget_word()
            return
        await self._tear_down()

    async def _tear_down(self, *, images_stay: bool = False) -> None:
        self.move.report.enter(Phase.TEAR_DOWN)
        try:
            await self.move.tear_down(images_stay=images_stay)
        except HostUnreachable:
            return
        self.move.report.end(Outcome.COMPLETED)

    async def _crashed(self) -> None:
        await self._record_undoing()
        await self.move.home.withdraw()
        await in_full(self.move.journal.record, SourceStep.HOME, time.time())
        await self.move.home.vm_crashed()
        await self._dismiss()

    async def _dismiss(self) -> None:
        """The VM is its users' again: have the destination destroy what it has."""
        await self._show_failure()
        there = await self._destroy_there(None) if self._is_told else DestinationState.UNKNOWN
        if there is None:
            return
        await in_full(self.move.journal.record, SourceStep.UNDONE, time.time())
        if there is DestinationState.OWNED:
            vm, host = self.move.header.vm.name, self.move.header.destination
            error = OwnerUnknown(
                f"VM '{vm}' belongs to this host and to host '{host}'",
                why="an administrator gave it to one of them while the other had it",
                todo="stop it on one of them with 'limosa vm stop' at once, and check its disks",
                vm=vm,
                host=host,
            )
            self.move.report.end(Outcome.FAILED, error.fault())

    async def _destroy_there(self, standing: Standing | None) -> DestinationState | None:
        """What the destination has now that it has been told to destroy it: nothing, or the VM if that is its own by
        now. None if it cannot be told."""
        try:
            async with asyncio.timeout(ABORT_WITHIN_S):
                if self.move.peer is None or self.move.peer.lost.done():
                    await self._connect()
                    standing = None
                assert self.move.peer is not None
                # It may not have heard of the move yet, and then there is nothing that it could be told to destroy.
                standing = standing or await self.move.peer.attach(self.move.header.migration)
                if standing.state in (DestinationState.LOADED, DestinationState.INCOMING):
                    await self.move.peer.abort(str(self.cause or "the move was undone"))
                    return DestinationState.GONE
                return standing.state
        except (LimosaError, TimeoutError):
            return None

    async def _as_resolved(self, qemu: SourceQemu, standing: Standing | None, owner: Side) -> SourceAction | None:
        """A person said whose the VM is, and answers for it; unless the destination, asked since, knows better. Returns
        what the rules said where they were followed instead."""
        if self._is_held(qemu):
            if owner is Side.DESTINATION:
                self._forget_word()  # said while QEMU did not answer
            return await self._act(qemu, standing)
        state = standing.state if standing is not None else None
        match owner, state:
            case _, DestinationState.OWNED:
                await self._tear_down()
            case Side.SOURCE, _:
                await (self._crashed() if qemu is SourceQemu.DEAD else self._resume_here())
            case _, DestinationState.LOADED | DestinationState.INCOMING:
                await self._hand_over()
            case _, DestinationState.GONE:
                self._forget_word()
                return await self._act(qemu, standing)
            case _:
                # Only the person knows, so what may be the last copy of its disks is not deleted.
                self.move.peer = None
                await self._tear_down(images_stay=True)
        return None

    def _forget_word(self) -> None:
        """A person gave the VM to a destination that cannot have it: the guest is here, or its copy is destroyed."""
        self.resolved = asyncio.get_running_loop().create_future()

    async def _record_undoing(self) -> None:
        if self.step is not SourceStep.UNDOING:
            await in_full(self.move.journal.record, SourceStep.UNDOING, time.time(), fault=self._fault())

    def _fault(self) -> Fault | None:
        """Why the move is undone, which the VM comes out of as it was: also if its destination is what was lost."""
        cause = self.cause
        if self._is_told and isinstance(cause, HostUnreachable) and not isinstance(cause, HostNotTrusted):
            vm = self.move.header.vm.name
            cause = DestinationLost(cause.what, why=cause.why, todo=cause.todo, vm=vm, host=cause.host)
        return cause.fault() if cause is not None else None

    async def _show_failure(self) -> None:
        if self.move.report.now.outcome in (Outcome.FAILED, Outcome.CANCELLED):
            return
        outcome = Outcome.CANCELLED if isinstance(self.cause, Cancelled) else Outcome.FAILED
        self.move.report.end(outcome, self._fault())
        await self.move.home.sending()  # what it may have sent is for others now

    def _show_waiting(self, standing: Standing | None, seconds: float) -> None:
        if self.move.report.now.outcome not in (Outcome.UNDER_WAY, Outcome.UNRESOLVED) or seconds < UNRESOLVED_AFTER_S:
            return
        vm, there = self.move.header.vm.name, self.move.header.destination
        word = f"limosa migration resolve {self.move.header.migration} --owner source"
        if standing is None:
            why = str(self.cause or f"host '{there}' cannot be reached")
            todo = f"it is settled as soon as '{there}' can be reached; if '{there}' is certainly dead: {word}"
        elif standing.state is DestinationState.GONE:
            why = f"host '{there}' was restarted meanwhile, and nothing of the VM is left there; it may have run before"
            todo = f"to let it go on here, as it was when it was sent: {word}"
        else:
            why = f"host '{there}' answers, and knows nothing of the move"
            todo = f"check whether it has the VM; if it certainly does not: {word}"
        error = OwnerUnknown(
            f"nobody can know whether host '{there}' has taken over VM '{vm}'; it does not run here",
            why=why,
            todo=todo,
            vm=vm,
            host=there,
        )
        if self.move.report.now.fault != error.fault():  # it may be asked for hours
            self.move.report.end(Outcome.UNRESOLVED, error.fault())


def _pauses() -> Iterator[float]:
    """Seconds to wait between questions: none at first, in the end five."""
    yield 0.0
    pause = 0.1
    while True:
        yield pause
        pause = min(5.0, pause * 2)
