"""QEMU's own compression, driven by the bare script: multifd with zstd.

QEMU connects its channels itself, since multifd takes no descriptors. Everything else is the floor's.
"""

from __future__ import annotations

from benchmarks.ground import Ground
from benchmarks.guest import Guest
from benchmarks.qmp import Qmp
from benchmarks.systems.bare import Bare

NAME = "multifd-zstd"
LEVEL = 1


class Multifd(Bare):
    """A guest moved by the script, compressed by QEMU, with QEMU's number of channels (two)."""

    def __init__(self, ground: Ground, guest: Guest) -> None:
        super().__init__(ground, guest, NAME)

    def _prepare(self, source: Qmp, destination: Qmp, *, encrypted: bool) -> None:
        super()._prepare(source, destination, encrypted=encrypted)
        for end in (source, destination):
            capability = {"capability": "multifd", "state": True}
            end.execute("migrate-set-capabilities", {"capabilities": [capability]})
            end.execute("migrate-set-parameters", {"multifd-compression": "zstd", "multifd-zstd-level": LEVEL})

    def _connect(self, source: Qmp, address: tuple[str, int]) -> str:
        return f"tcp:{address[0]}:{address[1]}"
