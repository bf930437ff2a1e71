"""A volume group for tests: a pretended one, or a real one where the test runs has named one that it may use.

The real one must be called ``bulk``, be empty but for a thin pool ``thin``, and have extents of 4 MiB.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from harness import fake_lvm

#: Set where there is a real one.
REAL = "LIMOSA_TEST_LVM"
GROUP, POOL = fake_lvm.GROUP, fake_lvm.POOL
EXTENT = fake_lvm.EXTENT


class FakeLvm:
    """A pretended ``lvm`` in a folder of its own; ``program`` is what to run."""

    def __init__(self, folder: Path, size_bytes: int = 64 * EXTENT, pool_bytes: int = 4 * EXTENT) -> None:
        self._state = folder / "state.json"
        self.program = folder / "lvm"
        source = Path(fake_lvm.__file__).read_text().split("\n", maxsplit=1)[1]
        self.program.write_text(f"#!{sys.executable} -I\n{source}")
        self.program.chmod(0o755)
        self._state.write_text(json.dumps(fake_lvm.initial(size_bytes, pool_bytes)))

    @property
    def volumes(self) -> dict[str, Any]:
        """What there is but for the pool, by name."""
        return dict(json.loads(self._state.read_text())["lvs"])

    def change(self, **values: Any) -> None:
        """Have the group be otherwise."""
        self._state.write_text(json.dumps(json.loads(self._state.read_text()) | values))


def has_a_real_one() -> bool:
    """Whether the tests may use a real group."""
    return REAL in os.environ
