"""Hosts of a lab, with the same handles as hosts on loopback."""

from __future__ import annotations

import errno
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from pyroute2 import IPRoute

from harness.hosts import Host, wait_until
from harness.steering import change
from limosa.lab import daemons, lifecycle, namespaces
from limosa.lab.plan import UPLINK, Lab
from limosa.model.vm import VmState
from limosa.wire import endpoints

#: what the command of every relay has in it; relays are kept for a while for the next move
RELAYS = "limosa.transport.relay"


class LabHost(Host):
    """A host of a lab. Its daemon is restarted with a plan for ``daemon.py`` in its environment."""

    def __init__(self, lab: Lab, name: str) -> None:
        super().__init__(lab.host_state(name), name, lab.address(name))
        self.lab = lab

    @property
    def run(self) -> Path:
        return self.lab.host_run(self.name)

    @property
    def namespace(self) -> str:
        """The network namespace that is this host."""
        return self.lab.namespace(self.name)

    def restart(self, environment: dict[str, str]) -> None:
        """End the daemon and start one with these variables."""
        daemons.stop(self.lab, self.name)
        self._start(environment)

    def wait_for_death(self, within_s: float = 20.0) -> None:
        """Wait until the daemon, which this process has started, has died of its plan."""
        pid = daemons.pid_of(self.lab, self.name)
        wait_until(lambda: pid is None or os.waitpid(pid, os.WNOHANG) != (0, 0), "the daemon dies", within_s)

    def kill(self) -> None:
        """kill -9, as a crash does."""
        pid = daemons.pid_of(self.lab, self.name)
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    def restart_as(self, command: Sequence[str]) -> None:
        """End the daemon and start one with another command, up to its settings file."""
        daemons.stop(self.lab, self.name)
        daemons.start(self.lab, [self.name], command)

    def processes(self) -> list[int]:
        """Everything that runs on this host besides its daemon."""
        inode = namespaces.inode(self.namespace)
        daemon = daemons.pid_of(self.lab, self.name)
        return [pid for pid in namespaces.processes_in({inode or 0}) if pid != daemon]

    def bystanders(self) -> list[str]:
        """What there is on this host besides its daemon: processes, taps and folders of VMs."""
        found = [f"process {pid} {_command(pid)}" for pid in self.processes()]
        found += [f"tap {name}" for name in self._taps()]
        return found + [str(path) for folder in (self.state / "vms", self.run / "vm") for path in folder.iterdir()]

    def wait_until_bare(self, but: str | None = None) -> None:
        """Wait until there is nothing but the daemon, and processes that have this in their command: ``RELAYS``."""

        def left() -> list[str]:
            return [one for one in self.bystanders() if but is None or but not in one]

        try:
            wait_until(lambda: left() == [], f"{self.name} keeps nothing")
        except AssertionError as error:
            moves = self.client.call(endpoints.LIST_MIGRATIONS).migrations
            views = [(view.vm, view.side, view.phase, view.outcome) for view in moves]
            raise AssertionError(f"{error}, but {left()}; moves: {views}") from None

    def _taps(self) -> list[str]:
        def look() -> list[str]:
            with IPRoute() as netlink:
                return [link.get("ifname") for link in netlink.link("dump", kind="tun")]

        return namespaces.inside(self.namespace, look)

    def start(self, plan: str = "") -> None:
        """Have a daemon without a plan."""
        self.restart({})

    def _start(self, environment: dict[str, str]) -> None:
        before = dict(os.environ)
        os.environ.update(environment)
        try:
            command = [sys.executable, str(Path(__file__).with_name("daemon.py"))]
            daemons.start(self.lab, [self.name], command)
        finally:
            os.environ.clear()
            os.environ.update(before)

    def is_cut(self) -> bool:
        """Whether the host's uplink is down."""

        def look() -> bool:
            with IPRoute() as netlink:
                return not netlink.link("get", ifname=UPLINK)[0]["flags"] & 1

        return namespaces.inside(self.lab.namespace(self.name), look)

    def clean(self) -> None:
        """Leave the host without the VM ``vm``."""
        view = self.vm("vm")
        if view is None:
            return
        if view.state in (VmState.RUNNING, VmState.PAUSED):
            self.client.call(endpoints.STOP_VM, vm="vm")
        self.client.call(endpoints.DELETE_VM, vm="vm")


