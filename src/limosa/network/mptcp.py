"""Multipath TCP as the kernel's own path manager has it: whether it is on, endpoints, limits; through netlink.

An *endpoint* is an address of this host that connections may use besides the one they were made with. With the flag
``signal`` the kernel announces it to the other end of every Multipath TCP connection; that end then connects to it as
well, from whichever of its NICs leads there. *Limits* say how many further connections each may have and how many
announced addresses it takes up. Both belong to the network namespace.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any, TypeVar

from pyroute2.netlink.generic.mptcp import MPTCP

from limosa.network.netlink import attribute, kernel_refusals

#: From linux/mptcp.h.
FLAG_SIGNAL = 1
#: The most the kernel allows of either limit (MPTCP_PM_ADDR_MAX in net/mptcp).
MOST = 8

_SWITCH = Path("/proc/sys/net/mptcp/enabled")

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Endpoint:
    """An address, the kernel's number for it, and its flags."""

    address: str
    number: int
    flags: int


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
    """The kernel's, of the network namespace in which it is first used. A thread of its own asks: see ``netlink``.

    Every call raises :class:`NetworkError` if the kernel refuses.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mptcp")

    async def endpoints(self) -> tuple[Endpoint, ...]:
        """All there are, whoever made them."""
        return await self._run("list the endpoints of", _endpoints)

    async def announce(self, address: str) -> Endpoint:
        """Make an endpoint that is announced to the other end of all connections."""

        def add(socket: MPTCP) -> Endpoint:
            socket.endpoint("add", flags=FLAG_SIGNAL, **{_field(address): address})
            return next(one for one in _endpoints(socket) if one.address == address)

        return await self._run("make an endpoint of", add)

    async def withdraw(self, endpoint: Endpoint) -> None:
        """Remove an endpoint; what runs over it, runs over the others from then on."""
        arguments = {"id": endpoint.number, _field(endpoint.address): endpoint.address}
        await self._run("remove an endpoint of", lambda socket: socket.endpoint("del", **arguments))

    async def limits(self) -> Limits:
        """The limits in force."""
        return await self._run("read the limits of", _limits)

    async def set_limits(self, limits: Limits) -> None:
        """Set both limits, for connections that begin from now on."""
        await self._run(
            "set the limits of",
            lambda socket: socket.limits("set", subflows=limits.subflows, add_addr_accepted=limits.accepted),
        )

    async def _run(self, what: str, work: Callable[[MPTCP], Answer]) -> Answer:
        def connect_and_work() -> Answer:
            # Seldom done, so the socket is not kept; the loop is named because uvloop knows no netlink sockets.
            loop = asyncio.SelectorEventLoop()
            try:
                with kernel_refusals(f"cannot {what} Multipath TCP"), MPTCP(use_event_loop=loop) as socket:
                    return work(socket)
            finally:
                loop.run_until_complete(asyncio.sleep(0))  # the transport closes its descriptor in a callback
                loop.close()

        return await asyncio.get_running_loop().run_in_executor(self._thread, connect_and_work)


def _field(address: str) -> str:
    return "addr6" if ip_address(address).version == 6 else "addr4"


def _endpoints(socket: MPTCP) -> tuple[Endpoint, ...]:
    found = [attribute(message, "MPTCP_PM_ATTR_ADDR") for message in socket.endpoint("show")]
    return tuple(_endpoint(one) for one in found if one is not None)


def _endpoint(message: Any) -> Endpoint:
    prefix = "MPTCP_PM_ADDR_ATTR_"
    address = attribute(message, f"{prefix}ADDR4") or attribute(message, f"{prefix}ADDR6")
    return Endpoint(address, attribute(message, f"{prefix}ID"), attribute(message, f"{prefix}FLAGS") or 0)


def _limits(socket: MPTCP) -> Limits:
    answer = socket.limits("show")[0]
    return Limits(
        attribute(answer, "MPTCP_PM_ATTR_SUBFLOWS") or 0, attribute(answer, "MPTCP_PM_ATTR_RCV_ADD_ADDRS") or 0
    )
