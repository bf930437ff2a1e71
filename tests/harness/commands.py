"""``limosa`` as a person runs it: a process of its own, its exit code, what it prints."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.labs import LabHost

LIMOSA = str(Path(sys.executable).with_name("limosa"))
ENDS_WITHIN_S = 120.0


@dataclass(frozen=True)
class Said:
    """How a command ended."""

    code: int
    out: str
    error: str

    @property
    def objects(self) -> list[Any]:
        """The JSON objects it printed, one a line."""
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def object(self) -> Any:
        """The one JSON object it printed."""
        (one,) = self.objects
        return one


def limosa(host: LabHost, *words: str) -> Said:
    """Run a command against a lab host's own socket."""
    return run([LIMOSA, "--host", f"{host.lab.name}-{host.name}", *words])


def run(command: list[str], **environment: str) -> Said:
    """Run a command."""
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=ENDS_WITHIN_S, env=environment or None
    )
    return Said(done.returncode, done.stdout, done.stderr)
