"""What a transport gives to the two ends of a move: a connected socket for each QEMU, and nothing of how it came about.

The daemons make the connection and hand it to their QEMUs, which know neither addresses nor ports. So every transport
looks the same to them, nobody listens in QEMU, and whoever calls a port by mistake or malice is turned away by the
destination's daemon before QEMU has read a byte: the caller must first say the token that the destination gave to the
source in the session between the daemons.
"""

from __future__ import annotations

import socket
from typing import Protocol


class Channel(Protocol):
    """The source's end."""

    @property
    def socket(self) -> socket.socket:
        """Connected to the destination; QEMU is to get a duplicate."""

    def shorten(self) -> None:
        """Let little wait between QEMU and the network from now on, at some cost of throughput. Never raises.

        QEMU takes for sent what was taken from it. What waits would be sent while the guest stands still.
        """

    def close(self) -> None:
        """Close what is ours; QEMU's duplicate goes on. May be repeated."""


class Doorway(Protocol):
    """The destination's end: where the source is awaited."""

    @property
    def address(self) -> str:
        """The IP address to call."""

    @property
    def port(self) -> int:
        """The TCP port to call."""

    @property
    def token(self) -> str:
        """What the caller has to say first, in hexadecimal digits."""

    async def accept(self) -> socket.socket:
        """Wait for the source, however long; others are turned away. The socket is the caller's."""

    def close(self) -> None:
        """Await nobody any more. May be repeated."""
