"""A trip: one move of a guest by one transport, metered from outside, whatever other VMs do meanwhile.

Nobody watches the guest from the LAN here, since that takes processor time, which is what transports differ in.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.ground import Ground, Link
from benchmarks.measurements import Trip
from benchmarks.neighbours import Neighbours
from benchmarks.program import say
from benchmarks.systems import Moved, System
from benchmarks.systems.bare import Bare
from benchmarks.systems.limosa import Limosa

#: The guest is at work again after this time.
AWAKE_S = 0.5
_RELAY = b"limosa.transport.relay"


@dataclass(frozen=True)
class Scene:
    """What is the same for several trips."""

    part: str
    place: Ground
    link: Link
    #: bytes per second that plain TCP streams bring over it
    link_bytes_per_s: float
    #: which guest moves
    guest: str
    neighbours: Neighbours | None = None

    def by_limosa(self, limosa: Limosa, transport: str, number: int, load: str = "idle") -> Trip:
        """A move by Limosa, with TLS."""
        end_relays(self.place)
        act = _with_transport(limosa, transport)
        return self._take(limosa, act, transport, number, load)

    def by_script(self, bare: Bare, number: int, load: str = "idle") -> Trip:
        """A move by a bare script, with TLS."""
        return self._take(bare, lambda: bare.move(encrypted=True), bare.name, number, load)

    def _take(self, system: System, act: Callable[[], Moved], transport: str, number: int, load: str) -> Trip:
        place, source = self.place, system.host
        system.wake()
        time.sleep(AWAKE_S)
        work = self.neighbours.meter() if self.neighbours is not None else None
        cpu_s, wire = place.cpu_s(system.name), place.bytes_on_wire(source)
        moved = act()
        work_per_s = work() if work is not None else 0.0
        cpu_s, wire = place.cpu_s(system.name) - cpu_s, place.bytes_on_wire(source) - wire
        system.pause()
        told = system.told if isinstance(system, Limosa) else {}
        trip = Trip(
            part=self.part,
            link=self.link.name,
            link_bytes_per_s=self.link_bytes_per_s,
            equal_nics=len(set(self.link.speeds)) == 1,
            load=load,
            guest=self.guest,
            system=system.name,
            transport=transport,
            way=told.get("transport", transport),
            round=number,
            wall_s=moved.wall_s,
            transfer_s=moved.transfer_s,
            blackout_ms=moved.blackout_ms,
            cpu_s=cpu_s + moved.command_cpu_s,
            wire_bytes=wire,
            payload_bytes=told["progress"]["transferred_bytes"] if told else 0,
            others_per_s=work_per_s,
        )
        say(_words(trip))
        return trip


def end_relays(place: Ground) -> None:
    """End relays that wait for further moves: what they have sent before would make the next move a cheaper one."""
    for pid in map(int, (place.group("limosa") / "cgroup.procs").read_text().split()):
        # They may end by themselves meanwhile.
        with suppress(FileNotFoundError, ProcessLookupError):
            if _RELAY in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)


def _with_transport(limosa: Limosa, transport: str) -> Callable[[], Moved]:
    return lambda: limosa.move(encrypted=True, transport=transport)


def _words(trip: Trip) -> str:
    way = f" ({trip.way})" if trip.way != trip.transport else ""
    others = f", others {trip.others_per_s:.0f}/s" if trip.others_per_s else ""
    return (
        f"{trip.part}, {trip.link}, {trip.load}, {trip.guest}, round {trip.round + 1}: {trip.transport}{way}: "
        f"{trip.wall_s:.2f} s, {trip.wire_bytes / 1e6:.0f} MB, blackout {trip.blackout_ms:.1f} ms{others}"
    )
