"""What a relay says unasked, and how it ends when something in it fails."""

from __future__ import annotations

import os
import socket
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress

from limosa.errors import LimosaError
from limosa.transport.relay import control
from limosa.transport.relay.errors import BrokenStream


class Notices:
    """Speaks on the control socket; any thread may."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    def say(self, message: control.Message) -> None:
        """Say something; no effect if the daemon is gone, which the main thread notices."""
        with suppress(OSError):
            control.send(self._socket, message)

    def channel_ended(self, statistics: control.ChannelStatistics) -> None:
        """A channel is over."""
        self.say(control.ChannelEnded(statistics=statistics))

    def lane_lost(self, lane: int, why: str) -> None:
        """A lane broke, or did not come about."""
        self.say(control.LaneLost(lane=lane, why=why))

    def guarded(self, work: Callable[[], None]) -> Callable[[], None]:
        """``work`` as a thread may run it: whatever it raises is said, and ends the process.

        The kernel then closes all sockets at once, so that every QEMU sees the end of its stream.
        """

        def run() -> None:
            try:
                work()
            except (BrokenStream, LimosaError) as error:
                self.fail(str(error))
            except Exception as error:  # noqa: BLE001 - a thread that died unseen would leave QEMUs waiting for ever
                traceback.print_exc()
                self.fail(f"{type(error).__name__}: {error}")

        return run

    def fail(self, why: str) -> None:
        """Say why, and end."""
        self.say(control.Failed(why=why))
        sys.stderr.flush()
        os._exit(1)
