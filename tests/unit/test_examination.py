"""Which of the destination's addresses are taken for open: those that are reached from where moves may begin."""

from __future__ import annotations

import asyncio

import pytest

from limosa.migration.examination import _open_route
from limosa.model.network import HostNetwork, HostNic, NicAddress
from limosa.transport import tcp
from limosa.transport.choice import Ends

MANAGEMENT, FIRST, SECOND = "192.0.2.1", "10.1.0.1", "10.2.0.1"


def nic(name: str, address: str) -> HostNic:
    own = (NicAddress(address=address, prefix=24),)
    return HostNic(name=name, index=2, kind="physical", up=True, carrier=True, mtu=1500, addresses=own)


@pytest.mark.parametrize(("own", "is_open"), [(FIRST, True), (MANAGEMENT, False), (None, False)])
def test_routing_must_lead_out_over_a_network_that_may_carry_moves(
    monkeypatch: pytest.MonkeyPatch, own: str | None, is_open: bool
) -> None:
    async def reach(address: str, port: int, source: str) -> str | None:
        assert (address, port, source) == (SECOND, 1, "")
        return own

    monkeypatch.setattr(tcp, "reach", reach)
    here = HostNetwork(nics=(nic("eth0", MANAGEMENT), nic("eth1", FIRST)), allowed=("10.1.0.0/24", "10.2.0.0/24"))
    ends = Ends("host1", "host2", here, HostNetwork(nics=(nic("eth0", SECOND),)), [SECOND])
    route, blocked = asyncio.run(_open_route(ends, "auto", 1))
    assert bool(route.paths) is is_open
    assert bool(blocked) is not is_open
