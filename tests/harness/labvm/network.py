"""A network of the machine the tests run on that lab VMs are plugged into, and servers with them.

It is a bridge in a network namespace. What runs in there meets the VMs as :data:`SERVER`, and outlives them.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from pyroute2 import IPRoute

from limosa.lab import namespaces
from limosa.network.taps import Tap, plug_in

#: VMs have addresses of the same network, by their numbers: 10.7.0.1 and so on.
SERVER, PREFIX = "10.7.0.254", 24
_BRIDGE = "lan"
T = TypeVar("T")


class Network:
    """One that is there. Made by :func:`network`."""

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace
        self._ports: list[str] = []

    def tap(self) -> Tap:
        """A new port, for one VM."""

        def work() -> Tap:
            with IPRoute() as netlink:
                return plug_in(netlink, _BRIDGE)

        tap = self.inside(work)
        self._ports.append(tap.name)
        return tap

    def inside(self, work: Callable[[], T]) -> T:
        """Do work as a machine of this network."""
        return namespaces.inside(self.namespace, work)

    @contextmanager
    def parted(self) -> Iterator[None]:
        """During the block the VMs do not hear each other; the servers and each of them do."""
        self._isolate(1)
        try:
            yield
        finally:
            self._isolate(0)

    def _isolate(self, isolated: int) -> None:
        def work() -> None:
            with IPRoute() as netlink:
                for name in self._ports:
                    (index,) = netlink.link_lookup(ifname=name)
                    netlink.brport("set", index=index, isolated=isolated)

        self.inside(work)


@contextmanager
def network() -> Iterator[Network]:
    """A network of its own, gone afterwards."""
    name = f"labvms{secrets.token_hex(3)}"
    namespaces.create(name)
    try:
        namespaces.inside(name, _build)
        yield Network(name)
    finally:
        namespaces.remove(name)


def _build() -> None:
    with IPRoute() as netlink:
        netlink.link("set", index=netlink.link_lookup(ifname="lo")[0], state="up")
        netlink.link("add", ifname=_BRIDGE, kind="bridge")
        (bridge,) = netlink.link_lookup(ifname=_BRIDGE)
        netlink.addr("add", index=bridge, address=SERVER, prefixlen=PREFIX)
        netlink.link("set", index=bridge, state="up")
