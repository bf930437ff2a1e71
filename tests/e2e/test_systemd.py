"""The shipped unit and settings in the hands of a real systemd, with Debian's kernel in lab VMs: the daemon starts with
the rights it is given and no others, VMs move between two such hosts, and outlive whatever systemd does to it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import limosa
from harness.labvm import LabVm, running_vms
from harness.labvm.hosts import LIMOSA, filler
from limosa.security import ca

pytestmark = [pytest.mark.qemu, pytest.mark.labvm, pytest.mark.long]

PACKAGING = Path(__file__).parents[2] / "packaging"
UNIT = "limosa-host.service"
SOURCE = Path(limosa.__file__).parents[1]
#: The addresses are those of the shipped example.
ADDRESSES = {"host1": "10.0.0.1", "host2": "10.0.0.2"}
FILL_MIB, MEMORY_MIB = 16, 32
STARTED_WITHIN_S = 300.0
#: Its number (linux/capability.h).
CAP_SYS_ADMIN = 21
#: Reached as soon as systemd runs: what the unit needs is started with it.
TARGET = "[Unit]\nDescription=Nothing but what is asked for\n"
#: A systemd that is the first process of its own namespace, since the VM has one already.
BOOT = """
mkdir -p /sys/fs/cgroup && mount -t cgroup2 cgroup2 /sys/fs/cgroup
container=labvm setsid unshare --fork --pid --mount --mount-proc /lib/systemd/systemd --unit=lab.target \
    >/run/systemd.log 2>&1 </dev/null &
for i in $(seq 600); do [ -S /run/systemd/private ] && exit; sleep 0.1; done
cat /run/systemd.log; false
"""


class Host:
    """A lab VM that is set up as README says."""

    def __init__(self, vm: LabVm) -> None:
        self.vm = vm
        self.name = vm.name

    def set_up(self, authority: Path) -> None:
        """Everything but the start."""
        address = ADDRESSES[self.name]
        ca.issue_host(authority, self.name, [address], authority.with_name(self.name))
        example = (PACKAGING / "host.toml.example").read_text()
        settings = example.replace('"host1"', f'"{self.name}"').replace('"10.0.0.1"', f'"{address}"')
        self.vm.run(f"ip addr add {address}/24 dev eth0; ip link set eth0 up")
        self.vm.run(f"mkdir -p /etc/limosa && cp -r {authority.with_name(self.name)} /etc/limosa/pki")
        self.vm.run("cat >/etc/limosa/host.toml", input=settings)
        self.vm.run(f"cp {PACKAGING / UNIT} /etc/systemd/system/")
        self.vm.run("cat >/etc/systemd/system/lab.target", input=TARGET)
        # The package these tests use may be another than the command's own.
        program = f'#!/bin/sh\nexec env PYTHONPATH={SOURCE} {LIMOSA} "$@"\n'
        self.vm.run("cat >/usr/local/bin/limosa && chmod 755 /usr/local/bin/limosa", input=program)
        self.vm.run(BOOT)

    def run(self, *words: str, within_s: float = 120.0) -> str:
        """A command where systemd is the first process."""
        into = 'pid=$(pgrep -xo systemd) && exec nsenter --target $pid --pid --mount -- "$@"'
        return self.vm.run("sh", "-ec", into, "sh", *words, within_s=within_s)

    def systemctl(self, *words: str) -> None:
        """Have systemd do something with the unit."""
        self.run("systemctl", *words, UNIT, within_s=STARTED_WITHIN_S)

    def property(self, name: str) -> str:
        """What systemd says of the unit."""
        return self.run("systemctl", "show", "--property", name, "--value", UNIT).strip()

    def limosa(self, *words: str) -> list[Any]:
        """The objects a command prints."""
        return [json.loads(line) for line in self.run("limosa", *words, "--json", within_s=300).splitlines()]

    def vm_view(self) -> Any:
        """The one VM as this host sees it."""
        return self.limosa("vm", "show", "web")[0]

    def until_active(self) -> None:
        """Return when the daemon is ready; if it never is, why is in the error."""
        asks = f"""
            for i in $(seq {STARTED_WITHIN_S:.0f}); do systemctl is-active --quiet {UNIT} && exit; sleep 1; done
            systemctl status --no-pager --full {UNIT}; tail -n 50 /run/systemd.log; false
        """
        self.run("sh", "-c", asks, within_s=STARTED_WITHIN_S + 60)


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Host, Host]]:
    with tempfile.TemporaryDirectory(prefix="labunit-") as place, running_vms(*ADDRESSES, cables=1) as vms:
        folder = Path(place)
        folder.chmod(0o755)
        (folder / "filler").write_bytes(filler(FILL_MIB))
        ca.create_authority(folder / "ca")
        one, two = (Host(vm) for vm in vms)
        for host in (one, two):
            host.set_up(folder / "ca")
            host.systemctl("start", "--no-block")
        for host in (one, two):
            host.until_active()
            host.limosa("host", "settings", "reserved_memory_mib=0", *(f"peers.{n}={a}" for n, a in ADDRESSES.items()))
        kernel, memory = str(folder / "filler"), f"{MEMORY_MIB}M"
        create = ("vm", "create", "web", "--memory", memory, "--kernel", kernel, "--accelerator", "tcg", "--start")
        one.limosa(*create)
        yield one, two


def test_the_daemon_is_ready_and_has_no_other_rights(hosts: tuple[Host, Host]) -> None:
    one, _ = hosts
    assert (one.property("ActiveState"), one.property("NRestarts")) == ("active", "0")
    pid = one.property("MainPID")
    status = one.run("cat", f"/proc/{pid}/status")
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert fields["NoNewPrivs"] == "1"
    assert int(fields["CapEff"], 16) == int(fields["CapBnd"], 16)
    assert not int(fields["CapEff"], 16) >> CAP_SYS_ADMIN & 1
    assert one.run("cat", f"/proc/{pid}/oom_score_adj").strip() == "-900"


def test_a_vm_moves_and_runs_on_whatever_becomes_of_the_daemon(hosts: tuple[Host, Host]) -> None:
    one, two = hosts
    assert one.limosa("move", "web", "--to", "host2")[-1]["outcome"] == "completed"
    assert two.vm_view()["state"] == "running"
    qemus = two.run("pgrep", "-f", "qemu-system.*guest=web")
    two.systemctl("restart")
    assert (two.vm_view()["state"], two.run("pgrep", "-f", "qemu-system.*guest=web")) == ("running", qemus)
    daemon = two.property("MainPID")
    two.run("kill", "-9", daemon)
    two.run("sh", "-c", f"while kill -0 {daemon} 2>/dev/null; do sleep 0.1; done")
    two.until_active()
    assert two.property("MainPID") != daemon
    assert two.property("NRestarts") == "1"
    assert (two.vm_view()["state"], two.run("pgrep", "-f", "qemu-system.*guest=web")) == ("running", qemus)
    two.systemctl("stop")
    assert two.run("pgrep", "-f", "qemu-system.*guest=web") == qemus
    two.systemctl("start")
    assert two.limosa("move", "web", "--to", "host1")[-1]["outcome"] == "completed"
    assert one.vm_view()["state"] == "running"
