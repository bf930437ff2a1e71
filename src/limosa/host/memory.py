"""How much memory a host can still give to VMs."""

from __future__ import annotations

from pathlib import Path


def meminfo_mib(field: str) -> int:
    """A field of ``/proc/meminfo``, in MiB."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == field:
            return int(rest.split()[0]) // 1024
    raise ValueError(field)


def available_mib(reserved_mib: int, committed_mib: int) -> int:
    """What a new VM may have: neither more than was not promised yet, nor more than is free now.

    Both count, because a promise need not be used yet, and others on the host use memory nobody promised.
    """
    unpromised = meminfo_mib("MemTotal") - reserved_mib - committed_mib
    free = meminfo_mib("MemAvailable") - reserved_mib
    return max(0, min(unpromised, free))
