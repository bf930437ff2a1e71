"""What the rest of Limosa may ask of a running QEMU, in domain words.

``MachineProtocol`` is the seam between moving a VM and QEMU: :class:`limosa.qemu.machine.Machine` implements it with a
real QEMU, :class:`limosa.testing.machine.FakeMachine` without one, and one contract test holds both to it. QEMU's own
names of states and statistics end here.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from limosa.model.vm import DiskFormat
from limosa.wire.peer import StreamCredentials


@dataclass(frozen=True)
class Event:
    """Something QEMU reported by itself. ``at`` is QEMU's own time stamp, seconds since the epoch."""

    name: str
    data: Mapping[str, Any]
    at: float


class RunState(StrEnum):
    """QEMU's run state (``RunState`` in qapi/run-state.json)."""

    RUNNING = "running"
    PAUSED = "paused"
    #: started with ``-S`` and never continued
    PRELAUNCH = "prelaunch"
    #: waits for, or is receiving, the state of a VM
    INMIGRATE = "inmigrate"
    POSTMIGRATE = "postmigrate"
    FINISH_MIGRATE = "finish-migrate"
    SHUTDOWN = "shutdown"
    GUEST_PANICKED = "guest-panicked"
    INTERNAL_ERROR = "internal-error"
    IO_ERROR = "io-error"
    WATCHDOG = "watchdog"
    SAVE_VM = "save-vm"
    RESTORE_VM = "restore-vm"
    SUSPENDED = "suspended"
    DEBUG = "debug"
    COLO = "colo"


class MigrationState(StrEnum):
    """Where QEMU's migration stands (``MigrationStatus`` in qapi/migration.json)."""

    NONE = "none"
    SETUP = "setup"
    ACTIVE = "active"
    PRE_SWITCHOVER = "pre-switchover"
    DEVICE = "device"
    POSTCOPY_ACTIVE = "postcopy-active"
    POSTCOPY_PAUSED = "postcopy-paused"
    POSTCOPY_RECOVER_SETUP = "postcopy-recover-setup"
    POSTCOPY_RECOVER = "postcopy-recover"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


#: The stream is under way, and a cancel can still end it.
PRE_COPY = frozenset(
    {MigrationState.SETUP, MigrationState.ACTIVE, MigrationState.PRE_SWITCHOVER, MigrationState.DEVICE}
)
#: A post-copy whose stream broke has another one, and both QEMUs find out what is still missing.
RECOVERING = frozenset({MigrationState.POSTCOPY_RECOVER_SETUP, MigrationState.POSTCOPY_RECOVER})
#: The guest may run at the destination, and a part of its memory is still at the source only.
POST_COPY = frozenset({MigrationState.POSTCOPY_ACTIVE, MigrationState.POSTCOPY_PAUSED}) | RECOVERING
#: With the first of these the guest is at the destination: all of it, or all but a part of its memory.
SWITCHED_OVER = frozenset({MigrationState.COMPLETED, MigrationState.POSTCOPY_ACTIVE})
#: What ``PRE_COPY`` ends with.
PRE_COPY_ENDINGS = SWITCHED_OVER | {MigrationState.FAILED, MigrationState.CANCELLED}
#: The source cannot take the guest back on its own any more.
NO_WAY_BACK = POST_COPY | {MigrationState.COMPLETED}


@dataclass(frozen=True)
class MigrationStatistics:
    """A look at QEMU's migration. Before the first one everything but ``state`` is zero."""

    state: MigrationState = MigrationState.NONE
    transferred_bytes: int = 0
    remaining_bytes: int = 0
    total_bytes: int = 0
    rate_bytes_per_s: float = 0.0
    dirty_rate_bytes_per_s: float = 0.0
    #: passes over guest memory begun so far
    iteration: int = 0
    #: the guest's pause as QEMU measured it, known when completed
    downtime_ms: float = 0.0
    expected_downtime_ms: float = 0.0
    total_s: float = 0.0
    setup_s: float = 0.0
    throttle_percent: int = 0
    #: QEMU's words where it failed
    error: str = ""


@dataclass(frozen=True)
class RdmaAddress:
    """Where one QEMU listens and the other calls by RDMA, which no socket of ours can do for them.

    An IPv4 address, as QEMU's RDMA knows no other. Raises ``ValueError`` for anything else: it becomes part of a URI.
    """

    address: str
    port: int

    def __post_init__(self) -> None:
        ipaddress.IPv4Address(self.address)

    @property
    def uri(self) -> str:
        """As QEMU's commands have it."""
        return f"rdma:{self.address}:{self.port:d}"


