"""``scripts/benchmark moves``: Limosa, the bare script and ``virsh`` move the same guest, turn by turn.

Each system boots its guest once and moves it back and forth; the guests that are not being measured are paused. All
send memory over one TCP connection: what other transports are worth, ``scripts/benchmark transports`` measures.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from benchmarks import machine, program
from benchmarks.ending import ended_in_order
from benchmarks.ground import GIGABIT, HOSTS, UNSHAPED, Ground, Link, ground, run
from benchmarks.guest import IDLE, Guest
from benchmarks.program import say
from benchmarks.report import Report, page
from benchmarks.resident import resident_memory
from benchmarks.systems import System, other
from benchmarks.systems.bare import Bare
from benchmarks.systems.limosa import Limosa, boot, change_settings, command
from benchmarks.systems.virsh import Virsh
from benchmarks.targets import Measured, Together, rows
from benchmarks.turn import observe, rotated, warm_up, words

ROUNDS = 9
IDLE_VMS = 8


@dataclass(frozen=True)
class Turn:
    """A system and whether it encrypts."""

    system: System
    encrypted: bool


def main() -> int:
    """Measure, print the table, write what was asked for."""
    given = program.arguments("moves", "Compare Limosa's moves with virsh's and with a bare QMP script's.", ROUNDS)
    moves: list[Measured] = []
    together: list[Together] = []
    calibration: dict[str, float] = {}
    with ended_in_order(), resident_memory():
        for link in (UNSHAPED, GIGABIT):
            with ground(link) as place:
                calibration[link.name] = place.calibrate()
                moves += _compare(place, link, given.rounds)
        with ground(GIGABIT) as place:
            together += _move_together(place, GIGABIT, given.rounds)
    report = Report(
        machine=machine.machine(),
        versions=machine.versions(),
        calibration=calibration,
        rows=tuple(rows(moves, together)),
        moves=tuple(moves),
        together=tuple(together),
    )
    program.publish(given, report, page(report))
    return 0


def _compare(place: Ground, link: Link, rounds: int) -> Iterator[Measured]:
    """All systems, interleaved."""
    limosa = Limosa(place, Guest("limosa", 0))
    say(f"{link.name}: booting the guests")
    limosa.boot()
    machine_type, cpu = limosa.machine_and_cpu()
    limosa.pause()
    guests = [Guest(name, number, machine=machine_type, cpu=cpu) for number, name in enumerate(("bare", "virsh"), 1)]
    bare, virsh = Bare(place, guests[0]), Virsh(place, guests[1])
    for system in (bare, virsh):
        system.boot()
        system.pause()
    addresses = {"limosa": Guest("limosa", 0).address} | {guest.name: guest.address for guest in guests}
    warm_up(virsh)
    turns = [Turn(limosa, True), Turn(bare, True), Turn(limosa, False), Turn(bare, False), Turn(virsh, False)]
    for number in range(rounds):
        for turn in rotated(turns, number):
            yield _measure(place, link, turn, number, addresses[turn.system.name])


def _measure(place: Ground, link: Link, turn: Turn, number: int, address: str) -> Measured:
    system = turn.system
    seen = observe(place, system, address, lambda: system.move(encrypted=turn.encrypted))
    say(f"{link.name}, round {number + 1}: {system.name}{', TLS' if turn.encrypted else ''}: {words(seen)}")
    return Measured(
        **msgspec.structs.asdict(seen),
        link=link.name,
        system=system.name,
        encrypted=turn.encrypted,
        round=number,
        overhead_s=seen.wall_s - seen.transfer_s,
    )


def _move_together(place: Ground, link: Link, rounds: int) -> Iterator[Together]:
    """Many idle VMs, all at once."""
    say(f"{link.name}: booting {IDLE_VMS} guests")
    for number in range(IDLE_VMS):
        boot(place, dataclasses.replace(Guest(f"idle{number}", number), load=IDLE))
    change_settings(place, f"max_outgoing={IDLE_VMS}", f"max_incoming={IDLE_VMS}")
    host = HOSTS[0]
    for number in range(rounds):
        wire = place.bytes_on_wire(host)
        _, wall_s, _ = run(command(place, host, "move", "--all", "--to", other(host), "--transport", "tcp"))
        wire = place.bytes_on_wire(host) - wire
        host = other(host)
        say(f"{link.name}, round {number + 1}: {IDLE_VMS} VMs in {wall_s:.2f} s, {wire / 1e6:.0f} MB")
        speed = link.mbit_per_s * 1e6 / 8
        yield Together(link=link.name, vms=IDLE_VMS, round=number, wall_s=wall_s, wire_bytes=wire, bytes_per_s=speed)


if __name__ == "__main__":
    sys.exit(main())
