"""The way a move takes: which transport, over which NICs, and why."""

from __future__ import annotations

from limosa.model.base import Model


class Path(Model, forbid_unknown_fields=False, frozen=True):
    """From an address of the source to one of the destination, and the NICs that have them.

    ``here`` and ``nic_here`` are empty where the source's routing decides.
    """

    here: str
    there: str
    nic_here: str = ""
    nic_there: str = ""
    #: the slower NIC's, null if one of them does not say
    speed_mbit_per_s: int | None = None
    #: connections, with ports of their own, that it takes to use all members of a team on it
    streams: int = 1
    #: payload the destination has acknowledged; what another path had to send again counts on both
    sent_bytes: int = 0
    #: TCP connections over it at the last look, with those of other VMs where relays share them; 0 by RDMA
    connections: int = 0


class Compressed(Model, forbid_unknown_fields=False, frozen=True):
    """What the relays made of a VM's memory so far."""

    #: as QEMU sent it
    raw_bytes: int
    #: as it went over the network, less what TLS and TCP add
    sent_bytes: int
    #: the one over the other; null while nothing was sent
    ratio: float | None
    #: processor time spent on compressing it
    cpu_s: float
    #: TCP connections between the two relays, which all VMs share that move this way meanwhile
    connections: int


class Route(Model, forbid_unknown_fields=False, frozen=True):
    """What was chosen for a move. ``paths`` are best first, and empty if nothing leads there."""

    transport: str
    paths: tuple[Path, ...] = ()
    #: in words
    why: str = ""
    #: relays spread it over a TCP connection for each path, without Multipath TCP
    striped: bool = False
    #: its relays carry no other VM
    alone: bool = False
    #: null if no relay compresses it
    compressed: Compressed | None = None

    @property
    def is_multipath(self) -> bool:
        """Whether it takes Multipath TCP, by itself or below relays."""
        connections = sum(path.streams for path in self.paths)
        return not self.striped and (self.transport == "multichannel" or connections > 1)

    @property
    def is_relayed(self) -> bool:
        """Whether relays carry it."""
        return self.transport == "compression" or self.striped
