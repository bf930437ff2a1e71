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
from collections.abc import Awaitable, Coroutine, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import msgspec

from limosa.background import in_full
from limosa.errors import Cancelled, DestinationLost, LimosaError, MigrationFailed, PreflightRefused, QemuGone
from limosa.migration import again, layers, rest
from limosa.migration.disks import copies, landed, not_deleted
from limosa.migration.examination import Examined, Question, both, examine
from limosa.migration.figures import Figures, by_our_clock
from limosa.migration.home import Home, Terms
from limosa.migration.interruption import unless
from limosa.migration.journal import Journal
from limosa.migration.mirrors import Mirrors
from limosa.migration.ownership import SourceStep
from limosa.migration.paths import Paths
from limosa.migration.peer import Dialler, Peer
from limosa.migration.report import Report
from limosa.migration.steering import Steering
from limosa.model.facts import VmFacts
from limosa.model.finding import Severity
from limosa.model.migration import Phase
from limosa.qemu.protocol import (
    POST_COPY,
    PRE_COPY_ENDINGS,
    SWITCHED_OVER,
    Event,
    MachineProtocol,
    MigrationState,
    MigrationStatistics,
    StreamParameters,
)
from limosa.security.stream import make_credentials
from limosa.transport.choice import connected
from limosa.transport.shares import Kind
from limosa.wire.peer import Prepare, Prepared, StreamCredentials

LOOK_EVERY_S = 0.2
#: How long a QEMU may be silent and send nothing, if it may have the guest wait meanwhile.
QEMU_SILENT_S = 3.0
#: From the end of the stream to the destination's word that its QEMU has ended.
LAST_WORDS_WITHIN_S = 1.0

T = TypeVar("T")


