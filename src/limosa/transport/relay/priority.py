"""Being the last in line for processor time, and for a moment not.

Two rules of the kernel's scheduler (sched(7)) make a process last in line, and both are needed:

- ``SCHED_IDLE``: its share beside any other process of its scheduling group is negligible.
- Where the kernel groups processes by session (autogroup) and no cgroup does it, a lone ``SCHED_IDLE`` process in a
  session of its own would get the *session's* share, as large as that of a whole QEMU. The session's nice value makes
  it small.

Back again: a process may leave ``SCHED_IDLE`` if it is privileged or ``RLIMIT_NICE`` covers its nice value, so
:func:`allow_lift` raises that limit while we still may. A session's nice value can be changed by whoever has the file
open, ten times a second (by all unprivileged processes together). Whichever of the two works is enough where it is the
one that matters. A process that could not come back takes the nice value 19 instead of ``SCHED_IDLE``: five times the
share, but still a hundredth of others', so that what it has begun ends within tens of milliseconds.
"""

from __future__ import annotations

import os
import resource
from contextlib import suppress

#: RLIMIT_NICE counts from 20 - nice value: this allows a nice value of 0.
_NICE_ZERO = 20
_LAST_NICE = 19


def allow_lift() -> None:
    """Allow this process and those it starts to leave ``SCHED_IDLE``; no effect without the right to."""
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NICE, (_NICE_ZERO, _NICE_ZERO))


class Place:
    """The place in line of a process, which is to be the leader of a session.

    To be made while we have the rights we started with: once they are given up, ``/proc`` is closed to us.
    ``keeps_rights``: whether we will keep them.
    """

    def __init__(self, pid: int, *, keeps_rights: bool) -> None:
        self._pid = pid
        root = os.geteuid() == 0 and keeps_rights
        self._can_return = root or resource.getrlimit(resource.RLIMIT_NICE)[0] >= _NICE_ZERO
        if not self._can_return:
            os.setpriority(os.PRIO_PROCESS, pid, _LAST_NICE)
        try:
            self._session = os.open(f"/proc/{pid}/autogroup", os.O_WRONLY | os.O_CLOEXEC)
        except OSError:
            self._session = -1  # this kernel has none

    def lift(self) -> None:
        """Give it a share like others', as far as we can."""
        self._set_session_nice(0)
        with suppress(OSError):
            os.sched_setscheduler(self._pid, os.SCHED_OTHER, os.sched_param(0))

    def put_last(self) -> bool:
        """Put it last in line. False: the kernel wants to be asked again a little later."""
        if self._can_return:
            with suppress(OSError):
                os.sched_setscheduler(self._pid, os.SCHED_IDLE, os.sched_param(0))
        return self._set_session_nice(_LAST_NICE)

    def _set_session_nice(self, nice: int) -> bool:
        if self._session < 0:
            return True
        try:
            os.write(self._session, str(nice).encode())
        except BlockingIOError:
            return False
        except OSError:
            pass  # it ended: there is nothing to ask again
        return True
