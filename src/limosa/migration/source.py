"""The source's side of a move; ``SourceMove.run`` reads as the protocol.

::

    build-up      preflight; the destination builds everything while our QEMU is set up
    copy          QEMU sends memory, QEMU to QEMU
    synchronise   QEMU sends again what the guest wrote meanwhile; the convergence policy watches
    switchover    QEMU stops the guest, sends the rest and reports ``completed``; the destination takes over
    tear-down     the destination is durable; QEMU here ends and the VM is forgotten

Until the switchover the move can be cancelled and every failure leaves the guest running here. Whatever breaks, and
wherever, ``settle`` brings it to an end; it is also where a restarted daemon begins.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import msgspec

from limosa.errors import Cancelled, LimosaError, MigrationFailed, NotConverging, PreflightRefused, QemuGone
from limosa.migration import again, convergence, preflight, progress
from limosa.migration.convergence import Convergence
from limosa.migration.journal import Journal
from limosa.migration.ownership import SourceStep
from limosa.migration.paths import Paths
from limosa.migration.peer import Dialler, Peer
from limosa.migration.report import Report
from limosa.model.facts import VmFacts
from limosa.model.finding import Finding, Severity
from limosa.model.migration import Phase
from limosa.model.network import HostNetwork
from limosa.model.route import Route
from limosa.model.vm import Accelerator, VmConfig
from limosa.qemu.protocol import Event, MachineProtocol, MigrationState, MigrationStatistics, StreamParameters
from limosa.security.stream import make_credentials
from limosa.settings.host import ConvergencePolicy
from limosa.transport import tcp
from limosa.transport.advise import between, not_by_rdma
from limosa.transport.channel import Channel
from limosa.transport.choice import Ends, choose, connected
from limosa.wire.peer import Prepare, Prepared

LOOK_EVERY_S = 0.2

T = TypeVar("T")


@dataclass(frozen=True)
class Terms:
    """Under which terms a VM moves: the host's settings with what was asked for this move."""

    policy: ConvergencePolicy
    transport: str
    encrypt: bool
    rdma_pin_all: bool = False
    #: why RDMA, by which the move began, is not to be tried again; empty if it was not tried
    rdma_failed: str = ""

    def without_post_copy(self) -> Terms:
        """The same, with post-copy forbidden."""
        return replace(self, policy=msgspec.structs.replace(self.policy, post_copy=False))


class Home(Protocol):
    """What the script needs of the host it runs on."""

    async def facts(self) -> VmFacts:
        """What preflight needs to know about the VM here."""

    def carry_on(self) -> dict[str, str]:
        """Small files of the VM's own that go along, base64 by name."""

    async def connect(self, route: Route, prepared: Prepared) -> Channel:
        """A connection to the destination for the guest's memory, by the transport of ``route``.

        Raises :class:`DestinationLost` and :class:`NetworkError`.
        """

    def networks(self) -> AsyncIterator[HostNetwork]:
        """This host's network, again after each change."""

    def bandwidth(self) -> int:
        """Bytes per second this move may use now, 0: no cap."""

    async def end_qemu(self) -> None:
        """End the VM's QEMU here, which will never run the guest again."""

    async def vm_left(self) -> None:
        """The VM belongs to the destination, durably: forget it here, durably."""

    async def vm_stays(self) -> None:
        """The VM goes on here; it may be operated again."""

    async def vm_crashed(self) -> None:
        """The VM's QEMU died here before anything was handed over."""


