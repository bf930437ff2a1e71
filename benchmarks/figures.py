"""What is measured of each move between hosts, whichever system makes it."""

from __future__ import annotations

from benchmarks.rows import Figure
from limosa.model.base import Model


class Observed(Model, frozen=True):
    """A move, as seen by all that watched it."""

    wall_s: float
    transfer_s: float
    blackout_ms: float
    #: the client's longest gap around the switchover
    gap_ms: float
    #: the client's longest gap in the whole move, and in a second before it
    stall_ms: float
    noise_ms: float
    cpu_s: float
    wire_bytes: int


WALL = Figure[Observed]("wall time", "s", lambda move: move.wall_s)
TRANSFER = Figure[Observed]("transfer time", "s", lambda move: move.transfer_s)
BLACKOUT = Figure[Observed]("blackout", "ms", lambda move: move.blackout_ms)
GAP = Figure[Observed]("client's gap", "ms", lambda move: move.gap_ms)
STALL = Figure[Observed]("client's longest stall", "ms", lambda move: move.stall_ms)
NOISE = Figure[Observed]("client's noise floor", "ms", lambda move: move.noise_ms)
CPU = Figure[Observed]("processor time", "s", lambda move: move.cpu_s)
WIRE = Figure[Observed]("bytes on the wire", "MB", lambda move: move.wire_bytes / 1e6)

#: What a page says about them.
METHOD = """\
- *Blackout*: STOP on the source to RESUME on the destination, by the time stamps of QEMU's events.
- *Client's gap*: a client in another network namespace sends an echo request every millisecond; the longest time
  without an answer around the switchover, less that millisecond. *Longest stall*: the same over the whole move;
  *noise floor*: the same over a second before it.
- *Processor time*: of daemons, both QEMUs (the guest's own work included) and the command.
"""
