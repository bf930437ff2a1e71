"""Makes a lab's namespaces into hosts on a LAN, each with migration NICs of the speed that was asked for.

A NIC's speed is a token bucket (tbf) on each end of its veth pair: the host's end limits what it sends, the wire's end
what it receives. What was measured for the numbers here:

- The bucket must hold a whole packet as TCP hands it to a veth (64 KiB with segmentation offload), or the kernel cuts
  each packet up first and a core is busy with that alone. At high speeds it must also bridge the timer's jitter, so it
  holds at least two milliseconds.
- The queue behind it is short (4 buckets): a long one would be a delay that switches of that speed do not have, and the
  last pages of a VM would wait in it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from pyroute2 import IPRoute

from limosa.lab import namespaces
from limosa.lab.plan import CLIENT_ADDRESS, SWITCH, UPLINK, Lab
from limosa.network.netlink import kernel_refusals

SMALLEST_BUCKET = 128 * 1024


def wire(lab: Lab) -> None:
    """Make all namespaces and what is in them. Raises :class:`NetworkError`; what was made until then stays."""
    for namespace in lab.namespaces:
        namespaces.create(namespace)
    _configure(lab.wire, lambda netlink: _build_wire(netlink, lab))
    _configure(lab.client, _build_client)
    for host in lab.host_names:
        _configure(lab.namespace(host), partial(_build_host, lab=lab, host=host))


def bucket(speed_mbit_per_s: int) -> int:
    """Bytes that may go at once on a NIC of this speed."""
    return max(SMALLEST_BUCKET, speed_mbit_per_s * 1_000_000 // 8 // 500)


def _configure(namespace: str, work: Callable[[IPRoute], None]) -> None:
    def connect_and_work() -> None:
        with kernel_refusals(f"cannot set up the network of '{namespace}'"), IPRoute() as netlink:
            netlink.link("set", index=1, state="up")  # the loopback interface is always the first
            work(netlink)

    namespaces.inside(namespace, connect_and_work)


def _build_wire(netlink: IPRoute, lab: Lab) -> None:
    """The bridges, and the cables to each host, whose far ends appear inside the hosts."""
    for name in (SWITCH, *lab.nic_names):
        _add_bridge(netlink, name)
    _add_cable(netlink, SWITCH, "client", (lab.client, "eth0"))
    for host in lab.host_names:
        _add_cable(netlink, SWITCH, host, (lab.namespace(host), UPLINK))
        for nic, speed in zip(lab.nic_names, lab.speeds, strict=True):
            index = _add_cable(netlink, nic, host, (lab.namespace(host), nic))
            _limit(netlink, index, speed)


def _build_client(netlink: IPRoute) -> None:
    _set_up(netlink, _index(netlink, "eth0"), CLIENT_ADDRESS)


def _build_host(netlink: IPRoute, lab: Lab, host: str) -> None:
    switch = _add_bridge(netlink, SWITCH, address=_mac(lab.address(host)))
    _set_up(netlink, switch, lab.address(host))
    netlink.link("set", index=_index(netlink, UPLINK), master=switch, state="up")
    for nic, address, speed in zip(lab.nic_names, lab.migration_addresses(host), lab.speeds, strict=True):
        index = _index(netlink, nic)
        _set_up(netlink, index, address)
        _limit(netlink, index, speed)


def _add_bridge(netlink: IPRoute, name: str, **attributes: str) -> int:
    netlink.link("add", ifname=name, kind="bridge", **attributes)
    index = _index(netlink, name)
    netlink.link("set", index=index, state="up")
    return index


def _add_cable(netlink: IPRoute, bridge: str, end: str, peer: tuple[str, str]) -> int:
    """A veth pair from a bridge of this namespace to an interface in another; returns the near end's index."""
    name = f"{bridge}-{end}"
    namespace, interface = peer
    with (namespaces.FOLDER / namespace).open() as handle:
        far_end = {"ifname": interface, "net_ns_fd": handle.fileno()}
        netlink.link("add", ifname=name, kind="veth", peer=far_end)
    index = _index(netlink, name)
    netlink.link("set", index=index, master=_index(netlink, bridge), state="up")
    return index


def _set_up(netlink: IPRoute, index: int, address: str) -> None:
    netlink.addr("add", index=index, address=address, prefixlen=24)
    netlink.link("set", index=index, state="up")


def _limit(netlink: IPRoute, index: int, speed_mbit_per_s: int) -> None:
    if speed_mbit_per_s == 0:
        return
    size = bucket(speed_mbit_per_s)
    # An integer is bytes per second to pyroute2, a string would be bits.
    netlink.tc("add", "tbf", index=index, rate=speed_mbit_per_s * 1_000_000 // 8, burst=size, limit=4 * size)


def _index(netlink: IPRoute, name: str) -> int:
    return int(netlink.link("get", ifname=name)[0]["index"])


def _mac(address: str) -> str:
    """A locally administered MAC address that can be read as the IPv4 address it belongs to."""
    return ":".join(["02", "00", *(f"{int(part):02x}" for part in address.split("."))])
