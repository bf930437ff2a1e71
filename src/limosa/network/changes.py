"""Word of changes to this host's network interfaces and addresses, from the kernel as they happen.

The messages are not read: that there was one is reason to look again. So nothing is missed when they come faster than
they can be taken, and no library is needed that would want a loop of its own (see ``netlink``).
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

from limosa.network.netlink import kernel_refusals

# From linux/rtnetlink.h.
RTMGRP_LINK = 0x1
RTMGRP_IPV4_IFADDR = 0x10
RTMGRP_IPV6_IFADDR = 0x100

#: Changes come in bursts (a link, its addresses, their routes): look when it has become quiet for so long.
QUIET_S = 0.05


async def changes() -> AsyncIterator[None]:
    """Yields when it has begun to watch, and after each burst of changes from then on.

    It is the network namespace of the caller that is watched. Raises :class:`NetworkError`.
    """
    with kernel_refusals("cannot watch the network interfaces"):
        watch = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE)
    loop, changed = asyncio.get_running_loop(), asyncio.Event()
    with watch:
        with kernel_refusals("cannot watch the network interfaces"):
            watch.bind((0, RTMGRP_LINK | RTMGRP_IPV4_IFADDR | RTMGRP_IPV6_IFADDR))

        def take() -> None:
            # Empty, or the kernel had to drop some: that is a change as well.
            with contextlib.suppress(OSError):
                while watch.recv(65536):
                    pass
            changed.set()

        loop.add_reader(watch, take)
        try:
            yield
            while True:
                await changed.wait()
                while changed.is_set():
                    changed.clear()
                    await asyncio.sleep(QUIET_S)
                yield
        finally:
            loop.remove_reader(watch)