class SourceMove:
    """One move. Made by the host daemon, which calls :meth:`run` once, or ``settle`` after a restart."""

    def __init__(
        self,
        journal: Journal,
        machine: MachineProtocol | None,
        dial: Dialler,
        home: Home,
        terms: Terms,
        report: Report,
    ) -> None:
        self.journal = journal
        self.header = journal.header
        self.machine = machine
        self.dial = dial
        self.home = home
        self.terms = self._asked = terms
        self.report = report
        self.peer: Peer | None = None
        self.channel: Channel | None = None
        self.examined: Examined | None = None
        self.paths: Paths | None = None
        loop = asyncio.get_running_loop()
        #: done when a person cancels
        self.cancelled: asyncio.Future[None] = loop.create_future()
        #: done with the state in which QEMU's migration ended, or passed the point of no return
        self.sent: asyncio.Future[MigrationState] = loop.create_future()
        self.stopped_at: float | None = None
        self._latest: MigrationStatistics | None = None

    async def run(self) -> None:
        """Move the VM. Raises what went wrong; then nothing is settled yet."""
        assert self.machine is not None
        unsubscribe = self.machine.on_event(self._on_event)
        try:
            try:
                await self.send(self.machine)
            except LimosaError as failure:
                if not again.may_follow(self, failure):
                    raise
                await self._without_rdma(self.machine, failure)
                await self.send(self.machine)
            await self.switch_over(self.machine)
            await self.tear_down()
        finally:
            unsubscribe()
            self._close_channel()

    async def send(self, machine: MachineProtocol) -> None:
        """Everything before the switchover."""
        self.report.enter(Phase.BUILD_UP)
        self.peer = await self.guard(self.dial())
        prepared = await self.guard(self.build_up(machine, self.peer))
        self.report.enter(Phase.COPY)
        await self.guard(self.copy(machine, prepared))

    async def _without_rdma(self, machine: MachineProtocol, failure: LimosaError) -> None:
        """Put everything back to where it was before RDMA was tried."""
        self.report.note(f"RDMA failed ({failure}); it begins again by another way")
        self._close_channel()
        if self.peer is not None:
            peer, self.peer = self.peer, None  # its loss, if it comes, is not to interrupt what follows
            await peer.close()
        await self.guard(again.undo(self, machine, failure))
        self.terms = replace(self._asked, rdma_failed=str(failure))
        self.sent = asyncio.get_running_loop().create_future()
        self.stopped_at = None

    async def build_up(self, machine: MachineProtocol, peer: Peer) -> Prepared:
        """Check, then have the destination build everything while QEMU here is set up."""
        examined = await self.check(peer)
        self.journal.record(SourceStep.PREPARING, time.time())
        server, client = make_credentials() if self.terms.encrypt else (None, None)
        request = Prepare(
            migration=self.header.migration,
            vm=self.header.vm,
            accelerator=self.header.accelerator,
            transport=examined.route.transport,
            addresses=tuple(path.there for path in examined.route.paths),
            networks=connected(examined.ends.here),
            credentials=server,
            post_copy=self.terms.policy.post_copy,
            streams=tuple(path.streams for path in examined.route.paths),
            rdma_pin_all=self.terms.rdma_pin_all,
            running=self.header.was_running,
            files=self.home.carry_on(),
        )
        parameters = StreamParameters(
            credentials=client,
            downtime_limit_ms=self.terms.policy.first_downtime_ms,
            bandwidth_bytes_per_s=self.home.bandwidth(),
            post_copy=self.terms.policy.post_copy,
            rdma=examined.route.transport == "rdma",
            rdma_pin_all=self.terms.rdma_pin_all,
        )
        prepared, _ = await _both(peer.prepare(request, self._in_line), machine.prepare_outgoing(parameters))
        return prepared

    async def check(self, peer: Peer) -> Examined:
        """Preflight. Raises :class:`PreflightRefused` with all findings if one is an error."""
        header = self.header
        examined = self.examined = await examine(
            peer,
            header.vm,
            header.source,
            header.accelerator,
            self._facts(),
            self.terms.transport,
            self.terms.rdma_failed,
        )
        findings = examined.findings
        if any(finding.severity is Severity.ERROR for finding in findings):
            raise PreflightRefused(findings, vm=self.header.vm.name, host=peer.host)
        # Post-copy by RDMA is a way of QEMU's that hardly anybody goes, and a guest is lost with it if it fails.
        if examined.route.transport == "rdma" or any(one.code == "post-copy-not-possible" for one in findings):
            self.terms = self.terms.without_post_copy()
        self.report.change(findings=findings, transport=examined.route.transport, route=examined.route)
        return examined

    async def _facts(self) -> VmFacts:
        # What was asked for this move counts, not what the host's settings say.
        facts = await self.home.facts()
        network = msgspec.structs.replace(facts.network, encrypt=self.terms.encrypt)
        return msgspec.structs.replace(
            facts, post_copy=self.terms.policy.post_copy, network=network, capped=self.home.bandwidth() > 0
        )

    async def copy(self, machine: MachineProtocol, prepared: Prepared) -> None:
        """Send memory until QEMU reports that everything was sent and loaded."""
        assert self.examined is not None
        assert self.peer is not None
        self.journal.record(SourceStep.MIGRATING, time.time(), durable=False)
        self.channel = await self.home.connect(self.examined.route, prepared)
        self.paths = Paths(self.examined.route, self.examined.ends, self.channel)
        await machine.migrate(self.channel.stream)
        watch = asyncio.ensure_future(self._watch(machine))
        follow = asyncio.ensure_future(self.paths.follow(self.home.networks(), self.peer))
        try:
            # Looking must not delay the hand-over, so it goes on beside the waiting.
            waiting: set[asyncio.Future[Any]] = {self.sent, watch}
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if not self.sent.done():
                watch.result()
        finally:
            watch.cancel()
            follow.cancel()
        state = self.sent.result()
        if state not in (MigrationState.COMPLETED, MigrationState.POSTCOPY_ACTIVE):
            raise await self._failure(machine, state)

    async def switch_over(self, machine: MachineProtocol) -> None:
        """Give the destination the word. From here on only ``settle`` may let the guest run here again."""
        assert self.peer is not None
        self.journal.record(SourceStep.HANDING_OVER, time.time(), durable=False)
        running = await self.peer.take_over()
        self.report.enter(Phase.TEAR_DOWN)
        if running.resumed_at is not None and self.stopped_at is not None:
            self.report.change(blackout_ms=round(1000 * (running.resumed_at - self.stopped_at), 3))
        if self.sent.result() is MigrationState.COMPLETED:
            await self._last_figures(machine)

    async def tear_down(self) -> None:
        """Wait until the destination is durable, then end QEMU here and forget the VM."""
        if self.machine is not None:
            await self._everything_followed(self.machine)
        # The guest runs there, so this copy of its memory is of no use any more; its files are, until that is durable.
        await _both(self._confirm(), self.home.end_qemu())
        await self.home.vm_left()
        self.journal.record(SourceStep.FINISHED, time.time(), durable=False)

    async def _confirm(self) -> None:
        if self.peer is not None:
            await self.peer.adopted()
        self.journal.record(SourceStep.CONFIRMED, time.time())

    async def _everything_followed(self, machine: MachineProtocol) -> None:
        """After a post-copy: QEMU here must live until the destination has fetched all memory."""
        try:
            while (await machine.migration()).state in POST_COPY:
                self.report.note("the guest runs at the destination, the rest of its memory follows")
                await asyncio.sleep(LOOK_EVERY_S)
            if self.sent.done() and self.sent.result() in POST_COPY:
                await self._last_figures(machine)
        except QemuGone:
            return

    def cancel(self) -> None:
        """Have the move cancelled at the next moment at which that is possible."""
        if not self.cancelled.done():
            self.cancelled.set_result(None)

    async def guard(self, work: Coroutine[Any, Any, T]) -> T:
        """Do ``work`` unless a person cancels, QEMU dies or the session breaks, which raises."""
        assert self.machine is not None
        task = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(self.machine.gone.wait())
        lost = {self.peer.lost} if self.peer is not None else set()
        try:
            await asyncio.wait({task, gone, self.cancelled, *lost}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                self._interrupted(gone)
            return await task
        finally:
            gone.cancel()
            if not task.done():
                task.cancel()
                await asyncio.wait({task})

    def _interrupted(self, gone: asyncio.Future[Any]) -> None:
        vm, host = self.header.vm.name, self.header.destination
        if self.cancelled.done():
            raise Cancelled(f"the move of VM '{vm}' to host '{host}' was cancelled", vm=vm, host=host)
        if gone.done():
            raise QemuGone(f"QEMU of VM '{vm}' ended during the move", vm=vm, host=self.header.source)
        if self.peer is not None and self.peer.lost.done():
            self.peer.lost.result()

    def _close_channel(self) -> None:
        """Ours must not outlive QEMU's, whose end is the end of the stream."""
        if self.channel is not None:
            self.channel.close()
            self.channel = None

    def _in_line(self, place: int) -> None:
        if place == 0:
            self.report.enter(Phase.BUILD_UP)
        else:
            self.report.wait_in_line(place, f"a slot on host '{self.header.destination}'")

    def _on_event(self, event: Event) -> None:
        match event.name:
            case "STOP":
                self.stopped_at = event.at
                self.report.enter(Phase.SWITCHOVER, silently=True)
            case "MIGRATION_PASS" if event.data.get("pass", 0) > 1 and self.report.now.phase is Phase.COPY:
                self.report.enter(Phase.SYNCHRONISE)
                if self.channel is not None:
                    self.channel.shorten()
            case "MIGRATION":
                state = MigrationState(event.data["status"])
                if state in ENDINGS and not self.sent.done():
                    self.sent.set_result(state)

    async def _watch(self, machine: MachineProtocol) -> None:
        judge = Convergence.begin(self.terms.policy)
        while True:
            judge = await self._look(machine, judge, await machine.migration())
            await asyncio.sleep(LOOK_EVERY_S)

    async def _look(self, machine: MachineProtocol, judge: Convergence, look: MigrationStatistics) -> Convergence:
        self._latest = look
        if look.state is not MigrationState.ACTIVE:
            return judge
        judge, action = judge.judge(time.monotonic(), look)
        await self._act(machine, action)
        self.report.bar = self.report.bar.moved(self.report.now.phase, look)
        note = "" if isinstance(action, convergence.GiveUp) else action.note
        shown = progress.progress(self.report.bar, look, limit_ms=judge.downtime_limit_ms, note=note)
        self.report.change(progress=shown, route=self._route())
        return judge

    async def _act(self, machine: MachineProtocol, action: convergence.Action) -> None:
        match action:
            case convergence.RaiseDowntimeLimit(milliseconds):
                await machine.set_downtime_limit(milliseconds)
            case convergence.Throttle(percent):
                await machine.set_throttle(percent, convergence.THROTTLE_STEP_PERCENT)
            case convergence.StartPostCopy():
                await machine.start_post_copy()
            case convergence.GiveUp(why):
                vm = self.header.vm.name
                raise NotConverging(
                    f"the move of VM '{vm}' does not converge",
                    why=why,
                    todo="allow a longer blackout (--blackout-budget), post-copy, or move it when it is quieter",
                    vm=vm,
                    host=self.header.destination,
                )

    async def _failure(self, machine: MachineProtocol, state: MigrationState) -> LimosaError:
        error = (await machine.migration()).error or f"QEMU reports {state}"
        vm, host = self.header.vm.name, self.header.destination
        return MigrationFailed(
            f"QEMU could not move VM '{vm}' to host '{host}'", why=error, todo="see the logs of both", vm=vm, host=host
        )

    async def _last_figures(self, machine: MachineProtocol) -> None:
        look = await machine.migration()
        shown = progress.progress(self.report.bar, look, limit_ms=0, note="")
        self.report.change(
            progress=shown, transfer_s=look.total_s, qemu_downtime_ms=look.downtime_ms, route=self._route()
        )

    def _route(self) -> Route | None:
        return self.paths.look() if self.paths is not None else self.report.now.route


POST_COPY = frozenset(
    {
        MigrationState.POSTCOPY_ACTIVE,
        MigrationState.POSTCOPY_PAUSED,
        MigrationState.POSTCOPY_RECOVER,
        MigrationState.POSTCOPY_RECOVER_SETUP,
    }
)
ENDINGS = frozenset(
    {
        MigrationState.COMPLETED,
        MigrationState.FAILED,
        MigrationState.CANCELLED,
        MigrationState.POSTCOPY_ACTIVE,
    }
)


@dataclass(frozen=True)
class Examined:
    """What stands against a move, and the way it would take between which ends."""

    findings: tuple[Finding, ...]
    route: Route
    ends: Ends


async def examine(
    peer: Peer,
    vm: VmConfig,
    source: str,
    accelerator: Accelerator,
    facts: Coroutine[Any, Any, VmFacts],
    transport: str,
    rdma_failed: str = "",
) -> Examined:
    """Ask the destination, try its ports, choose the way, and judge. The same for ``limosa check`` and for the move.

    ``facts`` are gathered here while the destination gathers its own. ``rdma_failed``: see :func:`choose`.
    """
    (there, skew), here = await _both(peer.inspect(vm, accelerator), facts)
    ends = Ends(source, there.host, here.network, there.network, there.addresses, vm.memory_mib, here.capped)
    route = await _open_route(ends, transport, there.trial_port, rdma_failed)
    findings = preflight.check(vm, source, here, there, clock_skew_s=skew, reachable=bool(route.paths))
    wanted = (not_by_rdma(route),) if route.transport != "rdma" and (transport == "rdma" or rdma_failed) else ()
    return Examined((*findings, *wanted, *between(ends, route)), route, ends)


async def _open_route(ends: Ends, transport: str, port: int, rdma_failed: str) -> Route:
    """The best route of which every path can be connected; one without paths if there is none."""
    open_: set[str] = set()
    blocked: set[str] = set() if port else set(ends.offered)
    while True:
        route = choose(ends, transport, blocked, rdma_failed=rdma_failed)
        untried = [path.there for path in route.paths if path.there not in open_]
        if not untried:
            return route
        answers = await asyncio.gather(*(tcp.reachable(address, port) for address in untried))
        for address, answer in zip(untried, answers, strict=True):
            (open_ if answer else blocked).add(address)


async def _both(first: Coroutine[Any, Any, T], second: Coroutine[Any, Any, Any]) -> tuple[T, Any]:
    """Do both at once; if one fails, the other is cancelled and the failure raised."""
    try:
        async with asyncio.TaskGroup() as group:
            one, two = group.create_task(first), group.create_task(second)
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return one.result(), two.result()
