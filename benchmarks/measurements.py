"""What a run of transports measures: each single measurement, and all of them so far."""

from __future__ import annotations

from dataclasses import dataclass, field

from limosa.model.base import Model


class Trip(Model, frozen=True):
    """One move of one guest."""

    part: str
    link: str
    #: payload of plain TCP streams over it
    link_bytes_per_s: float
    #: whether its NICs are of one speed
    equal_nics: bool
    #: what other VMs compute: idle, half (of the processors), busy
    load: str
    guest: str
    #: limosa or multifd-zstd
    system: str
    #: what was asked for
    transport: str
    #: what was taken
    way: str
    round: int
    wall_s: float
    transfer_s: float
    blackout_ms: float
    cpu_s: float
    #: that passed the source's migration NICs in both directions, with all headers
    wire_bytes: int
    #: of QEMU's stream; 0 if it is not known
    payload_bytes: int
    #: thousands of steps that all other VMs together did a second; 0 if there were none
    others_per_s: float


class Streamed(Model, frozen=True):
    """Random bytes sent from one host to the other. ``by``: direct TCP, or relays."""

    by: str
    round: int
    sent_bytes: int
    wall_s: float
    #: of all processes on the way, those that send and receive included
    cpu_s: float


class Drained(Model, frozen=True):
    """All VMs moved to the other host."""

    by: str
    guest: str
    vms: int
    round: int
    wall_s: float
    cpu_s: float
    wire_bytes: int


class Cut(Model, frozen=True):
    """A move in which a NIC lost its cable."""

    nic: str
    host: str
    round: int
    #: of the guest's memory that was sent until then
    after_percent: float
    wall_s: float
    #: the longest time in which no more was sent
    stall_s: float
    #: why it failed; empty if it did not
    failed: str


class Compared(Model, frozen=True):
    """Guest memory compared page by page after everything was sent and before any of the two QEMUs let it run."""

    transport: str
    #: what was taken
    way: str
    pages: int
    #: that had changed since the move began
    changed: int
    different: int


@dataclass
class Measurements:
    """Each part adds to it."""

    calibration: dict[str, float] = field(default_factory=dict)
    trips: list[Trip] = field(default_factory=list)
    streams: list[Streamed] = field(default_factory=list)
    drains: list[Drained] = field(default_factory=list)
    cuts: list[Cut] = field(default_factory=list)
    compared: list[Compared] = field(default_factory=list)
