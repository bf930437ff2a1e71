"""This host's own addresses, and which of them may carry guest memory.

Gathering (``own_addresses``) is apart from choosing (``migration_addresses``), which is a pure function.
"""

from __future__ import annotations

import array
import fcntl
import ipaddress
import socket as sockets
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from pyroute2 import IPRoute

from limosa.network.netlink import Netlink, attribute, kernel_refusals

# From linux/if_addr.h: the address cannot be used yet, or is in use elsewhere.
IFA_F_DADFAILED = 0x08
IFA_F_TENTATIVE = 0x40

# From linux/sockios.h and linux/ethtool.h.
SIOCETHTOOL = 0x8946
ETHTOOL_GSET = 0x00000001
_ETHTOOL_CMD = struct.Struct("=IIIHBBBBBBIIHBBIII")
_SPEED_UNKNOWN = 0xFFFFFFFF


@dataclass(frozen=True)
class HostAddress:
    """An address of this host. ``speed_mbit_per_s`` is what the NIC says of itself, None if it says nothing."""

    address: str
    prefix: int
    interface: str
    speed_mbit_per_s: int | None = None


async def own_addresses(netlink: Netlink) -> tuple[HostAddress, ...]:
    """All usable addresses of this host, in the kernel's order. Raises :class:`NetworkError`."""
    return await netlink.run(gather)


def gather(socket: IPRoute) -> tuple[HostAddress, ...]:
    """What :func:`own_addresses` does, for a caller that may block."""
    with kernel_refusals("cannot list the host's addresses"):
        names = {link["index"]: attribute(link, "IFLA_IFNAME") for link in socket.get_links()}
        messages = [message for message in socket.get_addr() if message["index"] in names]
        speeds = {index: _speed(names[index]) for index in {message["index"] for message in messages}}
    return tuple(
        HostAddress(
            # IFA_ADDRESS is the other end's on point-to-point links; IPv6 has no IFA_LOCAL elsewhere.
            address=attribute(message, "IFA_LOCAL") or attribute(message, "IFA_ADDRESS"),
            prefix=message["prefixlen"],
            interface=names[message["index"]],
            speed_mbit_per_s=speeds[message["index"]],
        )
        for message in messages
        if not (attribute(message, "IFA_FLAGS") or message["flags"]) & (IFA_F_TENTATIVE | IFA_F_DADFAILED)
    )


def migration_addresses(
    own: Sequence[HostAddress], networks: Sequence[str], fallback: str | None = None
) -> tuple[str, ...]:
    """Those of this host's addresses that may carry guest memory, best first.

    With ``networks`` (the setting ``migration_networks``): the addresses inside them, in the order of the networks, the
    faster NIC first inside one; none if the host has no such address, for the setting is a permission and not a wish.
    Without: ``fallback``, the address at which the other host reached this one.
    """
    if not networks:
        return (fallback,) if fallback else ()
    # A dict keeps the first place of an address that lies in several networks.
    chosen: dict[str, None] = {}
    for network in networks:
        chosen.update(dict.fromkeys(_inside(own, network)))
    return tuple(chosen)


def _inside(own: Sequence[HostAddress], network: str) -> list[str]:
    allowed = ipaddress.ip_network(network)
    found = [host for host in own if ipaddress.ip_address(host.address) in allowed]
    found.sort(key=lambda host: (-(host.speed_mbit_per_s or 0), int(ipaddress.ip_address(host.address))))
    return [host.address for host in found]


def _speed(interface: str) -> int | None:
    """Mbit/s by ethtool; sysfs would answer for the network namespace it was mounted in, not for ours."""
    command = array.array("B", _ETHTOOL_CMD.pack(ETHTOOL_GSET, *[0] * 17))
    request = struct.pack("16sP16x", interface.encode(), command.buffer_info()[0])
    with sockets.socket(sockets.AF_INET, sockets.SOCK_DGRAM) as socket:
        try:
            fcntl.ioctl(socket, SIOCETHTOOL, request)
        except OSError:
            return None  # loopback and many virtual interfaces have no speed
    answer = _ETHTOOL_CMD.unpack(command)
    speed = answer[3] | answer[12] << 16
    return speed if 0 < speed < _SPEED_UNKNOWN and speed != 0xFFFF else None
