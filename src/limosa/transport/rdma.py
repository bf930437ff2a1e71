"""RDMA: guest memory goes from the memory of one host into that of the other, without the processors of either.

It is QEMU's own (``rdma:ADDRESS:PORT`` on both sides). No socket can be handed over, so that QEMU listens and calls
itself, nobody has to say a token, and nothing is encrypted. Hence it is used only where both hosts have switched
encryption off. It knows IPv4 only, and locks what it sends, on both sides.

What is said here about hosts and paths is pure; ``choice`` asks. When RDMA fails, ``migration.again`` has the move go
on by another way.
"""

from __future__ import annotations

import ipaddress
import itertools
import secrets
from collections.abc import Iterable, Iterator, Sequence

from limosa.model.network import HostNetwork, HostNic
from limosa.model.route import Path
from limosa.qemu.protocol import MachineProtocol, RdmaAddress
from limosa.transport.channel import Used

#: A QEMU tries one port, so each gets another: RDMA's are their own, and none but our QEMUs listen on them.
_turn = itertools.count()
_TOKEN_BYTES = 16


class RdmaChannel:
    """The source's end: where its QEMU is to call."""

    def __init__(self, stream: RdmaAddress) -> None:
        self.stream = stream

    def set_short(self, short: bool, pace: float) -> None:
        """See :class:`limosa.transport.channel.Channel`: no kernel is between, in which anything could wait."""

    @property
    def connections(self) -> tuple[()]:
        """See :class:`limosa.transport.channel.Channel`: the kernel knows of none."""
        return ()

    def spread_over(self, ways: Iterable[tuple[str, str]]) -> None:
        """See :class:`limosa.transport.channel.Channel`: it goes over one device."""

    def used(self) -> tuple[Used, ...]:
        """See :class:`limosa.transport.channel.Channel`: nobody counts what the device has carried for one QEMU."""
        return ()

    async def compressed(self) -> None:
        """See :class:`limosa.transport.channel.Channel`: nobody compresses."""

    async def fault(self) -> None:
        """See :class:`limosa.transport.channel.Channel`: nothing of ours is between."""

    def close(self) -> None:
        """See :class:`limosa.transport.channel.Channel`: it is QEMU's."""


class RdmaDoorway:
    """The destination's end, at which its QEMU listens already. Made by :func:`open_door`."""

    def __init__(self, stream: RdmaAddress) -> None:
        self.address = stream.address
        self.port = stream.port
        self.token = secrets.token_hex(_TOKEN_BYTES)  # nobody will ask for it

    async def accept(self) -> None:
        """See :class:`limosa.transport.channel.Doorway`."""

    def announce(self, addresses: Iterable[str]) -> None:
        """See :class:`limosa.transport.channel.Doorway`: it goes over one device."""

    def close(self) -> None:
        """See :class:`limosa.transport.channel.Doorway`: QEMU listens until it has its stream, or ends."""


async def open_door(machine: MachineProtocol, address: str, ports: tuple[int, int]) -> RdmaDoorway:
    """Have the destination's QEMU listen. Raises :class:`QemuError`."""
    stream = RdmaAddress(address, ports[0] + next(_turn) % (ports[1] - ports[0] + 1))
    await machine.receive(stream)
    return RdmaDoorway(stream)


def is_emulated(here: HostNetwork, there: HostNetwork, path: Path) -> bool:
    """Whether a path that has RDMA has it from the kernel, at one end at least."""
    return any(nic.rdma_emulated for _, nics in _with_nics(here, there, [path]) for nic in nics)


def paths(here: HostNetwork, there: HostNetwork, direct: Sequence[Path]) -> tuple[Path, ...]:
    """Those of the ways over common networks that lead from an RDMA device to another."""
    return tuple(
        path
        for path, nics in _with_nics(here, there, direct)
        if ipaddress.ip_address(path.there).version == 4
        and all(nic.rdma and not _is_team(side.uplink_of(nic)) for side, nic in zip((here, there), nics, strict=True))
    )


def against(
    source: str, destination: str, here: HostNetwork, there: HostNetwork, direct: Sequence[Path], memory_mib: int
) -> str:
    """What keeps a VM with that much memory from moving by RDMA, in words; empty if nothing does."""
    sides = ((source, here), (destination, there))
    if without := [name for name, network in sides if not any(nic.rdma for nic in network.nics)]:
        return f"there is no RDMA device on {_hosts(without)}"
    if not paths(here, there, direct):
        return _team_in_the_way(sides, _with_nics(here, there, direct)) or (
            "no common IPv4 network that may carry moves has an RDMA device on both hosts"
        )
    if encrypting := [name for name, network in sides if network.encrypt]:
        return f"RDMA is not encrypted, and 'encrypt' is on on {_hosts(encrypting)}"
    for name, network in sides:
        if network.lockable_mib is not None and network.lockable_mib < memory_mib:
            return f"QEMU may lock {network.lockable_mib} MiB of memory on host '{name}', and the VM has {memory_mib}"
    return ""


def _team_in_the_way(
    sides: Sequence[tuple[str, HostNetwork]], ways: Iterable[tuple[Path, tuple[HostNic, HostNic]]]
) -> str:
    for _, nics in ways:
        for (name, network), nic in zip(sides, nics, strict=True):
            team = network.uplink_of(nic)
            if team_members(network, team):
                return f"{team.name} on host '{name}' is a team of RDMA NICs, and RDMA does not go through a team"
    return ""


def team_members(network: HostNetwork, nic: HostNic) -> tuple[str, ...]:
    """The members of a team that have RDMA devices; none of anything else."""
    if not _is_team(nic):
        return ()
    return tuple(one.name for one in network.nics if one.name in nic.members and (one.rdma or nic.rdma))


def _is_team(nic: HostNic) -> bool:
    return nic.kind in ("bond", "team")


def _with_nics(
    here: HostNetwork, there: HostNetwork, direct: Sequence[Path]
) -> Iterator[tuple[Path, tuple[HostNic, HostNic]]]:
    for path in direct:
        near, far = here.nic_of(path.here), there.nic_of(path.there)
        if near is not None and far is not None:
            yield path, (near, far)


def _hosts(names: Sequence[str]) -> str:
    return " and ".join(f"host '{name}'" for name in names)
