"""A drain: all VMs of a host move to the other, and all are of one image of Debian.

Three fleets of VMs: Limosa's, libvirt's and the bare script's. Those that do not move are paused.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Generic, TypeVar

from benchmarks.debian import debian_guest
from benchmarks.ground import GIGABIT, Ground, ground, run
from benchmarks.guest import Guest
from benchmarks.measurements import Drained, Measurements
from benchmarks.program import say
from benchmarks.systems import System, other
from benchmarks.systems.limosa import Limosa, command
from benchmarks.systems.multifd import Multifd
from benchmarks.systems.virsh import Virsh, start_daemons
from benchmarks.transport_targets import COMPRESSED, PARALLEL, PLAIN, SEQUENCE, ZSTD
from benchmarks.trips import AWAKE_S, end_relays
from benchmarks.turn import rotated

VMS = 8
#: Guests that boot at once.
BOOTING = 2
#: What a Debian that is up still has to do is done after so long.
SETTLED_S = 15.0

S = TypeVar("S", bound=System)
T = TypeVar("T")


@dataclass(frozen=True)
class Fleet(Generic[S]):
    """The guests of one system."""

    place: Ground
    systems: Sequence[S]

    @property
    def name(self) -> str:
        """The system's."""
        return self.systems[0].name

    def boot(self) -> None:
        """Start all; they are paused then."""
        together([partial(_boot, system) for system in self.systems], BOOTING)

    def drain(self, by: str, number: int, act: Callable[[Sequence[S]], float]) -> Drained:
        """Have ``act``, which returns the commands' processor time, move all guests."""
        place, source = self.place, self.systems[0].host
        end_relays(place)
        together([system.wake for system in self.systems], BOOTING)
        time.sleep(AWAKE_S)
        began, cpu_s, wire = time.monotonic(), place.cpu_s(self.name), place.bytes_on_wire(source)
        of_commands = act(self.systems)
        wall_s, cpu_s, wire = (
            time.monotonic() - began,
            place.cpu_s(self.name) - cpu_s,
            place.bytes_on_wire(source) - wire,
        )
        together([system.pause for system in self.systems], BOOTING)
        say(f"drain, round {number + 1}: {by}: {wall_s:.2f} s, {wire / 1e6:.0f} MB")
        return Drained(
            by=by,
            guest="Debian guests",
            vms=len(self.systems),
            round=number,
            wall_s=wall_s,
            cpu_s=cpu_s + of_commands,
            wire_bytes=wire,
        )


def drain(rounds: int, measured: Measurements) -> None:
    """Turn by turn: Limosa compressed and plain, virsh in two ways, QEMU's own compression."""
    with ground(GIGABIT) as place:
        limosa, virsh, multifd = _boot_all(place)
        turns: dict[str, Callable[[int], Drained]] = {
            COMPRESSED: lambda number: limosa.drain(COMPRESSED, number, partial(_by_limosa, place, "compression")),
            PLAIN: lambda number: limosa.drain(PLAIN, number, partial(_by_limosa, place, "tcp")),
            SEQUENCE: lambda number: virsh.drain(SEQUENCE, number, _one_by_one),
            PARALLEL: lambda number: virsh.drain(PARALLEL, number, _at_once),
            ZSTD: lambda number: multifd.drain(ZSTD, number, _by_script),
        }
        for number in range(rounds):
            for by in rotated(list(turns), number):
                measured.drains.append(turns[by](number))


def _boot_all(place: Ground) -> tuple[Fleet[Limosa], Fleet[Virsh], Fleet[Multifd]]:
    say(f"drain, {GIGABIT.name}: booting three times {VMS} Debian guests")
    first = debian_guest("debian", 0)
    limosa = Fleet(place, [Limosa(place, guest) for guest in _named("limosa", first, 0)])
    limosa.boot()
    machine, cpu = limosa.systems[0].machine_and_cpu()
    like = replace(first, machine=machine, cpu=cpu)
    daemons = start_daemons(place)
    virsh = Fleet(place, [Virsh(place, guest, daemons) for guest in _named("virsh", like, VMS)])
    virsh.boot()
    multifd = Fleet(place, [Multifd(place, guest) for guest in _named("multifd", like, 2 * VMS)])
    multifd.boot()
    return limosa, virsh, multifd


def _named(name: str, guest: Guest, first: int) -> list[Guest]:
    return [replace(guest, name=f"{name}{number}", number=first + number) for number in range(VMS)]


def _boot(system: System) -> None:
    system.boot()
    time.sleep(SETTLED_S)
    system.pause()


def _by_limosa(place: Ground, transport: str, systems: Sequence[Limosa]) -> float:
    here = systems[0].host
    there = other(here)
    _, _, cpu_s = run(command(place, here, "move", "--all", "--to", there, "--transport", transport))
    for system in systems:
        system.host = there
    return cpu_s


def _one_by_one(systems: Sequence[Virsh]) -> float:
    return sum(system.migrate() for system in systems)


def _at_once(systems: Sequence[Virsh]) -> float:
    return sum(together([system.migrate for system in systems], len(systems)))


def _by_script(systems: Sequence[Multifd]) -> float:
    moves = [partial(system.move, encrypted=True) for system in systems]
    return sum(moved.command_cpu_s for moved in together(moves, len(moves)))


def together(works: Sequence[Callable[[], T]], at_once: int) -> list[T]:
    """Do all, so many at once. If this is interrupted nobody waits for the rest: it ends with the lab."""
    workers = ThreadPoolExecutor(at_once)
    try:
        return list(workers.map(lambda work: work(), works))
    finally:
        workers.shutdown(wait=False, cancel_futures=True)
