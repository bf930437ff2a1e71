"""A host's network as far as moves are concerned: its NICs with their addresses and speeds, and what is allowed."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

from limosa.model.base import Model

#: Kinds by which VMs and containers hang on a bridge. A veth may also lead out, if it is all there is.
_INWARD = ("tun", "veth")


def smallest_network(address: str, networks: Iterable[str]) -> str:
    """The smallest of ``networks`` the address is in; empty if it is in none."""
    ip = ipaddress.ip_address(address)
    inside = [ipaddress.ip_network(text) for text in networks]
    return str(max((net for net in inside if ip in net), key=lambda net: net.prefixlen, default=""))


class NicAddress(Model, forbid_unknown_fields=False, frozen=True):
    """An address of a NIC, with the length of its network's prefix in bits."""

    address: str
    prefix: int


class HostNic(Model, forbid_unknown_fields=False, frozen=True):
    """A network interface of a host, real or virtual.

    ``kind`` is ``physical``, ``loopback``, or Linux's word for a virtual one: ``bond``, ``team``, ``bridge``, ``vlan``,
    ``veth``, ``tun``. A team's or bridge's ``members`` have it as their ``master``.
    """

    name: str
    #: the kernel's number, which stays when the name changes
    index: int
    kind: str
    #: set up by the administrator
    up: bool
    #: and has a link
    carrier: bool
    mtu: int
    #: what it says of itself, or what it is shaped to if that is less; null if it says nothing
    speed_mbit_per_s: int | None = None
    addresses: tuple[NicAddress, ...] = ()
    master: str = ""
    members: tuple[str, ...] = ()
    #: the NIC that a VLAN, macvlan or ipvlan is on
    lower: str = ""
    #: of a bond or team, in the kernel's words: ``802.3ad``, ``loadbalance``; and of a bond, ``layer2``
    bond_mode: str = ""
    hash_policy: str = ""
    #: the RDMA device on it
    rdma: str = ""
    #: which the kernel emulates (soft-RoCE), at the cost of more processor time than TCP's
    rdma_emulated: bool = False


class Carried(Model, forbid_unknown_fields=False, frozen=True):
    """What a move has got through the network between two addresses, in its best second."""

    here: str
    there: str
    mbit_per_s: int
    #: so long ago that it does not contradict a NIC any more
    old: bool = False


class HostNetwork(Model, forbid_unknown_fields=False, frozen=True):
    """What one host brings to the choice of a way to another."""

    nics: tuple[HostNic, ...] = ()
    #: the kernel has Multipath TCP and it is switched on
    mptcp: bool = False
    #: its setting ``migration_networks``
    allowed: tuple[str, ...] = ()
    #: its setting ``encrypt``
    encrypt: bool = True
    #: how much memory a QEMU may lock for RDMA, in MiB; null: any amount
    lockable_mib: int | None = None
    #: by moves from here
    carried: tuple[Carried, ...] = ()
    #: its setting ``network_bandwidth_mbit_per_s``, for moves from here
    caps_mbit_per_s: dict[str, int] = {}

    def nic_of(self, address: str) -> HostNic | None:
        """The NIC that has an address."""
        return next((nic for nic in self.nics if any(own.address == address for own in nic.addresses)), None)

    def down_from(self, nic: HostNic) -> tuple[HostNic, ...]:
        """A NIC and what lies below it, one below the other. The last is the one by which what it sends leaves the
        host: what a VLAN is on, or the one NIC in a bridge. Where a bridge has several it is the bridge."""
        found = [nic]
        # Another host says this: it might say that two lie below each other.
        while (below := self._below(found[-1])) is not None and below not in found:
            found.append(below)
        return tuple(found)

    def uplink_of(self, nic: HostNic) -> HostNic:
        """The last of :meth:`down_from`."""
        return self.down_from(nic)[-1]

    def leads_out(self, nic: HostNic) -> bool:
        """Whether a NIC is more than a bridge on which nothing but VMs and containers hangs."""
        return nic.kind != "bridge" or any(one.kind not in _INWARD for one in self.nics if one.name in nic.members)

    def _below(self, nic: HostNic) -> HostNic | None:
        names = (nic.lower,) if nic.lower else nic.members if nic.kind == "bridge" else ()
        found = [one for one in self.nics if one.name in names]
        outward = [one for one in found if one.kind not in _INWARD] or found
        return outward[0] if len(outward) == 1 else None

    def cap_to(self, address: str) -> int:
        """Mbit/s that moves from here may use of the network an address is in, 0: no cap."""
        return self.caps_mbit_per_s.get(smallest_network(address, self.caps_mbit_per_s), 0)

    def carried_to(self, here: str, there: str) -> Carried | None:
        """From an address of ours to another host's; None if no move has measured it."""
        return next((one for one in self.carried if (one.here, one.there) == (here, there)), None)
