"""What network interfaces this host has: through netlink, ethtool's ioctl and, for RDMA devices, sysfs.

Gathering (``inventory``) is apart from understanding (``describe``), which is a pure function of the kernel's answers,
so that bonds, teams and RDMA devices are tested on machines that have none. Taps of VMs are left out: a busy host has
hundreds and no move goes through them.

A NIC's speed is what ethtool says. Where the administrator shapes a NIC with a token bucket (tbf), its rate counts: a
choice between NICs has to be made by what they may carry. A VLAN or a bridge is no faster than what lies below it.
"""

from __future__ import annotations

import array
import fcntl
import socket as sockets
import struct
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from pyroute2 import IPRoute

from limosa.model.network import HostNetwork, HostNic, NicAddress
from limosa.network import teams
from limosa.network.netlink import Netlink, attribute, kernel_refusals

# From linux/if.h and linux/if_addr.h: an address that cannot be used yet, or is in use elsewhere.
IFF_UP = 0x1
IFF_LOOPBACK = 0x8
IFA_F_DADFAILED = 0x08
IFA_F_TENTATIVE = 0x40
# From linux/pkt_sched.h.
TC_H_ROOT = 0xFFFFFFFF

# From linux/sockios.h and linux/ethtool.h.
SIOCETHTOOL = 0x8946
ETHTOOL_GSET = 0x00000001
_ETHTOOL_CMD = struct.Struct("=IIIHBBBBBBIIHBBIII")
_SPEED_UNKNOWN = 0xFFFFFFFF
_BYTES_PER_MBIT = 125_000

# From linux/if_bonding.h, in the words of the kernel's own documentation.
BOND_MODES = ("balance-rr", "active-backup", "balance-xor", "broadcast", "802.3ad", "balance-tlb", "balance-alb")
#: Those that use all members, with a team's names for them.
_USE_ALL = ("balance-rr", "balance-xor", "802.3ad", "roundrobin", "random", "loadbalance")
HASH_POLICIES = ("layer2", "layer3+4", "layer2+3", "encap2+3", "encap3+4", "vlan+srcmac")

#: Kinds that send all they have to send through one other NIC, as packets of their own addresses. Of others
#: ``IFLA_LINK`` is something else: of a veth it is the other end.
_ON_ANOTHER = ("vlan", "macvlan", "ipvlan")

RDMA_DEVICES = Path("/sys/class/infiniband")


@dataclass(frozen=True)
class Answers:
    """What the kernel said, message by message; speeds (Mbit/s) and RDMA devices by interface name.

    ``emulated``: those RDMA devices that are none of the hardware's.
    """

    links: Iterable[Any]
    addresses: Iterable[Any] = ()
    qdiscs: Iterable[Any] = ()
    speeds: Mapping[str, int] = field(default_factory=dict)
    rdma: Mapping[str, str] = field(default_factory=dict)
    emulated: Collection[str] = ()
    #: by the kernel's number
    team_modes: Mapping[int, str] = field(default_factory=dict)


async def inventory(netlink: Netlink) -> tuple[HostNic, ...]:
    """All NICs of this host, in the kernel's order. Raises :class:`NetworkError`."""
    return await netlink.run(gather)


def gather(socket: IPRoute) -> tuple[HostNic, ...]:
    """What :func:`inventory` does, for a caller that may block."""
    with kernel_refusals("cannot list the host's network interfaces"):
        links = [link for link in socket.get_links() if _kind(link) != "tun"]
        names = [attribute(link, "IFLA_IFNAME") for link in links]
        rdma = rdma_devices(RDMA_DEVICES)
        return describe(
            Answers(
                links,
                list(socket.get_addr()),
                list(socket.get_qdiscs()),
                {name: speed for name in names if (speed := _ethtool_speed(name)) is not None},
                rdma,
                emulated(RDMA_DEVICES, rdma.values()),
                teams.modes(link["index"] for link in links if _kind(link) == "team"),
            )
        )


def describe(answers: Answers) -> tuple[HostNic, ...]:
    """NICs from the kernel's messages."""
    links = list(answers.links)
    names = {link["index"]: attribute(link, "IFLA_IFNAME") for link in links}
    addresses = _by_index(answers.addresses)
    shaped = {message["index"]: rate for message in answers.qdiscs if (rate := _shaped(message)) is not None}
    nics = tuple(
        HostNic(
            name=names[link["index"]],
            index=link["index"],
            kind=_kind(link),
            up=bool(link["flags"] & IFF_UP),
            carrier=bool(link["flags"] & IFF_UP) and attribute(link, "IFLA_CARRIER") != 0,
            mtu=attribute(link, "IFLA_MTU") or 0,
            speed_mbit_per_s=_least(answers.speeds.get(names[link["index"]]), shaped.get(link["index"])),
            addresses=tuple(addresses[link["index"]]),
            master=names.get(attribute(link, "IFLA_MASTER"), ""),
            members=tuple(names[one["index"]] for one in links if attribute(one, "IFLA_MASTER") == link["index"]),
            lower=names.get(_lower(link), ""),
            bond_mode=answers.team_modes.get(link["index"]) or _bond_word(BOND_MODES, link, "IFLA_BOND_MODE"),
            hash_policy=_bond_word(HASH_POLICIES, link, "IFLA_BOND_XMIT_HASH_POLICY"),
            rdma=answers.rdma.get(names[link["index"]], ""),
            rdma_emulated=answers.rdma.get(names[link["index"]], "") in answers.emulated,
        )
        for link in links
    )
    nics = tuple(_with_speed_of_members(nic, nics) for nic in nics)
    network = HostNetwork(nics=nics)
    return tuple(_with_speed_of_lower(nic, network.down_from(nic)) for nic in nics)


