"""The lab the moves are measured in, and its meters.

One lab of two hosts for each link. All three systems live in the same namespaces, on the same bridges and migration
NICs; each has its daemons and QEMUs in a control group of its own, whose processor time is known to the microsecond
also for processes that have ended meanwhile.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from pyroute2 import IPRoute

from benchmarks.ending import undisturbed
from limosa.lab import daemons, lifecycle, namespaces
from limosa.lab.plan import SWITCH, Lab

HOSTS = ("host1", "host2")
CALIBRATE_S = 2.0
GONE_WITHIN_S = 10.0

T = TypeVar("T")


@dataclass(frozen=True)
class Link:
    """What the hosts' migration NICs are: the speed of each, Mbit/s, in order; 0 is unshaped."""

    name: str
    speeds: tuple[int, ...]

    @property
    def mbit_per_s(self) -> int:
        """That of all together."""
        return sum(self.speeds)


UNSHAPED = Link("unshaped", (0,))
FAST = Link("2.5 Gbit/s", (2500,))
GIGABIT = Link("1 Gbit/s", (1000,))
SLOW = Link("100 Mbit/s", (100,))
TWO_NICS = Link("2 x 500 Mbit/s", (500, 500))
UNEQUAL_NICS = Link("500 + 100 Mbit/s", (500, 100))
FOUR_NICS = Link("4 x 250 Mbit/s", (250, 250, 250, 250))


