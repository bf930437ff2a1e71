"""Teams of NICs: which of them spread one move over all their members, and how; pure.

A bond that chooses the member by a hash gives a connection one member, however long it lasts. Where the hash takes in
ports, several connections between the same two addresses come to lie on several members; which ones is chance. In the
other modes nothing is gained by more connections: ``active-backup`` uses one member, ``balance-tlb`` and
``balance-alb`` give one to each host (19 of 2x20 Mbit/s measured with four connections), ``balance-rr`` spreads a
single connection, out of order. What a *team* hashes in its mode ``loadbalance`` is not told, so it counts as one NIC.

Often the address is not the bond's: it is that of a bridge with the bond in it, or of a VLAN on it. The bond hashes
what these send as it hashes its own.
"""

from __future__ import annotations

from limosa.model.network import HostNetwork, HostNic

#: Modes that choose the member by a hash.
HASHING = ("balance-xor", "802.3ad")
#: Modes that take members in turn, those of bonds and those of teams.
IN_TURN = ("balance-rr", "roundrobin", "random")
#: Modes that use one member.
ONE_MEMBER = ("active-backup", "activebackup")
#: Hashes that take in ports.
BY_PORT = ("layer3+4", "encap3+4")


def spreads(network: HostNetwork, nic: HostNic) -> bool:
    """Whether several connections to one host use more of this NIC, or of what lies below it, than one."""
    team = network.uplink_of(nic)
    return team.bond_mode in HASHING and team.hash_policy in BY_PORT and len(active(network, team)) > 1


def active(network: HostNetwork, nic: HostNic) -> tuple[HostNic, ...]:
    """The members of a team that have a link."""
    return tuple(one for one in network.nics if one.name in nic.members and one.carrier)
