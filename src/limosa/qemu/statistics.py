"""QEMU's ``query-migrate`` answer in our units."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from limosa.qemu.protocol import MigrationState, MigrationStatistics


def parse(answer: Mapping[str, Any]) -> MigrationStatistics:
    """Statistics from QEMU's answer. Fields QEMU leaves out, as most before the first pass, are zero.

    Durations come in milliseconds, ``mbps`` in 10^6 bits per second (and below zero before it was measured), the dirty
    rate in pages per second.
    """
    ram: Mapping[str, Any] = answer.get("ram", {})
    return MigrationStatistics(
        state=MigrationState(answer.get("status", MigrationState.NONE)),
        transferred_bytes=ram.get("transferred", 0),
        remaining_bytes=ram.get("remaining", 0),
        total_bytes=ram.get("total", 0),
        rate_bytes_per_s=max(0.0, ram.get("mbps", 0.0)) * 1e6 / 8,
        dirty_rate_bytes_per_s=float(ram.get("dirty-pages-rate", 0) * ram.get("page-size", 4096)),
        iteration=ram.get("dirty-sync-count", 0),
        downtime_ms=float(answer.get("downtime", 0)),
        expected_downtime_ms=float(answer.get("expected-downtime", 0)),
        total_s=answer.get("total-time", 0) / 1000,
        setup_s=answer.get("setup-time", 0) / 1000,
        throttle_percent=answer.get("cpu-throttle-percentage", 0),
        error=answer.get("error-desc", ""),
    )
