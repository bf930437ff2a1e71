"""What a move is expected to cost."""

from __future__ import annotations

import os

import pytest

from limosa.host.expectation import expect, resident_bytes
from limosa.migration.examination import Examined
from limosa.model.finding import Finding
from limosa.model.network import HostNetwork
from limosa.model.route import Path, Route
from limosa.model.storage import BackingFile, DiskAction, DiskPlan, LayerPlan
from limosa.settings.host import ConvergencePolicy
from limosa.transport.choice import Ends
from limosa.transport.shares import Kind

MB = 1_000_000
ENDS = Ends("host1", "host2", HostNetwork(), HostNetwork(), ())
POLICY = ConvergencePolicy(first_downtime_ms=2, blackout_budget_ms=60, post_copy=True)
STAYS = DiskPlan(disk="vda", action=DiskAction.STAY, path="/a", format="raw", expected_bytes=7 * MB)
COPIED = DiskPlan(
    disk="vdb", action=DiskAction.COPY, path="/b", format="raw", expected_bytes=300 * MB, needed_bytes=9000 * MB
)
LAYER = LayerPlan(origin="/c", file=BackingFile(path="/d", format="raw", size=1), expected_bytes=200 * MB)


def examined(
    *speeds: int | None,
    disks: tuple[DiskPlan, ...] = (),
    layers: tuple[LayerPlan, ...] = (),
    transport: str = "tcp",
    findings: tuple[Finding, ...] = (),
) -> Examined:
    paths = tuple(Path(here="10.0.0.1", there="10.0.0.2", speed_mbit_per_s=speed) for speed in speeds)
    return Examined(findings, Route(transport=transport, paths=paths), ENDS, disks, layers)


@pytest.mark.parametrize(
    ("speeds", "caps", "mbit_per_s", "seconds"),
    [
        ((800,), {}, 800, 6.0),
        ((800, 1600), {}, 2400, 2.0),
        # On an average: 500 MB of disks at 50 MB/s and 100 MB of memory at 100, and so on.
        ((800,), {Kind.STORAGE: 50 * MB}, 436, 11.0),
        ((800,), {Kind.MEMORY: 10 * MB, Kind.STORAGE: 900 * MB}, 320, 15.0),
        ((800,), {Kind.MEMORY: 50 * MB, Kind.STORAGE: 50 * MB}, 400, 12.0),
        ((800, None), {}, None, None),
        ((), {}, None, None),
    ],
)
def test_how_long(
    speeds: tuple[int | None, ...], caps: dict[Kind, int], mbit_per_s: int | None, seconds: float | None
) -> None:
    seen = examined(*speeds, disks=(STAYS, COPIED), layers=(LAYER,))
    found = expect(seen, 100 * MB, POLICY, lambda kind: caps.get(kind, 0))
    assert (found.disk_bytes, found.memory_bytes) == (500 * MB, 100 * MB)
    assert (found.mbit_per_s, found.seconds) == (mbit_per_s, seconds)
    assert (found.first_downtime_ms, found.blackout_budget_ms, found.post_copy) == (2, 60, True)


def test_at_which_rate_nothing_would_be_sent() -> None:
    found = expect(examined(800), 0, POLICY, lambda _: 50 * MB)
    assert (found.mbit_per_s, found.seconds) == (400, 0.0)


def test_post_copy_is_not_spoken_of_where_it_is_not_possible() -> None:
    refused = Finding.warning("post-copy-not-possible", "not that way", "use another")
    for seen in (examined(800, findings=(refused,)), examined(800, transport="rdma")):
        assert not expect(seen, MB, POLICY, lambda _: 0).post_copy


def test_what_a_process_has_of_memory() -> None:
    assert 1 * MB < (resident_bytes(os.getpid()) or 0) < 10_000 * MB
    assert resident_bytes(2**22 + 1) is None
