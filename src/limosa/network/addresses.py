"""Which of this host's addresses may carry guest memory; pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from limosa.model.network import HostNetwork, HostNic


@dataclass(frozen=True)
class HostAddress:
    """An address of this host. ``speed_mbit_per_s`` is its NIC's, None if that says nothing."""

    address: str
    prefix: int
    interface: str
    speed_mbit_per_s: int | None = None


def own_addresses(nics: Iterable[HostNic]) -> tuple[HostAddress, ...]:
    """All usable addresses of these NICs, in their order."""
    return tuple(
        HostAddress(own.address, own.prefix, nic.name, nic.speed_mbit_per_s) for nic in nics for own in nic.addresses
    )


def stream_addresses(network: HostNetwork, reached_at: str) -> tuple[str, ...]:
    """This host's addresses that may carry guest memory, best first; ``reached_at``: where the other host reached it.

    Without allowed networks these are all that another host may be able to reach, and ``reached_at`` is the best.
    """
    own = own_addresses(network.nics)
    best = migration_addresses(own, network.allowed, reached_at)
    if network.allowed or ipaddress.ip_address(reached_at).is_loopback:
        return best
    return tuple(dict.fromkeys((*best, *shareable(own))))


def migration_addresses(
    own: Sequence[HostAddress], networks: Sequence[str], fallback: str | None = None
) -> tuple[str, ...]:
    """Those of this host's addresses that may carry guest memory, best first.

    With ``networks`` (the setting ``migration_networks``): the addresses inside them, in the order of the networks, the
    faster NIC first inside one; none if the host has no such address, for the setting is a permission and not a wish.
    Without: ``fallback``, the address at which the other host reached this one.
    """
    if not networks:
        return (fallback,) if fallback else ()
    # A dict keeps the first place of an address that lies in several networks.
    chosen: dict[str, None] = {}
    for network in networks:
        chosen.update(dict.fromkeys(_inside(own, network)))
    return tuple(chosen)


def shareable(own: Iterable[HostAddress]) -> tuple[str, ...]:
    """Those of this host's addresses that another host may be able to reach."""
    parsed = [ipaddress.ip_address(host.address) for host in own]
    return tuple(str(address) for address in parsed if not (address.is_loopback or address.is_link_local))


def _inside(own: Sequence[HostAddress], network: str) -> list[str]:
    allowed = ipaddress.ip_network(network)
    found = [host for host in own if ipaddress.ip_address(host.address) in allowed]
    found.sort(key=lambda host: (-(host.speed_mbit_per_s or 0), int(ipaddress.ip_address(host.address))))
    return [host.address for host in found]
