"""Limosa, as a user has it: the lab's daemons and ``limosa move``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.ground import HOSTS, Ground, run
from benchmarks.guest import FILLED, Guest
from benchmarks.systems import Moved, other
from benchmarks.systems.bare import wait_for
from limosa.lab.plan import SWITCH

LIMOSA = str(Path(sys.executable).with_name("limosa"))
_BEFORE_SWITCHOVER = ("build-up", "copy", "synchronise")


class Limosa:
    """A guest moved by ``limosa move``."""

    def __init__(self, ground: Ground, guest: Guest) -> None:
        self.name = "limosa"
        self.host = HOSTS[0]
        self._ground = ground
        self._guest = guest
        self._encrypted: bool | None = None
        ground.adopt_daemons(self.name)

    def boot(self) -> None:
        """Start the guest on the first host; returns when its memory is filled."""
        boot(self._ground, self._guest)

    def machine_and_cpu(self) -> tuple[str, str]:
        """The machine type and CPU Limosa chose for the guest."""
        config = say(self._ground, self.host, "vm", "show", self._guest.name)["config"]
        return config["machine"], config["cpu"]

    def pause(self) -> None:
        """Stop the guest."""
        say(self._ground, self.host, "vm", "pause", self._guest.name)

    def wake(self) -> None:
        """Let it run again."""
        say(self._ground, self.host, "vm", "resume", self._guest.name)

    def move(self, *, encrypted: bool) -> Moved:
        """Move the guest to the other host."""
        if encrypted is not self._encrypted:
            change_settings(self._ground, f"encrypt={'on' if encrypted else 'off'}")
            self._encrypted = encrypted
        there = other(self.host)
        said, wall_s, cpu_s = run(command(self._ground, self.host, "move", self._guest.name, "--to", there))
        self.host = there
        move = json.loads(said)
        return Moved(
            wall_s=wall_s,
            transfer_s=move["transfer_s"],
            blackout_ms=move["blackout_ms"],
            command_cpu_s=cpu_s,
            stopped_at=move["accepted_at"] + sum(move["phases"].get(phase, 0.0) for phase in _BEFORE_SWITCHOVER),
        )


def boot(ground: Ground, guest: Guest) -> None:
    """Create and start a guest on the first host; returns when its memory is filled."""
    say(
        ground,
        HOSTS[0],
        *("vm", "create", guest.name, "--memory", f"{guest.load.memory_mib}M", "--cpus", "1", "--accelerator", "tcg"),
        *("--switch", f"{SWITCH},mac={guest.mac}", "--kernel", guest.kernel, "--initrd", guest.initrd),
        *("--append", guest.command_line, "--start"),
    )
    wait_for(ground.lab.host_state(HOSTS[0]) / "state" / "vms" / guest.name / "console.log", FILLED)


def change_settings(ground: Ground, *changes: str) -> None:
    """Change the settings of both hosts."""
    for host in HOSTS:
        say(ground, host, "host", "settings", *changes)


def command(ground: Ground, host: str, *words: str) -> list[str]:
    """A command to a host of the lab."""
    return [LIMOSA, "--host", f"{ground.lab.name}-{host}", *words, "--json"]


def say(ground: Ground, host: str, *words: str) -> Any:
    """The answer of a command to a host of the lab."""
    return json.loads(run(command(ground, host, *words))[0])
