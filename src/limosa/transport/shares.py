"""How much of the bandwidth each stream of a move may use: caps by kind and by network, shared fairly; pure.

A cap is divided equally between the moves it concerns at the time. A move over several networks may use its share of
each; one network without a cap leaves it free on all. The least of all caps counts; 0 is no cap everywhere here.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum


class Kind(StrEnum):
    """What is sent."""

    MEMORY = "memory"
    STORAGE = "storage"


@dataclass(frozen=True)
class Caps:
    """What all moves together may use, bytes per second."""

    kinds: Mapping[Kind, int] = field(default_factory=dict)
    #: by network, such as ``10.0.0.0/24``
    networks: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Claim:
    """One move that sends now. ``addresses``: of the destination, one for each path."""

    kind: Kind
    addresses: tuple[str, ...] = ()
    #: its own cap, bytes per second
    own: int = 0


def allowance(claim: Claim, claims: Sequence[Claim], caps: Caps) -> int:
    """Bytes per second ``claim`` may use, of ``claims``, which has it too."""
    alike = sum(one.kind is claim.kind for one in claims)
    bounds = [claim.own, _share(caps.kinds.get(claim.kind, 0), alike), _of_networks(claim, claims, caps)]
    return min((bound for bound in bounds if bound), default=0)


def network_of(address: str, networks: Mapping[str, int]) -> str:
    """The smallest of ``networks`` the address is in; empty if it is in none."""
    ip = ipaddress.ip_address(address)
    inside = [ipaddress.ip_network(text) for text in networks]
    return str(max((net for net in inside if ip in net), key=lambda net: net.prefixlen, default=""))


def _of_networks(claim: Claim, claims: Sequence[Claim], caps: Caps) -> int:
    used = {network_of(address, caps.networks) for address in claim.addresses}
    if not used or "" in used:
        return 0
    shares = []
    for network in used:
        users = sum(any(network_of(address, caps.networks) == network for address in one.addresses) for one in claims)
        shares.append(_share(caps.networks[network], users))
    return 0 if 0 in shares else sum(shares)


def _share(cap: int, users: int) -> int:
    return max(1, cap // max(1, users)) if cap else 0
