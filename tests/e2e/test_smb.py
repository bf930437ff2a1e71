"""VMs on an SMB 3 share that each host has mounted for itself: they move there and back without a byte of a disk being
sent, their disks move onto the share and off it, and what keeps a second host off an image is Limosa's lease, since
QEMU's locks do not reach other clients."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from harness import samba
from harness.commands import limosa
from harness.crashes import disks_of
from harness.disks import assert_keeps, assert_sound, goes_on, number
from harness.guests import LanClient, address_of, linux, wait_until_it_serves
from harness.hosts import settled, wait_until
from harness.labs import LabHost, running_lab
from harness.samba import Share
from harness.steering import change, move, remove
from limosa.cli.main import main
from limosa.errors import Conflict, ImageLeased, PreflightRefused
from limosa.model.migration import Outcome
from limosa.model.storage import DiskAction
from limosa.model.vm import VmState
from limosa.storage import leases
from limosa.wire import api, endpoints

pytestmark = [pytest.mark.qemu, pytest.mark.lab]

SIZE_MIB = 64


class Lab:
    """Two hosts with a share at ``point``."""

    def __init__(self, hosts: list[LabHost], share: Share, point: Path) -> None:
        self.first, self.second = hosts
        self.share = share
        self.point = point
        self.image = str(point / "web.qcow2")

    def lease(self) -> leases.Lease:
        """The lease on the image, as the server has it."""
        return leases.read(str(self.share.folder / "web.qcow2"))

    def holder(self, image: Path) -> str:
        """The host that holds the lease on an image, by its path on the hosts."""
        return leases.read(str(self.share.folder / image.name)).host

    def nothing_of(self, image: Path) -> bool:
        """Whether the share has neither the image nor a lease on it."""
        return not any(image.name in path.name for path in self.share.folder.iterdir())


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    samba.skip_without_samba()
    with running_lab() as hosts:
        point = hosts[0].lab.state / "vms-on-smb"
        with samba.shared(hosts, point) as share:
            for host in hosts:
                change(host, {"locations.store": {"path": str(point), "shared": True}})
            yield Lab(hosts, share, point)


@pytest.fixture(scope="module")
def client(lab: Lab) -> LanClient:
    """A client of a guest ``web`` on the first host, which writes numbers on its disk."""
    disk = api.NewDisk(path=lab.image, size_mib=SIZE_MIB)
    lab.first.create(msgspec.structs.replace(linux("web", load={"disk": "vda"}), disks=(disk,)))
    client = LanClient(lab.first.lab, address_of(1))
    wait_until_it_serves(client)
    return client


def thief(image: str) -> api.NewVm:
    """Another VM that wants to write the image."""
    return api.NewVm(name="thief", memory_mib=32, accelerator="tcg", disks=(api.NewDisk(path=image, format="qcow2"),))


def test_it_moves_there_and_back_and_no_disk_is_copied(lab: Lab, client: LanClient) -> None:
    wait_until(lambda: number(client) > 3, "the guest numbers its disk")
    served = lab.share.folder / "web.qcow2"
    inode = served.stat().st_ino
    with client.talking() as conversation:
        for source, destination in ((lab.first, lab.second), (lab.second, lab.first)):
            migration = move(source, "web", destination)
            assert [plan.action for plan in migration.disks] == [DiskAction.STAY]
            assert lab.lease().host == destination.name
            goes_on(client)
    assert conversation.faults == []
    assert served.stat().st_ino == inode
    images = [path.name for path in lab.share.folder.iterdir() if not path.name.startswith(".")]
    assert images == ["web.qcow2"]


def test_a_second_host_is_kept_off_the_image(lab: Lab, client: LanClient) -> None:
    lab.second.client.call(endpoints.CREATE_VM, thief(lab.image))
    with pytest.raises(ImageLeased, match=f"host '{lab.first.name}' holds the lease"):
        lab.second.client.call(endpoints.START_VM, vm="thief")
    assert lab.second.show("thief").state is VmState.STOPPED
    goes_on(client)


def test_a_cancelled_move_leaves_the_lease_with_the_source(lab: Lab, client: LanClient) -> None:
    begun = lab.first.client.call(
        endpoints.MOVE,
        api.MoveRequest(vm="web", destination=lab.second.name, options=api.MoveOptions(bandwidth_mbit_per_s=1)),
    )
    wait_until(lambda: lab.lease().promised_to == lab.second.name, "the lease is promised")
    lab.first.client.call(endpoints.CANCEL_MIGRATION, migration=begun.id)
    assert lab.first.outcome(begun.id).outcome is Outcome.CANCELLED
    wait_until(lambda: settled([lab.first, lab.second]), "the destination has nothing of it any more")
    assert (lab.lease().host, lab.lease().promised_to) == (lab.first.name, "")
    goes_on(client)


def test_check_says_if_the_lease_is_not_the_sources(lab: Lab, client: LanClient) -> None:
    request = api.CheckRequest(vm="web", destination=lab.second.name)
    assert lab.first.client.call(endpoints.CHECK, request).possible
    ours = lab.lease()
    served = str(lab.share.folder / "web.qcow2")
    leases.change(served, lambda now: msgspec.structs.replace(now, epoch=now.epoch + 1, host="stranger"))
    (finding,) = lab.first.client.call(endpoints.CHECK, request).findings
    assert (finding.code, "host 'stranger' holds the lease" in finding.what) == ("image-leased", True)
    ended = lab.first.outcome(lab.first.move("web", lab.second.name).id)
    assert ended.fault is not None
    assert ended.fault.code == PreflightRefused.code
    leases.change(served, lambda now: msgspec.structs.replace(ours, epoch=now.epoch + 1))
    goes_on(client)


def test_the_hosts_know_that_they_see_one_share(lab: Lab) -> None:
    """Whatever they call it, and without an administrator's word."""
    change(lab.second, {"locations.nas": {"path": str(lab.point)}, "locations.store": None})
    try:
        seen = lab.first.client.call(endpoints.SIGHTINGS)
        assert [(one.location, one.host, one.as_location) for one in seen.sightings] == [
            ("store", lab.second.name, "nas")
        ]
    finally:
        change(lab.second, {"locations.store": {"path": str(lab.point), "shared": True}, "locations.nas": None})


