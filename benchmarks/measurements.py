"""What a run of transports has measured so far."""

from __future__ import annotations

from dataclasses import dataclass, field

from benchmarks.transport_targets import Compared, Cut, Drained, Streamed, Trip


@dataclass
class Measurements:
    """Each part adds to it."""

    calibration: dict[str, float] = field(default_factory=dict)
    trips: list[Trip] = field(default_factory=list)
    streams: list[Streamed] = field(default_factory=list)
    drains: list[Drained] = field(default_factory=list)
    cuts: list[Cut] = field(default_factory=list)
    compared: list[Compared] = field(default_factory=list)