def by_terms(facts: VmFacts, terms: Terms, own_cap: int) -> VmFacts:
    """What was asked for a move counts, not what the host's settings say. ``own_cap``: bytes a second, 0 for none."""
    network = msgspec.structs.replace(facts.network, encrypt=terms.encrypt)
    capped = facts.capped or own_cap > 0
    return msgspec.structs.replace(facts, post_copy=terms.policy.post_copy, network=network, capped=capped)


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
        self.figures = Figures(report, home)
        self.peer: Peer | None = None
        self.examined: Examined | None = None
        loop = asyncio.get_running_loop()
        #: done when a person cancels
        self.cancelled: asyncio.Future[None] = loop.create_future()
        #: done when the destination is given its word, or is known to own the VM: the move cannot be cancelled any more
        self.handed_over: asyncio.Future[None] = loop.create_future()
        if any(record.step == SourceStep.HANDING_OVER for record in journal.records):
            self.handed_over.set_result(None)
        self.disk_credentials: StreamCredentials | None = None
        #: why the first stream of a try could not be connected
        self.unreached: DestinationLost | None = None
        self._begun_again_for: set[again.Why] = set()
        self._begin_try()

    def _begin_try(self) -> None:
        """Nothing is under way yet."""
        #: from the moment at which the destination awaits the streams
        self.steering: Steering | None = None
        loop = asyncio.get_running_loop()
        #: done when QEMU waits before the switchover, with the guest stopped
        self.before_switchover: asyncio.Future[None] = loop.create_future()
        #: done with the state in which QEMU's migration ended, or passed the point of no return
        self.sent: asyncio.Future[MigrationState] = loop.create_future()
        #: whether QEMU can slow the guest
        self._slows = False
        #: whether it may have the guest wait for the network, if it is to be slowed
        self._waits_with_guest = False
        self._sent_at: float | None = None
        self.stopped_at: float | None = None

    def begin_on(self, terms: Terms) -> None:
        """Take other terms than at first. To be called before :meth:`run`."""
        self.terms = self._asked = terms

    async def run(self) -> None:
        """Move the VM. Raises what went wrong; then nothing is settled yet."""
        assert self.machine is not None
        unsubscribe = self.machine.on_event(self._on_event)
        try:
            while True:
                try:
                    await self.send(self.machine)
                    break
                except LimosaError as failure:
                    why = again.why(self, failure)
                    if why is None or why in self._begun_again_for:
                        raise
                    await self._begin_again(self.machine, failure, why)
            await self.switch_over(self.machine)
            await self.tear_down()
        except LimosaError:
            if self.steering is not None:
                self.steering.cut_off(sent=self.sent.done())
            raise
        finally:
            unsubscribe()
            self.figures.learn()
            self._close_channels()

    async def send(self, machine: MachineProtocol) -> None:
        """Everything before the switchover."""
        self.report.enter(Phase.BUILD_UP)
        self.peer = await self.guard(self.dial())
        prepared = await self.guard(self.build_up(machine, self.peer))
        steering = self.steering = Steering(
            machine, self.header, self.terms.policy, self.home.bandwidth, slows=self._slows
        )
        if copies(self.report.now.disks):
            self.report.enter(Phase.STORAGE)
            await self.guard(self.copy_disks(steering, prepared))
        self.report.enter(Phase.COPY)
        await self.guarded_copy(machine, steering, prepared)

    async def _begin_again(self, machine: MachineProtocol, failure: LimosaError, why: again.Why) -> None:
        """Put everything back to where it was before the first try."""
        self._begun_again_for.add(why)
        self.report.note(again.note(why, failure))
        self._close_channels()
        if self.peer is not None:
            peer, self.peer = self.peer, None  # its loss, if it comes, is not to interrupt what follows
            await peer.close()
        await self.guard(again.undo(self, machine, failure))
        self._asked = self.terms = again.terms(self._asked, why, failure)
        self._begin_try()

    async def first(self, connecting: Awaitable[T]) -> T:
        """The first stream of a try: the ways were tried, but maybe long ago."""
        try:
            return await connecting
        except DestinationLost as error:
            self.unreached = error
            raise

    def _close_channels(self) -> None:
        if self.steering is not None:
            self.steering.close()
        self.home.disconnect()

    async def build_up(self, machine: MachineProtocol, peer: Peer) -> Prepared:
        """Check, then have the destination build everything while QEMU here is set up."""
        examined = await self.check(peer)
        to_copy, below = copies(examined.disks), examined.layers
        self.figures.expect(examined, self.header.vm.memory_mib)
        copied = {plan.disk for plan in to_copy}
        left = tuple(disk.path for disk in self.header.vm.disks if disk.name in copied)
        to_delete = () if self.terms.keep else left
        await in_full(self.journal.record, SourceStep.PREPARING, time.time(), left=to_delete)
        await self.home.promise(peer.host, left)
        if to_copy or below:
            in_line = self.report.line("other moves of disks from this host", then=Phase.BUILD_UP)
            await self.home.take_storage_slot(in_line)
        there, encrypt = examined.ends.destination, self.terms.encrypt
        # A disk is encrypted whatever is said of memory: else whoever finds the port could write into it.
        streams, through_tls = 1 + len(to_copy) + bool(below), encrypt or bool(to_copy or below)
        relays = await self.home.seats(there, examined.route, streams, encrypt=through_tls)
        # Memory that relays carry leaves the host through their TLS, and is not encrypted twice.
        server, client = make_credentials() if encrypt and not relays else (None, None)
        disks_server, self.disk_credentials = make_credentials() if (to_copy or below) and not relays else (None, None)
        request = Prepare(
            migration=self.header.migration,
            vm=landed(self.header.vm, examined.disks),
            accelerator=self.header.accelerator,
            transport=examined.route.transport,
            addresses=tuple(path.there for path in examined.route.paths),
            networks=connected(examined.ends.here),
            relay=relays[0] if relays else None,
            credentials=server,
            post_copy=self.terms.policy.post_copy,
            streams=tuple(path.streams for path in examined.route.paths),
            rdma_pin_all=self.terms.rdma_pin_all,
            running=self.header.was_running,
            files=self.home.carry_on(),
            disks=to_copy,
            disk_credentials=disks_server,
            disk_relays=tuple(relays[1 : 1 + len(to_copy)]),
            layers=below,
            layers_relay=relays[-1] if below and relays else None,
        )
        # Where that is not safe, only a guest that needs it may be slowed. Copies of disks are not made anew for that.
        wanted, needed = self.terms.policy.auto_converge, self.terms.must_slow or bool(to_copy)
        safe = await machine.slows_safely()
        self._slows = wanted and (needed or safe)
        self._waits_with_guest = self._slows and not safe
        parameters = StreamParameters(
            credentials=client,
            downtime_limit_ms=self.terms.policy.first_downtime_ms,
            bandwidth_bytes_per_s=self.home.bandwidth(Kind.MEMORY),
            post_copy=self.terms.policy.post_copy,
            pause=bool(to_copy),
            slows=self._slows,
            rdma=examined.route.transport == "rdma",
            rdma_pin_all=self.terms.rdma_pin_all,
        )
        in_line = self.report.line(f"a slot on host '{self.header.destination}'", then=Phase.BUILD_UP)
        preparing = peer.prepare(request, in_line, partial(layers.send, self))
        prepared, _ = await both(preparing, machine.prepare_outgoing(parameters))
        return prepared

    async def check(self, peer: Peer) -> Examined:
        """Preflight. Raises :class:`PreflightRefused` with all findings if one is an error."""
        header = self.header
        question = Question(
            vm=header.vm,
            source=header.source,
            accelerator=header.accelerator,
            transport=self.terms.transport,
            storage=self.terms.storage,
            chain=self.terms.chain,
            tag=header.migration,
            keep=self.terms.keep,
            rdma_failed=self.terms.rdma_failed,
        )
        examined = self.examined = await examine(peer, question, self._facts(), self.home.disks_here)
        findings = examined.findings
        if any(finding.severity is Severity.ERROR for finding in findings):
            raise PreflightRefused(findings, vm=self.header.vm.name, host=peer.host)
        if not examined.post_copy_possible:
            self.terms = self.terms.without_post_copy()
        self.report.change(
            findings=findings,
            transport=examined.route.transport,
            route=examined.route,
            disks=examined.disks,
            layers=examined.layers,
        )
        return examined

    async def _facts(self) -> VmFacts:
        return by_terms(await self.home.facts(), self.terms, self.home.own_cap)

    async def copy_disks(self, steering: Steering, prepared: Prepared) -> None:
        """Copy the disks that move along, until the copies keep up with the guest."""
        assert self.examined is not None
        await self.home.sending()
        to_copy = copies(self.examined.disks)
        channels = await self.first(self.home.connect_disks(self.examined.route, prepared, len(to_copy)))
        paths = self.figures.paths_of(self.examined, *channels)
        mirrors = await steering.copy_disks(to_copy, channels, self.disk_credentials)
        with self._following(paths):
            await mirrors.until_ready(lambda: self.figures.show_copies(steering))

    async def guarded_copy(self, machine: MachineProtocol, steering: Steering, prepared: Prepared) -> None:
        """:meth:`copy`, guarded. What carries the stream knows best why it broke."""
        try:
            await self.guard(self.copy(machine, steering, prepared))
        except Cancelled:
            raise
        except MigrationFailed as error:
            fault = await steering.channel.fault() if steering.channel is not None else None
            if fault is None:
                await self.guard(self._last_words())
                raise
            fault.vm, fault.host = self.header.vm.name, self.header.destination
            raise fault from error

    async def _last_words(self) -> None:
        """Let the destination say first why its QEMU ended: ours only knows that its stream broke."""
        if self.peer is not None:
            await asyncio.wait({self.peer.lost}, timeout=LAST_WORDS_WITHIN_S)

    async def copy(self, machine: MachineProtocol, steering: Steering, prepared: Prepared) -> None:
        """Send memory until QEMU reports that everything was sent and loaded."""
        await self.home.sending()
        assert self.examined is not None
        self.journal.record(SourceStep.MIGRATING, time.time(), durable=False)
        connecting = self.home.connect(self.examined.route, prepared)
        channel = await (self.first(connecting) if self.mirrors is None else connecting)
        steering.take_memory(channel)
        paths = self.figures.paths_of(self.examined, channel, *steering.disk_channels)
        await machine.migrate(channel.stream)
        watch = asyncio.ensure_future(self._watch(machine, steering))
        finish = asyncio.ensure_future(self._finish_copies(machine))
        limit = asyncio.ensure_future(steering.stands_still_too_long())
        hurry = asyncio.ensure_future(steering.hurry_copies())
        try:
            # Looking must not delay the hand-over, so it goes on beside the waiting.
            waiting: set[asyncio.Future[Any]] = {self.sent, watch, finish, limit, hurry}
            with self._following(paths):
                while not self.sent.done():
                    done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                    for one in done - {self.sent}:
                        one.result()
        finally:
            watch.cancel()
            finish.cancel()
            limit.cancel()
            hurry.cancel()
        state = self.sent.result()
        if state not in SWITCHED_OVER:
            raise await self._failure(machine, state)

    async def _failure(self, machine: MachineProtocol, state: MigrationState) -> LimosaError:
        error = (await machine.migration()).error or f"QEMU reports {state}"
        vm, host = self.header.vm.name, self.header.destination
        return MigrationFailed(
            f"QEMU could not move VM '{vm}' to host '{host}'", why=error, todo="see the logs of both", vm=vm, host=host
        )

    async def _watch(self, machine: MachineProtocol, steering: Steering) -> None:
        """Look, steer and show, until cancelled."""
        while True:
            if not self.before_switchover.done():
                await steering.keep_copies_up()
            look = await self._look(machine, steering)
            if look.state is MigrationState.ACTIVE:
                bar = self.report.bar = self.report.bar.moved(self.report.now.phase, look)
                note = await steering.steer(look, bar.pace)
                await self.figures.show_memory(bar, look, steering, note)
            await asyncio.sleep(LOOK_EVERY_S)

    async def _look(self, machine: MachineProtocol, steering: Steering) -> MigrationStatistics:
        """Raises :class:`MigrationFailed` if QEMU waits for the network, and has the guest wait with it."""
        looking = asyncio.ensure_future(machine.migration())
        try:
            while not looking.done():
                before = steering.sent_bytes
                await asyncio.wait({looking}, timeout=QEMU_SILENT_S)
                is_silent = not looking.done() and before is not None and steering.sent_bytes == before
                if is_silent and self._waits_with_guest:
                    raise steering.silent(f"nothing was sent for {QEMU_SILENT_S:g} s, in which QEMU did not answer")
            return looking.result()
        finally:
            looking.cancel()

    @contextmanager
    def _following(self, paths: Paths) -> Iterator[None]:
        """Have NICs used that appear during the block."""
        assert self.peer is not None
        follow = asyncio.ensure_future(paths.follow(self.home.networks(), self.peer))
        try:
            yield
        finally:
            follow.cancel()

    async def _finish_copies(self, machine: MachineProtocol) -> None:
        """When the guest stands still, make the copies of its disks whole, and only then let the last memory go."""
        await self.before_switchover
        if self.mirrors is None:
            await machine.continue_migration()
        else:
            assert self.peer is not None
            await self.mirrors.finish()
            await both(machine.continue_migration(), self.peer.disks_whole())

    async def switch_over(self, machine: MachineProtocol) -> None:
        """Give the destination the word. From here on only ``settle`` may let the guest run here again."""
        assert self.peer is not None
        self.journal.record(SourceStep.HANDING_OVER, time.time(), durable=False)
        self.note_hand_over()
        said_at = time.time()
        running = await self.peer.take_over()
        heard_at = time.time()
        self.report.enter(Phase.TEAR_DOWN)
        if self.sent.result() is MigrationState.COMPLETED:
            await self.figures.show_last(await machine.migration(), self.steering)
        if running.resumed_at is not None and self.stopped_at is not None:
            resumed_at = by_our_clock(running.resumed_at, running.after_s, said_at, heard_at)
            blackout_ms = 1000 * (resumed_at - self._stopped_at(self.stopped_at))
            self.report.change(blackout_ms=round(blackout_ms, 3))

    def _stopped_at(self, said_at: float) -> float:
        """When the guest stopped. QEMU says so when nothing that it was writing is under way any more
        (``virtio_blk_stop_ioeventfd``, hw/block/virtio-blk.c), which takes its time if that has to be copied, too. Its
        figure at the end begins before."""
        downtime_ms = self.report.now.qemu_downtime_ms
        if self.mirrors is None or self._sent_at is None or downtime_ms is None:
            return said_at
        return min(said_at, self._sent_at - downtime_ms / 1000)

    async def tear_down(self, *, images_stay: bool = False) -> None:
        """Wait until the destination is durable, then end QEMU here and forget the VM."""
        self.note_hand_over()
        if self.machine is not None:
            await self._everything_followed(self.machine)
        # The guest runs there, so this copy of its memory is of no use any more; its files are, until that is durable.
        await both(self._confirm(images_stay), self.home.end_qemu())
        left = self._left()
        if self.journal.rests_on_a_word:
            await self.home.vm_left(())
            said = tuple(
                not_deleted(path, "only an administrator's decision gave the VM to the destination") for path in left
            )
        else:
            said = await self.home.vm_left(left)
        self.report.change(findings=tuple(dict.fromkeys((*self.report.now.findings, *said))))
        await in_full(self.journal.record, SourceStep.FINISHED, time.time())
        self.home.free_name()

    async def _confirm(self, images_stay: bool) -> None:
        if self.journal.step == SourceStep.CONFIRMED:
            return  # an earlier try did it, perhaps on a person's word, of which the destination knows nothing
        if self.peer is not None:
            await self.peer.adopted()
        await in_full(self.journal.record, SourceStep.CONFIRMED, time.time(), stay=images_stay)

    def _left(self) -> tuple[str, ...]:
        """Images nobody uses here any more, by the journal."""
        return next((record.left for record in self.journal.records if record.left), ())

    async def _everything_followed(self, machine: MachineProtocol) -> None:
        """After a post-copy: QEMU here must live until the destination has fetched all memory."""
        try:
            while (state := (await machine.migration()).state) in POST_COPY:
                if state is MigrationState.POSTCOPY_PAUSED:
                    await rest.mend(self, machine)
                self.report.note("the guest runs at the destination, the rest of its memory follows")
                await asyncio.sleep(LOOK_EVERY_S)
            if self.sent.done() and self.sent.result() in POST_COPY:
                await self.figures.show_last(await machine.migration(), self.steering)
        except QemuGone:
            return

    async def guard(self, work: Coroutine[Any, Any, T]) -> T:
        """Do ``work`` unless a person cancels, QEMU dies or the session breaks, which raises."""
        assert self.machine is not None
        lost = {self.peer.lost} if self.peer is not None else set()
        return await unless(self.machine.gone, {self.cancelled, *lost}, self._interrupted, work)

    def _interrupted(self) -> None:
        vm, host = self.header.vm.name, self.header.destination
        if self.cancelled.done():
            raise Cancelled(f"the move of VM '{vm}' to host '{host}' was cancelled", vm=vm, host=host)
        if self.machine is not None and self.machine.gone.is_set():
            raise QemuGone(f"QEMU of VM '{vm}' ended during the move", vm=vm, host=self.header.source)
        if self.peer is not None and self.peer.lost.done():
            self.peer.lost.result()

    def _on_event(self, event: Event) -> None:
        match event.name:
            # While copies of disks are made it may stand still for them to begin (``Disks._mirror``).
            case "STOP" if self.report.now.phase is not Phase.STORAGE:
                self.stopped_at = event.at
                if self.steering is not None:
                    self.steering.guest_stopped()
                self.report.enter(Phase.SWITCHOVER, silently=True)
            case "MIGRATION_PASS" if event.data.get("pass", 0) > 1 and self.report.now.phase is Phase.COPY:
                self.report.enter(Phase.SYNCHRONISE)
                if self.steering is not None:
                    self.steering.pass_began()
            case "MIGRATION":
                state = MigrationState(event.data["status"])
                if state is MigrationState.PRE_SWITCHOVER and not self.before_switchover.done():
                    self.before_switchover.set_result(None)
                if state in PRE_COPY_ENDINGS and not self.sent.done():
                    self._sent_at = event.at
                    self.sent.set_result(state)

    # What others ask of a move that is under way

    @property
    def in_post_copy(self) -> bool:
        """Whether the guest may run at the destination already while QEMU here sends it the rest of its memory."""
        lives = self.machine is not None and not self.machine.gone.is_set()
        return lives and self.sent.done() and self.sent.result() is MigrationState.POSTCOPY_ACTIVE

    @property
    def mirrors(self) -> Mirrors | None:
        """The copies of disks, if they have begun."""
        return self.steering.mirrors if self.steering is not None else None

    async def cap_memory(self, bytes_per_s: int) -> None:
        """Cap what is sent of memory, 0: no cap."""
        if self.steering is not None:
            await self.steering.cap_memory(bytes_per_s)
        elif self.machine is not None:
            await self.machine.set_bandwidth(bytes_per_s)

    async def cap_copies(self, bytes_per_s: int) -> None:
        """Cap what the copies of disks send together, 0: no cap."""
        if self.steering is not None:
            await self.steering.cap_copies(bytes_per_s)

    def cancel(self) -> None:
        """Have the move cancelled at the next moment at which that is possible."""
        if not self.cancelled.done():
            self.cancelled.set_result(None)

    def note_hand_over(self) -> None:
        """The destination is given its word, or is known to own the VM."""
        if not self.handed_over.done():
            self.handed_over.set_result(None)
