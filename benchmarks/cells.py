"""Moves of one guest by one transport and another, on different links, with and without other VMs at work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from benchmarks.debian import debian_guest
from benchmarks.ground import FAST, FOUR_NICS, GIGABIT, SLOW, TWO_NICS, UNEQUAL_NICS, UNSHAPED, Ground, Link, ground
from benchmarks.guest import IDLE, Guest
from benchmarks.measurements import Measurements, Trip
from benchmarks.neighbours import LOADS, Neighbours
from benchmarks.program import say
from benchmarks.systems.limosa import Limosa
from benchmarks.systems.multifd import NAME as ZSTD
from benchmarks.systems.multifd import Multifd
from benchmarks.transport_targets import FIXED
from benchmarks.trips import Scene
from benchmarks.turn import rotated

CALIBRATIONS = 3


def compression(rounds: int, measured: Measurements) -> None:
    """Against plain TCP and QEMU's own compression, nothing else at work, for each guest."""
    for name, guest in {"busy guest": Guest("busy", 0), "Debian guest": debian_guest("debian", 0)}.items():
        with ground(GIGABIT) as place:
            scene = _scene("compression", place, GIGABIT, name, measured)
            limosa, multifd = _boot_both(place, guest)
            for number in range(rounds):
                for transport in rotated(["tcp", "compression", ZSTD], number):
                    if transport == ZSTD:
                        trip = scene.by_script(multifd, number)
                    else:
                        trip = scene.by_limosa(limosa, transport, number)
                    measured.trips.append(trip)


def busy(rounds: int, measured: Measurements) -> None:
    """Against plain TCP while other VMs keep all processors busy."""
    _cells("busy", GIGABIT, ("busy",), ("tcp", "compression"), rounds, measured)


def matrix(rounds: int, measured: Measurements) -> None:
    """``auto`` against fixed choices, on all links at all loads."""
    for link in (SLOW, GIGABIT, FAST, UNSHAPED):
        _cells("matrix", link, tuple(LOADS), (*FIXED, "auto"), rounds, measured)


def nics(rounds: int, measured: Measurements) -> None:
    """All NICs at once against one of them; one of four is outrun by the guest."""
    for link in (TWO_NICS, UNEQUAL_NICS, FOUR_NICS):
        transports = ("multichannel",) if link is FOUR_NICS else ("tcp", "multichannel")
        _cells("nics", link, ("idle",), transports, rounds, measured)


def _cells(
    part: str, link: Link, loads: Sequence[str], transports: Sequence[str], rounds: int, measured: Measurements
) -> None:
    """All transports at all loads on a link, turn by turn."""
    name, guest = ("small guest", Guest("small", 0, load=IDLE)) if link is SLOW else ("busy guest", Guest("busy", 0))
    with ground(link) as place:
        scene = _scene(part, place, link, name, measured)
        limosa = _boot(place, guest)
        neighbours = Neighbours(place) if any(LOADS[load] for load in loads) else None
        scene = replace(scene, neighbours=neighbours)
        for number in range(rounds):
            for load in loads:
                for transport in rotated(transports, number):
                    measured.trips.append(_at(scene, limosa, transport, number, load))


def _at(scene: Scene, limosa: Limosa, transport: str, number: int, load: str) -> Trip:
    if scene.neighbours is None:
        return scene.by_limosa(limosa, transport, number)
    with scene.neighbours.at(load):
        return scene.by_limosa(limosa, transport, number, load)


def _scene(part: str, place: Ground, link: Link, guest: str, measured: Measurements) -> Scene:
    """Calibrate the link: the best of some, since what disturbs the streams makes them slower only."""
    rate = max(place.goodput() for _ in range(CALIBRATIONS))
    measured.calibration[link.name] = max(rate, measured.calibration.get(link.name, 0.0))
    say(f"{part}, {link.name} ({rate * 8e-6:.0f} Mbit/s): booting the {guest}")
    return Scene(part, place, link, rate, guest)


def _boot(place: Ground, guest: Guest) -> Limosa:
    """Limosa's guest, paused."""
    limosa = Limosa(place, guest)
    limosa.boot()
    limosa.pause()
    return limosa


def _boot_both(place: Ground, guest: Guest) -> tuple[Limosa, Multifd]:
    """Limosa's guest and one like it, both paused."""
    limosa = _boot(place, guest)
    machine, cpu = limosa.machine_and_cpu()
    multifd = Multifd(place, replace(guest, name="multifd", number=guest.number + 1, machine=machine, cpu=cpu))
    multifd.boot()
    multifd.pause()
    return limosa, multifd