@dataclass(frozen=True)
class Ground:
    """A lab that is up."""

    lab: Lab
    #: for files of the systems that are compared; gone with the lab
    folder: Path
    _groups: dict[str, Path] = field(default_factory=dict)

    def inside(self, host: str, work: Callable[[], T]) -> T:
        """The answer of ``work``, done on a host."""
        return namespaces.inside(self.lab.namespace(host), work)

    def on_client(self, work: Callable[[], T]) -> T:
        """The answer of ``work``, done where the LAN's clients are."""
        return namespaces.inside(self.lab.client, work)

    def migration_address(self, host: str) -> str:
        """A host's address on its first migration NIC."""
        return self.lab.migration_addresses(host)[0]

    def bytes_on_wire(self, host: str) -> int:
        """Bytes that have passed a host's migration NICs in both directions so far, frames' headers included."""
        return self._counted(host, "rx_bytes", "tx_bytes")

    def bytes_sent(self, host: str) -> int:
        """The same of what the host has sent."""
        return self._counted(host, "tx_bytes")

    def _counted(self, host: str, *counters: str) -> int:
        def count() -> int:
            with IPRoute() as netlink:
                links = [netlink.link("get", ifname=nic)[0] for nic in self.lab.nic_names]
                return sum(int(link.get_attr("IFLA_STATS64")[name]) for link in links for name in counters)

        return self.inside(host, count)

    def plug(self, host: str, nic: str, *, in_: bool) -> None:
        """Pull the cable out of a migration NIC, or put it in again: at the far end, so that the host sees it go."""

        def work() -> None:
            with IPRoute() as netlink:
                index = netlink.link_lookup(ifname=f"{nic}-{host}")[0]
                netlink.link("set", index=index, state="up" if in_ else "down")

        namespaces.inside(self.lab.wire, work)

    def add_tap(self, host: str, name: str) -> None:
        """Plug a tap into a host's switch."""

        def add() -> None:
            with IPRoute() as netlink:
                netlink.link("add", ifname=name, kind="tuntap", mode="tap")
                index = netlink.link_lookup(ifname=name)[0]
                switch = netlink.link_lookup(ifname=SWITCH)[0]
                netlink.link("set", index=index, master=switch, state="up")

        self.inside(host, add)

    def spawn(self, host: str, group: str, command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        """Start a process on a host, in a control group."""
        members = self.group(group) / "cgroup.procs"
        joining = ["/bin/sh", "-c", 'echo $$ >"$0" && exec "$@"', str(members), *command]

        def start() -> subprocess.Popen[bytes]:
            with log.open("ab") as output:
                return subprocess.Popen(
                    joining, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
                )

        return self.inside(host, start)

    def group(self, name: str) -> Path:
        """The control group of a system."""
        if name not in self._groups:
            path = _control_groups() / f"limosa-benchmark-{self.lab.name}-{name}"
            path.mkdir(exist_ok=True)
            self._groups[name] = path
        return self._groups[name]

    def cpu_s(self, name: str) -> float:
        """Processor seconds a system's control group has used so far."""
        lines = (self.group(name) / "cpu.stat").read_text().splitlines()
        return int(dict(line.split() for line in lines)["usage_usec"]) / 1e6

    @contextmanager
    def counted(self, group: str) -> Iterator[None]:
        """Have this process, and what it starts meanwhile, counted in a control group."""
        root = _control_groups()
        own = root / Path("/proc/self/cgroup").read_text().split("0::/", 1)[1].strip()
        (self.group(group) / "cgroup.procs").write_text(str(os.getpid()))
        try:
            yield
        finally:
            (own / "cgroup.procs").write_text(str(os.getpid()))

    def adopt_daemons(self, group: str) -> None:
        """Put the lab's own daemons into a control group."""
        for host in HOSTS:
            (self.group(group) / "cgroup.procs").write_text(str(daemons.pid_of(self.lab, host)))

    def calibrate(self) -> float:
        """Bytes per second that pass the migration NICs while one TCP stream on each is as fast as it can be."""
        wire, began = self.bytes_on_wire(HOSTS[1]), time.monotonic()
        self._fill_all()
        return (self.bytes_on_wire(HOSTS[1]) - wire) / (time.monotonic() - began)

    def goodput(self) -> float:
        """What one TCP stream on each migration NIC brings meanwhile, without any headers: bytes per second."""
        return sum(self._fill_all())

    def _fill_all(self) -> list[float]:
        """Bytes per second that a stream to each of the second host's addresses brought."""
        addresses = self.lab.migration_addresses(HOSTS[1])
        with ThreadPoolExecutor(len(addresses)) as streams:
            return list(streams.map(self._fill, addresses))

    def _fill(self, address: str) -> float:
        """Send to an address of the second host; bytes per second that came."""
        with self.inside(HOSTS[1], lambda: socket.create_server((address, 0))) as listener:
            sending = threading.Thread(target=self.inside, args=(HOSTS[0], lambda: _send(listener.getsockname()[:2])))
            sending.start()
            with listener.accept()[0] as stream:
                began = time.monotonic()
                rate = _drain(stream) / (time.monotonic() - began)
            sending.join()
            return rate


@contextmanager
def ground(link: Link, daemon: Sequence[str] | None = None) -> Iterator[Ground]:
    """A lab of two hosts with such a link, and everything in it gone afterwards.

    ``daemon`` is another command to start the hosts' daemons with.
    """
    name = f"bm{os.getpid() % 1_000_000}"
    folder = Path(tempfile.mkdtemp(prefix="limosa-benchmark-"))
    lab = Lab(name=name, hosts=len(HOSTS), nics=len(link.speeds), speed_mbit_per_s=link.speeds)
    built = Ground(lab, folder)
    try:
        folder.chmod(0o755)  # libvirt's QEMU is not root's
        lifecycle.up(lab, daemon=daemon)
        yield built
    finally:
        with undisturbed():
            lifecycle.down(name)
            for group in built._groups.values():
                _remove(group)
            shutil.rmtree(folder)


def run(command: Sequence[str]) -> tuple[str, float, float]:
    """What a command wrote, its wall time and its own processor time, in seconds. Raises if it fails.

    If this is interrupted, so is the command.
    """
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        output, errors = process.stdout, process.stderr
        assert output is not None
        assert errors is not None
        try:
            said = output.read()  # a few lines at most, so neither pipe fills up
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            raise
        wall_s = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)}: {errors.read().strip() or said.strip()}")
    return said, wall_s, usage.ru_utime + usage.ru_stime


def _remove(group: Path) -> None:
    """Take away a control group as soon as the last of its processes, which are ended, is gone."""
    deadline = time.monotonic() + GONE_WITHIN_S
    while True:
        try:
            return group.rmdir()
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def _control_groups() -> Path:
    """Where control groups of the second version are mounted."""
    return next(path for path in (Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup")) if path.is_dir())


def _send(address: tuple[str, int]) -> None:
    block = bytes(1024 * 1024)
    until = time.monotonic() + CALIBRATE_S
    with socket.create_connection(address) as stream:
        while time.monotonic() < until:
            stream.sendall(block)


def _drain(stream: socket.socket) -> int:
    """Read to the end; how many bytes came."""
    buffer = bytearray(1024 * 1024)
    total = 0
    while count := stream.recv_into(buffer):
        total += count
    return total
