"""Disks on logical volumes, with Debian's device mapper in lab VMs: to them and from them, on one host and between two,
and when the device below fails, or the daemon is killed. Everything the guest was told is written is there, and nothing
else is left."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from harness.labvm import LabVm, numberer
from harness.labvm.hosts import VmHost, running_vm_hosts
from harness.labvm.vm import CommandFailed
from harness.lvm import GROUP, POOL, REAL
from limosa.model.migration import Migration, Outcome
from limosa.model.storage import DiskPlan

pytestmark = [pytest.mark.qemu, pytest.mark.labvm, pytest.mark.long]

CONTRACT = Path(__file__).parents[1] / "contract" / "test_volumes.py"
NUMBERS_WITHIN_S = 60
#: What a pool gives at once, and what LVM rounds its share of a small pool by.
POOL_PIECE = 128 << 10
#: A group on what others have left; one with room for thin volumes only; and one on a device that fails from its 13th
#: MiB on. Nobody makes device nodes here but LVM itself.
DEVICES = f"""
export DM_DISABLE_UDEV=1
printf 'activation {{\\nudev_sync=0\\nudev_rules=0\\n}}\\n' >/etc/lvm/lvmlocal.conf
mkdir /mnt/devices && mount -t tmpfs none /mnt/devices
yes junk | head -c 100M >/mnt/devices/sound
truncate -s 64M /mnt/devices/failing
truncate -s 64M /mnt/devices/slim
losetup /dev/loop0 /mnt/devices/sound
losetup /dev/loop1 /mnt/devices/failing
losetup /dev/loop2 /mnt/devices/slim
echo '0 126976 linear /dev/loop1 2048' | dmsetup create failing
lvm vgcreate -qq {GROUP} /dev/loop0
lvm lvcreate -qq --yes --type thin-pool --size 32M --name {POOL} {GROUP}
lvm vgcreate -qq slim /dev/loop2
lvm lvcreate -qq --yes --type thin-pool --size 32M --name {POOL} slim
lvm vgcreate -qq shaky /dev/mapper/failing
printf '0 26624 linear /dev/loop1 2048\\n26624 100352 error\\n' | dmsetup load failing
dmsetup resume failing
"""
#: What lies on a disk: digest of all but the ring, the numbers in the ring, whether that is all there is.
LOOK = """
import hashlib, json, struct, sys
path, size, at, count, sector = sys.argv[1], *map(int, sys.argv[2:])
with open(path, "rb") as disk:
    data = disk.read(size)
    more = disk.read(1)
