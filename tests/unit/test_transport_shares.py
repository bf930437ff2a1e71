"""Sharing caps: what each move gets never adds up to more than a cap, and nobody is left with nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from limosa.model.network import smallest_network
from limosa.transport.shares import Caps, Claim, Kind, allowance, lane

NETWORKS = {"10.0.1.0/24": 1000, "10.0.2.0/24": 600, "10.0.0.0/16": 5000}
ADDRESSES = ["10.0.1.2", "10.0.1.3", "10.0.2.2", "10.0.3.2", "192.0.2.1"]
CLAIMS = st.lists(
    st.builds(
        Claim,
        kinds=st.frozensets(st.sampled_from(Kind), min_size=1),
        addresses=st.lists(st.sampled_from(ADDRESSES), unique=True, max_size=3).map(tuple),
        own=st.sampled_from([0, 50, 10_000]),
        striped=st.booleans(),
    ),
    min_size=1,
    max_size=6,
)
CAPS = st.builds(
    Caps,
    kinds=st.dictionaries(st.sampled_from(Kind), st.sampled_from([0, 300, 2000])),
    networks=st.sampled_from([{}, NETWORKS]),
)
MEMORY, BOTH = frozenset({Kind.MEMORY}), frozenset(Kind)


@given(CLAIMS, CAPS)
def test_a_kind_never_gets_more_than_its_cap(claims: list[Claim], caps: Caps) -> None:
    for kind, cap in caps.kinds.items():
        of_kind = [allowance(kind, claim, claims, caps) for claim in claims if kind in claim.kinds]
        if cap:
            assert 0 not in of_kind
            assert sum(of_kind) <= cap


@given(CLAIMS, CAPS)
def test_a_move_never_gets_more_than_its_own_cap_and_never_nothing(claims: list[Claim], caps: Caps) -> None:
    for claim in claims:
        given_ = [allowance(kind, claim, claims, caps) for kind in claim.kinds]
        assert all(one >= 0 for one in given_)
        if claim.own:
            assert 0 not in given_
            assert sum(given_) <= claim.own


@given(CLAIMS)
def test_a_network_never_carries_more_than_its_cap(claims: list[Claim]) -> None:
    caps = Caps(networks=NETWORKS)
    for network, cap in NETWORKS.items():
        used = 0
        for claim in claims:
            inside = [address for address in claim.addresses if smallest_network(address, NETWORKS) == network]
            if claim.striped:
                used += sum(lane(address, claim, claims, caps) for address in inside)
            elif inside:  # all of it may go over this one
                used += sum(allowance(kind, claim, claims, caps) for kind in claim.kinds)
        assert used <= cap


@pytest.mark.parametrize(
    ("claim", "others", "expected"),
    [
        (Claim(MEMORY, ("192.0.2.1",)), [], 0),
        (Claim(MEMORY, ("10.0.1.2",)), [], 1000),
        (Claim(MEMORY, ("10.0.1.2", "10.0.2.2")), [], 600),
        (Claim(MEMORY, ("10.0.1.2", "192.0.2.1")), [], 1000),
        (Claim(MEMORY, ("10.0.1.2", "192.0.2.1"), striped=True), [], 0),
        (Claim(MEMORY, ("10.0.1.2",)), [Claim(frozenset({Kind.STORAGE}), ("10.0.1.3",))], 500),
        (Claim(MEMORY, ("10.0.3.2",)), [], 5000),
        (Claim(MEMORY, ("10.0.1.2",), own=70), [], 70),
        (Claim(BOTH, ("10.0.1.2",)), [], 500),
        (Claim(BOTH, ("10.0.3.2",), own=70), [], 35),
    ],
)
def test_networks_in_particular(claim: Claim, others: list[Claim], expected: int) -> None:
    assert allowance(Kind.MEMORY, claim, [claim, *others], Caps(networks=NETWORKS)) == expected


def test_the_cap_of_a_kind_is_its_own() -> None:
    claim, caps = Claim(BOTH, ("192.0.2.1",)), Caps(kinds={Kind.MEMORY: 900, Kind.STORAGE: 100})
    assert [allowance(kind, claim, [claim], caps) for kind in (Kind.MEMORY, Kind.STORAGE)] == [900, 100]


@pytest.mark.parametrize(
    ("address", "others", "expected"),
    [
        ("192.0.2.1", [], 0),
        ("10.0.1.2", [], 1000),
        ("10.0.2.2", [], 600),
        ("10.0.1.3", [], 500),  # it has appeared, and 10.0.1.2 is there already
        ("10.0.1.2", [Claim(MEMORY, ("10.0.1.9",))], 500),
        ("10.0.3.2", [Claim(MEMORY, ("10.0.4.2",))], 2500),
    ],
)
def test_lanes_in_particular(address: str, others: list[Claim], expected: int) -> None:
    claim = Claim(MEMORY, ("10.0.1.2", "10.0.2.2", "192.0.2.1"), striped=True)
    assert lane(address, claim, [claim, *others], Caps(networks=NETWORKS)) == expected
