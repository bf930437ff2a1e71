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
import socket
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import msgspec

from limosa.background import in_full
from limosa.errors import Cancelled, LimosaError, MigrationFailed, NotConverging, PreflightRefused, QemuGone
from limosa.migration import again, convergence, disks, layers, mirrors, progress, rest
from limosa.migration.convergence import Convergence
from limosa.migration.examination import Examined, Question, both, examine
from limosa.migration.home import Home, Terms
from limosa.migration.interruption import unless
from limosa.migration.journal import Journal
from limosa.migration.mirrors import Mirrors
from limosa.migration.ownership import SourceStep
from limosa.migration.paths import Paths
from limosa.migration.peer import Dialler, Peer
from limosa.migration.report import Report
from limosa.model.facts import VmFacts
from limosa.model.finding import Severity
from limosa.model.migration import Phase, Progress
from limosa.model.route import Route
from limosa.model.storage import DiskProgress
from limosa.model.units import MIB
from limosa.qemu.protocol import (
    POST_COPY,
    PRE_COPY_ENDINGS,
    SWITCHED_OVER,
    Event,
    MachineProtocol,
    MigrationState,
    MigrationStatistics,
    RunState,
    StreamParameters,
)
from limosa.security.stream import make_credentials
from limosa.transport import tcp
from limosa.transport.channel import Channel, SocketChannel
from limosa.transport.choice import connected
from limosa.transport.shares import Kind
from limosa.wire.peer import Prepare, Prepared, StreamCredentials

