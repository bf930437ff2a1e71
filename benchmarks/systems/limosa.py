"""Limosa, as a user has it: the lab's daemons, ``limosa move`` and ``limosa storage move``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks import disk
from benchmarks.ground import HOSTS, Ground, run
from benchmarks.guest import Guest
from benchmarks.systems import Moved, other
from benchmarks.systems.bare import wait_for
from limosa.lab.plan import SWITCH

LIMOSA = str(Path(sys.executable).with_name("limosa"))
#: The location every host has, and a second one for moves on one host.
OWN_LOCATION, OTHER_LOCATION = "images", "other"
_BEFORE_SWITCHOVER = ("build-up", "storage", "copy", "synchronise")
_TRANSFER = ("storage", "copy", "synchronise", "switchover")


class Limosa:
    """A guest moved by ``limosa move``."""

    def __init__(self, ground: Ground, guest: Guest) -> None:
        self.name = "limosa"
        self.host = HOSTS[0]
        self._ground = ground
        self._guest = guest
        self._encrypted: bool | None = None
        self._location = OWN_LOCATION
        #: of its disk, if it has one
        self.image = images(ground, self.host) / f"{guest.name}.qcow2"
        #: what it said of the last move
        self.told: dict[str, Any] = {}
        ground.adopt_daemons(self.name)

    def boot(self) -> None:
        """Start the guest on the first host; returns when it does what it is to do."""
        if self._guest.disk is not None and not self.image.exists():
            disk.copy(self._guest.disk, self.image)
        boot(self._ground, self._guest, self.image)

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

    def move(self, *, encrypted: bool, transport: str = "tcp") -> Moved:
        """Move the guest to the other host. Raises ``RuntimeError`` if its disk is not where it should be then."""
        if encrypted is not self._encrypted:
            change_settings(self._ground, f"encrypt={'on' if encrypted else 'off'}")
            self._encrypted = encrypted
        there = other(self.host)
        words = ("move", self._guest.name, "--to", there, "--transport", transport)
        said, wall_s, cpu_s = run(command(self._ground, self.host, *words))
        self.host = there
        move = self.told = json.loads(said)
        self._follow_disk(move)
        phases = move["phases"]
        return Moved(
            wall_s=wall_s,
            transfer_s=sum(phases.get(phase, 0.0) for phase in _TRANSFER) if move["disks"] else move["transfer_s"],
            blackout_ms=move["blackout_ms"],
            command_cpu_s=cpu_s,
            stopped_at=move["accepted_at"] + sum(phases.get(phase, 0.0) for phase in _BEFORE_SWITCHOVER),
        )

    def move_disk(self) -> float:
        """Move the guest's disk to the other location of its host. Returns the wall time. Raises as :meth:`move`."""
        self._location = OTHER_LOCATION if self._location == OWN_LOCATION else OWN_LOCATION
        words = ("storage", "move", self._guest.name, "--to", self._location)
        said, wall_s, _ = run(command(self._ground, self.host, *words))
        self._follow_disk(json.loads(said))
        return wall_s

    def _follow_disk(self, move: dict[str, Any]) -> None:
        for plan in move["disks"]:
            left, self.image = self.image, Path(plan["path"])
            if left.exists() or not self.image.exists():
                raise RuntimeError(f"{left} should have been moved to {self.image}")


def boot(ground: Ground, guest: Guest, image: Path | None = None) -> None:
    """Create and start a guest on the first host; returns when it does what it is to do."""
    disks = ("--disk", f"{image},format=qcow2") if guest.disk is not None else ()
    say(
        ground,
        HOSTS[0],
        *("vm", "create", guest.name, "--memory", f"{guest.load.memory_mib}M", "--cpus", "1", "--accelerator", "tcg"),
        *("--switch", f"{SWITCH},mac={guest.mac}", "--kernel", guest.kernel, "--initrd", guest.initrd),
        *("--append", guest.command_line, *disks, "--start"),
    )
    wait_for(_state(ground, HOSTS[0]) / "vms" / guest.name / "console.log", guest.loaded)


def images(ground: Ground, host: str) -> Path:
    """The folder of a host's own location."""
    return _state(ground, host) / OWN_LOCATION


def add_locations(ground: Ground) -> None:
    """Give each host a second location, which the other sees, too: the machine is the same."""
    for host in HOSTS:
        folder = _state(ground, host) / OTHER_LOCATION
        folder.mkdir(mode=0o711)
        say(ground, host, "storage", "add", OTHER_LOCATION, str(folder))


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


def _state(ground: Ground, host: str) -> Path:
    return ground.lab.host_state(host) / "state"
