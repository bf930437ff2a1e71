"""``scripts/benchmark transports``: transports against plain TCP, QEMU's own compression and ``virsh``.

The parts are independent of each other: each makes its labs, boots its guests, and adds to what was measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks import cells, machine, program
from benchmarks.cuts import cuts
from benchmarks.drains import drain
from benchmarks.ending import ended_in_order
from benchmarks.likeness import memory
from benchmarks.measurements import Measurements
from benchmarks.program import say
from benchmarks.qmp import QmpError
from benchmarks.relayed import relay
from benchmarks.resident import resident_memory
from benchmarks.transport_report import Report, page
from benchmarks.transport_targets import rows
from limosa.errors import LimosaError


@dataclass(frozen=True)
class Part:
    """Something to be measured. ``rounds`` is what fits, with all others, into 40 minutes."""

    measure: Callable[[int, Measurements], None]
    rounds: int


#: In the order in which they are measured.
PARTS = {
    "compression": Part(cells.compression, 5),
    "busy": Part(cells.busy, 5),
    "matrix": Part(cells.matrix, 3),
    "nics": Part(cells.nics, 3),
    "relay": Part(relay, 5),
    "drain": Part(drain, 2),
    "cuts": Part(cuts, 24),
    "memory": Part(memory, 1),
}


def main() -> int:
    """Measure, print the table, write what was asked for."""
    given = program.arguments("transports", "Measure what each transport is worth.", None, _add_options)
    measured = Measurements()
    with ended_in_order(), resident_memory():
        ended_well = [_measured(name, given.rounds, measured) for name in given.only]
    report = Report(
        machine=machine.machine(),
        versions=machine.versions(),
        calibration=measured.calibration,
        rows=tuple(rows(measured.trips, measured.streams, measured.drains, measured.cuts, measured.compared)),
        trips=tuple(measured.trips),
        streams=tuple(measured.streams),
        drains=tuple(measured.drains),
        cuts=tuple(measured.cuts),
        compared=tuple(measured.compared),
    )
    program.publish(given, report, page(report, () if given.only == list(PARTS) else given.only))
    return 0 if all(ended_well) else 1


def _measured(name: str, rounds: int | None, measured: Measurements) -> bool:
    """Measure a part. If it fails the others are not lost, nor what it has measured until then."""
    say(f"{name}:")
    try:
        PARTS[name].measure(rounds or PARTS[name].rounds, measured)
    except (LimosaError, QmpError, OSError, RuntimeError) as error:
        say(f"{name} failed: {error}")
        return False
    return True


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--only",
        type=parts,
        default=list(PARTS),
        metavar="PART,...",
        help=f"only these parts, of {', '.join(PARTS)}; a round of 'cuts' is one move (100 are a thorough run)",
    )


def parts(given: str) -> list[str]:
    """The parts that are named. Raises ``ArgumentTypeError``."""
    names = given.split(",")
    for name in names:
        if name not in PARTS:
            raise argparse.ArgumentTypeError(f"there is no part '{name}'; choose of {', '.join(PARTS)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
