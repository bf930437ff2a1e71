"""Multipath TCP as the kernel's own path manager has it: whether it is on, endpoints, limits; through netlink.

An *endpoint* is an address of this host that connections may use besides the one they were made with. With the flag
``signal`` the kernel announces it to the other end of every Multipath TCP connection; that end then connects to it as
well, from whichever of its NICs leads there. *Limits* say how many further connections each may have and how many
announced addresses it takes up. Both belong to the network namespace.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from pyroute2.netlink.generic.mptcp import MPTCP

from limosa.errors import NetworkError
from limosa.network.netlink import attribute, kernel_refusals

# From linux/mptcp.h.
FLAG_SIGNAL = 1
#: Made by the kernel itself for an address from which it connected to an announced one; an explicit one replaces it.
FLAG_IMPLICIT = 16
#: The most the kernel allows of either limit (MPTCP_PM_ADDR_MAX in net/mptcp).
MOST = 8

_SWITCH = Path("/proc/sys/net/mptcp/enabled")


@dataclass(frozen=True)
class Endpoint:
    """An address, the kernel's number for it, and its flags. With a ``port`` that one is announced too, and the kernel
    listens there; else it is the one of the connection."""

    address: str
    number: int
    flags: int
    port: int = 0


@dataclass(frozen=True)
class Limits:
    """For each connection: how many further ones, and how many announced addresses."""

    subflows: int
    accepted: int

    def raised_to(self, other: Limits) -> Limits:
        """The larger of both, each by itself."""
        return Limits(max(self.subflows, other.subflows), max(self.accepted, other.accepted))


def is_on() -> bool:
    """Whether this network namespace makes Multipath TCP connections. False where the kernel has none."""
    try:
        return _SWITCH.read_text().strip() == "1"
    except OSError:
        return False


class PathManager:
    """The kernel's, of the network namespace of the caller. A thread of its own asks: see ``netlink``.

    Every call raises :class:`NetworkError` if the kernel refuses.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mptcp")

    async def endpoints(self) -> tuple[Endpoint, ...]:
        """All there are, whoever made them."""
        answers = await self._ask("list the endpoints of", lambda socket: socket.endpoint("show"))
        found = [attribute(answer, "MPTCP_PM_ATTR_ADDR") for answer in answers]
        return tuple(_endpoint(one) for one in found if one is not None)

    async def announce(self, address: str, port: int = 0) -> Endpoint:
        """Make an endpoint that is announced to the other end of all connections.

        Raises :class:`NetworkError` also if somebody has removed it at once.
        """
        arguments = {"flags": FLAG_SIGNAL, _field(address): address, **({"port": port} if port else {})}
        await self._ask("make an endpoint of", lambda socket: socket.endpoint("add", **arguments))
        for one in await self.endpoints():
            if (one.address, one.port) == (address, port):
                return one
        raise NetworkError(
            f"the endpoint of Multipath TCP at {address} was removed by somebody else as soon as it was made",
            todo="see what else on this host sets endpoints, such as NetworkManager or mptcpd",
        )

    async def withdraw(self, endpoint: Endpoint) -> None:
        """Remove an endpoint; what runs over it, runs over the others from then on."""
        arguments = {"id": endpoint.number, _field(endpoint.address): endpoint.address}
        await self._ask("remove an endpoint of", lambda socket: socket.endpoint("del", **arguments))

    async def limits(self) -> Limits:
        """The limits in force."""
        (answer,) = await self._ask("read the limits of", lambda socket: socket.limits("show"))
        subflows, accepted = (attribute(answer, f"MPTCP_PM_ATTR_{name}") for name in ("SUBFLOWS", "RCV_ADD_ADDRS"))
        return Limits(subflows or 0, accepted or 0)

    async def set_limits(self, limits: Limits) -> None:
        """Set both limits, for connections that begin from now on."""
        arguments = {"subflows": limits.subflows, "add_addr_accepted": limits.accepted}
        await self._ask("set the limits of", lambda socket: socket.limits("set", **arguments))

    async def _ask(self, what: str, request: Callable[[MPTCP], Iterable[Any]]) -> tuple[Any, ...]:
        """The answers to one request."""

        def connect_and_ask() -> tuple[Any, ...]:
            # pyroute2 closes the loop of a generic netlink socket after each request, so each has its own; and it is
            # named because a daemon may have made uvloop the policy, which knows no netlink sockets.
            with (
                kernel_refusals(f"cannot {what} Multipath TCP"),
                MPTCP(use_event_loop=asyncio.SelectorEventLoop()) as socket,
            ):
                return tuple(request(socket))

        return await asyncio.get_running_loop().run_in_executor(self._thread, connect_and_ask)


def _field(address: str) -> str:
    return "addr6" if ip_address(address).version == 6 else "addr4"


def _endpoint(message: Any) -> Endpoint:
    prefix = "MPTCP_PM_ADDR_ATTR_"
    address = attribute(message, f"{prefix}ADDR4") or attribute(message, f"{prefix}ADDR6")
    number, flags, port = (attribute(message, f"{prefix}{name}") for name in ("ID", "FLAGS", "PORT"))
    return Endpoint(address, number, flags or 0, port or 0)
