"""A host daemon that compares guest memory: Limosa's own, with a look in the moment in which both sides have it all.

At the source, after its QEMU has reported ``completed`` and before the destination gets the word, no guest runs and
both QEMUs have all memory. It is read from the processes themselves (proc(5), ``mem``): both hosts of a lab are on this
machine. What was found is appended to a file, an object a line.

Started by path, with that file and the daemon's settings file; the lab adds the latter.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from limosa.host.serve import serve
from limosa.migration.source import SourceMove
from limosa.migration.steering import Steering
from limosa.model.vm import VmConfig
from limosa.qemu.protocol import MachineProtocol
from limosa.settings import toml
from limosa.settings.daemon import DaemonSettings
from limosa.wire.peer import Prepared

PAGE_BYTES = 4096
PIECE_BYTES = 1024 * 1024


def memory_of(state: Path, vm: VmConfig) -> bytes:
    """All memory of a VM on the host with that state folder. Raises ``LookupError`` if it cannot be told apart."""
    pid = json.loads((state / "vms" / vm.name / "process.json").read_bytes())["pid"]
    size = vm.memory_mib * 1024 * 1024
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        span, rights = line.split()[:2]
        first, last = (int(end, 16) for end in span.split("-"))
        if last - first == size and rights.startswith("rw"):
            with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
                memory.seek(first)
                return b"".join(memory.read(PIECE_BYTES) for _ in range(size // PIECE_BYTES))
    raise LookupError(f"process {pid} has no mapping of {size} bytes")


def different_pages(one: bytes, other: bytes) -> int:
    """How many pages are not alike."""
    pieces = range(0, len(one), PIECE_BYTES)
    unlike = [at for at in pieces if one[at : at + PIECE_BYTES] != other[at : at + PIECE_BYTES]]
    pages = (at + page for at in unlike for page in range(0, PIECE_BYTES, PAGE_BYTES))
    return sum(one[at : at + PAGE_BYTES] != other[at : at + PAGE_BYTES] for at in pages)


def compare(file: Path, own: Path, hosts: Path) -> None:
    """Have each move from the host with state folder ``own`` looked at. ``hosts`` has the folders of all hosts."""
    begin, end = SourceMove.copy, SourceMove.switch_over
    before: dict[str, bytes] = {}

    async def copy(self: SourceMove, machine: MachineProtocol, steering: Steering, prepared: Prepared) -> None:
        before[self.header.migration] = await asyncio.to_thread(memory_of, own, self.header.vm)
        await begin(self, machine, steering, prepared)

    async def switch_over(self: SourceMove, machine: MachineProtocol) -> None:
        await asyncio.to_thread(look, self)
        await end(self, machine)

    def look(move: SourceMove) -> None:
        vm = move.header.vm
        here, there = memory_of(own, vm), memory_of(hosts / move.header.destination / "state", vm)
        first = before.pop(move.header.migration)
        found = {
            "pages": len(here) // PAGE_BYTES,
            "changed": different_pages(first, here),
            "different": different_pages(here, there),
        }
        with file.open("a") as told:
            told.write(json.dumps(found) + "\n")

    SourceMove.copy, SourceMove.switch_over = copy, switch_over  # type: ignore[method-assign]


def main() -> None:
    """Serve, with the files named on the command line."""
    file, settings = map(Path, sys.argv[1:])
    own = Path(toml.read(settings, DaemonSettings).state_dir)
    compare(file, own, own.parent.parent)
    serve(settings)


if __name__ == "__main__":
    main()
