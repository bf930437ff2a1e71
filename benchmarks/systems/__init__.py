"""The systems that are compared, one module each, all with the same handles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Moved:
    """What a system knows of one move it made."""

    #: from the command to its end
    wall_s: float
    #: QEMU's total time: from ``migrate`` until the source's QEMU reports completed
    transfer_s: float
    #: STOP on the source to RESUME on the destination, by the time stamps of QEMU's events
    blackout_ms: float
    #: of the command itself; daemons and QEMUs are in the system's control group
    command_cpu_s: float
    #: when the guest stopped at the source, seconds since the epoch
    stopped_at: float


class System(Protocol):
    """A guest in the lab, and what moves it back and forth between the two hosts."""

    #: also that of its control group
    name: str
    #: the host the guest is on
    host: str

    def boot(self) -> None:
        """Start the guest on the first host; returns when its memory is filled."""

    def pause(self) -> None:
        """Stop the guest, so that it takes nothing from the one being measured."""

    def wake(self) -> None:
        """Let it run again."""

    def move(self, *, encrypted: bool) -> Moved:
        """Move the guest to the other host."""


def other(host: str) -> str:
    """The other of the two hosts."""
    return {"host1": "host2", "host2": "host1"}[host]