def _with_speed_of_members(nic: HostNic, nics: tuple[HostNic, ...]) -> HostNic:
    """A bond or team that uses all its members, with the speed they have together.

    The kernel adds up what its members say of themselves; what they are shaped to is not in that. Of a team it does so
    in every mode, also where one member is used.
    """
    if nic.bond_mode not in _USE_ALL:
        return _with_speed_of_one(nic, nics) if nic.bond_mode == "activebackup" else nic
    speeds = [one.speed_mbit_per_s for one in nics if one.name in nic.members and one.carrier]
    known = [speed for speed in speeds if speed is not None]
    together = sum(known) if known and len(known) == len(speeds) else None
    return msgspec.structs.replace(nic, speed_mbit_per_s=_least(nic.speed_mbit_per_s, together))


def _with_speed_of_one(nic: HostNic, nics: tuple[HostNic, ...]) -> HostNic:
    """A team that uses one member, whichever that is."""
    speeds = [one.speed_mbit_per_s for one in nics if one.name in nic.members and one.carrier]
    return msgspec.structs.replace(nic, speed_mbit_per_s=_least(nic.speed_mbit_per_s, *speeds))


def _with_speed_of_lower(nic: HostNic, way_down: Iterable[HostNic]) -> HostNic:
    """A VLAN or bridge, which may say more than what it is on is shaped to, or than a team really has."""
    return msgspec.structs.replace(nic, speed_mbit_per_s=_least(*(one.speed_mbit_per_s for one in way_down)))


def rdma_devices(folder: Path) -> dict[str, str]:
    """RDMA devices by the name of the NIC they are on; none where the kernel or this namespace knows none."""
    return {
        interface: entry.parts[len(folder.parts)]
        for entry in sorted(folder.glob("*/ports/*/gid_attrs/ndevs/*"))
        if (interface := _first_line(entry))
    }


def emulated(folder: Path, devices: Iterable[str]) -> frozenset[str]:
    """Those RDMA devices that hang on no bus: soft-RoCE and soft-iWARP."""
    return frozenset(device for device in devices if "virtual" in (folder / device).resolve().parts)


def _first_line(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""  # an entry without a NIC refuses to be read


def _kind(link: Any) -> str:
    if link["flags"] & IFF_LOOPBACK:
        return "loopback"
    return str(attribute(link, "IFLA_LINKINFO", "IFLA_INFO_KIND") or "physical")


def _lower(link: Any) -> int | None:
    """The number of the NIC that another is on; None if there is none in this network namespace."""
    if _kind(link) not in _ON_ANOTHER or attribute(link, "IFLA_LINK_NETNSID") is not None:
        return None
    number: int | None = attribute(link, "IFLA_LINK")
    return number


def _by_index(messages: Iterable[Any]) -> defaultdict[int, list[NicAddress]]:
    found: defaultdict[int, list[NicAddress]] = defaultdict(list)
    for message in messages:
        if (attribute(message, "IFA_FLAGS") or message["flags"]) & (IFA_F_TENTATIVE | IFA_F_DADFAILED):
            continue
        # IFA_ADDRESS is the other end's on point-to-point links; IPv6 has no IFA_LOCAL elsewhere.
        address = attribute(message, "IFA_LOCAL") or attribute(message, "IFA_ADDRESS")
        found[message["index"]].append(NicAddress(address=address, prefix=message["prefixlen"]))
    return found


def _bond_word(words: tuple[str, ...], link: Any, name: str) -> str:
    """A bond's option in words; empty for what is no bond."""
    number = attribute(link, "IFLA_LINKINFO", "IFLA_INFO_DATA", name) if _kind(link) == "bond" else None
    return words[number] if isinstance(number, int) and number < len(words) else ""


def _shaped(qdisc: Any) -> int | None:
    """Mbit/s a token bucket lets through that stands before the whole NIC."""
    if attribute(qdisc, "TCA_KIND") != "tbf" or qdisc["parent"] != TC_H_ROOT:
        return None
    options = attribute(qdisc, "TCA_OPTIONS")
    parameters = attribute(options, "TCA_TBF_PARMS")
    rate = attribute(options, "TCA_TBF_RATE64") or (parameters["rate"] if parameters else 0)
    return max(1, rate // _BYTES_PER_MBIT) if rate else None


def _least(*speeds: int | None) -> int | None:
    return min((speed for speed in speeds if speed is not None), default=None)


def _ethtool_speed(interface: str) -> int | None:
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
