"""What a move is expected to cost, before it begins."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from limosa.host.bandwidth import MBIT_BYTES
from limosa.migration import disks
from limosa.migration.examination import Examined
from limosa.settings.host import ConvergencePolicy
from limosa.transport.shares import Kind
from limosa.wire.api import Expected


def expect(
    examined: Examined,
    memory_bytes: int,
    policy: ConvergencePolicy,
    cap: Callable[[Kind], int],
) -> Expected:
    """As if nothing else used the way and the guest wrote nothing; pure. ``cap``: bytes per second for each kind of
    what is sent, 0 for none."""
    disk_bytes = sum(plan.expected_bytes for plan in disks.copies(examined.disks))
    disk_bytes += sum(layer.expected_bytes for layer in examined.layers)
    speeds = [path.speed_mbit_per_s for path in examined.route.paths]
    known = [speed for speed in speeds if speed]
    speed = sum(known) * MBIT_BYTES if known and len(known) == len(speeds) else None
    seconds = mbit_per_s = None
    if speed is not None:
        of_disks, of_memory = (min(speed, cap(kind) or speed) for kind in (Kind.STORAGE, Kind.MEMORY))
        seconds = disk_bytes / of_disks + memory_bytes / of_memory
        rate = (disk_bytes + memory_bytes) / seconds if seconds else of_memory
        mbit_per_s = max(1, round(rate / MBIT_BYTES))
    return Expected(
        disk_bytes=disk_bytes,
        memory_bytes=memory_bytes,
        mbit_per_s=mbit_per_s,
        seconds=round(seconds, 1) if seconds is not None else None,
        first_downtime_ms=policy.first_downtime_ms,
        blackout_budget_ms=policy.blackout_budget_ms,
        post_copy=policy.post_copy and examined.post_copy_possible,
    )


def resident_bytes(pid: int) -> int | None:
    """What a process has of its anonymous memory (proc_pid_status(5)); None if it has ended. A guest's memory is such,
    and what it never touched costs a move next to nothing."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), None)
