"""Which of a host's addresses may carry guest memory."""

from __future__ import annotations

import ipaddress

from hypothesis import given
from hypothesis import strategies as st

from limosa.network.addresses import HostAddress, migration_addresses

LAN = HostAddress("10.77.0.11", 24, "lan")
SLOW = HostAddress("10.78.0.11", 24, "mig0", 1000)
FAST = HostAddress("10.78.0.12", 24, "mig1", 25000)
SIX = HostAddress("fd00::5", 64, "mig2", 100)
OWN = (LAN, SLOW, FAST, SIX)


def test_the_order_of_the_networks_comes_first_then_the_speed() -> None:
    assert migration_addresses(OWN, ("fd00::/16", "10.78.0.0/24", "10.77.0.0/24")) == (
        "fd00::5",
        "10.78.0.12",
        "10.78.0.11",
        "10.77.0.11",
    )


def test_an_address_in_two_networks_counts_once_where_it_comes_first() -> None:
    assert migration_addresses(OWN, ("10.78.0.11/32", "10.78.0.0/16")) == ("10.78.0.11", "10.78.0.12")


def test_networks_are_a_permission_so_the_fallback_does_not_weaken_them() -> None:
    assert migration_addresses(OWN, ("192.0.2.0/24",), fallback="10.77.0.11") == ()


def test_without_networks_the_address_the_other_host_reached_is_taken() -> None:
    assert migration_addresses(OWN, (), fallback="10.77.0.11") == ("10.77.0.11",)
    assert migration_addresses(OWN, ()) == ()


@given(
    st.lists(st.ip_addresses().map(lambda a: HostAddress(str(a), 24, "x")), max_size=8),
    st.lists(st.tuples(st.ip_addresses(v=4), st.integers(0, 32)), min_size=1, max_size=5),
)
def test_never_an_address_outside_the_networks_never_one_left_out(
    own: list[HostAddress], allowed: list[tuple[ipaddress.IPv4Address, int]]
) -> None:
    networks = [ipaddress.ip_network(pair, strict=False) for pair in allowed]
    chosen = migration_addresses(own, [str(network) for network in networks])
    expected = {host.address for host in own if any(ipaddress.ip_address(host.address) in net for net in networks)}
    assert set(chosen) == expected
    assert len(chosen) == len(set(chosen))
