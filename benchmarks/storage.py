"""``scripts/benchmark storage``: disks of running VMs move, by Limosa and by ``virsh``, turn by turn.

In one lab with a NIC of 1 Gbit/s: to a host that shares nothing, to another folder of the host, and to a host that has
what lies below the disk. In a second lab with two NICs: to a host that shares nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import msgspec

from benchmarks import disk, machine, program
from benchmarks.ending import ended_in_order
from benchmarks.ground import GIGABIT, HOSTS, TWO_NICS, Ground, Link, ground
from benchmarks.guest import WRITING, Guest
from benchmarks.program import say
from benchmarks.resident import resident_memory
from benchmarks.storage_report import Report, page
from benchmarks.storage_targets import Copied, DiskMeasured, OverlaySent, rows
from benchmarks.systems import Moved, System
from benchmarks.systems.copiers import COPIERS, copied
from benchmarks.systems.limosa import Limosa, add_locations, images
from benchmarks.systems.virsh import Virsh
from benchmarks.turn import observe, rotated, words

ROUNDS = 5
CALIBRATIONS = 3


@dataclass
class Measurements:
    """Everything that was measured so far."""

    calibration: dict[str, float] = field(default_factory=dict)
    moves: list[DiskMeasured] = field(default_factory=list)
    copies: list[Copied] = field(default_factory=list)
    overlays: list[OverlaySent] = field(default_factory=list)


@dataclass(frozen=True)
class Guests:
    """The guests of a lab, all paused."""

    place: Ground
    #: the disk they were made with
    pattern: Path
    limosa: Limosa
    virsh: Virsh
    addresses: dict[str, str]


def main() -> int:
    """Measure, print the table, write what was asked for."""
    given = program.arguments("storage", "Compare moves of disks with virsh's, with qemu-img and nbdcopy.", ROUNDS)
    measured = Measurements()
    with ended_in_order(), resident_memory():
        with ground(GIGABIT) as place:
            _one_nic(place, given.rounds, measured)
        with ground(TWO_NICS) as place:
            _two_nics(place, given.rounds, measured)
    report = Report(
        machine=machine.machine(),
        versions=machine.versions("libnbd-bin"),
        calibration=measured.calibration,
        rows=tuple(rows(measured.moves, measured.copies, measured.overlays)),
        moves=tuple(measured.moves),
        copies=tuple(measured.copies),
        overlays=tuple(measured.overlays),
    )
    program.publish(given, report, page(report))
    return 0


def _one_nic(place: Ground, rounds: int, measured: Measurements) -> None:
    measured.calibration[GIGABIT.name] = rate = _rate(place)
    guests = _boot(place, GIGABIT)
    golden = _boot_golden(guests)
    for number in range(rounds):
        for transport in rotated(["tcp", "compression", ""], number):
            measured.moves.append(_move(guests, GIGABIT, rate, transport, number))
        measured.copies += _copy(guests, number)
        measured.overlays.append(_move_golden(place, golden, number))


def _two_nics(place: Ground, rounds: int, measured: Measurements) -> None:
    measured.calibration[TWO_NICS.name] = rate = _rate(place)
    guests = _boot(place, TWO_NICS)
    for number in range(rounds):
        for transport in rotated(["multichannel", ""], number):
            measured.moves.append(_move(guests, TWO_NICS, rate, transport, number))


def _rate(place: Ground) -> float:
    """What plain TCP streams carry, in bytes per second: the best of some, since what disturbs them makes them slower
    only, and a link thought slow would look well used."""
    return max(place.calibrate() for _ in range(CALIBRATIONS))


def _boot(place: Ground, link: Link) -> Guests:
    """Both systems' guests, with disks of the same contents."""
    say(f"{link.name}: making the disk and booting the guests")
    pattern = disk.make(place.folder)
    guest = Guest("limosa", 0, load=WRITING, disk=pattern)
    add_locations(place)
    limosa = Limosa(place, guest)
    limosa.boot()
    machine_type, cpu = limosa.machine_and_cpu()
    limosa.pause()
    other = replace(guest, name="virsh", number=1, machine=machine_type, cpu=cpu)
    virsh = Virsh(place, other)
    virsh.boot()
    virsh.pause()
    return Guests(place, pattern, limosa, virsh, {"limosa": guest.address, "virsh": other.address})


def _boot_golden(guests: Guests) -> Limosa:
    """A guest of Limosa's whose disk lies above the same image on both hosts."""
    place = guests.place
    bases = [images(place, host) / "golden.qcow2" for host in HOSTS]
    for base in bases:
        disk.copy(guests.pattern, base)
    golden = Limosa(place, Guest("overlay", 2, load=WRITING, disk=guests.pattern))
    disk.make_overlay(golden.image, bases[0])
    golden.boot()
    golden.pause()
    return golden


def _move(guests: Guests, link: Link, rate: float, transport: str, number: int) -> DiskMeasured:
    """One move to the other host: Limosa's by that transport, or virsh's if there is none."""
    system: System
    act: Callable[[], Moved]
    if transport:
        system, act = guests.limosa, lambda: guests.limosa.move(encrypted=True, transport=transport)
    else:
        system, act = guests.virsh, lambda: guests.virsh.move(encrypted=False)
    seen = observe(guests.place, system, guests.addresses[system.name], act)
    say(f"{link.name}, round {number + 1}: {system.name} {transport}: {words(seen)}")
    return DiskMeasured(
        **msgspec.structs.asdict(seen),
        link=link.name,
        system=system.name,
        transport=transport or "tcp",
        round=number,
        link_bytes_per_s=rate,
    )


def _copy(guests: Guests, number: int) -> Iterator[Copied]:
    """All copies of the disk on one host. Guests that are not moved are paused, and images at rest have none."""
    ways: dict[str, Callable[[], float]] = {
        "limosa": lambda: _awake(guests.limosa, guests.limosa.move_disk),
        "blockcopy": lambda: _awake(guests.virsh, guests.virsh.move_disk),
    }
    ways |= {name: partial(copied, name, guests.pattern) for name in COPIERS}
    for by in rotated(list(ways), number):
        wall_s = ways[by]()
        say(f"one host, round {number + 1}: {by}: {wall_s:.2f} s")
        yield Copied(by=by, round=number, wall_s=wall_s)
    # Home again, where the other host does not see it.
    _awake(guests.limosa, guests.limosa.move_disk)


def _awake(system: System, work: Callable[[], float]) -> float:
    system.wake()
    try:
        return work()
    finally:
        system.pause()


def _move_golden(place: Ground, golden: Limosa, number: int) -> OverlaySent:
    overlay, host = disk.allocated(golden.image), golden.host
    golden.wake()
    sent = place.bytes_sent(host)
    moved = golden.move(encrypted=True, transport="tcp")
    sent = place.bytes_sent(host) - sent
    golden.pause()
    progress = golden.told["progress"]
    memory = progress["transferred_bytes"] - sum(copy["sent_bytes"] for copy in progress["disks"])
    say(
        f"overlay, round {number + 1}: {moved.wall_s:.2f} s, {sent / 1e6:.0f} MB sent, "
        f"{memory / 1e6:.0f} MB of it memory; the overlay has {overlay / 1e6:.0f} MB"
    )
    return OverlaySent(round=number, wall_s=moved.wall_s, overlay_bytes=overlay, sent_bytes=sent, memory_bytes=memory)


if __name__ == "__main__":
    sys.exit(main())