def test_the_lease_of_a_host_that_died_stays_until_a_person_says_so(
    lab: Lab, client: LanClient, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = lab.first, lab.second
    last = number(client)
    qemus = first.qemus()
    first.kill()
    for pid in qemus:
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(ImageLeased, match=f"host '{first.name}' holds the lease") as caught:
        second.client.call(endpoints.START_VM, vm="thief")
    assert "limosa storage release" in caught.value.todo
    monkeypatch.setenv("LIMOSA_SOCKET", str(second.run / "api.sock"))
    assert main(["storage", "release", lab.image, "--from", second.name]) == Conflict.exit_code
    assert main(["storage", "release", lab.image, "--from", "stranger"]) == ImageLeased.exit_code
    assert lab.lease().host == first.name
    capsys.readouterr()
    assert main(["storage", "release", lab.image, "--from", first.name]) == 0
    assert f"'{first.name}' must not run" in capsys.readouterr().out
    assert_sound(lab.share.folder / "web.qcow2", last)
    second.client.call(endpoints.START_VM, vm="thief")
    assert lab.lease().host == second.name

    restart(lab, first)
    with pytest.raises(ImageLeased, match=f"host '{second.name}' holds the lease"):
        first.client.call(endpoints.START_VM, vm="web")
    remove(second, "thief")
    assert lab.lease().host == ""


def test_a_host_takes_its_own_lease_again(lab: Lab) -> None:
    first = lab.first
    first.client.call(endpoints.START_VM, vm="web")
    client = LanClient(first.lab, address_of(1))
    wait_until_it_serves(client)
    first.kill()
    for pid in first.qemus():
        os.kill(pid, signal.SIGKILL)
    assert lab.lease().host == first.name
    restart(lab, first)
    first.client.call(endpoints.START_VM, vm="web")
    wait_until_it_serves(client)
    assert lab.lease().host == first.name
    remove(first, "web")
    assert lab.lease().host == ""


@pytest.fixture(scope="module")
def local(lab: Lab) -> LanClient:
    """A client of a guest ``web`` on the first host, with its disk where only that host sees it."""
    first = lab.first
    disk = api.NewDisk(path=str(first.state / "images" / "web.qcow2"), size_mib=SIZE_MIB)
    first.create(msgspec.structs.replace(linux("web", load={"disk": "vda"}), disks=(disk,)))
    client = LanClient(first.lab, address_of(1))
    wait_until_it_serves(client)
    wait_until(lambda: number(client) > 3, "the guest numbers its disk")
    return client


def test_a_disk_moves_onto_the_share_and_off_it(lab: Lab, local: LanClient) -> None:
    first, second = lab.first, lab.second
    old = only_disk(first)
    assert limosa(first, "storage", "move", "web", "--to", "store").code == 0
    shared = only_disk(first)
    assert (shared.parent, old.exists()) == (lab.point, False)
    assert lab.holder(shared) == first.name
    goes_on(local)
    assert [plan.action for plan in move(first, "web", second).disks] == [DiskAction.STAY]
    assert lab.holder(shared) == second.name
    assert limosa(second, "storage", "move", "web", "--to", "images").code == 0
    assert only_disk(second).parent == second.state / "images"
    assert lab.nothing_of(shared)
    goes_on(local)
    assert_keeps(second, "web", number(local))


def test_a_move_between_hosts_puts_a_disk_on_the_share_and_takes_it_off(lab: Lab, local: LanClient) -> None:
    first, second = lab.first, lab.second
    before = only_disk(second)
    assert move_to(second, first, "store") is DiskAction.COPY
    shared = only_disk(first)
    assert (shared.parent, before.exists()) == (lab.point, False)
    assert lab.holder(shared) == first.name
    goes_on(local)
    assert move_to(first, second, "images") is DiskAction.COPY
    assert only_disk(second).parent == second.state / "images"
    assert lab.nothing_of(shared)
    goes_on(local)
    assert_keeps(second, "web", number(local))
    remove(second, "web")


def only_disk(host: LabHost) -> Path:
    """The image of ``web``."""
    (image,) = disks_of(host, "web")
    return image


def move_to(source: LabHost, destination: LabHost, location: str) -> DiskAction:
    """Move ``web`` and have its disk go to a location of the destination; what became of it."""
    options = api.MoveOptions(storage={"vda": location})
    request = api.MoveRequest(vm="web", destination=destination.name, options=options)
    ended = source.outcome(source.client.call(endpoints.MOVE, request).id)
    assert ended.outcome is Outcome.COMPLETED, ended.fault
    (plan,) = ended.disks
    return plan.action


def restart(lab: Lab, host: LabHost) -> None:
    """Start a daemon that was killed."""
    host.restart_as(samba.daemon_with(lab.share.seen(host.name), lab.point))
