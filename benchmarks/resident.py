"""Memory that stays this machine's own while something is measured.

Where the machine is itself a VM, its kernel may tell the hypervisor which memory is free, which then takes it
(free page reporting, Documentation/mm/free_page_reporting.rst in Linux). Whoever gets it next waits until it is there
again: 1.9 ms for a MiB was seen, and 0.2 where it had not been taken. A move fills a guest's memory anew, so it would
be the hypervisor that is measured.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from benchmarks.program import say

#: Blocks of two to the power of this many pages, and larger ones, are reported.
_ORDER = Path("/sys/module/page_reporting/parameters/page_reporting_order")
#: The kernel keeps no free blocks of this size (MAX_PAGE_ORDER, linux/mmzone.h).
_NO_BLOCK = "11"
_LEFT_ALONE_BYTES = 2 << 30


@contextmanager
def resident_memory() -> Iterator[None]:
    """Touch free memory once, and have none of it taken within the block. No effect where nobody takes it."""
    if not _ORDER.exists():
        yield
        return
    before = _ORDER.read_text()
    with suppress(OSError):  # this kernel does not let us: it is measured as it is
        _ORDER.write_text(_NO_BLOCK)
    try:
        say("touching this machine's memory")
        _touch()
        yield
    finally:
        _ORDER.write_text(before)


def _touch() -> None:
    available = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
    size = int(available[1]) * 1024 - _LEFT_ALONE_BYTES if available else 0
    if size <= 0:
        return
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        for at in range(0, size, mmap.PAGESIZE):
            memory[at] = 1
