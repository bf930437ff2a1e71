"""``limosa check`` on hosts that are really as wrong as the findings say: each for itself, and everything at once."""

from __future__ import annotations

import json
import secrets
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from pyroute2 import IPRoute

from harness.commands import Said, limosa
from harness.hosts import tiny
from harness.labs import LabHost, running_lab
from harness.steering import move, remove, settings
from limosa.lab import daemons, namespaces
from limosa.model.vm import VmState
from limosa.security import ca
from limosa.settings import toml
from limosa.settings.daemon import DaemonSettings
from limosa.wire import api, endpoints

pytestmark = [pytest.mark.qemu, pytest.mark.lab]

DAEMON = [sys.executable, str(Path(__file__).parents[1] / "harness" / "daemon.py")]
#: Starts a daemon that has a file system of its own in place of a folder; what is said before comes to be in it.
ELSEWHERE = 'mount -t tmpfs -o mode=755 none "$0" && cd "$0" && eval "$1" && shift && exec "$@"'
NO_CPUS: dict[str, Any] = {"models": {}, "features": [], "seen": []}


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[LabHost, LabHost]]:
    """Two hosts, with a VM ``vm`` on the first that could move."""
    with running_lab() as (source, destination):
        source.create(tiny("vm"))
        assert codes(check(source, "vm", "host2")) == set()
        yield source, destination


def check(source: LabHost, vm: str, to: str) -> Said:
    return limosa(source, "check", vm, "--to", to, "--json")


def codes(said: Said) -> set[str]:
    """The findings; the exit code must fit them, and each must say what to do."""
    report = said.object
    errors = [finding for finding in report["findings"] if finding["severity"] == "error"]
    assert (report["possible"], said.code) == ((False, 6) if errors else (True, 0))
    assert all(finding["what"] and finding["todo"] for finding in report["findings"])
    return {finding["code"] for finding in report["findings"]}


class TestTheDestination:
    """Its settings, its VMs and its network."""

    def test_live_migration_is_off(self, hosts: tuple[LabHost, LabHost]) -> None:
        source, _ = hosts
        for host in hosts:
            with settings(host, {"live_migration": False}):
                said = check(source, "vm", "host2")
                assert codes(said) == {"migration-off"}
                assert host.name in said.object["findings"][0]["todo"]

    def test_it_has_not_enough_memory(self, hosts: tuple[LabHost, LabHost]) -> None:
        source, destination = hosts
        total = destination.client.call(endpoints.HOST).memory_total_mib
        with settings(destination, {"reserved_memory_mib": total - 16}):
            assert codes(check(source, "vm", "host2")) == {"memory-short"}

    def test_every_migration_port_is_taken(self, hosts: tuple[LabHost, LabHost]) -> None:
        source, destination = hosts
        address = destination.lab.migration_addresses("host2")[0]
        taken = namespaces.inside(destination.namespace, lambda: socket.create_server((address, 0)))
        with taken, settings(destination, {"migration_ports": [taken.getsockname()[1]] * 2}):
            assert codes(check(source, "vm", "host2")) == {"ports-taken"}

    def test_its_port_cannot_be_reached(self, hosts: tuple[LabHost, LabHost]) -> None:
        source, destination = hosts
        # An address on which it listens and to which no way leads from here.
        local = {"migration_networks": ["127.0.0.0/8"]}
        with settings(source, local), settings(destination, local):
            assert codes(check(source, "vm", "host2")) == {"port-blocked"}

    def test_it_is_on_no_network_that_may_carry_moves(self, hosts: tuple[LabHost, LabHost]) -> None:
        source, destination = hosts
        with settings(destination, {"migration_networks": ["192.0.2.0/24"]}):
            assert codes(check(source, "vm", "host2")) == {"no-migration-network"}

    def test_it_takes_only_what_is_encrypted(self, hosts: tuple[LabHost, LabHost]) -> None:
        source, _ = hosts
        with settings(source, {"encrypt": False}):
            assert codes(check(source, "vm", "host2")) == {"not-encrypted"}
            moved = limosa(source, "move", "vm", "--to", "host2", "--json")
            assert (moved.code, moved.object["fault"]["code"]) == (6, "preflight-refused")

    def test_it_has_a_vm_of_that_name_or_uuid(self, hosts: tuple[LabHost, LabHost]) -> None:
        source, destination = hosts
        destination.client.call(endpoints.CREATE_VM, tiny("vm"))
        assert codes(check(source, "vm", "host2")) == {"name-taken"}
        destination.client.call(endpoints.DELETE_VM, vm="vm")
        twin = msgspec.structs.replace(tiny("twin"), uuid=source.show("vm").config.uuid)
        destination.client.call(endpoints.CREATE_VM, twin)
        assert codes(check(source, "vm", "host2")) == {"uuid-taken"}
        destination.client.call(endpoints.DELETE_VM, vm="twin")

    def test_it_has_no_switch_of_that_name(self, hosts: tuple[LabHost, LabHost]) -> None:
        source, _ = hosts
        add_bridge(source, "only1")
        source.create(msgspec.structs.replace(tiny("plugged"), nics=(api.NewNic(switch="only1"),)))
        said = check(source, "plugged", "host2")
        assert codes(said) == {"switch-missing"}
        assert "'only1'" in said.object["findings"][0]["what"]
        add_bridge(hosts[1], "only1")
        assert codes(check(source, "plugged", "host2")) == set()
        remove(source, "plugged")

    def test_it_is_the_host_the_vm_is_on(self, hosts: tuple[LabHost, LabHost]) -> None:
        assert codes(check(hosts[0], "vm", "host1")) == {"same-host"}


