"""A migration as people and programs see it: phase, progress, timings, outcome."""

from __future__ import annotations

from enum import StrEnum

from limosa.model.base import MigrationId, Model, Name
from limosa.model.finding import Finding
from limosa.model.route import Route
from limosa.model.storage import DiskPlan, DiskProgress, LayerPlan


class Phase(StrEnum):
    """Where a move stands. ``WAITING`` is the line before a slot is free and does not count as work."""

    WAITING = "waiting"
    BUILD_UP = "build-up"
    #: disks that move along are copied; only where there are any
    STORAGE = "storage"
    COPY = "copy"
    SYNCHRONISE = "synchronise"
    SWITCHOVER = "switchover"
    TEAR_DOWN = "tear-down"


class Outcome(StrEnum):
    """How a move ended, or that it has not."""

    UNDER_WAY = "under-way"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    #: the source cannot know which side owns the VM; it is paused there, and may be running at the destination, until
    #: that can be asked or an administrator decides
    UNRESOLVED = "unresolved"


class Side(StrEnum):
    """Which end of a move a host is."""

    SOURCE = "source"
    DESTINATION = "destination"


class Progress(Model, forbid_unknown_fields=False, frozen=True):
    """A look at a running move. ``percent`` never goes back within one move."""

    percent: float = 0.0
    transferred_bytes: int = 0
    remaining_bytes: int = 0
    total_bytes: int = 0
    rate_bytes_per_s: float = 0.0
    dirty_rate_bytes_per_s: float = 0.0
    #: passes over guest memory begun so far
    iteration: int = 0
    remaining_s: float | None = None
    downtime_limit_ms: float | None = None
    throttle_percent: int = 0
    disks: tuple[DiskProgress, ...] = ()
    #: in words: what it waits for, or why it does not converge and what is done about it
    note: str = ""


class Fault(Model, forbid_unknown_fields=False, frozen=True):
    """An error as it crosses a wire or lies in a journal; the daemon's side of :class:`limosa.errors.LimosaError`."""

    code: str
    what: str
    why: str = ""
    todo: str = ""
    vm: str = ""
    host: str = ""
    findings: tuple[Finding, ...] = ()


class Migration(Model, forbid_unknown_fields=False, frozen=True):
    """One move of one VM, seen from the host that reports it.

    ``phases`` maps each phase already ended to its duration in seconds; ``blackout_ms`` is STOP at the source to
    RESUME at the destination by the time stamps of QEMU's events, ``qemu_downtime_ms`` QEMU's own figure. Where disks
    go along ``blackout_ms`` begins with that, because STOP is said when what the guest wrote last has been copied.
    Where the hosts' clocks differ it is wrong by the time that a word takes there and back, at most.
    """

    id: MigrationId
    vm: Name
    source: Name
    destination: Name
    side: Side
    #: which was asked for, until one is chosen (see ``route``)
    transport: str
    phase: Phase
    outcome: Outcome
    progress: Progress
    #: seconds since the epoch
    accepted_at: float
    phases: dict[str, float] = {}
    #: wall time without waiting in line
    total_s: float | None = None
    #: from the source's ``migrate`` to its ``completed``, by QEMU
    transfer_s: float | None = None
    blackout_ms: float | None = None
    qemu_downtime_ms: float | None = None
    fault: Fault | None = None
    #: place in line, from 1, while phase is ``WAITING``
    place: int | None = None
    findings: tuple[Finding, ...] = ()
    #: the way it takes, with what each path has carried so far; null until it is chosen
    route: Route | None = None
    #: what becomes of each disk; empty until it is planned
    disks: tuple[DiskPlan, ...] = ()
    #: files below them that are sent too
    layers: tuple[LayerPlan, ...] = ()
