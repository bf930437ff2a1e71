"""The settings page of a host: all of live migration in one place, validated, changed while the daemon works.

Each field carries its own help in ``Meta(description=...)``; ``limosa host settings`` prints it.
"""

from __future__ import annotations

import ipaddress
from typing import Annotated, Literal

from msgspec import Meta

from limosa.model.base import Model, Name
from limosa.model.storage import OWN_LOCATION, Place
from limosa.settings.address import PeerAddress, parse_address

Transport = Literal["auto", "tcp", "multichannel", "compression", "rdma"]
Cidr = Annotated[str, Meta(max_length=64, description="a network such as 10.0.0.0/24")]


class ConvergencePolicy(Model, frozen=True):
    """What a move does when the guest writes faster than its memory, or its disks, can be sent. Steps for memory are
    taken in this order."""

    first_downtime_ms: Annotated[
        float,
        Meta(
            ge=1, le=2000, description="downtime limit a move starts with; raised step by step up to blackout_budget_ms"
        ),
    ] = 2
    blackout_budget_ms: Annotated[
        float, Meta(ge=1, le=2000, description="the longest blackout a move may plan for, in milliseconds")
    ] = 60
    auto_converge: Annotated[
        bool, Meta(description="slow the guest's processors when the budget alone does not suffice")
    ] = True
    max_throttle_percent: Annotated[int, Meta(ge=1, le=99, description="how far auto_converge may slow the guest")] = 80
    post_copy: Annotated[
        bool,
        Meta(
            description="as a last step run the guest at the destination before all its memory is there; not undoable"
        ),
    ] = False
    slow_writes: Annotated[
        bool,
        Meta(description="slow the guest's writes to a disk while it writes faster than that can, or may, be copied"),
    ] = True
    least_write_kib_per_s: Annotated[
        int,
        Meta(
            ge=1,
            le=1024 * 1024,
            description="lower limit for slow_writes, per disk",
        ),
    ] = 64
    patience_s: Annotated[float, Meta(ge=1, le=86400, description="abort after this long without progress")] = 120

    def __post_init__(self) -> None:
        if self.first_downtime_ms > self.blackout_budget_ms:
            raise ValueError("first_downtime_ms is more than blackout_budget_ms")


class HostSettings(Model, frozen=True):
    """All live settings of a host."""

    live_migration: Annotated[bool, Meta(description="whether VMs may move from or to this host")] = True
    max_outgoing: Annotated[
        int,
        Meta(
            ge=1,
            le=64,
            description="moves from this host at once that copy no disks; more are queued. Relates to max_incoming and "
            "max_storage_moves",
        ),
    ] = 2
    max_incoming: Annotated[
        int,
        Meta(
            ge=1,
            le=64,
            description="moves to this host at once that copy no disks; more are queued. Relates to max_outgoing and "
            "max_storage_moves",
        ),
    ] = 2
    max_storage_moves: Annotated[
        int,
        Meta(
            ge=1,
            le=64,
            description="moves that copy disks, on this host or from it, at once, and as many to it; more are queued",
        ),
    ] = 2
    migration_networks: Annotated[
        tuple[Cidr, ...],
        Meta(
            description="networks that may carry moves, in order of preference: a move that uses one network takes the "
            "first listed, even if another is faster; empty: any the hosts share"
        ),
    ] = ()
    migration_ports: Annotated[
        tuple[int, int], Meta(description="first and last TCP port on which this host receives guest memory and disks")
    ] = (49152, 49407)
    transport: Annotated[
        Transport,
        Meta(
            description="how guest memory travels: tcp, one connection; multichannel, all NICs at once; "
            "compression, compressed with idle processor time; rdma, by RDMA devices, which needs encrypt off on both "
            "hosts; auto chooses the fastest between the two hosts"
        ),
    ] = "auto"
    rdma_pin_all: Annotated[
        bool,
        Meta(
            description="with rdma, lock all memory of a VM at once: faster, but needs that much free memory on "
            "both hosts"
        ),
    ] = False
    encrypt: Annotated[
        bool,
        Meta(
            description="TLS for guest memory that is sent, and required for what is received; switch it off on both "
            "hosts, and only on networks nobody else can reach"
        ),
    ] = True
    compression_window_mib: Annotated[
        int,
        Meta(
            ge=1,
            le=1024,
            description="memory, a power of two, in which compression finds pages that an earlier VM has sent already; "
            "used for each pair of hosts, on both, during such moves; the smaller of the two values applies",
        ),
    ] = 512
    bandwidth_mbit_per_s: Annotated[
        int,
        Meta(
            ge=0,
            le=1_000_000,
            description="cap for guest memory sent by this host, shared by its moves; 0: none. Relates to "
            "storage_bandwidth_mbit_per_s and network_bandwidth_mbit_per_s",
        ),
    ] = 0
    storage_bandwidth_mbit_per_s: Annotated[
        int, Meta(ge=0, le=1_000_000, description="the same for disks that move along with their VMs")
    ] = 0
    network_bandwidth_mbit_per_s: Annotated[
        dict[Cidr, Annotated[int, Meta(ge=1, le=1_000_000)]],
        Meta(description="caps by network for everything that moves from this host over it, shared by the moves"),
    ] = {}
    convergence: ConvergencePolicy = ConvergencePolicy()
    reserved_memory_mib: Annotated[
        int, Meta(ge=0, le=16 * 1024 * 1024, description="memory kept for the host itself, never given to VMs")
    ] = 512
    peers: Annotated[
        dict[Name, PeerAddress],
        Meta(description="addresses of other hosts by name, for moves; hosts not listed are looked up in DNS"),
    ] = {}
    locations: Annotated[
        dict[Name, Place],
        Meta(
            description="folders (path) and LVM volume groups (lvm) for disk images by name; a folder marked as shared "
            "holds the same files on every host that has one of that name. Relates to default_location"
        ),
    ] = {}
    default_location: Annotated[
        Name,
        Meta(description="where images of VMs that move here go unless another location is given"),
    ] = OWN_LOCATION

    def __post_init__(self) -> None:
        for name, networks in (
            ("migration_networks", self.migration_networks),
            ("network_bandwidth_mbit_per_s", self.network_bandwidth_mbit_per_s),
        ):
            for network in networks:
                try:
                    ipaddress.ip_network(network)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from None
        if self.compression_window_mib.bit_count() != 1:
            raise ValueError("compression_window_mib: a power of two, such as 256 or 512")
        for name, address in self.peers.items():
            try:
                parse_address(address)
            except ValueError as error:
                raise ValueError(f"peers.{name}: {error}") from None
        groups: dict[str, str] = {}
        for name, place in self.locations.items():
            if place.lvm is not None and name != groups.setdefault(place.root, name):
                raise ValueError(f"locations.{name}: {groups[place.root]} is in this volume group already")
        if self.default_location not in {*self.locations, OWN_LOCATION}:
            raise ValueError(f"default_location: there is no location '{self.default_location}'")
        first, last = self.migration_ports
        if not 1024 <= first <= last <= 65535:
            raise ValueError("migration_ports: two ports from 1024 to 65535, the lower first")