LOOK_EVERY_S = 0.2
#: So long before a guest may stop, what waits on the way is made little: it would have to wait for that. If it will go
#: on for so much longer it is made more again, which is faster.
SHORTEN_BEFORE_S, LENGTHEN_BEFORE_S = 0.3, 0.6
#: While the guest must not stop memory that is left for so long trickles, in bytes per second: see _hold_back.
TRICKLE_BEFORE_S, TRICKLE = 1.0, 10_000
#: A guest that has stopped runs on here if its destination has not loaded everything within this. The largest budget
#: for a blackout is a fifth of it.
STANDS_STILL_S = 10.0
ANSWERS_WITHIN_S = 1.0
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
        self.peer: Peer | None = None
        self.channel: Channel | None = None
        #: what the stream makes, bytes a second, by the last look
        self._rate = 0.0
        #: for which rate little waits on the way; None: as much as likes to
        self._short_for: float | None = None
        self._trickles = False
        #: bytes per second that copies of disks may send, 0: no cap
        self._disks_cap = 0
        #: at any time a cap was kept, so that what the networks carried says nothing of them
        self._was_capped = False
        #: until a post-copy is asked for, of which nobody knows at once whether it has begun
        self._way_back = True
        self.examined: Examined | None = None
        self.paths: Paths | None = None
        loop = asyncio.get_running_loop()
        #: done when a person cancels
        self.cancelled: asyncio.Future[None] = loop.create_future()
        #: done with the state in which QEMU's migration ended, or passed the point of no return
        self.sent: asyncio.Future[MigrationState] = loop.create_future()
        #: done when the destination is given its word, or is known to own the VM: the move cannot be cancelled any more
        self.handed_over: asyncio.Future[None] = loop.create_future()
        if any(record.step == SourceStep.HANDING_OVER for record in journal.records):
            self.handed_over.set_result(None)
        #: done when QEMU waits before the switchover, with the guest stopped
        self.paused: asyncio.Future[None] = loop.create_future()
        self.mirrors: Mirrors | None = None
        self.disk_credentials: StreamCredentials | None = None
        self.disk_channels: list[SocketChannel] = []
        #: bytes that were sent for each
        self._disks_sent: list[int | None] = []
        #: what files below disks were sent by counts on, though it is closed
        self.layers_channel: list[SocketChannel] = []
        #: bytes of files below disks
        self.layers_sent = 0
        self.stopped_at: float | None = None
        self._sent_at: float | None = None
        self.stands_still = asyncio.Event()

    def begin_on(self, terms: Terms) -> None:
        """Take other terms than at first. To be called before :meth:`run`."""
        self.terms = self._asked = terms

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
        except LimosaError:
            self._cut_off()
            raise
        finally:
            unsubscribe()
            if self.paths is not None and not self._was_capped:
                self.home.learn(self.paths.carried())
            self._close_channel()

    async def send(self, machine: MachineProtocol) -> None:
        """Everything before the switchover."""
        self.report.enter(Phase.BUILD_UP)
        self.peer = await self.guard(self.dial())
        prepared = await self.guard(self.build_up(machine, self.peer))
        if disks.copies(self.report.now.disks):
            self.report.enter(Phase.STORAGE)
            await self.guard(self.copy_disks(machine, prepared))
        self.report.enter(Phase.COPY)
        await self._copied(machine, prepared)

    async def _without_rdma(self, machine: MachineProtocol, failure: LimosaError) -> None:
        """Put everything back to where it was before RDMA was tried."""
        self.report.note(f"RDMA failed ({failure}); it begins again by another way")
        self._close_channel()
        if self.peer is not None:
            peer, self.peer = self.peer, None  # its loss, if it comes, is not to interrupt what follows
            await peer.close()
        await self.guard(again.undo(self, machine, failure))
        self.terms = replace(self._asked, rdma_failed=str(failure))
        self.sent, self.paused = [asyncio.get_running_loop().create_future() for _ in range(2)]
        self.stopped_at = self._sent_at = None
        self._trickles = False
        self.stands_still.clear()

    async def build_up(self, machine: MachineProtocol, peer: Peer) -> Prepared:
        """Check, then have the destination build everything while QEMU here is set up."""
        examined = await self.check(peer)
        copies, below = disks.copies(examined.disks), examined.layers
        self._expect(examined)
        copied = {plan.disk for plan in copies}
        left = tuple(disk.path for disk in self.header.vm.disks if disk.name in copied)
        to_delete = () if self.terms.keep else left
        await in_full(self.journal.record, SourceStep.PREPARING, time.time(), left=to_delete)
        await self.home.promise(peer.host, left)
        if copies or below:
            await self.home.take_storage_slot(
                self.report.line("other moves of disks from this host", then=Phase.BUILD_UP),
                self.report.line("other moves of this host", then=Phase.BUILD_UP),
            )
        there, encrypt = examined.ends.destination, self.terms.encrypt
        # A disk is encrypted whatever is said of memory: else whoever finds the port could write into it.
        streams, through_tls = 1 + len(copies) + bool(below), encrypt or bool(copies or below)
        relays = await self.home.seats(there, examined.route, streams, encrypt=through_tls)
        # Memory that relays carry leaves the host through their TLS, and is not encrypted twice.
        server, client = make_credentials() if encrypt and not relays else (None, None)
        disks_server, self.disk_credentials = make_credentials() if (copies or below) and not relays else (None, None)
        request = Prepare(
            migration=self.header.migration,
            vm=disks.landed(self.header.vm, examined.disks),
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
            disks=copies,
            disk_credentials=disks_server,
            disk_relays=tuple(relays[1 : 1 + len(copies)]),
            layers=below,
            layers_relay=relays[-1] if below and relays else None,
        )
        parameters = StreamParameters(
            credentials=client,
            downtime_limit_ms=self.terms.policy.first_downtime_ms,
            bandwidth_bytes_per_s=self.home.bandwidth(Kind.MEMORY),
            post_copy=self.terms.policy.post_copy,
            pause=bool(copies),
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
        examined = self.examined = await examine(peer, question, self._facts(), self.home.disks)
        findings = examined.findings
        if any(finding.severity is Severity.ERROR for finding in findings):
            raise PreflightRefused(findings, vm=self.header.vm.name, host=peer.host)
        # Post-copy by RDMA is a way of QEMU's that hardly anybody goes, and a guest is lost with it if it fails.
        if examined.route.transport == "rdma" or any(one.code == "post-copy-not-possible" for one in findings):
            self.terms = self.terms.without_post_copy()
        self.report.change(
            findings=findings,
            transport=examined.route.transport,
            route=examined.route,
            disks=examined.disks,
            layers=examined.layers,
        )
        return examined

    def _expect(self, examined: Examined) -> None:
        """Give disks and what lies below them their share of the bar."""
        expected = sum(plan.expected_bytes for plan in disks.copies(examined.disks))
        expected += sum(plan.expected_bytes for plan in examined.layers)
        if expected:
            self.report.bar = self.report.bar.with_disks(expected, self.header.vm.memory_mib * MIB)

    async def _facts(self) -> VmFacts:
        return by_terms(await self.home.facts(), self.terms, self.home.own_cap)

    async def copy_disks(self, machine: MachineProtocol, prepared: Prepared) -> None:
        """Copy the disks that move along, until the copies keep up with the guest."""
        assert self.examined is not None
        await self.home.sending()
        route, copies = self.examined.route, disks.copies(self.examined.disks)
        self.disk_channels = await self.home.connect_disks(route, prepared, len(copies))
        paths = self.paths_of(*self.disk_channels)
        self._disks_cap = self.home.bandwidth(Kind.STORAGE)
        each = self._disks_cap // len(copies)
        await mirrors.send(machine, self.header.migration, copies, self.disk_channels, self.disk_credentials, each)
        copying = self.mirrors = Mirrors(machine, [plan.disk for plan in copies], self.terms.policy)
        self._pace_disks()
        with self._following(paths):
            await copying.until_ready(lambda: self._show_disks(copying))

    async def cap_memory(self, bytes_per_s: int) -> None:
        """Cap what is sent of memory, 0: no cap."""
        if self.machine is not None and not self._trickles:
            await self.machine.set_bandwidth(bytes_per_s)

    async def cap_disks(self, bytes_per_s: int) -> None:
        """Cap what the copies of disks send together, 0: no cap."""
        if self.mirrors is not None:
            self._disks_cap = bytes_per_s
            self._pace_disks()
            await self.mirrors.cap(bytes_per_s)

    def _pace_disks(self) -> None:
        """Have connections keep to the cap: QEMU does only until a copy is ready (``mirror_run``, block/mirror.c).
        There is none when the guest may stop, because it stands still for what is on its way then."""
        free = self._short_for is not None or self.stands_still.is_set()
        for channel in self.disk_channels:
            channel.pace(0 if free else self._disks_cap // len(self.disk_channels))

    def paths_of(self, *channels: Channel) -> Paths:
        """The paths that are shown from now on: what these channels carry, and what files below disks have taken."""
        assert self.examined is not None
        channels = (*self.layers_channel, *channels)
        self.paths = Paths(self.examined.route, self.examined.ends, channels, self.examined.blocked)
        return self.paths

    async def _show_disks(self, copying: Mirrors) -> None:
        self.report.bar, shown = progress.of_disks(
            self.report.bar,
            self.report.now.progress,
            await self._disks(copying),
            time.monotonic(),
            before=self.layers_sent,
        )
        await self._show(shown)

    async def _show(self, shown: Progress, by_rdma: int = 0) -> None:
        """Show how far it is and the route as it is now, of which new paths change what others may use of a network."""
        assert self.paths is not None
        known, route = self.paths.addresses, await self.paths.look(by_rdma)
        self.report.change(progress=shown, route=route)
        self._was_capped = self._was_capped or any(self.home.bandwidth(kind) for kind in Kind)
        if self.paths.addresses != known:
            await self.home.sending()

    async def copy(self, machine: MachineProtocol, prepared: Prepared) -> None:
        """Send memory until QEMU reports that everything was sent and loaded."""
        await self.home.sending()
        assert self.examined is not None
        self.journal.record(SourceStep.MIGRATING, time.time(), durable=False)
        self.channel = await self.home.connect(self.examined.route, prepared)
        paths = self.paths_of(self.channel, *self.disk_channels)
        await machine.migrate(self.channel.stream)
        watch = asyncio.ensure_future(self._watch(machine))
        finish = asyncio.ensure_future(self._finish_disks(machine))
        limit = asyncio.ensure_future(self._not_for_ever(machine))
        try:
            # Looking must not delay the hand-over, so it goes on beside the waiting.
            waiting: set[asyncio.Future[Any]] = {self.sent, watch, finish, limit}
            with self._following(paths):
                while not self.sent.done():
                    done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                    for one in done - {self.sent}:
                        one.result()
        finally:
            watch.cancel()
            finish.cancel()
            limit.cancel()
        state = self.sent.result()
        if state not in SWITCHED_OVER:
            raise await self._failure(machine, state)

    @contextmanager
    def _following(self, paths: Paths) -> Iterator[None]:
        """Have NICs used that appear during the block."""
        assert self.peer is not None
        follow = asyncio.ensure_future(paths.follow(self.home.networks(), self.peer))
        try:
            yield
        finally:
            follow.cancel()

    async def _finish_disks(self, machine: MachineProtocol) -> None:
        """When the guest stands still, make the copies of its disks whole, and only then let the last memory go."""
        await self.paused
        if self.mirrors is None:
            await machine.continue_migration()
        else:
            assert self.peer is not None
            await self.mirrors.finish()
            await both(machine.continue_migration(), self.peer.disks_whole())

    async def _not_for_ever(self, machine: MachineProtocol) -> None:
        """End the move if the guest stands still for too long: until all is loaded there it can run on here."""
        await self.stands_still.wait()
        await asyncio.sleep(STANDS_STILL_S)
        with suppress(TimeoutError):  # see _cut_off
            async with asyncio.timeout(ANSWERS_WITHIN_S):
                if await machine.status() is not RunState.FINISH_MIGRATE:
                    return  # it was not the move that stopped it
        vm, host = self.header.vm.name, self.header.destination
        if self.mirrors is not None and not self.mirrors.whole:
            raise MigrationFailed(
                f"the disks of VM '{vm}' could not be made whole on host '{host}' while it stood still",
                why=f"what the guest had written last was not copied within {STANDS_STILL_S:.0f} s",
                todo="move the VM when it writes less, or over a faster network",
                vm=vm,
                host=host,
            )
        raise MigrationFailed(
            f"host '{host}' did not take the rest of VM '{vm}', which stood still meanwhile",
            why=f"its QEMU had not loaded everything within {STANDS_STILL_S:.0f} s",
            todo="see the VM's qemu.log there, and whether that host has processor time and memory left",
            vm=vm,
            host=host,
        )

    async def _copied(self, machine: MachineProtocol, prepared: Prepared) -> None:
        """:meth:`copy`, guarded. What carries the stream knows best why it broke."""
        try:
            await self.guard(self.copy(machine, prepared))
        except Cancelled:
            raise
        except MigrationFailed as error:
            fault = await self.channel.fault() if self.channel is not None else None
            if fault is None:
                await self.guard(self._last_words())
                raise
            fault.vm, fault.host = self.header.vm.name, self.header.destination
            raise fault from error

    async def _last_words(self) -> None:
        """Let the destination say first why its QEMU ended: ours only knows that its stream broke."""
        if self.peer is not None:
            await asyncio.wait({self.peer.lost}, timeout=LAST_WORDS_WITHIN_S)

    async def switch_over(self, machine: MachineProtocol) -> None:
        """Give the destination the word. From here on only ``settle`` may let the guest run here again."""
        assert self.peer is not None
        self.journal.record(SourceStep.HANDING_OVER, time.time(), durable=False)
        self.note_hand_over()
        running = await self.peer.take_over()
        self.report.enter(Phase.TEAR_DOWN)
        if self.sent.result() is MigrationState.COMPLETED:
            await self._last_figures(machine)
        if running.resumed_at is not None and self.stopped_at is not None:
            blackout_ms = 1000 * (running.resumed_at - self._stopped_at(self.stopped_at))
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
            said = tuple(disks.not_deleted(path, "only a person says that the destination has the VM") for path in left)
        else:
            said = await self.home.vm_left(left)
        self.report.change(findings=tuple(dict.fromkeys((*self.report.now.findings, *said))))
        self.journal.record(SourceStep.FINISHED, time.time(), durable=False)

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
                await self._last_figures(machine)
        except QemuGone:
            return

    @property
    def in_post_copy(self) -> bool:
        """Whether the guest may run at the destination already while QEMU here sends it the rest of its memory."""
        lives = self.machine is not None and not self.machine.gone.is_set()
        return lives and self.sent.done() and self.sent.result() is MigrationState.POSTCOPY_ACTIVE

    def cancel(self) -> None:
        """Have the move cancelled at the next moment at which that is possible."""
        if not self.cancelled.done():
            self.cancelled.set_result(None)

    def note_hand_over(self) -> None:
        """The destination is given its word, or is known to own the VM."""
        if not self.handed_over.done():
            self.handed_over.set_result(None)

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

    def _close_channel(self) -> None:
        """Ours must not outlive QEMU's, whose end is the end of the stream."""
        for channel in (self.channel, *self.disk_channels):
            if channel is not None:
                channel.close()
        self.channel, self.disk_channels, self.layers_channel, self._short_for = None, [], [], None
        self.home.disconnect()

    def _cut_off(self) -> None:
        """Have a QEMU that has not sent everything fail, as a cancel does. It may not hear of a cancel: while it sends
        the rest, and waits for its socket, it holds the lock it needs for that (``migration_completion`` with the BQL,
        migration/migration.c). It also does while it stops the guest and waits for what is on its way to copies of
        disks (``bdrv_drain_all`` in ``do_vm_stop``, system/cpus.c)."""
        has_more = self._way_back and not self.sent.done()
        for channel in (self.channel if has_more else None, *self.disk_channels):
            if channel is not None and isinstance(channel.stream, socket.socket):
                with suppress(OSError):
                    channel.stream.shutdown(socket.SHUT_RDWR)

    def _on_event(self, event: Event) -> None:
        match event.name:
            case "STOP":
                self.stopped_at = event.at
                self.stands_still.set()
                self._pace_disks()
                self.report.enter(Phase.SWITCHOVER, silently=True)
            case "MIGRATION_PASS" if event.data.get("pass", 0) > 1 and self.report.now.phase is Phase.COPY:
                self.report.enter(Phase.SYNCHRONISE)
                if not self._is_held:
                    self._set_short(True)  # this one may be over at once
            case "MIGRATION":
                state = MigrationState(event.data["status"])
                if state is MigrationState.PRE_SWITCHOVER and not self.paused.done():
                    self.paused.set_result(None)
                if state in PRE_COPY_ENDINGS and not self.sent.done():
                    self._sent_at = event.at
                    self.sent.set_result(state)

    def _set_short(self, short: bool) -> None:
        """Told again when the stream has become much faster or slower: the rate is hardly known to begin with."""
        if short and self._short_for is not None:
            is_so = 0.5 < self._rate / max(self._short_for, 1.0) < 2
        else:
            is_so = short is (self._short_for is not None)
        if self.channel is not None and not is_so:
            self._short_for = self._rate if short else None
            self.channel.set_short(short, self._rate)
            self._pace_disks()

    async def _watch(self, machine: MachineProtocol) -> None:
        judge = Convergence.begin(self.terms.policy)
        while True:
            if self.mirrors is not None and not self.paused.done():
                await self.mirrors.keep_up(self.terms.policy.blackout_budget_ms / 1000)
            judge = await self._look(machine, judge, await machine.migration())
            await asyncio.sleep(LOOK_EVERY_S)

    async def _look(self, machine: MachineProtocol, judge: Convergence, look: MigrationStatistics) -> Convergence:
        if look.state is not MigrationState.ACTIVE:
            return judge
        bar = self.report.bar = self.report.bar.moved(self.report.now.phase, look)
        self._rate = look.rate_bytes_per_s or bar.pace
        if self.mirrors is not None and self._is_held:
            disks_behind = ", ".join(self.mirrors.behind)
            note = f"the copy of disk {disks_behind} has to catch up before the guest may stop"
            judge, action = judge.hold(time.monotonic(), note)
            self._set_short(False)
        else:
            judge, action = judge.judge(time.monotonic(), look)
            self._let_wait(bar.pace, look, judge)
        await self._act(machine, action)
        await self._hold_back(machine, look, bar.pace)
        note = "" if isinstance(action, convergence.GiveUp) else action.note
        shown = await self._with_disks(progress.progress(bar, look, limit_ms=judge.downtime_limit_ms, note=note))
        notes = note, progress.slows_writes(shown.disks)
        await self._show(msgspec.structs.replace(shown, note="; ".join(filter(None, notes))), look.transferred_bytes)
        return judge

    @property
    def _is_held(self) -> bool:
        """Whether the guest should not stop yet, because of its disks."""
        return self.mirrors is not None and bool(self.mirrors.behind)

    async def _hold_back(self, machine: MachineProtocol, look: MigrationStatistics, pace: float) -> None:
        """Have the last of memory trickle while the guest should not stop: QEMU stops it whenever it looks and finds
        that nothing was written. So it looks ten times a second at most (``BUFFER_DELAY``, migration/migration.c), and
        a guest that has written nothing for so long misses little while it stands still."""
        trickles = self._is_held and (self._trickles or look.remaining_bytes < TRICKLE_BEFORE_S * pace)
        if trickles is not self._trickles:
            self._trickles = trickles
            await machine.set_bandwidth(TRICKLE if trickles else self.home.bandwidth(Kind.MEMORY))

    def _let_wait(self, pace: float, look: MigrationStatistics, judge: Convergence) -> None:
        """Have little or much wait on the way, by how soon the guest may stop: QEMU stops it when what remains takes no
        longer than the downtime limit."""
        limit_s = judge.downtime_limit_ms / 1000
        if judge.in_post_copy or look.remaining_bytes < (limit_s + SHORTEN_BEFORE_S) * pace:
            self._set_short(True)
        elif look.remaining_bytes > (limit_s + LENGTHEN_BEFORE_S) * pace:
            self._set_short(False)

    async def _disks(self, copying: Mirrors) -> tuple[DiskProgress, ...]:
        """How far the copies are, and how much was sent for them until their channels were closed."""
        if self.disk_channels:
            self._disks_sent = [await _sent(channel) for channel in self.disk_channels]
        shown = zip(copying.progress(), self._disks_sent, strict=False)
        return tuple(msgspec.structs.replace(copy, sent_bytes=sent) for copy, sent in shown)

    async def _with_disks(self, shown: Progress) -> Progress:
        if self.mirrors is None:
            return shown
        copies = await self._disks(self.mirrors)
        sent = shown.transferred_bytes + progress.sent(copies) + self.layers_sent
        return msgspec.structs.replace(shown, transferred_bytes=sent, disks=copies)

    async def _act(self, machine: MachineProtocol, action: convergence.Action) -> None:
        match action:
            case convergence.RaiseDowntimeLimit(milliseconds):
                await machine.set_downtime_limit(milliseconds)
            case convergence.Hold():
                await machine.set_downtime_limit(0)
            case convergence.Throttle(percent):
                await machine.set_throttle(percent, convergence.THROTTLE_STEP_PERCENT)
            case convergence.StartPostCopy():
                self._way_back = False
                if self.channel is not None and isinstance(self.channel.stream, socket.socket):
                    tcp.end_in_silence(self.channel.stream)
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
            progress=await self._with_disks(shown),
            transfer_s=look.total_s,
            qemu_downtime_ms=look.downtime_ms,
            route=await self._route(look.transferred_bytes),
        )

    async def _route(self, of_memory: int = 0) -> Route | None:
        return await self.paths.look(of_memory) if self.paths is not None else self.report.now.route


async def _sent(channel: Channel) -> int | None:
    """Bytes that a channel has sent, before compression; None if nobody counts them."""
    if (compressed := await channel.compressed()) is not None:
        return compressed.raw_bytes
    used = channel.used()
    return sum(one.sent_bytes for one in used) if used else None
