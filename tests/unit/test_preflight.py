"""Preflight: every rule finds what it is for, alone and together with others."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from limosa.migration.preflight import check
from limosa.model.facts import DestinationFacts, FileIdentity, LeaseConflict, VmFacts
from limosa.model.finding import Finding, Severity
from limosa.model.network import HostNetwork
from limosa.model.vm import Disk, HostDevice, Nic, VmConfig

DISK = FileIdentity(path="/vm/web1.qcow2", machine="m", device=1, inode=2)
VM = VmConfig(
    name="web1",
    uuid="7b0b7d3c-57b8-4f5c-9d5e-2d2f3f1e2a10",
    memory_mib=1024,
    cpus=1,
    machine="pc-q35-10.0",
    cpu="x86-64-v2",
    disks=(Disk(name="vda", path=DISK.path, format="qcow2"),),
    nics=(Nic(switch="lan", mac="52:54:00:00:00:01"),),
)
HERE = VmFacts(
    running=True,
    accelerator="tcg",
    qemu=(10, 0, 2),
    files=(DISK,),
    live_migration=True,
    encrypt=True,
    post_copy=False,
)
THERE = DestinationFacts(
    host="host2",
    qemu=(10, 0, 2),
    live_migration=True,
    accelerators=("tcg",),
    machine_known=True,
    cpu_known=True,
    cpu_missing=(),
    switches_missing=(),
    memory_available_mib=4096,
    name_taken=False,
    uuid_taken=False,
    files=(DISK,),
    firmware_available=True,
    post_copy_possible=True,
    addresses=("10.0.0.2",),
    trial_port=49407,
    time=0.0,
)


def findings(
    *, vm: VmConfig = VM, here: VmFacts = HERE, there: DestinationFacts = THERE, skew: float = 0.0, reach: bool = True
) -> tuple[Finding, ...]:
    return check(vm, "host1", here, there, clock_skew_s=skew, reachable=reach)


def codes(**facts: Any) -> set[str]:
    return {finding.code for finding in findings(**facts)}


def test_nothing_stands_against_a_good_move() -> None:
    assert findings() == ()


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"host": "host1"}, "same-host"),
        ({"live_migration": False}, "migration-off"),
        ({"qemu": (7, 0, 0)}, "qemu-too-old"),
        ({"qemu": (8, 2, 0)}, "emulation-unsafe"),
        ({"qemu": (9, 2, 0)}, "qemu-older"),
        ({"accelerators": ("kvm",)}, "accelerator-missing"),
        ({"machine_known": False}, "machine-unknown"),
        ({"cpu_known": False}, "cpu-unknown"),
        ({"cpu_missing": ("avx2",)}, "cpu-features-missing"),
        ({"switches_missing": ("lan",)}, "switch-missing"),
        ({"memory_available_mib": 1023}, "memory-short"),
        ({"name_taken": True}, "name-taken"),
        ({"uuid_taken": True}, "uuid-taken"),
        ({"files": ()}, "file-not-visible"),
        ({"files": (msgspec.structs.replace(DISK, inode=99),)}, "file-not-same"),
        ({"files": (msgspec.structs.replace(DISK, writable=False),)}, "file-not-writable"),
        ({"addresses": ()}, "no-migration-network"),
        ({"trial_port": 0}, "ports-taken"),
        ({"certificate_until": 29 * 86400.0}, "certificate-expires"),
    ],
)
def test_each_fact_of_the_destination_has_its_finding(change: dict[str, Any], code: str) -> None:
    assert code in codes(there=msgspec.structs.replace(THERE, **change))


def test_on_its_own_host_a_vm_is_not_said_to_be_in_its_own_way() -> None:
    there = msgspec.structs.replace(THERE, host="host1", name_taken=True, uuid_taken=True, memory_available_mib=0)
    assert codes(there=there) == {"same-host"}


def test_a_certificate_that_expires_is_a_warning_for_either_host() -> None:
    soon, late = 29 * 86400.0, 31 * 86400.0
    for here, there, hosts in ((soon, late, ["host1"]), (late, soon, ["host2"]), (late, late, []), (None, None, [])):
        found = findings(
            here=msgspec.structs.replace(HERE, certificate_until=here),
            there=msgspec.structs.replace(THERE, certificate_until=there),
        )
        assert [finding.severity for finding in found] == [Severity.WARNING] * len(hosts)
        assert all(f"host '{host}'" in one.what for host, one in zip(hosts, found, strict=True))


def test_facts_of_the_vm_and_the_way() -> None:
    assert codes(here=msgspec.structs.replace(HERE, running=False)) == {"vm-not-running"}
    assert codes(here=msgspec.structs.replace(HERE, live_migration=False)) == {"migration-off"}
    assert codes(reach=False) == {"port-blocked"}
    apart = msgspec.structs.replace(HERE, network=HostNetwork(allowed=("10.1.0.0/24",)))
    assert codes(here=apart, reach=False) == {"no-migration-network"}
    clear = HostNetwork(encrypt=False)
    assert codes(here=msgspec.structs.replace(HERE, network=clear)) == {"not-encrypted"}
    assert codes(there=msgspec.structs.replace(THERE, network=clear)) == set()
    device = HostDevice(kind="pci", address="0000:01:00.0")
    assert codes(vm=msgspec.structs.replace(VM, host_devices=(device,))) == {"local-device"}
    uefi = msgspec.structs.replace(VM, firmware="uefi")
    assert codes(vm=uefi, there=msgspec.structs.replace(THERE, firmware_available=False)) == {"firmware-missing"}


def test_clock_skew_warns_and_does_not_refuse() -> None:
    (finding,) = findings(skew=-90)
    assert (finding.code, finding.severity) == ("clock-skew", Severity.WARNING)
    assert "90 s behind" in finding.what


def test_post_copy_is_not_done_through_relays() -> None:
    allowed = msgspec.structs.replace(HERE, post_copy=True)
    found = check(VM, "host1", allowed, THERE, clock_skew_s=0.0, reachable=True, relayed=True)
    assert [(one.code, one.severity) for one in found] == [("post-copy-not-possible", Severity.WARNING)]
    assert check(VM, "host1", HERE, THERE, clock_skew_s=0.0, reachable=True, relayed=True) == ()


def test_post_copy_is_asked_for_only_where_it_is_allowed() -> None:
    unable = msgspec.structs.replace(THERE, post_copy_possible=False)
    assert codes(there=unable) == set()
    (finding,) = findings(here=msgspec.structs.replace(HERE, post_copy=True), there=unable)
    assert (finding.code, finding.severity) == ("post-copy-not-possible", Severity.WARNING)
    assert "userfaultfd" in finding.todo


def test_hardware_virtualisation_does_not_need_the_emulation_fix() -> None:
    old = msgspec.structs.replace(THERE, qemu=(8, 2, 0), accelerators=("kvm",))
    assert codes(here=msgspec.structs.replace(HERE, accelerator="kvm", qemu=(8, 2, 0)), there=old) == set()


def test_everything_is_found_at_once_errors_first() -> None:
    bad = msgspec.structs.replace(THERE, name_taken=True, memory_available_mib=0, switches_missing=("lan",))
    found = findings(there=bad, skew=60)
    assert [finding.severity for finding in found] == [Severity.ERROR] * 3 + [Severity.WARNING]
    assert all(finding.todo for finding in found)


def test_a_lease_that_cannot_be_handed_on_refuses_unless_the_disk_is_copied() -> None:
    conflict = LeaseConflict(image=DISK.path, why="host 'host3' holds the lease", todo="release it")
    here = msgspec.structs.replace(HERE, leases=(conflict,))
    (finding,) = findings(here=here)
    assert (finding.code, finding.severity, finding.todo) == ("image-leased", Severity.ERROR, "release it")
    assert "host 'host3' holds the lease" in finding.what
    assert check(VM, "host1", here, THERE, clock_skew_s=0, reachable=True, copied={DISK.path}) == ()


@pytest.mark.parametrize("model", ["host", "max,+avx"])
@pytest.mark.parametrize(
    ("here", "there", "words"),
    [
        (("avx", "sse2"), ("avx", "avx512f", "sse2"), ""),
        (("avx", "avx512f", "sse2"), ("avx", "sse2"), "lacks avx512f of"),
        (("avx",), (), "is unknown"),  # a destination that does not compare yet
        ((), ("avx",), "is unknown"),
    ],
)
def test_a_processor_that_is_the_hosts_moves_to_hosts_that_have_all_of_it(
    model: str, here: tuple[str, ...], there: tuple[str, ...], words: str
) -> None:
    found = findings(
        vm=msgspec.structs.replace(VM, cpu=model),
        here=msgspec.structs.replace(HERE, cpu_features=here),
        there=msgspec.structs.replace(THERE, cpu_features=there),
    )
    assert [finding.code for finding in found] == (["cpu-features-missing"] if words else [])
    assert all(words in finding.what for finding in found)


def test_what_cannot_be_compared_for_want_of_kvm_is_told_once() -> None:
    here = msgspec.structs.replace(HERE, accelerator="kvm", cpu_features=("avx",))
    assert codes(vm=msgspec.structs.replace(VM, cpu="host"), here=here) == {"accelerator-missing"}
