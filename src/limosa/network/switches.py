"""Virtual switches: the Linux bridges of this host, known to VMs by name."""

from __future__ import annotations

from dataclasses import dataclass

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from limosa.errors import NetworkError
from limosa.network.netlink import Netlink, attribute, kernel_refusals


@dataclass(frozen=True)
class Switch:
    """A bridge as the kernel has it now."""

    name: str
    index: int
    mtu: int
    up: bool


async def switches(netlink: Netlink) -> tuple[str, ...]:
    """Names of all virtual switches of this host, sorted. Raises :class:`NetworkError`."""

    def ask(socket: IPRoute) -> tuple[str, ...]:
        with kernel_refusals("cannot list the host's virtual switches"):
            return tuple(sorted(attribute(link, "IFLA_IFNAME") for link in socket.link("dump", kind="bridge")))

    return await netlink.run(ask)


def find_switch(socket: IPRoute, name: str) -> Switch:
    """The switch of that name. Raises :class:`NetworkError` if there is none or it is no bridge."""
    todo = "create it on this host, for example with 'ip link add NAME type bridge', or give the VM another switch"
    try:
        link = socket.link("get", ifname=name)[0]
    except NetlinkError as fault:
        raise NetworkError(f"there is no virtual switch '{name}'", todo=todo) from fault
    if attribute(link, "IFLA_LINKINFO", "IFLA_INFO_KIND") != "bridge":
        raise NetworkError(f"'{name}' is not a virtual switch", why="the interface is not a Linux bridge", todo=todo)
    return Switch(name=name, index=link["index"], mtu=attribute(link, "IFLA_MTU"), up=bool(link["flags"] & 1))
