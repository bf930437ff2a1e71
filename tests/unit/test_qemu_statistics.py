"""QEMU's migration figures in our units."""

from __future__ import annotations

from limosa.qemu.protocol import MigrationState, MigrationStatistics
from limosa.qemu.statistics import parse


def test_nothing_yet() -> None:
    assert parse({}) == MigrationStatistics(state=MigrationState.NONE)


def test_before_the_rate_was_measured() -> None:
    assert parse({"status": "active", "ram": {"mbps": -1.0}}).rate_bytes_per_s == 0


def test_all_figures() -> None:
    answer = {
        "status": "completed",
        "total-time": 1500,
        "setup-time": 4,
        "downtime": 7,
        "expected-downtime": 300,
        "cpu-throttle-percentage": 20,
        "ram": {
            "transferred": 1000,
            "remaining": 5,
            "total": 2000,
            "mbps": 8.0,
            "dirty-pages-rate": 10,
            "page-size": 4096,
            "dirty-sync-count": 3,
        },
    }
    assert parse(answer) == MigrationStatistics(
        state=MigrationState.COMPLETED,
        transferred_bytes=1000,
        remaining_bytes=5,
        total_bytes=2000,
        rate_bytes_per_s=1e6,
        dirty_rate_bytes_per_s=40960.0,
        iteration=3,
        downtime_ms=7,
        expected_downtime_ms=300,
        total_s=1.5,
        setup_s=0.004,
        throttle_percent=20,
    )


def test_a_failure_says_why() -> None:
    assert parse({"status": "failed", "error-desc": "Broken pipe"}).error == "Broken pipe"