def add_bridge(host: LabHost, name: str) -> None:
    def work() -> None:
        with IPRoute() as netlink:
            netlink.link("add", ifname=name, kind="bridge", state="up")

    namespaces.inside(host.namespace, work)


class TestTheWay:
    """Hosts that cannot be asked."""

    def test_nobody_knows_the_host(self, hosts: tuple[LabHost, LabHost]) -> None:
        assert codes(check(hosts[0], "vm", "nowhere.invalid")) == {"host-unreachable"}
        said = check(hosts[0], "vm", "no such host")
        assert (said.code, said.object["error"]["code"]) == (2, "invalid-input")

    def test_its_daemon_is_down(self, hosts: tuple[LabHost, LabHost]) -> None:
        source, destination = hosts
        daemons.stop(destination.lab, "host2")
        try:
            said = check(source, "vm", "host2")
            assert codes(said) == {"host-unreachable"}
            said = limosa(source, "move", "vm", "--to", "host2", "--json")
            assert (said.code, said.object["fault"]["code"]) == (7, "host-unreachable")
            assert source.show("vm").state is VmState.RUNNING
        finally:
            destination.start()

    def test_it_belongs_to_strangers(self, hosts: tuple[LabHost, LabHost], tmp_path: Path) -> None:
        source, destination = hosts
        ca.create_authority(tmp_path / "ca")
        ca.issue_host(tmp_path / "ca", "host2", [destination.address], tmp_path / "pki")
        with host_settings(destination, certificates=str(tmp_path / "pki")):
            assert codes(check(source, "vm", "host2")) == {"host-not-trusted"}

    def test_another_host_answers(self, hosts: tuple[LabHost, LabHost]) -> None:
        source, _ = hosts
        with settings(source, {"peers": {"host3": "10.77.0.12", "host2": "10.77.0.12"}}):
            assert codes(check(source, "vm", "host3")) == {"host-not-trusted"}


@contextmanager
def host_settings(host: LabHost, **changes: Any) -> Iterator[None]:
    """A daemon with another ``host.toml`` during the block."""
    path = host.folder / "host.toml"
    before = path.read_bytes()
    toml.write(path, msgspec.structs.replace(toml.read(path, DaemonSettings), **changes))
    try:
        host.start()
        yield
    finally:
        path.write_bytes(before)
        host.start()


