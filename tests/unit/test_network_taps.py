"""Taps, switches and addresses against the kernel, inside a network namespace that only this test's thread is in."""

from __future__ import annotations

import asyncio
import ctypes
import os
import socket
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import uvloop
from pyroute2 import IPRoute

from limosa.errors import NetworkError
from limosa.network import taps
from limosa.network.addresses import own_addresses
from limosa.network.netlink import Netlink
from limosa.network.nics import inventory
from limosa.network.switches import switches
from limosa.network.taps import Tap, open_tap, plug_in

pytestmark = [pytest.mark.lab, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]

CLONE_NEWNET = 0x40000000
NIC_ADDRESS = "f2:00:00:00:00:01"


def in_a_namespace(test: Callable[[Netlink], Awaitable[None]], runner: Callable[..., None] = asyncio.run) -> None:
    """Run ``test`` in a fresh network namespace with a switch ``lan`` (10.0.0.1/24, MTU 1400) and a veth ``nic``."""
    failures: list[BaseException] = []

    async def with_netlink() -> None:
        netlink = Netlink()
        try:
            await netlink.run(furnish)
            await test(netlink)
        finally:
            netlink.close()

    def inside() -> None:
        # The namespace belongs to the thread (and those it starts) and ends with it.
        try:
            assert ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET) == 0
            runner(with_netlink())
        except BaseException as failure:  # noqa: BLE001 - handed to the test's own thread
            failures.append(failure)

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]


def furnish(netlink: IPRoute) -> None:
    netlink.link("add", ifname="lan", kind="bridge", mtu=1400)
    netlink.link("add", ifname="nic", kind="veth", address=NIC_ADDRESS, peer={"ifname": "cable"})
    for name, address in (("lan", "10.0.0.1"), ("nic", "10.0.1.1")):
        index = netlink.link_lookup(ifname=name)[0]
        netlink.addr("add", index=index, address=address, prefixlen=24)
        netlink.link("set", index=index, state="up")


def interfaces() -> set[str]:
    return {name for _, name in socket.if_nameindex()}


@pytest.mark.parametrize("runner", [asyncio.run, uvloop.run])
def test_a_tap_is_up_on_its_switch_and_vanishes_with_its_descriptor(runner: Callable[..., None]) -> None:
    async def test(netlink: Netlink) -> None:
        before = interfaces()
        tap = await open_tap(netlink, "lan")
        link = (await netlink.run(lambda ask: ask.link("get", ifname=tap.name)))[0]
        assert tap.name.startswith("lm")
        assert link.get_attr("IFLA_MTU") == 1400
        assert link.get_attr("IFLA_MASTER") == socket.if_nametoindex("lan")
        assert link.get_attr("IFLA_ADDRESS").startswith("fe:")
        assert link["flags"] & 1
        assert not os.get_inheritable(tap.fd)
        tap.close()
        assert interfaces() == before

    in_a_namespace(test, runner)


def test_the_switch_keeps_its_address() -> None:
    async def test(netlink: Netlink) -> None:
        await netlink.run(
            lambda ask: ask.link("set", index=socket.if_nametoindex("nic"), master=socket.if_nametoindex("lan"))
        )
        tap = await open_tap(netlink, "lan")
        link = (await netlink.run(lambda ask: ask.link("get", ifname="lan")))[0]
        assert link.get_attr("IFLA_ADDRESS") == NIC_ADDRESS
        tap.close()

    in_a_namespace(test)


@pytest.mark.parametrize("name", ["nic", "missing", "lan0123456789012345", "lan%d", ""])
def test_what_is_no_switch_is_refused_and_nothing_is_left(name: str) -> None:
    async def test(netlink: Netlink) -> None:
        before = interfaces(), len(list(Path("/proc/self/fd").iterdir()))
        with pytest.raises(NetworkError):
            await open_tap(netlink, name)
        assert (interfaces(), len(list(Path("/proc/self/fd").iterdir()))) == before

    in_a_namespace(test)


def test_a_cancelled_opening_leaves_no_tap(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slowly(ask: IPRoute, switch: str) -> Tap:
        begun.set()
        go_on.wait()
        return plug_in(ask, switch)

    async def test(netlink: Netlink) -> None:
        before = interfaces()
        opening = asyncio.ensure_future(open_tap(netlink, "lan"))
        await asyncio.to_thread(begun.wait)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        go_on.set()
        await netlink.run(lambda ask: None)  # its thread has done by now what was asked of it before
        await asyncio.sleep(0)
        assert interfaces() == before

    monkeypatch.setattr(taps, "plug_in", slowly)
    in_a_namespace(test)


def test_switches_and_addresses_are_found() -> None:
    async def test(netlink: Netlink) -> None:
        assert await switches(netlink) == ("lan",)
        found = {host.address: host for host in own_addresses(await inventory(netlink))}
        assert found["10.0.0.1"].interface == "lan"
        assert found["10.0.1.1"].speed_mbit_per_s == 10000

    in_a_namespace(test)