@dataclass(frozen=True)
class StreamParameters:
    """How guest memory shall travel. Both ends are given the same, but for the credentials."""

    #: null: not encrypted
    credentials: StreamCredentials | None = None
    downtime_limit_ms: float = 300.0
    #: 0: no cap
    bandwidth_bytes_per_s: int = 0
    post_copy: bool = False
    #: stop before the switchover, with the guest stopped, until :meth:`MachineProtocol.continue_migration`
    pause: bool = False
    #: the guest may be slowed later (:meth:`MachineProtocol.set_throttle`); see :meth:`MachineProtocol.slows_safely`
    slows: bool = True
    #: memory goes by RDMA, so that QEMU has to lock it
    rdma: bool = False
    #: lock all of it at the beginning, instead of each piece when it is sent
    rdma_pin_all: bool = False


@dataclass(frozen=True)
class ImageFile:
    """An image of this host as QEMU is to open it. ``direct``: without the host's page cache."""

    path: str
    format: DiskFormat
    direct: bool = True
    #: it keeps its space when a guest, or a copy, has zeroes for it
    thick: bool = False
    #: QEMU keeps others off it by locks of its own; off where the file system's do not work
    locks: bool = True
    #: it is a block device, of which the disk is the first ``size_bytes``
    device: bool = False
    size_bytes: int | None = None
    #: where the disk has zeroes make holes, also where they were read as data
    look_for_zeroes: bool = False


class CopyState(StrEnum):
    """How the copy of a disk stands."""

    #: not everything has been copied once
    COPYING = "copying"
    #: it keeps up with what the guest writes
    READY = "ready"
    #: the guest's I/O is held back; both are alike and flushed
    SETTLED = "settled"
    ENDED = "ended"


@dataclass(frozen=True)
class CopyStatistics:
    """A look at the copy of a disk. ``error``: QEMU's words where it failed."""

    state: CopyState
    copied_bytes: int
    total_bytes: int
    error: str = ""


class CopyingProtocol(Protocol):
    """A QEMU that copies disks, as those who look after the copies see it. Errors are as below."""

    def on_event(self, callback: Callable[[Event], None]) -> Callable[[], None]:
        """Have ``callback`` called with each event at once, in order. Returns what ends that."""

    async def copies(self) -> dict[str, CopyStatistics]:
        """How all copies stand, by disk."""

    async def cap_copy(self, disk: str, bytes_per_s: int) -> None:
        """Cap what is copied, 0: no cap. Where nothing is, or no longer, there is nothing to cap."""

    async def hurry_copy(self, disk: str) -> None:
        """Have a copy that is ready take at once what the guest has written since it looked last. No effect where none
        is, or QEMU cannot be asked."""

    async def slow_writes(self, disk: str, bytes_per_s: int) -> None:
        """Let the guest write so much a second to a disk, from now on; 0: as much as it can. A copy that is given up,
        or takes the disk's place, ends that."""

    async def end_copy(self, disk: str) -> None:
        """Source: make a copy that is ready whole, flush and end it. Raises :class:`StorageError` if it failed."""

    async def drop_copy(self, disk: str, tag: str) -> None:
        """Source: give a copy up, or close one that has ended. The disk is as it was. May be repeated.

        Raises :class:`StorageError` if QEMU does not end it, and so may still write to it."""


