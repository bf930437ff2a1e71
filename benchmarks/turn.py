"""A turn: one system moves its guest while everything is watched.

A turn is a second in which only the client watches (the noise floor), the move, and most of a second more of watching.
The guest runs for that time only, so that it takes nothing from the others when it is their turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from benchmarks.figures import Observed
from benchmarks.gap import Client
from benchmarks.ground import HOSTS, Ground
from benchmarks.systems import Moved, System

QUIET_S = 1.0
AFTER_S = 0.7
#: A gap belongs to the switchover if it touches this time around the moment the guest stopped.
BEFORE_STOP_S, AFTER_STOP_S = 0.05, 0.5

T = TypeVar("T")


def observe(place: Ground, system: System, address: str, move: Callable[[], Moved]) -> Observed:
    """Have the system make a move of its guest, which has that address on the LAN."""
    system.wake()
    try:
        source = system.host
        client = place.on_client(lambda: Client(address, place.folder))
        try:
            time.sleep(QUIET_S)
            began, cpu_s, wire = time.time(), place.cpu_s(system.name), place.bytes_on_wire(source)
            moved = move()
            ended, cpu_s = time.time(), place.cpu_s(system.name) - cpu_s
            wire = place.bytes_on_wire(source) - wire
            time.sleep(AFTER_S)
        finally:
            answers = client.stop()
    finally:
        system.pause()
    return Observed(
        wall_s=moved.wall_s,
        transfer_s=moved.transfer_s,
        blackout_ms=moved.blackout_ms,
        gap_ms=answers.gap_ms(moved.stopped_at - BEFORE_STOP_S, moved.stopped_at + AFTER_STOP_S),
        stall_ms=answers.gap_ms(began, ended + AFTER_S),
        noise_ms=answers.gap_ms(began - QUIET_S, began),
        cpu_s=cpu_s + moved.command_cpu_s,
        wire_bytes=wire,
    )


def warm_up(system: System) -> None:
    """Move there and back unmeasured: libvirt asks QEMU for its capabilities once on each host."""
    system.wake()
    for _ in HOSTS:
        system.move(encrypted=False)
    system.pause()


def rotated(turns: Sequence[T], number: int) -> list[T]:
    """The turns of a round. Each begins with another, so that none always follows the same."""
    first = number % len(turns)
    return [*turns[first:], *turns[:first]]


def words(seen: Observed) -> str:
    """What was seen, in short."""
    return (
        f"{seen.wall_s:.2f} s, transfer {seen.transfer_s:.2f} s, blackout {seen.blackout_ms:.1f} ms, "
        f"gap {seen.gap_ms:.0f} ms"
    )
