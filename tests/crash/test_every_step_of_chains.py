"""kill -9 while what lies below a disk is sent: either it stays below the disk, whole, or nothing of it is left.

The disk lies above two files that only the source has. What happens to the disk itself is shown in
``test_every_step_of_disks``; here are the steps before that, and those after which the files are the VM's.
"""

from __future__ import annotations

import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from harness.crashes import broken_move, clean, disks_of, images, nothing_else_is_left, place, whole_chain
from harness.disks import assert_clean, raw_copy
from harness.hosts import Host, running_hosts, tiny
from limosa.model.migration import Outcome
from limosa.wire import api, endpoints

pytestmark = [pytest.mark.qemu, pytest.mark.lab]

MIB = 1024 * 1024
HERE = {"daemon": "running at alpha", "qemu": "crashed at alpha", "both": "crashed at alpha"}
#: Nothing runs at the destination at these steps but its daemon.
STAYS = {"daemon": "running at alpha"}
LANDED = {"daemon": "running at beta"}
STEPS: dict[str, dict[str, str]] = {
    "source:sent:before": HERE,
    "source:sent:after": HERE,
    "destination:begin:after": STAYS,
    "destination:awaited:before": STAYS,
    "destination:awaited:after": STAYS,
    "destination:received:before": STAYS,
    "destination:received:after": STAYS,
    "destination:complete:before": STAYS,
    "destination:complete:after": STAYS,
    "destination:made:before": STAYS,
    "destination:made:after": STAYS,
    "destination:exported:after": STAYS,
    "destination:continuing:after": LANDED,
    "destination:owned:before": LANDED,
    "destination:owned:after": LANDED,
}
QUICK = {
    "source:sent:before:daemon",
    "source:sent:after:both",
    "destination:awaited:after:daemon",
    "destination:received:after:daemon",
    "destination:complete:after:daemon",
    "destination:owned:before:daemon",
}


def plans() -> Iterator[tuple[str, str]]:
    """Every plan, and where the VM must be afterwards."""
    for step, expected in STEPS.items():
        for victim, where in expected.items():
            yield f"{step}:{victim}", where


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[Host]]:
    with running_hosts("alpha", "beta") as made:
        yield made


@pytest.fixture(scope="module")
def middle(hosts: list[Host]) -> Path:
    """A file above another, in no location of any host."""
    folder = hosts[0].folder / "golden"
    folder.mkdir(mode=0o711)
    golden, above = folder / "golden.raw", folder / "middle.qcow2"
    golden.write_bytes(random.Random(3).randbytes(MIB) + bytes(3 * MIB))
    create(above, golden, "raw")
    subprocess.run(["qemu-io", "-c", "write -P 5 2M 64k", str(above)], check=True, stdout=subprocess.DEVNULL)
    return above


def create(overlay: Path, below: Path, below_format: str) -> None:
    words = ["create", "-q", "-f", "qcow2", "-b", str(below), "-F", below_format, str(overlay)]
    subprocess.run(["qemu-img", *words], check=True)
    overlay.chmod(0o644)


def with_chain(host: Host, middle: Path) -> api.NewVm:
    """A VM with a disk above others."""
    path = host.state / "images" / "vm.qcow2"
    create(path, middle, "qcow2")
    return msgspec.structs.replace(tiny("vm"), disks=(api.NewDisk(path=str(path)),))


def assert_whole(disk: Path, middle: Path) -> None:
    """Nothing is written on the disk, so it holds what shows through it."""
    assert len(whole_chain(disk)) == 3
    for image in whole_chain(disk)[:-1]:
        assert_clean(image)
    copies = [raw_copy(disk), raw_copy(middle)]
    try:
        assert copies[0].read_bytes() == copies[1].read_bytes()
    finally:
        for copy in copies:
            copy.unlink()


@pytest.mark.parametrize(
    ("plan", "expected"),
    [pytest.param(*case, id=case[0], marks=[] if case[0] in QUICK else pytest.mark.long) for case in plans()],
)
def test_one_host_has_the_vm_and_its_chain(hosts: list[Host], middle: Path, plan: str, expected: str) -> None:
    hosts[0].create(with_chain(hosts[0], middle))
    with broken_move(hosts, plan, expected) as owner:
        assert_whole(disks_of(owner, "vm")[0], middle)
        if not expected.startswith("running"):
            owner.client.call(endpoints.START_VM, vm="vm")


def test_without_a_crash_the_chain_moves(hosts: list[Host], middle: Path) -> None:
    """The cases above would prove little if the move failed by itself."""
    alpha, beta = hosts
    for host in hosts:
        host.kill()
        host.start()
    alpha.create(with_chain(alpha, middle))
    try:
        migration = alpha.outcome(alpha.move("vm", "beta").id)
        assert migration.outcome is Outcome.COMPLETED, migration.fault
        assert len(migration.layers) == 2
        assert place(hosts) == "running at beta"
        assert nothing_else_is_left(hosts)
        assert sorted(images(beta)) == sorted(whole_chain(disks_of(beta, "vm")[0]))
        assert_whole(disks_of(beta, "vm")[0], middle)
    finally:
        clean(hosts)