class MachineProtocol(CopyingProtocol, Protocol):
    """A QEMU that runs one VM. Every method raises :class:`QemuGone` once its process has ended, :class:`QemuError`
    if QEMU refuses, and :class:`OutcomeUnknown` if the connection broke before QEMU answered."""

    @property
    def gone(self) -> asyncio.Event:
        """Set as soon as the process has ended."""

    def exit_text(self) -> str:
        """Why the process ended, in QEMU's own words where it had some. Empty while it runs."""

    async def status(self) -> RunState:
        """QEMU's run state."""

    async def pause(self) -> None:
        """Stop the guest; no effect if it is stopped."""

    async def resume(self) -> float:
        """Let the guest run. Returns since when (seconds since the epoch, by QEMU's RESUME event).

        Refused with :class:`QemuError` while the state of the VM has not arrived completely.
        """

    async def resume_if_stopped(self) -> None:
        """Let the guest run unless it does. May follow at once on the event that its stream broke or was cancelled."""

    async def quit(self) -> None:
        """End QEMU, by force if it does not listen. Returns when its process is gone; never raises ``QemuGone``."""

    async def kill(self) -> None:
        """End QEMU by force. Returns when its process is gone."""

    async def announce(self) -> None:
        """Tell the switches anew where the VM's NICs are."""

    async def slows_safely(self) -> bool:
        """Source: whether a guest that may be slowed goes on whatever happens to the network meanwhile."""

    async def prepare_outgoing(self, parameters: StreamParameters) -> None:
        """Source: set everything up for :meth:`migrate`. May be repeated."""

    async def migrate(self, stream: socket.socket | RdmaAddress) -> None:
        """Source: start to send the VM into a connected socket. Returns as soon as QEMU has accepted; events tell the
        rest. QEMU gets a duplicate of the socket; the caller's must not outlive the move, whose end is the stream's.

        With an address QEMU calls there itself, by RDMA."""

    async def cancel_migration(self) -> None:
        """Source: ask QEMU to end the migration. No effect if none runs.

        Its ``cancelled`` event says when that is done; it may also be too late and end ``completed``. A guest that had
        been stopped for the switchover is let run again by QEMU itself.
        """

    async def set_downtime_limit(self, milliseconds: float) -> None:
        """Source: the blackout QEMU may plan for; rounded up to whole milliseconds. 0: the guest stops only when
        nothing remains to be sent, which may be any moment in which it wrote nothing."""

    async def set_bandwidth(self, bytes_per_s: int) -> None:
        """Source: cap what is sent; 0: no cap."""

    async def set_throttle(self, max_percent: int, step_percent: int) -> None:
        """Source: let QEMU slow the guest's processors, in steps, up to ``max_percent``."""

    async def start_post_copy(self) -> None:
        """Source: switch over now and send the rest behind. There is no way back."""

    async def send_rest(self, stream: socket.socket) -> None:
        """Source: go on, over another stream, with a post-copy whose own broke (``POSTCOPY_PAUSED``). As
        :meth:`migrate`; may be repeated as often as that breaks."""

    async def continue_migration(self) -> None:
        """Source: go on with a migration that waits before its switchover (``StreamParameters.pause``)."""

    async def prepare_incoming(self, parameters: StreamParameters) -> None:
        """Destination: set everything up for :meth:`receive`."""

    async def receive(self, stream: socket.socket | RdmaAddress) -> None:
        """Destination: load the VM from a connected socket, of which QEMU gets a duplicate. Returns as soon as QEMU has
        accepted; events tell the rest.

        With an address QEMU listens there itself, by RDMA, when this returns. A QEMU that could not is of no
        further use: it refuses all other streams too (migration_incoming_state_setup in migration/migration.c)."""

    async def receive_rest(self, stream: socket.socket) -> None:
        """Destination: take the rest of a post-copy, whose stream broke, from another one, which is the machine's from
        now on. QEMU answers this also while it waits for a page of the guest with all else standing still."""

    async def migration(self) -> MigrationStatistics:
        """How the migration stands, as seen from this side."""

    async def forget_stream(self) -> None:
        """Drop credentials and settings of the last stream. May be repeated."""

    # Disks that move along

    async def trust_disks(self, credentials: StreamCredentials) -> None:
        """Source: take the credentials with which copies go to a host."""

    async def copy_to_host(
        self, disk: str, tag: str, stream: socket.socket, bytes_per_s: int, *, whole: bool, encrypt: bool
    ) -> None:
        """Source: begin to copy a disk into ``stream``, to the export of its name; ``tag`` names the copy.

        ``whole``: with what is below an overlay. ``bytes_per_s``: a cap, 0 for none. ``encrypt`` needs
        :meth:`trust_disks`.
        """

    async def export_disks(
        self, disks: Iterable[str], listener: socket.socket, credentials: StreamCredentials | None
    ) -> None:
        """Destination: let whoever has the other half of ``credentials`` write these disks, through ``listener``;
        without credentials whoever can call that."""

    async def end_exports(self) -> None:
        """Destination: let nobody write disks from elsewhere any more. May be repeated."""
