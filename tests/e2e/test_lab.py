"""The lab against the kernel: what it builds, what it measures, and that it leaves nothing behind."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from limosa.errors import Conflict, HostUnreachable
from limosa.lab import daemons, hosts, lifecycle, namespaces
from limosa.lab.image import command_line, guest_image
from limosa.lab.plan import Lab

lab_test = [pytest.mark.lab, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]

LIMOSA = str(Path(sys.executable).with_name("limosa"))
#: A daemon that says it is ready and does no more.
READY = "import os, signal, socket; s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); "
READY += "s.sendto(b'READY=1', os.environ['NOTIFY_SOCKET']); signal.pause()"
STAND_IN = [sys.executable, "-c", READY]


@pytest.fixture
def name() -> Iterator[str]:
    """A name no other lab has; whatever a test leaves under it is a failure."""
    name = f"t{secrets.token_hex(4)}"
    interfaces = socket.if_nameindex()
    yield name
    try:
        assert traces(name) == []
        assert socket.if_nameindex() == interfaces
    finally:
        lifecycle.down(name)


def traces(name: str) -> list[str]:
    """Everything on this machine that tells of a lab."""
    found = [str(folder) for folder in (hosts.STATE / name, hosts.RUN / name) if folder.exists()]
    found += namespaces.names(re.compile(rf"{name}-"))
    commands = {path: path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()}
    return found + [str(path) for path, command in commands.items() if f"/{name}/".encode() in command]


def inodes(lab: Lab) -> set[int]:
    return {inode for inode in map(namespaces.inode, lab.namespaces) if inode is not None}


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True


class TestLifecycle:
    """Up, down, and what may happen in between."""

    pytestmark = lab_test

    def test_a_lab_serves_and_goes(self, name: str) -> None:
        built = json.loads(
            subprocess.check_output([LIMOSA, "lab", "up", "--hosts", "2", "--nics", "2", "--name", name, "--json"])
        )
        try:
            assert built["complete"]
            assert [host["host"] for host in built["hosts"]] == ["host1", "host2"]
            assert all(not has_ended(host["daemon"]) for host in built["hosts"])
            status = json.loads(
                subprocess.check_output([LIMOSA, "--host", f"{name}-host2", "host", "status", "--json"])
            )
            assert status["name"] == "host2"
            assert "lan" in status["switches"]
            assert {"10.77.0.12", "10.78.0.12", "10.79.0.12"} <= {
                address.split("/")[0] for address in status["addresses"]
            }
            # From the LAN, over mutual TLS, with the lab's own operator certificate.
            outside = [LIMOSA, "lab", "exec", "--name", name, "client", "--", "limosa", "--host", "10.77.0.11"]
            assert json.loads(subprocess.check_output([*outside, "host", "status", "--json"]))["name"] == "host1"
            with pytest.raises(Conflict):
                lifecycle.up(lifecycle.plan(name, 1, 1, 0))
            inside = inodes(lifecycle.load(name))
        finally:
            removed = json.loads(subprocess.check_output([LIMOSA, "lab", "down", "--name", name, "--json"]))
        assert removed["processes"] >= 2
        assert namespaces.processes_in(inside) == []

    def test_down_does_nothing_where_nothing_is(self, name: str) -> None:
        removed = lifecycle.down(name)
        assert (removed.processes, removed.namespaces, removed.folders) == (0, (), ())

    def test_down_after_a_daemon_was_killed_ends_what_ran_on_its_host(self, name: str) -> None:
        lab = Lab(name=name, hosts=1)
        lifecycle.up(lab, daemon=STAND_IN)
        bystander = subprocess.Popen(["sleep", "600"])
        command = [LIMOSA, "lab", "exec", "--name", name, "host1", "--", "sh", "-c", "echo there; exec sleep 600"]
        try:
            with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as resident:
                assert resident.stdout is not None
                assert resident.stdout.readline() == b"there\n"
                os.kill(daemons.pid_of(lab, "host1") or 0, signal.SIGKILL)
                assert lifecycle.down(name).processes >= 1
                assert resident.wait(5) == -signal.SIGKILL
            assert bystander.poll() is None
        finally:
            bystander.kill()
            bystander.wait()

    def test_down_finds_daemons_whose_namespace_lost_its_name(self, name: str) -> None:
        lab = Lab(name=name, hosts=1)
        lifecycle.up(lab, daemon=STAND_IN)
        pid = daemons.pid_of(lab, "host1")
        assert pid is not None
        for namespace in lab.namespaces:
            namespaces.remove(namespace)
        assert lifecycle.down(name).processes == 1
        assert has_ended(pid)

    @pytest.mark.parametrize("names_left", [["wire"], ["host1", "client"]])
    def test_down_takes_stale_namespaces(self, name: str, names_left: list[str]) -> None:
        for left in names_left:
            namespaces.create(f"{name}-{left}")
        assert len(lifecycle.down(name).namespaces) == len(names_left)

    @pytest.mark.parametrize(
        "moment", ["wiring.wire", "wiring._configure", "lifecycle._furnish", "daemons.start", "daemons.Starting.wait"]
    )
    def test_down_after_up_was_killed_in_the_middle(self, name: str, moment: str) -> None:
        program = f"""
