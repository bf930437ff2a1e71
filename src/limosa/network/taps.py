"""Taps: the host's end of a VM's network card, plugged into a virtual switch.

A tap here is a file descriptor. It is not persistent: the kernel removes the interface with the last descriptor, which
is the daemon's until QEMU has inherited it and QEMU's from then on. So no crash of anything leaves a tap behind, and
there is no call to remove one: close it.

The host's end gets an address that begins with ``fe:`` because a bridge takes the lowest address among its ports for
its own (``br_stp_recalculate_bridge_id`` in Linux): a lower one would change the switch's address, and with it the
host's, each time a VM comes or goes.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import secrets
import struct
from dataclasses import dataclass
from socket import if_nametoindex

from pyroute2 import IPRoute

from limosa.background import then
from limosa.network.netlink import Netlink, kernel_refusals
from limosa.network.switches import Switch, find_switch

# From linux/if_tun.h.
TUNSETIFF = 0x400454CA
IFF_TAP = 0x0002
IFF_NO_PI = 0x1000
IFF_VNET_HDR = 0x4000
_INTERFACE_REQUEST = struct.Struct("16sH22x")


@dataclass(frozen=True)
class Tap:
    """An open tap; ``fd`` is close-on-exec and the caller's to close or to hand to QEMU (``-netdev tap,fd=``)."""

    fd: int
    name: str

    def close(self) -> None:
        """Let go of the tap; it vanishes unless a QEMU holds it."""
        os.close(self.fd)


async def open_tap(netlink: Netlink, switch: str) -> Tap:
    """A new tap, up and plugged into ``switch``, with its MTU; takes a few milliseconds.

    Raises :class:`NetworkError`; nothing is left then, nor if it is cancelled.
    """
    opening = asyncio.ensure_future(netlink.run(lambda socket: plug_in(socket, switch)))
    try:
        return await asyncio.shield(opening)
    except asyncio.CancelledError:
        # What has begun goes on in its thread, and nobody else would know of its tap.
        then(opening, Tap.close)
        raise


def plug_in(socket: IPRoute, switch: str) -> Tap:
    """What :func:`open_tap` does, for a caller that may block."""
    bridge = find_switch(socket, switch)
    tap = _make_tap()
    try:
        _plug_in(socket, tap.name, bridge)
    except BaseException:
        tap.close()
        raise
    return tap


def _make_tap() -> Tap:
    with kernel_refusals("cannot make a tap", todo="load the kernel module 'tun' and run the daemon as root"):
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
        # A name that begins with a fixed text does not end in '%d', so the kernel takes it as it is.
        name = f"lm{secrets.token_hex(4)}"
        try:
            fcntl.ioctl(fd, TUNSETIFF, _INTERFACE_REQUEST.pack(name.encode(), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR))
        except BaseException:
            os.close(fd)
            raise
        return Tap(fd, name)


def _plug_in(socket: IPRoute, name: str, bridge: Switch) -> None:
    address = ":".join(["fe", *(f"{byte:02x}" for byte in secrets.token_bytes(5))])
    with kernel_refusals(f"cannot plug a tap into the virtual switch '{bridge.name}'"):
        index = if_nametoindex(name)
        socket.link("set", index=index, address=address, mtu=bridge.mtu, master=bridge.index, state="up")
