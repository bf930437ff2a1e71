"""Sharing caps: what each move gets never adds up to more than a cap, and nobody is left with nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from limosa.transport.shares import Caps, Claim, Kind, allowance, network_of

NETWORKS = {"10.0.1.0/24": 1000, "10.0.2.0/24": 600, "10.0.0.0/16": 5000}
ADDRESSES = ["10.0.1.2", "10.0.2.2", "10.0.3.2", "192.0.2.1"]
CLAIMS = st.lists(
    st.builds(
        Claim,
        kind=st.sampled_from(Kind),
        addresses=st.lists(st.sampled_from(ADDRESSES), unique=True, max_size=3).map(tuple),
        own=st.sampled_from([0, 50, 10_000]),
    ),
    min_size=1,
    max_size=6,
)
CAPS = st.builds(
    Caps,
    kinds=st.dictionaries(st.sampled_from(Kind), st.sampled_from([0, 300, 2000])),
    networks=st.sampled_from([{}, NETWORKS]),
)


@given(CLAIMS, CAPS)
def test_a_kind_never_gets_more_than_its_cap(claims: list[Claim], caps: Caps) -> None:
    for kind, cap in caps.kinds.items():
        of_kind = [allowance(claim, claims, caps) for claim in claims if claim.kind is kind]
        if cap:
            assert 0 not in of_kind
            assert sum(of_kind) <= cap


@given(CLAIMS, CAPS)
def test_a_move_never_gets_more_than_its_own_cap_and_never_nothing(claims: list[Claim], caps: Caps) -> None:
    for claim in claims:
        given_ = allowance(claim, claims, caps)
        assert given_ >= 0
        if claim.own:
            assert 0 < given_ <= claim.own


@given(CLAIMS)
def test_a_network_never_carries_more_than_its_cap(claims: list[Claim]) -> None:
    """Of moves that use nothing but that network."""
    caps = Caps(networks=NETWORKS)
    for network, cap in NETWORKS.items():
        alone = [c for c in claims if c.addresses and {network_of(a, NETWORKS) for a in c.addresses} == {network}]
        assert sum(allowance(claim, claims, caps) for claim in alone) <= cap


@pytest.mark.parametrize(
    ("claim", "others", "expected"),
    [
        (Claim(Kind.MEMORY, ("192.0.2.1",)), [], 0),
        (Claim(Kind.MEMORY, ("10.0.1.2",)), [], 1000),
        (Claim(Kind.MEMORY, ("10.0.1.2", "10.0.2.2")), [], 1600),
        (Claim(Kind.MEMORY, ("10.0.1.2", "192.0.2.1")), [], 0),
        (Claim(Kind.MEMORY, ("10.0.1.2",)), [Claim(Kind.STORAGE, ("10.0.1.3",))], 500),
        (Claim(Kind.MEMORY, ("10.0.3.2",)), [], 5000),
        (Claim(Kind.MEMORY, ("10.0.1.2",), own=70), [], 70),
    ],
)
def test_networks_in_particular(claim: Claim, others: list[Claim], expected: int) -> None:
    assert allowance(claim, [claim, *others], Caps(networks=NETWORKS)) == expected