import os, signal, sys
from limosa.lab import daemons, lifecycle, wiring
{moment} = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
lifecycle.up(lifecycle.plan({name!r}, 2, 1, 100), daemon=sys.argv[1:])
"""
        killed = subprocess.run([sys.executable, "-c", program, *STAND_IN], check=False)
        assert killed.returncode == -signal.SIGKILL
        assert f"/var/lib/limosa-lab/{name}" in traces(name)
        lifecycle.down(name)

    def test_a_daemon_that_does_not_start_is_reported_with_its_last_words(self, name: str) -> None:
        with pytest.raises(HostUnreachable, match=r"status 3.*no luck today"):
            lifecycle.up(Lab(name=name, hosts=1), daemon=["/bin/sh", "-c", "echo no luck today; exit 3"])

    def test_a_daemon_can_be_restarted(self, name: str) -> None:
        lab = Lab(name=name, hosts=1)
        lifecycle.up(lab, daemon=STAND_IN)
        first = daemons.pid_of(lab, "host1")
        assert daemons.stop(lab, "host1")
        assert daemons.pid_of(lab, "host1") is None
        assert not daemons.stop(lab, "host1")
        daemons.start(lab, ["host1"], STAND_IN)
        assert daemons.pid_of(lab, "host1") not in (None, first)
        lifecycle.down(name)


@pytest.mark.lab
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
@pytest.mark.parametrize("speed", [100, pytest.param(400, marks=pytest.mark.long)])
def test_migration_nics_have_the_speed_that_was_asked_for(name: str, speed: int) -> None:
    lab = Lab(name=name, hosts=2, nics=2, speed_mbit_per_s=speed)
    lifecycle.up(lab, daemon=STAND_IN)
    try:
        # A machine that is busy with other things only ever slows a transfer down, so the best of three counts.
        assert 94 <= 100 * max(throughput(lab, "10.79.0.12") for _ in range(3)) / speed <= 101
        assert throughput(lab, "10.77.0.12") > 2 * speed, "the LAN is not limited"
    finally:
        lifecycle.down(name)


def throughput(lab: Lab, address: str, seconds: float = 1.0) -> float:
    """Mbit/s of TCP from host1 to ``address`` of host2, once it flows."""
    listener = namespaces.inside(lab.namespace("host2"), lambda: socket.create_server((address, 0)))
    with listener:
        port = listener.getsockname()[1]
        sender = namespaces.inside(lab.namespace("host1"), lambda: socket.create_connection((address, port)))
        receiver, _ = listener.accept()
    with receiver:
        thread = threading.Thread(target=send_until_refused, args=(sender,))
        thread.start()
        begin = time.monotonic() + 0.3
        while time.monotonic() < begin:
            receiver.recv(1 << 20)
        received = 0
        while (end := time.monotonic()) < begin + seconds:
            received += len(receiver.recv(1 << 20))
    thread.join()
    return received * 8 / 1e6 / (end - begin)


def send_until_refused(sender: socket.socket) -> None:
    block = bytes(1 << 18)
    with sender:
        try:
            while True:
                sender.sendall(block)
        except OSError:
            return


@pytest.mark.qemu
def test_the_guest_boots_serves_fills_its_memory_and_heeds_the_power_button(tmp_path: Path) -> None:
    image = guest_image(tmp_path) if os.geteuid() != 0 else guest_image()
    line = command_line(name="web1", address="10.0.2.15/24", fill_mib=40, random_mib=20, rewrite_mib_per_s=2)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = ["qemu-system-x86_64", "-M", "q35", "-accel", "tcg", "-cpu", "Nehalem", "-m", "256", "-nodefaults"]
    command += ["-display", "none", "-serial", f"file:{tmp_path / 'serial'}", "-qmp", "stdio"]
    command += ["-kernel", str(image.kernel), "-initrd", str(image.initrd), "-append", line]
    command += [
        "-netdev",
        f"user,id=n,restrict=on,hostfwd=tcp:127.0.0.1:{port}-:80",
        "-device",
        "virtio-net-pci,netdev=n",
    ]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as qemu:
        try:
            said = wait_for(tmp_path / "serial", "LIMOSA FILLED", qemu)
            assert said.index("LIMOSA READY") < said.index("LIMOSA FILLED")
            page = urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10).read().decode()
            assert page.startswith("host web1\nuptime ")
            assert "visits 1" in page
            assert urllib.request.urlopen(f"http://127.0.0.1:{port}/ok", timeout=10).read() == b"ok"
            assert qemu.stdin is not None
            qemu.stdin.write(b'{"execute": "qmp_capabilities"}{"execute": "system_powerdown"}')
            qemu.stdin.flush()
            assert qemu.wait(30) == 0
        finally:
            qemu.kill()


def wait_for(log: Path, text: str, process: subprocess.Popen[bytes], within_s: float = 90) -> str:
    """The log once ``text`` is in it; the process must not end before."""
    deadline = time.monotonic() + within_s
    while text not in (said := log.read_text(errors="replace") if log.exists() else ""):
        assert time.monotonic() < deadline, said[-500:]
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.05)
        assert process.poll() is None, said[-500:]
    return said
