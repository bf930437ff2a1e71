"""Steering a copy that runs: when the guest may stop, and how much waits on the way to the destination until then.

QEMU stops the guest as soon as what remains of memory takes no longer than the downtime limit. What counts for the
blackout besides is not QEMU's to see: what it has sent and is still here, in sockets and relays, and what the guest
wrote last to disks that are copied. So memory is held back while copies are behind, and little waits on the way when
the guest may stop soon.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from limosa.errors import MigrationFailed, NotConverging
from limosa.migration import convergence, mirrors
from limosa.migration.convergence import Convergence
from limosa.migration.journal import Header
from limosa.migration.mirrors import Excess, Mirrors
from limosa.model.storage import DiskPlan
from limosa.qemu.protocol import MachineProtocol, MigrationStatistics, RunState
from limosa.settings.host import ConvergencePolicy
from limosa.transport import tcp
from limosa.transport.channel import Channel, SocketChannel
from limosa.transport.shares import Kind
from limosa.wire.peer import StreamCredentials

#: So long before a guest may stop, what waits on the way is made little: it would have to wait for that. If it will go
#: on for so much longer it is made more again, which is faster.
SHORTEN_BEFORE_S, LENGTHEN_BEFORE_S = 0.3, 0.6
#: While the guest must not stop memory that is left for so long trickles, in bytes per second: see _hold_back.
TRICKLE_BEFORE_S, TRICKLE = 1.0, 10_000
#: While the guest may stop soon QEMU is made to look so often at what was written to disks: see hurry_copies.
HURRY_EVERY_S = 0.01
#: A guest that has stopped runs on here if its destination has not loaded everything within this. The largest budget
#: for a blackout is a fifth of it.
STANDS_STILL_S = 10.0
ANSWERS_WITHIN_S = 1.0


class Steering:
    """Steers one try to copy a guest, from the moment at which the destination awaits it; each try has its own.

    It is given the streams (:meth:`copy_disks`, :meth:`take_memory`) and has them until :meth:`close`. Whoever looks at
    QEMU tells it of each look (:meth:`keep_copies_up`, :meth:`steer`) and of QEMU's events (:meth:`pass_began`,
    :meth:`guest_stopped`).

    It decides how fast QEMU and the streams send, how much waits in them, how long the blackout may be, how fast the
    guest runs and writes, and when a post-copy begins. Of that last step there is no way back; all else that it sets
    ends with the stream (``forget_stream``) or the copies. It never continues a guest and never ends the move: when
    that should end it raises, and is of no further use but for :meth:`cut_off` and :meth:`close`.
    """

    def __init__(
        self,
        machine: MachineProtocol,
        header: Header,
        policy: ConvergencePolicy,
        bandwidth: Callable[[Kind], int],
        *,
        slows: bool = True,
    ) -> None:
        """``bandwidth``: bytes per second that may be sent now, 0 for no cap. ``slows``: QEMU can slow the guest."""
        self._machine = machine
        self._header = header
        self._policy = policy
        self._bandwidth = bandwidth
        #: why this try ends, if the guest is to be slowed, which QEMU can do only in a stream that begins with that
        self.must_slow: NotConverging | None = None
        self._convergence = Convergence.begin(policy, slows=slows)
        #: what memory goes through
        self.channel: Channel | None = None
        #: what the copies of disks go through, one each
        self.disk_channels: Sequence[SocketChannel] = ()
        self._disks: Sequence[str] = ()
        #: the copies of disks; None before they begin, or where there are none
        self.mirrors: Mirrors | None = None
        #: bytes per second that they may send together, 0: no cap
        self._copies_cap = 0
        #: the disks whose connection does not keep to that, and what has gone beyond it
        self._unpaced: set[str] = set()
        self._excess: dict[str, Excess] = {}
        #: what the stream of memory makes, bytes a second, by the last look
        self._rate = 0.0
        #: for which rate little waits on the way; None: as much as likes to
        self._short_for: float | None = None
        self._trickles = False
        #: set while little waits on the way
        self._may_stop = asyncio.Event()
        #: until a post-copy is asked for, of which nobody knows at once whether it has begun
        self._way_back = True
        self._stands_still = asyncio.Event()

    # The streams

    async def copy_disks(
        self, plans: Sequence[DiskPlan], channels: Sequence[SocketChannel], credentials: StreamCredentials | None
    ) -> Mirrors:
        """Begin to copy disks, over a channel each. The channels are closed here, also if that fails."""
        self.disk_channels = channels
        self._disks = [plan.disk for plan in plans]
        copies = self.mirrors = Mirrors(self._machine, self._disks, self._policy)
        await self.cap_copies(self._bandwidth(Kind.STORAGE))
        tag = self._header.migration
        await mirrors.send(self._machine, tag, plans, channels, credentials, lambda: copies.each)
        await copies.cap(self._copies_cap)  # it may have changed when a copy had its own and was not there yet
        return copies

    def take_memory(self, channel: Channel) -> None:
        """Memory goes through this channel."""
        self.channel = channel

    def close(self) -> None:
        """Close all channels. Ours must not outlive QEMU's, whose end is the end of the stream. May be repeated."""
        for channel in (self.channel, *self.disk_channels):
            if channel is not None:
                channel.close()
        self.channel, self.disk_channels, self._short_for = None, (), None

    def cut_off(self, *, sent: bool) -> None:
        """Have a QEMU that has not sent everything fail, as a cancel does; ``sent``: it has sent all memory, or has
        failed. It may not hear of a cancel: while it sends the rest, and waits for its socket, it holds the lock it
        needs for that (``migration_completion`` with the BQL, migration/migration.c). It also does while it stops the
        guest and waits for what is on its way to copies of disks (``bdrv_drain_all`` in ``do_vm_stop``, system/cpus.c).
        """
        has_more = self._way_back and not sent
        for channel in (self.channel if has_more else None, *self.disk_channels):
            if channel is not None and isinstance(channel.stream, socket.socket):
                with suppress(OSError):
                    channel.stream.shutdown(socket.SHUT_RDWR)

    @property
    def sent_bytes(self) -> int | None:
        """What has gone over the network of memory; None if that is not known."""
        if self.channel is None or not isinstance(self.channel.stream, socket.socket):
            return None
        return sum(one.sent_bytes for one in self.channel.used())

    # Caps

    async def cap_memory(self, bytes_per_s: int) -> None:
        """Cap what is sent of memory, 0: no cap."""
        if not self._trickles:
            await self._machine.set_bandwidth(bytes_per_s)

    async def cap_copies(self, bytes_per_s: int) -> None:
        """Cap what the copies of disks send together, 0: no cap."""
        if self.mirrors is not None:
            self._copies_cap = bytes_per_s
            self._pace_copies()
            await self.mirrors.cap(bytes_per_s)

    def _pace_copies(self) -> None:
        """Have connections keep to the cap: QEMU does only until a copy is ready (``mirror_run``, block/mirror.c)."""
        cap, channels = self._cap_of_each, zip(self._disks, self.disk_channels, strict=False)
        self._unpaced = {disk for disk, channel in channels if not channel.pace(cap)}

    @property
    def _cap_of_each(self) -> int:
        """There is none when the guest may stop, because it stands still for what is on its way then."""
        free = self._short_for is not None or self._stands_still.is_set()
        return 0 if free else self._copies_cap // max(1, len(self.disk_channels))

    async def hurry_copies(self) -> None:
        """Until the guest stops, and while it may soon, have what it writes to disks copied at once: what is left would
        be copied while it stands still."""
        while self.mirrors is not None and not self._stands_still.is_set():
            await self._may_stop.wait()
            await self.mirrors.hurry()
            await asyncio.sleep(HURRY_EVERY_S)

    # What QEMU tells

    def pass_began(self) -> None:
        """The first pass over memory has ended: what the guest wrote meanwhile is sent again."""
        if not self._behind:
            self._set_short(True)  # this pass may be over at once

    def guest_stopped(self) -> None:
        """The guest stands still, because QEMU is to send the rest, or for another reason."""
        self._stands_still.set()
        self._pace_copies()

    async def stands_still_too_long(self) -> None:
        """Raises :class:`MigrationFailed` if the guest stands still for too long: until all is loaded at the
        destination it can run on here. Returns if it was not the move that stopped it."""
        await self._stands_still.wait()
        await asyncio.sleep(STANDS_STILL_S)
        with suppress(TimeoutError):  # see cut_off
            async with asyncio.timeout(ANSWERS_WITHIN_S):
                if await self._machine.status() is not RunState.FINISH_MIGRATE:
                    return
        vm, host = self._header.vm.name, self._header.destination
        if self.mirrors is not None and not self.mirrors.whole:
            raise MigrationFailed(
                f"the disks of VM '{vm}' could not be completed on host '{host}' while it was stopped",
                why=f"the guest's last writes were not copied within {STANDS_STILL_S:.0f} s",
                todo="move the VM when it writes less, or over a faster network",
                vm=vm,
                host=host,
            )
        raise MigrationFailed(
            f"host '{host}' did not load the rest of VM '{vm}', which was stopped meanwhile",
            why=f"its QEMU had not loaded everything within {STANDS_STILL_S:.0f} s",
            todo="check the VM's qemu.log there, and whether that host has processor time and memory to spare",
            vm=vm,
            host=host,
        )

    # Each look

    @property
    def downtime_limit_ms(self) -> float:
        """How long the guest may stand still for memory, as QEMU was told last but for a hold."""
        return self._convergence.downtime_limit_ms

    @property
    def _behind(self) -> tuple[str, ...]:
        """The disks because of whose copies the guest should not stop yet."""
        return self.mirrors.behind if self.mirrors is not None else ()

    async def keep_copies_up(self) -> None:
        """Look at the copies of disks, if there are any, and slow the guest's writes to those that fall behind. To be
        called until the guest stops. Raises :class:`MigrationFailed` and :class:`NotConverging`."""
        if self.mirrors is not None:
            await self.mirrors.keep_up(self._policy.blackout_budget_ms / 1000, self._cap_of_each, self._count_excess())

    def _count_excess(self) -> dict[str, int]:
        """By how many bytes the copies of disks have outrun their cap whose connections do not keep to it."""
        now, cap = time.monotonic(), self._cap_of_each
        for disk, channel in zip(self._disks, self.disk_channels, strict=False):
            if disk in self._unpaced:
                sent = sum(one.sent_bytes for one in channel.used())
                self._excess[disk] = self._excess.get(disk, Excess(now, sent)).after(now, sent, cap)
        return {disk: round(excess.bytes) for disk, excess in self._excess.items()}

    async def steer(self, look: MigrationStatistics, pace: float) -> str:
        """Act on a look at memory while it is sent, ``pace`` bytes of it in a second. Returns in words what is waited
        for. Raises :class:`NotConverging` if nothing helps any more in this try, and :class:`MigrationFailed` if
        nothing can be sent."""
        self._rate = look.rate_bytes_per_s or pace
        if behind := self._behind:
            note = f"the copy of disk {', '.join(behind)} has to catch up before the guest may stop"
            self._convergence, action = self._convergence.hold(time.monotonic(), note)
            self._set_short(False)
        else:
            self._convergence, action = self._convergence.judge(time.monotonic(), look)
            self._let_wait(look, pace)
        if isinstance(action, convergence.BeginAnew):
            self.must_slow = self._not_converging(action.why)
            raise self.must_slow
        if isinstance(action, convergence.GiveUp):
            raise self.silent(action.why) if action.is_silent else self._not_converging(action.why)
        await self._act(action)
        await self._hold_back(look, pace)
        return action.note

    def silent(self, why: str) -> MigrationFailed:
        """The error if nothing goes over the network."""
        vm, host = self._header.vm.name, self._header.destination
        todo = f"check the network to host '{host}' and whether its QEMU works (the VM's qemu.log there)"
        return MigrationFailed(
            f"the memory of VM '{vm}' does not reach host '{host}'", why=why, todo=todo, vm=vm, host=host
        )

    def _not_converging(self, why: str) -> NotConverging:
        vm = self._header.vm.name
        return NotConverging(
            f"the move of VM '{vm}' does not converge",
            why=why,
            todo="allow a longer blackout (--blackout-budget), post-copy, or move it when it is quieter",
            vm=vm,
            host=self._header.destination,
        )

    async def _act(self, action: convergence.Action) -> None:
        match action:
            case convergence.RaiseDowntimeLimit(milliseconds):
                await self._machine.set_downtime_limit(milliseconds)
            case convergence.Hold():
                await self._machine.set_downtime_limit(0)
            case convergence.Throttle(percent):
                await self._machine.set_throttle(percent, convergence.THROTTLE_STEP_PERCENT)
            case convergence.StartPostCopy():
                self._way_back = False
                if self.channel is not None and isinstance(self.channel.stream, socket.socket):
                    tcp.end_in_silence(self.channel.stream)
                await self._machine.start_post_copy()

    async def _hold_back(self, look: MigrationStatistics, pace: float) -> None:
        """Have the last of memory trickle while the guest should not stop: QEMU stops it whenever it looks and finds
        that nothing was written. So it looks ten times a second at most (``BUFFER_DELAY``, migration/migration.c), and
        a guest that has written nothing for so long misses little while it stands still."""
        trickles = bool(self._behind) and (self._trickles or look.remaining_bytes < TRICKLE_BEFORE_S * pace)
        if trickles is not self._trickles:
            self._trickles = trickles
            await self._machine.set_bandwidth(TRICKLE if trickles else self._bandwidth(Kind.MEMORY))

    def _let_wait(self, look: MigrationStatistics, pace: float) -> None:
        """Have little or much wait on the way, by how soon the guest may stop: QEMU stops it when what remains takes no
        longer than the downtime limit."""
        limit_s = self.downtime_limit_ms / 1000
        if self._convergence.in_post_copy or look.remaining_bytes < (limit_s + SHORTEN_BEFORE_S) * pace:
            self._set_short(True)
        elif look.remaining_bytes > (limit_s + LENGTHEN_BEFORE_S) * pace:
            self._set_short(False)

    def _set_short(self, short: bool) -> None:
        """Told again when the stream has become much faster or slower: the rate is hardly known to begin with."""
        if short and self._short_for is not None:
            is_so = 0.5 < self._rate / max(self._short_for, 1.0) < 2
        else:
            is_so = short is (self._short_for is not None)
        if self.channel is not None and not is_so:
            self._short_for = self._rate if short else None
            if short:
                self._may_stop.set()
            else:
                self._may_stop.clear()
            # Copies' too: they would wait for memory, which goes first where little may wait.
            for channel in (self.channel, *self.disk_channels):
                channel.set_short(short, self._rate)
            self._pace_copies()