start, end = at * sector, (at + count) * sector
ring = struct.unpack(f"<{(end - start) // 4}I", data[start:end])
whole = all(len(set(ring[i : i + sector // 4])) == 1 for i in range(0, len(ring), sector // 4))
digest = hashlib.sha256(data[:start] + data[end:]).hexdigest()
seen = {"digest": digest, "ring": ring[:: sector // 4], "whole": whole, "more": bool(more), "size": len(data)}
print(json.dumps(seen))
"""


def wire(vm: LabVm, number: int) -> dict[str, Any]:
    """A network, and the devices."""
    vm.run(f"ip addr add 10.7.0.{number}/24 dev eth0; ip link set eth0 mtu 9000 up")
    vm.run(DEVICES)
    groups = {"bulk": GROUP, "thin": f"slim/{POOL}", "shaky": "shaky"}
    return {"locations": {name: {"lvm": group} for name, group in groups.items()}, "storage_bandwidth_mbit_per_s": 100}


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[VmHost, VmHost]]:
    image = tmp_path_factory.mktemp("guest") / "web.qcow2"
    numberer.write_image(image)
    with running_vm_hosts(wire, cables=1) as made:
        own = made[0].state / "images" / "web.qcow2"
        made[0].vm.run(f"cp {image} {own}")
        words = ("--memory", "32M", "--disk", f"{own},format=qcow2", "--accelerator", "tcg", "--start")
        made[0].limosa("vm", "create", "web", *words)
        goes_on(made[0])
        yield made


@pytest.fixture
def host(hosts: tuple[VmHost, VmHost]) -> VmHost:
    """Where the VM is."""
    return next(one for one in hosts if one.ask("vm", "list"))


def disk(host: VmHost) -> Path:
    """What the VM's disk is."""
    (view,) = host.ask("vm", "show", "web")
    return Path(view["config"]["disks"][0]["path"])


def goes_on(host: VmHost) -> None:
    """Return when the guest has written three numbers more."""
    console = host.state / "vms" / "web" / "console.log"
    count = f"$(grep -c . {console} || true)"
    host.vm.run(
        f"n={count}; for i in $(seq {NUMBERS_WITHIN_S * 10}); do [ {count} -gt $((n + 3)) ] && exit; sleep 0.1; done; "
        f"tail -n 3 {console}; exit 1"
    )


def assert_keeps(host: VmHost) -> None:
    """The disk has what it had, and every number the guest has said."""
    host.limosa("vm", "pause", "web")
    try:
        last = int(host.vm.run(f"tail -n 1 {host.state}/vms/web/console.log"), 16)
        path = disk(host)
        figures = (numberer.SIZE, numberer.RING_AT, numberer.RING, numberer.SECTOR)
        seen = json.loads(host.vm.run(sys.executable, "-c", LOOK, raw(host, path), *map(str, figures)))
    finally:
        host.limosa("vm", "resume", "web")
    assert seen["whole"]
    assert seen["size"] == numberer.SIZE
    assert seen["more"] is path.is_relative_to("/dev"), "a file is as large as the disk, a volume larger"
    assert seen["digest"] == numberer.digest()
    for number in range(max(1, last - numberer.RING + 1), last + 1):
        there = seen["ring"][number % numberer.RING]
        assert there >= number, f"number {number} was written and its sector has {there}"
        assert there % numberer.RING == number % numberer.RING
    goes_on(host)


def raw(host: VmHost, path: Path) -> str:
    """Where the contents of an image can be read. Its guest is paused, so QEMU has written all it knows."""
    if path.suffix != ".qcow2":
        return str(path)
    host.vm.run(f"qemu-img convert -U -f qcow2 -O raw {path} /mnt/devices/seen")
    return "/mnt/devices/seen"


def left(host: VmHost) -> list[str]:
    """Every image on the host."""
    volumes = host.vm.run("lvm lvs --noheadings --options lv_name").split()
    return sorted({*volumes, *host.vm.run(f"ls {host.state}/images").split()} - {POOL})


def ended(host: VmHost) -> Migration:
    """The newest move when it has ended."""
    return host.until(lambda view: view.outcome is not Outcome.UNDER_WAY)


def plan(migration: Migration) -> DiskPlan:
    (only,) = migration.disks
    return only


def test_locations_say_what_they_are(hosts: tuple[VmHost, VmHost]) -> None:
    found = {one["name"]: one for one in hosts[0].ask("storage", "list")}
    assert {name: one["kind"] for name, one in found.items()} == {
        "images": "folder",
        "bulk": "lvm",
        "thin": "lvm",
        "shaky": "lvm",
    }
    assert [found[name].get("fault", "") for name in ("bulk", "thin", "shaky")] == [""] * 3
    assert found["thin"]["total_bytes"] == 32 << 20
    assert "volume group:" in hosts[0].limosa("storage", "show", "bulk")


def test_the_real_lvm_keeps_the_contract(hosts: tuple[VmHost, VmHost]) -> None:
    pytest_ = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CONTRACT), "-k", "real"]
    said = hosts[1].vm.run("env", f"PYTHONPATH={':'.join(sys.path)}", f"{REAL}=1", *pytest_, within_s=300)
    assert "13 passed" in said


def test_a_new_disk_shows_nothing_of_who_was_there_before(hosts: tuple[VmHost, VmHost]) -> None:
    other = hosts[1]
    other.limosa("vm", "create", "blank", "--memory", "32M", "--disk", f"/dev/{GROUP}/blank.raw,size=8M")
    try:
        assert other.vm.run(f"tr -d '\\0' </dev/{GROUP}/blank.raw | wc -c").strip() == "0"
        (view,) = other.ask("vm", "show", "blank")
        assert view["config"]["disks"][0]["size_bytes"] == 8 << 20
    finally:
        other.limosa("vm", "delete", "blank")
        other.vm.run(f"lvm lvremove -qq --yes {GROUP}/blank.raw")


@pytest.mark.parametrize("location", ["bulk", "thin", "images"])
def test_on_one_host_to_volumes_and_back(host: VmHost, location: str) -> None:
    host.limosa("storage", "move", "web", "--to", location, "--bandwidth", "100", "--detach")
    move = ended(host)
    assert move.outcome is Outcome.COMPLETED
    assert disk(host).suffix == ".raw"
    assert left(host) == [disk(host).name]
    assert_keeps(host)
    if location == "thin":
        (taken,) = [one for one in host.ask("storage", "list") if one["name"] == location]
        count = taken["total_bytes"] - taken["free_bytes"]
        assert count - plan(move).space_bytes < POOL_PIECE, "no more than was looked for before"


def test_to_volumes_of_another_host_and_back(hosts: tuple[VmHost, VmHost], host: VmHost) -> None:
    other = next(one for one in hosts if one is not host)
    for source, destination, location in ((host, other, "bulk"), (other, host, "images")):
        source.begin("web", destination, "--storage", f"vda={location}")
        assert plan(source.moved()).device is (location == "bulk")
        assert left(source) == []
        assert left(destination) == [disk(destination).name]
        assert_keeps(destination)


def test_what_a_crash_left_is_shown_and_removed(host: VmHost) -> None:
    before = disk(host)
    host.limosa("storage", "move", "web", "--to", "bulk", "--bandwidth", "4", "--detach")
    begun = host.until(lambda view: any(one.copied_bytes for one in view.progress.disks))
    copy = plan(begun).path
    assert host.ask("storage", "leftovers") == [], "a move that is under way leaves nothing"
    host.kill()
    host.vm.run(f"rm {host.state}/migrations/{begun.id}.disks.json")
    host.start()
    host.wait()
    (one,) = host.ask("storage", "leftovers")
    assert (one["path"], one["host"]) == (copy, host.name)
    assert [doubt for doubt in one["doubts"] if "has it open" in doubt], "its QEMU goes on with the copy"
    with pytest.raises(CommandFailed):
        host.limosa("storage", "clean", copy, "--yes")
    host.limosa("vm", "stop", "web")
    (one,) = host.ask("storage", "leftovers")
    assert one["doubts"] == []
    assert [removed["path"] for removed in host.ask("storage", "clean", "--yes")[0]["removed"]] == [copy]
    assert left(host) == [before.name]
    host.limosa("vm", "start", "web")
    goes_on(host)
    assert_keeps(host)


def test_a_device_that_fails_on_one_host(host: VmHost) -> None:
    before = disk(host)
    host.limosa("storage", "move", "web", "--to", "shaky", "--detach")
    failed(host, ended(host), before)


def test_a_device_that_fails_at_the_destination(hosts: tuple[VmHost, VmHost], host: VmHost) -> None:
    other = next(one for one in hosts if one is not host)
    before = disk(host)
    host.begin("web", other, "--storage", "vda=shaky")
    failed(host, ended(host), before)
    assert left(other) == []
    assert other.ask("vm", "list") == []


def test_a_device_that_cannot_be_read(hosts: tuple[VmHost, VmHost], host: VmHost) -> None:
    """The guest does not know: it uses other sectors."""
    other = next(one for one in hosts if one is not host)
    host.limosa("storage", "move", "web", "--to", "bulk")
    before = disk(host)
    with end_unreadable(host, before):
        host.limosa("storage", "move", "web", "--to", "images", "--detach")
        fails(host, ended(host), before)
        host.begin("web", other, "--transport", "tcp")  # relays take long to start in a VM that is emulated
        fails(host, ended(host), before)
    assert_keeps(host)
    assert left(host) == [before.name]
    assert left(other) == []
    assert other.ask("vm", "list") == []
    host.limosa("storage", "move", "web", "--to", "images")
    assert_keeps(host)


@contextmanager
def end_unreadable(host: VmHost, volume: Path) -> Iterator[None]:
    """During the block reading the last MiB of a disk on a logical volume fails, and what follows it."""
    sectors = (numberer.SIZE - (1 << 20)) // 512
    name = host.vm.run(f"basename $(readlink -f {volume})").strip()
    host.vm.run(
        f"dmsetup table {name} >/mnt/devices/table; set -- $(cat /mnt/devices/table); "
        f'printf "0 {sectors} linear $4 $5\\n{sectors} $(($2 - {sectors})) error\\n" | dmsetup load {name}; '
        f"dmsetup resume {name}"
    )
    try:
        yield
    finally:
        host.vm.run(f"dmsetup load {name} </mnt/devices/table; dmsetup resume {name}")


def failed(host: VmHost, migration: Migration, before: Path) -> None:
    """It says why, and the VM goes on with the disk it had."""
    fails(host, migration, before)
    assert_keeps(host)


def fails(host: VmHost, migration: Migration, before: Path) -> None:
    """The same of one that cannot be looked at."""
    assert migration.outcome is Outcome.FAILED
    assert migration.fault is not None
    assert (migration.fault.code, migration.fault.why) == ("migration-failed", "Input/output error")
    assert disk(host) == before
    assert left(host) == [before.name]
    goes_on(host)
