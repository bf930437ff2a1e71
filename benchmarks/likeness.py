"""Guest memory is compared after a move by each transport (see ``witness``)."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import msgspec

from benchmarks import witness
from benchmarks.ground import TWO_NICS, ground
from benchmarks.guest import Guest
from benchmarks.measurements import Compared, Measurements
from benchmarks.program import say
from benchmarks.systems.limosa import Limosa
from limosa.model import reading

TRANSPORTS = ("tcp", "multichannel", "compression", "auto")


class _Found(msgspec.Struct):
    pages: int
    changed: int
    different: int


def memory(rounds: int, measured: Measurements) -> None:
    """One move by each transport in each round, of the guest that rewrites its memory."""
    with tempfile.TemporaryDirectory(prefix="limosa-witness-") as folder:
        file = Path(folder) / "found"
        daemon = [sys.executable, "-P", witness.__file__, str(file)]
        with ground(TWO_NICS, daemon) as place:
            say(f"memory, {TWO_NICS.name}: booting the busy guest")
            limosa = Limosa(place, Guest("busy", 0))
            limosa.boot()
            for _ in range(rounds):
                measured.compared += [_compared(limosa, transport, file) for transport in TRANSPORTS]


def _compared(limosa: Limosa, transport: str, file: Path) -> Compared:
    limosa.move(encrypted=True, transport=transport)
    found = reading.decode(file.read_bytes().splitlines()[-1], _Found)
    compared = Compared(
        transport=transport,
        way=limosa.told["transport"],
        pages=found.pages,
        changed=found.changed,
        different=found.different,
    )
    say(f"memory: {transport} ({compared.way}): {found.different} of {found.pages} pages differ")
    return compared