class TestQemu:
    """What the destination's QEMU cannot do. There is one QEMU on this machine, so its own answers are changed where
    the daemon keeps them."""

    @pytest.mark.parametrize(
        ("change", "code"),
        [
            (lambda known: known["machines"].clear(), "machine-unknown"),
            (lambda known: known.update(version=[9, 2, 0]), "qemu-older"),
            (lambda known: known["cpus"]["tcg"]["models"].pop("qemu64"), "cpu-unknown"),
            (lambda known: known["cpus"]["tcg"]["features"].remove("sse4.2"), "cpu-features-missing"),
            (lambda known: known.update(accelerators=["kvm"], cpus={"kvm": NO_CPUS}), "accelerator-missing"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_it_is_found(
        self, hosts: tuple[LabHost, LabHost], change: Callable[[dict[str, Any]], object], code: str
    ) -> None:
        source, destination = hosts
        path = destination.state / "qemu.json"
        before = path.read_bytes()
        known = json.loads(before)
        change(known)
        path.write_text(json.dumps(known))
        try:
            destination.start()
            assert code in codes(check(source, "vm", "host2"))
        finally:
            path.write_bytes(before)
            destination.start()

    def test_a_processor_nobody_has_is_refused_when_the_vm_is_made(self, hosts: tuple[LabHost, LabHost]) -> None:
        source, _ = hosts
        said = limosa(source, "vm", "create", "odd", "--memory", "32M", "--cpu", "x86-64-v3,+avx512f", "--json")
        assert (said.code, said.object["error"]["code"]) == (2, "invalid-input")
        assert "avx512f" in said.object["error"]["why"]
        assert source.vm("odd") is None


class TestFiles:
    """Disks that are not the same on both hosts."""

    @pytest.fixture
    def disk(self, hosts: tuple[LabHost, LabHost]) -> Iterator[Path]:
        """The disk of a VM ``disky`` on the first host, alone in its folder."""
        source, _ = hosts
        folder = source.lab.state / f"disks-{secrets.token_hex(3)}"
        folder.mkdir(mode=0o755)
        path = folder / "disky.raw"
        path.write_bytes(bytes(1024 * 1024))
        source.create(msgspec.structs.replace(tiny("disky"), disks=(api.NewDisk(path=str(path)),)))
        yield path
        remove(source, "disky")

    def test_the_same_file_may_be_used(self, hosts: tuple[LabHost, LabHost], disk: Path) -> None:
        report = check(hosts[0], "disky", "host2")
        assert codes(report) == set()
        assert actions(report) == ["stay"]

    def test_only_one_host_sees_it(self, hosts: tuple[LabHost, LabHost], disk: Path) -> None:
        source, destination = hosts
        with own_folder(destination, disk.parent, ":"):
            report = check(source, "disky", "host2")
            assert codes(report) == set()
            (plan,) = report.object["disks"]
            assert (plan["action"], plan["location"]) == ("copy", "images")
            assert plan["expected_bytes"] <= plan["virtual_bytes"] == 1024 * 1024

    def test_the_other_host_has_another_of_that_name(self, hosts: tuple[LabHost, LabHost], disk: Path) -> None:
        source, destination = hosts
        with own_folder(destination, disk.parent, f"truncate -s 1M {disk.name}"):
            assert actions(check(source, "disky", "host2")) == ["copy"]
            wish = limosa(source, "check", "disky", "--to", "host2", "--storage", "vda=nowhere", "--json")
            assert codes(wish) == {"location-unknown"}
            said = limosa(source, "move", "disky", "--to", "host2", "--storage", "vda=nowhere,vdx=images", "--json")
            assert (said.code, said.object["fault"]["code"]) == (6, "preflight-refused")
            assert "disk-unknown" in said.object["fault"]["why"]
        assert source.show("disky").state is VmState.RUNNING

    def test_locations_do_not_make_two_files_one(self, hosts: tuple[LabHost, LabHost], disk: Path) -> None:
        """Both say that they share it, but it is one machine, whose kernel knows better."""
        source, destination = hosts
        place = {"locations": {"store": {"path": str(disk.parent), "shared": True}}}
        another = own_folder(destination, disk.parent, f"truncate -s 1M {disk.name}")
        with another, settings(source, place), settings(destination, place):
            assert actions(check(source, "disky", "host2")) == ["copy"]

    def test_a_kernel_may_be_a_copy(self, hosts: tuple[LabHost, LabHost], disk: Path) -> None:
        source, destination = hosts
        kernel = disk.with_name("kernel")
        kernel.write_bytes(Path("/usr/share/qemu/linuxboot_dma.bin").read_bytes())
        kernel.chmod(0o644)
        image = f"cp /usr/share/qemu/linuxboot_dma.bin {kernel.name}"
        new = limosa(source, "vm", "create", "direct", "--memory", "32M", "--kernel", str(kernel), "--json")
        assert new.code == 0, new.error
        with own_folder(destination, disk.parent, image):
            assert codes(check(source, "direct", "host2")) == {"vm-not-running"}
        with own_folder(destination, disk.parent, f"{image}; echo more >>{kernel.name}"):
            assert codes(check(source, "direct", "host2")) == {"vm-not-running", "file-not-same"}
        source.client.call(endpoints.DELETE_VM, vm="direct")


def actions(said: Said) -> list[str]:
    """What becomes of each disk."""
    return [plan["action"] for plan in said.object["disks"]]


@contextmanager
def own_folder(host: LabHost, folder: Path, prepare: str) -> Iterator[None]:
    """A daemon that sees a folder of its own, filled by a shell command, where others see the shared one."""
    host.restart_as(["unshare", "--mount", "sh", "-c", ELSEWHERE, str(folder), prepare, *DAEMON])
    try:
        yield
    finally:
        host.start()


def test_what_is_asked_of_the_move_counts(hosts: tuple[LabHost, LabHost]) -> None:
    """As the move itself would have it, whatever the host's settings say."""
    source, _ = hosts
    asked = ("check", "vm", "--to", "host2", "--transport", "auto", "--json")
    free = limosa(source, *asked).object
    capped = limosa(source, *asked, "--bandwidth", "1").object
    assert (free["route"]["transport"], capped["route"]["transport"]) == ("compression", "tcp")
    assert "cap on bandwidth" in capped["route"]["why"]
    assert capped["expected"]["seconds"] > 20 * free["expected"]["seconds"]


def test_a_device_of_the_host_cannot_move(hosts: tuple[LabHost, LabHost]) -> None:
    source, _ = hosts
    assert limosa(source, "vm", "create", "keyed", "--memory", "32M", "--device", "usb:1050:0407").code == 0
    said = check(source, "keyed", "host2")
    assert codes(said) == {"local-device", "vm-not-running"}
    assert any("1050:0407" in finding["what"] for finding in said.object["findings"])
    source.client.call(endpoints.DELETE_VM, vm="keyed")


def test_everything_is_said_at_once_and_the_move_runs_the_same_checks(hosts: tuple[LabHost, LabHost]) -> None:
    source, destination = hosts
    destination.client.call(endpoints.CREATE_VM, tiny("vm"))
    bad = {"live_migration": False, "reserved_memory_mib": 1_000_000, "migration_networks": ["192.0.2.0/24"]}
    expected = {"migration-off", "memory-short", "no-migration-network", "name-taken"}
    with settings(destination, bad):
        assert codes(check(source, "vm", "host2")) == expected
        said = limosa(source, "move", "vm", "--to", "host2", "--json")
        assert said.code == 6
        assert {finding["code"] for finding in said.object["fault"]["findings"]} == expected
        told = limosa(source, "check", "vm", "--to", "host2")
        assert told.code == 6
        assert "VM 'vm' cannot move from 'host1' to 'host2'" in told.out
        assert all(f"[{code}]" in told.out for code in expected)
    destination.client.call(endpoints.DELETE_VM, vm="vm")
    assert destination.bystanders() == []
    move(source, "vm", destination)
    move(destination, "vm", source)