@contextmanager
def running_lab(
    hosts: int = 2,
    *,
    nics: int = 1,
    speed_mbit_per_s: int | Sequence[int] = 0,
    transport: str = "tcp",
    encrypt: bool = True,
) -> Iterator[list[LabHost]]:
    """A lab of its own name, gone afterwards with everything in it.

    Moves take the plainest ``transport``, so that a test of something else need not wait for relays; ``auto`` is what
    users have.
    """
    lab = lifecycle.plan(f"t{secrets.token_hex(3)}", hosts, nics, speed_mbit_per_s)
    try:
        lifecycle.up(lab)
        made = [LabHost(lab, name) for name in lab.host_names]
        for host in made:
            change(host, {"transport": transport, "encrypt": encrypt})
        yield made
    finally:
        lifecycle.down(lab.name)


def set_links(host: LabHost, state: str) -> None:
    """Cut or heal everything between a host and the others."""

    def work() -> None:
        with IPRoute() as netlink:
            for name in (UPLINK, *host.lab.nic_names):
                netlink.link("set", index=netlink.link("get", ifname=name)[0]["index"], state=state)

    namespaces.inside(host.lab.namespace(host.name), work)


def plug(host: LabHost, nic: str, *, in_: bool) -> None:
    """Pull the cable out of a migration NIC, or put it in again: at the far end, so that the host sees its link go."""

    def work() -> None:
        with IPRoute() as netlink:
            index = netlink.link("get", ifname=f"{nic}-{host.name}")[0]["index"]
            netlink.link("set", index=index, state="up" if in_ else "down")

    namespaces.inside(host.lab.wire, work)


def relay_processes(host: LabHost) -> list[int]:
    """Its relays, and the processes that compress for them."""
    return [pid for pid in host.processes() if RELAYS in _command(pid)]


def end_relays(host: LabHost) -> None:
    """Not to wait until they do it by themselves, and not to have the next move take their session."""
    for pid in relay_processes(host):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_until(lambda: relay_processes(host) == [], "its relays are gone")


@contextmanager
def off_the_network(host: LabHost, nic: str) -> Iterator[None]:
    """The switch passes nothing on from and to a migration NIC during the block, though it has its link."""

    def attach(bridge: int) -> int:
        with IPRoute() as netlink:
            port = netlink.link("get", ifname=f"{nic}-{host.name}")[0]
            netlink.link("set", index=port["index"], master=bridge)
            return int(port.get("master") or 0)

    bridge = namespaces.inside(host.lab.wire, lambda: attach(0))
    try:
        yield
    finally:
        namespaces.inside(host.lab.wire, lambda: attach(bridge))


def in_host(host: LabHost, work: Callable[[IPRoute, int], None], nic: str) -> None:
    """Do something to a NIC of a host, inside it."""

    def enter() -> None:
        with IPRoute() as netlink:
            work(netlink, netlink.link("get", ifname=nic)[0]["index"])

    namespaces.inside(host.namespace, enter)


@contextmanager
def without_address(host: LabHost, nic: str) -> Iterator[None]:
    """A migration NIC has no address during the block; afterwards it appears."""
    address = {"address": host.lab.migration_addresses(host.name)[int(nic[-1])], "prefixlen": 24}
    in_host(host, lambda netlink, index: netlink.addr("del", index=index, **address), nic)
    try:
        yield
    finally:
        in_host(host, lambda netlink, index: netlink.addr("add", index=index, **address), nic)


def break_connections(host: LabHost, nic: str) -> None:
    """Have the kernel end every TCP connection from the address of a migration NIC, as a reset does."""
    address = host.lab.migration_addresses(host.name)[int(nic[-1])]
    namespaces.inside(host.namespace, lambda: subprocess.run(["ss", "-K", "src", address], check=True))


def reaches(host: LabHost, address: str) -> bool:
    """Whether packets go to an address and back; nobody listens there."""

    def knock() -> bool:
        with socket.socket() as caller:
            caller.settimeout(1)
            return caller.connect_ex((address, 1)) == errno.ECONNREFUSED

    return namespaces.inside(host.namespace, knock)


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")[:100]
    except OSError:
        return "that has ended"
