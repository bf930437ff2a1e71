"""How much of the bandwidth each stream of a move may use: caps by kind and by network, shared fairly; pure.

A cap is divided equally between the moves it concerns at the time. What a move may use of a network, or by its own cap,
is divided again between memory and disks if it sends both. The least of all caps counts; 0 is no cap everywhere here.

QEMU keeps its streams to their allowance, but for a disk's when its copy keeps up (009-storage). It does not know
networks: where one connection goes over several of them (Multipath TCP), all of it has to be content with the least
share. Where relays spread a stream over a lane for each path, each lane is kept to its network's share by itself, and
what QEMU may send is not bound by networks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from limosa.model.network import smallest_network


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

    kinds: frozenset[Kind]
    addresses: tuple[str, ...] = ()
    #: its own cap, bytes per second
    own: int = 0
    #: each path is a lane of relays
    striped: bool = False


def allowance(kind: Kind, claim: Claim, claims: Sequence[Claim], caps: Caps) -> int:
    """Bytes per second that QEMU may send of ``kind``, which ``claim`` has, of ``claims``, which has it too."""
    alike = sum(kind in one.kinds for one in claims)
    networks = [] if claim.striped else [_of_network(one, claim, claims, caps) for one in _networks(claim, caps)]
    both = _least([claim.own, *networks])
    return _least([_share(caps.kinds.get(kind, 0), alike), _share(both, len(claim.kinds))])


def lane(address: str, claim: Claim, claims: Sequence[Claim], caps: Caps) -> int:
    """Bytes per second of ``claim``, which is striped, over its lane to an address, which it may not have known yet."""
    network = smallest_network(address, caps.networks)
    lanes = {address, *(one for one in claim.addresses if smallest_network(one, caps.networks) == network)}
    return _share(_of_network(network, claim, claims, caps), len(lanes)) if network else 0


def _networks(claim: Claim, caps: Caps) -> set[str]:
    """Those with a cap that it uses."""
    return {smallest_network(address, caps.networks) for address in claim.addresses} - {""}


def _of_network(network: str, claim: Claim, claims: Sequence[Claim], caps: Caps) -> int:
    others = sum(one is not claim and network in _networks(one, caps) for one in claims)
    return _share(caps.networks[network], others + 1)


def _share(cap: int, users: int) -> int:
    return max(1, cap // max(1, users)) if cap else 0


def _least(bounds: Iterable[int]) -> int:
    return min((bound for bound in bounds if bound), default=0)
