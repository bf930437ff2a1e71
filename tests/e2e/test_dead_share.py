"""A share that does not answer any more: what has nothing to do with it goes on, and what has is deleted by nobody."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest

from harness import samba
from harness.crashes import disks_of, images
from harness.hosts import Host, tiny, wait_until
from harness.samba import Share
from harness.steering import change, follow
from harness.stopped import SLOWLY, assert_one_whole_disk, begin, create, host_with_locations, make_raw
from limosa.client.host import HostClient
from limosa.errors import Conflict, LimosaError, PreflightRefused
from limosa.model.migration import Migration, Outcome, Phase
from limosa.model.vm import VmState
from limosa.wire import api, endpoints

pytestmark = [pytest.mark.qemu, pytest.mark.lab]

#: What the daemon waits at a time for what does not answer, and within what everybody is to be answered.
PATIENCE_S, ANSWERS_WITHIN_S = 1.0, 15.0


class Place:
    """A host that has mounted a share at ``point``, with a VM ``web`` that does not run, whose disk is on it."""

    def __init__(self, host: Host, share: Share, point: Path) -> None:
        self.host = host
        self.share = share
        self.point = point

    @property
    def client(self) -> HostClient:
        """It fails where it is not answered in time."""
        return HostClient(str(self.host.run / "api.sock"), timeout_s=ANSWERS_WITHIN_S)

    def die(self) -> None:
        self.share.die(self.host.name)

    def answer(self) -> None:
        self.share.answer(self.host.name)

    def serves_others(self) -> None:
        """A VM that has nothing to do with the share is made, started, stopped and deleted."""
        self.client.call(endpoints.CREATE_VM, tiny("bystander"))
        self.client.call(endpoints.START_VM, vm="bystander")
        self.client.call(endpoints.STOP_VM, vm="bystander")
        self.client.call(endpoints.DELETE_VM, vm="bystander")


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    samba.skip_without_samba()
    with pytest.MonkeyPatch.context() as environment, samba.served() as share, share.mounted("alpha") as point:
        environment.setenv("LIMOSA_TEST_PATIENCE_S", str(PATIENCE_S))
        with host_with_locations("fast") as host:
            try:
                yield Place(host, share, point)
            finally:
                share.answer("alpha")


@pytest.fixture
def wanted(place: Place) -> Iterator[bytes]:
    """What the disk of ``web`` has, which lies in location ``images``."""
    image = place.host.state / "images" / "web.raw"
    made = make_raw(image)
    create(place.host, image)
    yield made
    place.answer()
    for vm in place.host.client.call(endpoints.LIST_VMS).vms:
        place.host.client.call(endpoints.DELETE_VM, vm=vm.config.name)
    for path in images(place.host):
        path.unlink()


def copying(view: Migration) -> bool:
    return view.phase is Phase.STORAGE and any(disk.copied_bytes for disk in view.progress.disks)


def limit(place: Place, migration: str) -> None:
    """Let it go on as fast as it can."""
    place.client.call(endpoints.LIMIT_MIGRATION, api.LimitRequest(bandwidth_mbit_per_s=0), migration=migration)


def test_disks_move_elsewhere_while_that_of_a_stopped_vm_does_not_answer(place: Place, wanted: bytes) -> None:
    """In no location. It may be above any image, so what would be deleted stays."""
    host, other = place.host, place.point / "other.raw"
    disk = api.NewDisk(path=str(other), format="raw", size_mib=1)
    place.client.call(endpoints.CREATE_VM, msgspec.structs.replace(tiny("other"), disks=(disk,)))
    begun = begin(host, "fast", bandwidth_mbit_per_s=SLOWLY)
    follow(host, begun.id, copying)
    place.die()
    limit(place, begun.id)
    wait_until(lambda: place.client.call(endpoints.SHOW_MIGRATION, migration=begun.id).outcome is Outcome.COMPLETED, "")
    (left,) = place.client.call(endpoints.SHOW_MIGRATION, migration=begun.id).findings
    silent = f"{other} of VM 'other' does not answer"
    assert (left.code, silent in left.what) == ("image-left", True)
    assert (host.state / "images" / "web.raw").exists()
    request = api.DiskMoveRequest(vm="web", location="images")
    for _ in range(2):
        with pytest.raises(PreflightRefused, match=silent):
            place.client.call(endpoints.MOVE_DISKS, request)
    kept = place.client.call(endpoints.MOVE_DISKS, msgspec.structs.replace(request, keep=True))
    assert host.outcome(kept.id).outcome is Outcome.COMPLETED
    place.serves_others()
    place.answer()
    moved = begin(host, "fast")
    assert host.outcome(moved.id).findings == ()
    assert moved.disks[0].path in {str(path) for path in disks_of(host, "web")}


def test_who_asks_for_an_image_there_waits_and_nobody_else(place: Place, wanted: bytes) -> None:
    place.die()
    asked = [
        msgspec.structs.replace(tiny(name), disks=(disk,))
        for name, disk in (
            ("found", api.NewDisk(path=str(place.point / "found.qcow2"))),
            ("new", api.NewDisk(path=str(place.point / "new.qcow2"), size_mib=1)),
        )
    ]

    def ask(new: api.NewVm) -> None:
        with suppress(LimosaError):
            place.host.client.call(endpoints.CREATE_VM, new)

    asking = [threading.Thread(target=ask, args=(new,)) for new in asked]
    for thread in asking:
        thread.start()
    place.serves_others()
    place.serves_others()
    assert all(thread.is_alive() for thread in asking)
    place.answer()
    for thread in asking:
        thread.join(ANSWERS_WITHIN_S)
    assert {vm.config.name for vm in place.client.call(endpoints.LIST_VMS).vms} == {"web", "new"}


def test_a_daemon_starts_while_the_images_of_an_unfinished_move_do_not_answer(place: Place, wanted: bytes) -> None:
    host = place.host
    (old,) = disks_of(host, "web")
    change(host, {"locations.nas": {"path": str(place.point)}})
    begun = begin(host, "nas", bandwidth_mbit_per_s=SLOWLY)
    follow(host, begun.id, copying)
    host.kill()
    place.die()
    for _ in range(2):
        host.start()
        host.stop(2 * ANSWERS_WITHIN_S)
    host.start()
    place.serves_others()
    with pytest.raises(Conflict, match="is in migration"):
        place.client.call(endpoints.START_VM, vm="web")
    place.answer()
    wait_until(lambda: host.show("web").migration is None, "the move is undone")
    view = place.client.call(endpoints.SHOW_MIGRATION, migration=begun.id)
    assert view.outcome is Outcome.FAILED
    assert assert_one_whole_disk(host, wanted) == old
    assert host.show("web").state is VmState.STOPPED
    # A daemon that was ended while it waited may still have the image open when the share answers: then it stays.
    left = [finding.code for finding in view.findings]
    assert left == ["image-left"] or not [path for path in place.share.folder.iterdir() if begun.id in path.name], left
    change(host, {"locations.nas": None})
