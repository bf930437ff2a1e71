"""Last in line: processor time that nobody else wants.

Two settings make a process that, and both are needed:

- ``SCHED_IDLE``: its share beside any other process of its scheduling group is negligible.
- Where the kernel groups processes by session (autogroup) and no cgroup does it, a lone ``SCHED_IDLE`` process in a
  session of its own would get the *session's* share, as large as that of a whole QEMU. The session's nice value makes
  it small.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

_LAST_NICE = 19


def be_last() -> None:
    """Put this process, the leader of a session of its own, last in line. To be called before rights are given up."""
    with suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    with suppress(OSError):  # this kernel has none
        Path("/proc/self/autogroup").write_text(str(_LAST_NICE))
