"""``scripts/benchmark moves``: Limosa, the bare script and ``virsh`` move the same guest, turn by turn.

Each system boots its guest once and moves it back and forth; the guests that are not being measured are paused. A turn
is a second in which only the client watches (the noise floor), the move, and most of a second more of watching.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from benchmarks import machine
from benchmarks.gap import Client
from benchmarks.ground import GIGABIT, HOSTS, UNSHAPED, Ground, Link, ground, run
from benchmarks.guest import IDLE, Guest
from benchmarks.report import Report, page, terminal
from benchmarks.systems import System, other
from benchmarks.systems.bare import Bare
from benchmarks.systems.limosa import Limosa, boot, change_settings, command
from benchmarks.systems.virsh import Virsh
from benchmarks.targets import Measured, Together, rows

ROUNDS = 9
IDLE_VMS = 8
QUIET_S = 1.0
AFTER_S = 0.7
#: A gap belongs to the switchover if it touches this time around the moment the guest stopped.
BEFORE_STOP_S, AFTER_STOP_S = 0.05, 0.5


@dataclass(frozen=True)
class Turn:
    """A system and whether it encrypts."""

    system: System
    encrypted: bool


def main() -> int:
    """Measure, print the table, write what was asked for."""
    arguments = _arguments()
    moves: list[Measured] = []
    together: list[Together] = []
    calibration: dict[str, float] = {}
    for link in (UNSHAPED, GIGABIT):
        with ground(link) as place:
            calibration[link.name] = place.calibrate()
            moves += _compare(place, link, arguments.rounds)
    with ground(GIGABIT) as place:
        together += _move_together(place, GIGABIT, arguments.rounds)
    report = Report(
        machine=machine.machine(),
        versions=machine.versions(),
        calibration=calibration,
        rows=tuple(rows(moves, together)),
        moves=tuple(moves),
        together=tuple(together),
    )
    print(terminal(report))
    if arguments.json is not None:
        arguments.json.write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    if arguments.page is not None:
        arguments.page.write_text(page(report))
    return 0


def _compare(place: Ground, link: Link, rounds: int) -> Iterator[Measured]:
    """All systems, interleaved."""
    limosa = Limosa(place, Guest("limosa", 0))
    _say(f"{link.name}: booting the guests")
    limosa.boot()
    machine_type, cpu = limosa.machine_and_cpu()
    limosa.pause()
    guests = [Guest(name, number, machine=machine_type, cpu=cpu) for number, name in enumerate(("bare", "virsh"), 1)]
    bare, virsh = Bare(place, guests[0]), Virsh(place, guests[1])
    for system in (bare, virsh):
        system.boot()
        system.pause()
    addresses = {"limosa": Guest("limosa", 0).address} | {guest.name: guest.address for guest in guests}
    # libvirt asks QEMU for its capabilities once on each host; that is not part of a migration.
    _warm_up(virsh)
    turns = [Turn(limosa, True), Turn(bare, True), Turn(limosa, False), Turn(bare, False), Turn(virsh, False)]
    for number in range(rounds):
        # Each round begins with another, so that none always follows the same.
        first = number % len(turns)
        for turn in turns[first:] + turns[:first]:
            yield _measure(place, link, turn, number, addresses[turn.system.name])


def _warm_up(system: System) -> None:
    system.wake()
    for _ in HOSTS:
        system.move(encrypted=False)
    system.pause()


def _measure(place: Ground, link: Link, turn: Turn, number: int, address: str) -> Measured:
    system = turn.system
    system.wake()
    try:
        source = system.host
        client = place.on_client(lambda: Client(address, place.folder))
        try:
            time.sleep(QUIET_S)
            began, cpu_s, wire = time.time(), place.cpu_s(system.name), place.bytes_on_wire(source)
            moved = system.move(encrypted=turn.encrypted)
            ended, cpu_s = time.time(), place.cpu_s(system.name) - cpu_s
            wire = place.bytes_on_wire(source) - wire
            time.sleep(AFTER_S)
        finally:
            answers = client.stop()
    finally:
        system.pause()
    measured = Measured(
        link=link.name,
        system=system.name,
        encrypted=turn.encrypted,
        round=number,
        wall_s=moved.wall_s,
        transfer_s=moved.transfer_s,
        overhead_s=moved.wall_s - moved.transfer_s,
        blackout_ms=moved.blackout_ms,
        gap_ms=answers.gap_ms(moved.stopped_at - BEFORE_STOP_S, moved.stopped_at + AFTER_STOP_S),
        stall_ms=answers.gap_ms(began, ended + AFTER_S),
        noise_ms=answers.gap_ms(began - QUIET_S, began),
        cpu_s=cpu_s + moved.command_cpu_s,
        wire_bytes=wire,
    )
    _say(
        f"{link.name}, round {number + 1}: {system.name}{', TLS' if turn.encrypted else ''}: {measured.wall_s:.2f} s, "
        f"transfer {measured.transfer_s:.2f} s, blackout {measured.blackout_ms:.1f} ms, gap {measured.gap_ms:.0f} ms"
    )
    return measured


def _move_together(place: Ground, link: Link, rounds: int) -> Iterator[Together]:
    """Many idle VMs, all at once."""
    _say(f"{link.name}: booting {IDLE_VMS} guests")
    for number in range(IDLE_VMS):
        boot(place, dataclasses.replace(Guest(f"idle{number}", number), load=IDLE))
    change_settings(place, f"max_outgoing={IDLE_VMS}", f"max_incoming={IDLE_VMS}")
    host = HOSTS[0]
    for number in range(rounds):
        wire = place.bytes_on_wire(host)
        _, wall_s, _ = run(command(place, host, "move", "--all", "--to", other(host)))
        wire = place.bytes_on_wire(host) - wire
        host = other(host)
        _say(f"{link.name}, round {number + 1}: {IDLE_VMS} VMs in {wall_s:.2f} s, {wire / 1e6:.0f} MB")
        speed = link.mbit_per_s * 1e6 / 8
        yield Together(link=link.name, vms=IDLE_VMS, round=number, wall_s=wall_s, wire_bytes=wire, bytes_per_s=speed)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/benchmark moves", description="Compare Limosa's moves with virsh's and with a bare QMP script's."
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the page docs/benchmarks.md")
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N", help=f"rounds ({ROUNDS})")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("--rounds: at least 1")
    return arguments


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
