"""VMs that leave this host: the line of moves, each move's task, watchers, and what a restart finds of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from limosa.background import Background, in_full
from limosa.errors import (
    Cancelled,
    Conflict,
    HostUnreachable,
    LimosaError,
    OutcomeUnknown,
    from_fault,
)
from limosa.host.bandwidth import MBIT_BYTES, Bandwidth
from limosa.host.calling import Caller
from limosa.host.expectation import expect, resident_bytes
from limosa.host.faults import Obstacle, internal, unforeseen
from limosa.host.home import HomeHere
from limosa.host.own_disks import OwnDisks
from limosa.host.parts import Parts
from limosa.host.peers import dial
from limosa.host.slots import Place, Slots
from limosa.host.views import CANCEL_WITHIN_S, Views, not_cancelled_yet
from limosa.host.vms import HostedVm
from limosa.migration.examination import Examined, Question, examine
from limosa.migration.home import Terms
from limosa.migration.interruption import restarted
from limosa.migration.journal import Header, Journal, new_identity
from limosa.migration.ownership import SOURCE_ENDED, SourceStep
from limosa.migration.peer import Dialler
from limosa.migration.report import Report
from limosa.migration.settle import Settlement
from limosa.migration.source import SourceMove, by_terms
from limosa.model import reading
from limosa.model.base import is_name
from limosa.model.facts import VmFacts
from limosa.model.finding import Finding, Severity
from limosa.model.migration import Migration, Outcome, Phase, Progress, Side
from limosa.model.units import MIB
from limosa.model.vm import VmState
from limosa.qemu.protocol import MachineProtocol
from limosa.settings.address import split_address
from limosa.wire.api import CheckReport, CheckRequest, Expected, MoveOptions, MoveRequest

#: Between attempts to settle a move that could not be, because the disk is full for one.
SETTLE_EVERY_S = 2.0


class Outgoing:
    """All moves from this host."""

    def __init__(self, parts: Parts, pki: Path, views: Views) -> None:
        self._parts = parts
        self.host = parts.name
        self.slots = Slots(lambda: parts.page.now.max_outgoing)
        self._pki = pki
        self._vms = parts.vms
        self._page = parts.page
        self._views = views
        self._active: dict[str, SourceMove] = {}
        self._bandwidth = Bandwidth(parts.page, self._active, parts.relays)
        self._settling: dict[str, Settlement] = {}
        self._background = Background()
        parts.page.on_change(self._on_page)

    @property
    def under_way(self) -> int:
        """How many there are that wait in no line, and are not being undone."""
        moves = (move for name, move in self._active.items() if name not in self._settling)
        return sum(move.report.now.phase is not Phase.WAITING for move in moves)

    # What clients ask

    async def check(self, request: CheckRequest) -> CheckReport:
        """Every finding against a move, also that the destination cannot be reached at all."""
        hosted = self._vms.get(request.vm)
        try:
            peer = await self._dialler(request.destination)()
            try:
                destination = peer.host
                facts = self._facts(hosted, request.options)
                disks_here = OwnDisks(self._parts, hosted)
                examined = await examine(peer, self._question(hosted, request.options), facts, disks_here)
                findings, route, disks, layers = examined.findings, examined.route, examined.disks, examined.layers
                expected: Expected | None = self._expect(hosted, examined, request.options)
            finally:
                await peer.close()
        except HostUnreachable as error:
            destination = request.destination
            todo = error.todo or "see the logs of both hosts"
            findings = (Finding.error(error.code, str(error), todo),)
            route, disks, layers, expected = None, (), (), None
        possible = all(finding.severity is not Severity.ERROR for finding in findings)
        return CheckReport(
            vm=request.vm,
            source=self.host,
            destination=destination,
            possible=possible,
            findings=findings,
            route=route,
            disks=disks,
            layers=layers,
            expected=expected,
        )

    def _expect(self, hosted: HostedVm, examined: Examined, options: MoveOptions) -> Expected:
        memory = hosted.config.memory_mib * MIB
        resident = resident_bytes(hosted.machine.pid) if hosted.machine is not None else None
        return expect(
            examined,
            min(memory, resident) if resident is not None else memory,
            self._terms(options).policy,
            lambda kind: _least(self._bandwidth.alone(kind, examined.route), _own_cap(options)),
        )

    async def _facts(self, hosted: HostedVm, options: MoveOptions) -> VmFacts:
        return by_terms(await self._parts.inspector.vm_facts(hosted), self._terms(options), _own_cap(options))

    def _question(self, hosted: HostedVm, options: MoveOptions) -> Question:
        return Question(
            vm=hosted.config,
            source=self.host,
            accelerator=hosted.accelerator or "tcg",
            transport=options.transport or self._page.now.transport,
            storage=options.storage,
            chain=options.chain,
            tag=new_identity(),
            keep=options.keep,
        )

    async def move(self, request: MoveRequest) -> Migration:
        """Accept a move, durably, and begin it or put it in line. Raises :class:`Conflict`; nothing is kept then."""
        hosted = self._vms.get(request.vm)
        if hosted.machine is None or hosted.state not in (VmState.RUNNING, VmState.PAUSED):
            raise Conflict(f"VM '{request.vm}' is {hosted.state}", todo="start it first", vm=request.vm, host=self.host)
        self._vms.check_movable(hosted)
        name = split_address(request.destination)[0]
        header = Header(
            migration=new_identity(),
            side=Side.SOURCE,
            vm=hosted.config,
            accelerator=hosted.accelerator_in_use,
            source=self.host,
            destination=name if is_name(name) else "unnamed",
            address=request.destination,
            accepted_at=time.time(),
            boot=self._parts.boot,
            options=msgspec.to_builtins(request.options),
            was_running=hosted.state is VmState.RUNNING,
        )
        hosted.migration, machine = header.migration, hosted.machine
        try:
            journal = await in_full(Journal.begin, self._parts.files.migrations, header)
        except LimosaError:
            hosted.migration = None
            raise
        return self._begin(journal, hosted, machine)  # also if that has ended meanwhile, which the move will find

    async def cancel(self, migration: str) -> Migration:
        """Cancel a move. Raises :class:`Conflict` if it has ended or the VM is handed over, and
        :class:`OutcomeUnknown` if something does not answer that is needed for it: it is cancelled as soon as that
        does, if it still can be then."""
        view = self._views.show(migration)
        move = self._active.get(migration)
        if move is None or view.outcome is not Outcome.UNDER_WAY or move.handed_over.done():
            raise _too_late(view, self.host)
        move.cancel()
        ended = asyncio.ensure_future(self._views.ended(migration))
        either: set[asyncio.Future[Any]] = {ended, move.handed_over}
        try:
            await asyncio.wait(either, timeout=CANCEL_WITHIN_S, return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                return ended.result()
            if move.handed_over.done():
                raise _too_late(self._views.show(migration), self.host)
            raise self._not_yet(move)
        finally:
            ended.cancel()

    def _not_yet(self, move: SourceMove) -> OutcomeUnknown:
        """What is to be said of a cancel that takes longer."""
        settlement, view = self._settling.get(move.header.migration), self._views.show(move.header.migration)
        awaited = settlement.awaits if settlement is not None else "what was under way has not ended"
        return not_cancelled_yet(view, f"VM '{view.vm}'", awaited, self.host)

    async def resolve(self, migration: str, owner: Side) -> Migration:
        """A person says who owns the VM. Raises :class:`Conflict` if that is known, or cannot be."""
        view = self._views.show(migration)
        settlement = self._settling.get(migration)
        if settlement is None or view.outcome is not Outcome.UNRESOLVED:
            raise Conflict(f"the move of VM '{view.vm}' needs no decision", vm=view.vm, host=self.host)
        settlement.resolve(owner)
        return view

    # How moves are conducted

    async def recover(self, journal: Journal) -> None:
        """Take up a move that a restart found: from the line if it waited there, else settle it."""
        if journal.step is not None and SourceStep(journal.step) in SOURCE_ENDED:
            if not self._views.recall(journal.header.migration):
                self._tell_of(journal)
            return
        hosted = self._vms.find(journal.header.vm.name)
        if hosted is not None and hosted.config.uuid != journal.header.vm.uuid:
            hosted = None  # another VM that was given the name meanwhile
        if journal.step == SourceStep.HOME:
            hosted = None  # its users have had it since, and may have moved it away
        if journal.step == SourceStep.CONFIRMED and hosted is None:
            hosted = self._vms.hold_name(journal.header.vm)
        if hosted is not None:
            hosted.migration = journal.header.migration
        if journal.step is None and hosted is not None and hosted.machine is not None:
            self._begin(journal, hosted, hosted.machine)
        else:
            self._begin(journal, hosted, hosted.machine if hosted is not None else None, settle=True)

    def _tell_of(self, journal: Journal) -> None:
        """Show how a move ended of which an earlier daemon had no time to keep more than the journal."""
        header = journal.header
        view = self._first_view(header, str(header.options.get("transport") or self._page.now.transport))
        if journal.step == SourceStep.FINISHED:
            progress = msgspec.structs.replace(view.progress, percent=100.0)
            view = msgspec.structs.replace(view, phase=Phase.TEAR_DOWN, outcome=Outcome.COMPLETED, progress=progress)
        else:
            cause = _cause_in(journal) or restarted(header.vm.name, self.host)
            outcome = Outcome.CANCELLED if isinstance(cause, Cancelled) else Outcome.FAILED
            view = msgspec.structs.replace(view, phase=Phase.BUILD_UP, outcome=outcome, fault=cause.fault())
        self._views.publish(view)

    def _begin(
        self, journal: Journal, hosted: HostedVm | None, machine: MachineProtocol | None, *, settle: bool = False
    ) -> Migration:
        header = journal.header
        options = reading.convert(header.options, MoveOptions)
        terms = self._terms(options)
        first = self._left_view(journal) if settle else None
        report = Report(first or self._first_view(header, terms.transport), self._views.publish)
        place = Place(self.slots)
        home = HomeHere(self._parts, hosted, self._bandwidth, header.migration, _own_cap(options), place)
        move = SourceMove(journal, machine, self._dialler(header.address, report.mention), home, terms, report)
        self._active[header.migration] = move
        self._views.publish(report.now)
        self._background.spawn(self._settle(move, None) if settle else self._conduct(move, place, options))
        return report.now

    async def _conduct(self, move: SourceMove, place: Place, options: MoveOptions) -> None:
        try:
            try:
                await move.guard(place.take(move.report.line("other moves of this host")))
                move.begin_on(self._terms(options))  # settings may have changed while it waited
                await move.guard(self._bandwidth.share())
                await move.run()
            finally:
                place.give_back()  # to settle it sends nothing, and may take as long as its destination is away
            move.report.end(Outcome.COMPLETED)
        except LimosaError as error:
            await self._settle(move, error)
        except Exception as error:  # noqa: BLE001 - a fault of ours must not leave a VM without an owner
            await self._settle(move, self._internal(move, error))
        finally:
            self._ended(move)
            await self._bandwidth.share()

    async def _settle(self, move: SourceMove, cause: LimosaError | None) -> None:
        cause = cause or _cause_in(move.journal) or restarted(move.header.vm.name, self.host)
        settlement = Settlement(move, cause, rebooted=move.header.boot != self._parts.boot)
        self._settling[move.header.migration] = settlement
        obstacle = Obstacle(f"move {move.header.migration} of VM {move.header.vm.name} could not be settled yet")
        try:
            while True:
                if await self._is_settled(settlement, obstacle):
                    break
                await asyncio.sleep(SETTLE_EVERY_S)
        finally:
            self._settling.pop(move.header.migration, None)
            self._ended(move)

    async def _is_settled(self, settlement: Settlement, obstacle: Obstacle) -> bool:
        """Try once. What could not be written, because the disk is full, was not done either; it is tried again."""
        move = settlement.move
        try:
            await settlement.run()
        except Exception as error:  # noqa: BLE001 - a fault of ours must not leave a VM without an owner
            obstacle.met(error)
            if not isinstance(error, LimosaError):
                error = unforeseen(error, vm=move.header.vm.name, host=self.host)
            fault, now = error.fault(), move.report.now
            # Of a move that has failed people know all they need: its VM is theirs.
            if now.outcome not in (Outcome.FAILED, Outcome.CANCELLED) and now.fault != fault:
                move.report.end(Outcome.UNRESOLVED, fault)
            return False
        return True

    def _internal(self, move: SourceMove, error: Exception) -> LimosaError:
        header = move.header
        return internal(error, f"move {header.migration}", vm=header.vm.name, host=self.host)

    def _ended(self, move: SourceMove) -> None:
        if move.peer is not None:
            peer, move.peer = move.peer, None
            self._background.spawn(peer.close())
        move.journal.close()
        self._active.pop(move.header.migration, None)

    def _dialler(self, destination: str, tell: Callable[[str], None] = lambda _: None) -> Dialler:
        caller = Caller(destination, lambda: self._page.now.peers.get(destination, destination), self.host, self._pki)
        return lambda: dial(caller, tell)

    def _terms(self, options: MoveOptions) -> Terms:
        settings = self._page.now
        policy = settings.convergence
        changes: dict[str, Any] = {}
        if options.blackout_budget_ms is not None:
            changes["blackout_budget_ms"] = options.blackout_budget_ms
            changes["first_downtime_ms"] = min(policy.first_downtime_ms, options.blackout_budget_ms)
        if options.post_copy is not None:
            changes["post_copy"] = options.post_copy
        transport = options.transport or settings.transport
        policy = msgspec.structs.replace(policy, **changes)
        pin_all = settings.rdma_pin_all if options.rdma_pin_all is None else options.rdma_pin_all
        return Terms(policy, transport, settings.encrypt, options.storage, options.chain, options.keep, pin_all)

    async def limit(self, migration: str, mbit_per_s: int) -> Migration:
        """Cap a move that is under way, 0: no cap of its own.

        Raises :class:`Conflict` if it has ended, or goes by RDMA.
        """
        view = self._views.show(migration)
        move = self._active.get(migration)
        if move is None or view.outcome is not Outcome.UNDER_WAY:
            raise Conflict(f"the move of VM '{view.vm}' has ended", vm=view.vm, host=self.host)
        if mbit_per_s and view.route is not None and view.route.transport == "rdma":
            raise Conflict(
                f"the move of VM '{view.vm}' uses RDMA, which QEMU cannot cap",
                todo="cancel it and move the VM again with a cap, so that it uses TCP",
                vm=view.vm,
                host=self.host,
            )
        move.home.own_cap = mbit_per_s * MBIT_BYTES
        await self._bandwidth.share()
        return self._views.show(migration)

    def _on_page(self) -> None:
        self.slots.admit()
        self._background.spawn(self._bandwidth.share())

    def _left_view(self, journal: Journal) -> Migration | None:
        """What an earlier daemon showed last of a move that it could not settle, where that holds still: that it
        waits for a person, or has failed and only its destination does not know that yet."""
        view = self._views.kept(journal.header.migration)
        if view is None:
            return None
        has_failed = journal.step == SourceStep.HOME and view.outcome in (Outcome.FAILED, Outcome.CANCELLED)
        return view if has_failed or view.outcome is Outcome.UNRESOLVED else None

    def _first_view(self, header: Header, transport: str) -> Migration:
        return Migration(
            id=header.migration,
            vm=header.vm.name,
            source=header.source,
            destination=header.destination,
            side=Side.SOURCE,
            transport=transport,
            phase=Phase.WAITING,
            outcome=Outcome.UNDER_WAY,
            progress=Progress(),
            accepted_at=header.accepted_at,
        )


def _own_cap(options: MoveOptions) -> int:
    """The cap of one move, in bytes a second; 0: none."""
    return (options.bandwidth_mbit_per_s or 0) * MBIT_BYTES


def _least(*caps: int) -> int:
    """The lowest of caps of which 0 is none."""
    return min((cap for cap in caps if cap), default=0)


def _cause_in(journal: Journal) -> LimosaError | None:
    """Why an earlier daemon began to undo the move, if it did."""
    return next((from_fault(record.fault) for record in journal.records if record.fault is not None), None)


def _too_late(view: Migration, host: str) -> Conflict:
    """Why a move cannot be cancelled any more."""
    if view.outcome is Outcome.COMPLETED:
        why = f"it has completed; the VM is on host '{view.destination}'"
    elif view.outcome is Outcome.UNRESOLVED and view.fault is not None:
        why = str(from_fault(view.fault))
    elif view.outcome is not Outcome.UNDER_WAY:
        why = f"it has ended: {view.outcome}"
    else:
        why = f"the VM is handed over to host '{view.destination}'"
    return Conflict(f"the move of VM '{view.vm}' cannot be cancelled any more", why=why, vm=view.vm, host=host)
