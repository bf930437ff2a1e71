"""Disks of a running guest move between locations of its host: in every form, cancelled, and between other moves."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from harness.commands import Said, limosa
from harness.crashes import disks_of
from harness.disks import assert_keeps, goes_on, number
from harness.guests import LanClient
from harness.hosts import tiny, wait_until
from harness.images import MIB, SIZE_MIB, add_location, images, numbering
from harness.labs import LabHost, running_lab
from harness.qmp import assert_no_copies
from harness.steering import follow, move, remove, settings
from limosa.errors import OutcomeUnknown
from limosa.model.migration import Migration, Outcome, Phase
from limosa.wire import api, endpoints

pytestmark = [pytest.mark.qemu, pytest.mark.lab]

#: The copy of the disk would take minutes.
SLOWLY = 4
CANCEL_WITHIN_S = 2.0


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[LabHost]]:
    with running_lab() as made:
        for host in made:
            add_location(host, "fast")
        yield made


@pytest.fixture(scope="module")
def client(hosts: list[LabHost]) -> LanClient:
    """A client of a guest ``web`` with two disks on the first host."""
    return numbering(hosts[0], disks=2)


def to(host: LabHost, location: str, *words: str) -> Said:
    """Move disks and wait for the end."""
    return limosa(host, "storage", "move", "web", "--to", location, "--json", *words)


def assert_moved(host: LabHost, client: LanClient, said: Said, old: list[Path] | None = None) -> None:
    """It says so, nothing is lost, nothing else is left than ``old``, and nothing is left in QEMU."""
    assert (said.code, said.object["outcome"]) == (0, "completed"), said.error
    goes_on(client)
    assert_keeps(host, "web", number(client))
    assert set(images(host)) == {*disks_of(host, "web"), *(old or [])}
    assert_no_copies(host, disks=2)


def test_all_disks_go_and_may_change_their_format(hosts: list[LabHost], client: LanClient) -> None:
    host = hosts[0]
    said = to(host, "fast", "--format", "qcow2")
    assert [disk["disk"] for disk in said.object["disks"]] == ["vda", "vdb"]
    assert_moved(host, client, said)
    assert {(path.parent.name, path.suffix) for path in disks_of(host, "web")} == {("fast", ".qcow2")}
    refused = to(host, "fast")
    assert (refused.code, refused.object["error"]["code"]) == (5, "conflict")


def test_one_disk_goes_twice_and_becomes_thick(hosts: list[LabHost], client: LanClient) -> None:
    host = hosts[0]
    other = disks_of(host, "web")[1]
    for form in ("raw", "qcow2"):
        assert_moved(host, client, to(host, "images", "--disk", "vda", "--format", form, "--thick"))
        image, unmoved = disks_of(host, "web")
        assert unmoved == other
        assert (image.suffix, image.parent.name) == (f".{form}", "images")
        assert image.stat().st_blocks * 512 >= SIZE_MIB * MIB


def test_the_old_image_can_be_kept(hosts: list[LabHost], client: LanClient) -> None:
    host = hosts[0]
    old = disks_of(host, "web")[0]
    last = number(client)
    said = to(host, "fast", "--disk", "vda", "--keep")
    assert_moved(host, client, said, [old])
    assert old.stat().st_size > last * 4096
    old.unlink()


def test_it_moves_on_to_another_host_and_back(hosts: list[LabHost], client: LanClient) -> None:
    first, second = hosts
    assert_moved(first, client, to(first, "images"))
    move(first, "web", second)
    assert images(first) == []
    assert_moved(second, client, to(second, "fast"))
    assert_moved(second, client, to(second, "images", "--format", "raw"))
    move(second, "web", first)
    assert images(second) == []
    assert_keeps(first, "web", number(client))


def accepted(view: Migration) -> bool:
    return True


def copying(view: Migration) -> bool:
    return view.phase is Phase.STORAGE and any(disk.copied_bytes for disk in view.progress.disks)


def on_its_way(view: Migration) -> bool:
    return view.progress.percent > 5 and copying(view)


@pytest.mark.parametrize("until", [accepted, copying, on_its_way])
def test_cancelled_it_never_was(hosts: list[LabHost], client: LanClient, until: Callable[[Migration], bool]) -> None:
    host = hosts[0]
    before = disks_of(host, "web")
    request = api.DiskMoveRequest(vm="web", location="fast", bandwidth_mbit_per_s=SLOWLY)
    begun = host.client.call(endpoints.MOVE_DISKS, request)
    follow(host, begun.id, until)
    said = limosa(host, "migration", "cancel", "web", "--json")
    assert (said.code, said.object["outcome"]) == (0, "cancelled")
    assert disks_of(host, "web") == images(host) == before
    assert_keeps(host, "web", number(client))
    assert_no_copies(host, disks=2)
    goes_on(client)


def test_while_its_qemu_hangs_a_cancel_says_so_and_is_done_afterwards(hosts: list[LabHost], client: LanClient) -> None:
    host = hosts[0]
    before = disks_of(host, "web")
    request = api.DiskMoveRequest(vm="web", location="fast", bandwidth_mbit_per_s=SLOWLY)
    begun = host.client.call(endpoints.MOVE_DISKS, request)
    follow(host, begun.id, copying)
    (pid,) = host.qemus()
    os.kill(pid, signal.SIGSTOP)
    try:
        asked = time.monotonic()
        with pytest.raises(OutcomeUnknown, match="the disks of VM 'web' is not cancelled yet"):
            host.client.call(endpoints.CANCEL_MIGRATION, migration=begun.id)
        assert time.monotonic() - asked < CANCEL_WITHIN_S
    finally:
        os.kill(pid, signal.SIGCONT)
    assert host.outcome(begun.id).outcome is Outcome.CANCELLED
    assert disks_of(host, "web") == images(host) == before
    assert_no_copies(host, disks=2)
    goes_on(client)


@contextmanager
def beside(host: LabHost, *names: str) -> Iterator[None]:
    """VMs with a disk each run during the block."""
    paths = [host.state / "images" / f"{name}.raw" for name in names]
    for name, path in zip(names, paths, strict=True):
        path.write_bytes(os.urandom(SIZE_MIB * MIB))
        host.create(msgspec.structs.replace(tiny(name), disks=(api.NewDisk(path=str(path)),)))
    try:
        yield
    finally:
        paths = [disk for name in names for disk in disks_of(host, name)]
        remove(host, *names)
        for path in paths:
            path.unlink()


def test_a_cap_is_kept_and_can_be_changed_on_the_way(hosts: list[LabHost], client: LanClient) -> None:
    host = hosts[0]
    with beside(host, "one"):
        request = api.DiskMoveRequest(vm="one", location="fast", bandwidth_mbit_per_s=SLOWLY)
        begun = host.client.call(endpoints.MOVE_DISKS, request).id
        before = copied(follow(host, begun, copying))
        since = time.monotonic()
        host.client.call(endpoints.LIMIT_MIGRATION, api.LimitRequest(bandwidth_mbit_per_s=10 * SLOWLY), migration=begun)
        more = copied(follow(host, begun, lambda view: copied(view) >= before + 8 * MIB)) - before
        took_s = time.monotonic() - since
        # QEMU copies whole pieces of a MiB, and waits afterwards.
        assert seconds(more - 2 * MIB, 10 * SLOWLY) < took_s < seconds(more, SLOWLY)
        host.client.call(endpoints.LIMIT_MIGRATION, api.LimitRequest(bandwidth_mbit_per_s=0), migration=begun)
        assert host.outcome(begun).outcome is Outcome.COMPLETED


def copied(view: Migration) -> int:
    return sum(disk.copied_bytes for disk in view.progress.disks)


def seconds(count: int, mbit_per_s: int) -> float:
    """What so many bytes take."""
    return count * 8 / (mbit_per_s * 1e6)


def test_those_over_the_limit_wait_in_line_and_can_leave_it(hosts: list[LabHost], client: LanClient) -> None:
    host = hosts[0]
    before = disks_of(host, "web")

    def begin(vm: str) -> str:
        request = api.DiskMoveRequest(vm=vm, location="fast", bandwidth_mbit_per_s=SLOWLY)
        return host.client.call(endpoints.MOVE_DISKS, request).id

    def place(migration: str) -> int | None:
        return host.client.call(endpoints.SHOW_MIGRATION, migration=migration).place

    with beside(host, "one", "two"), settings(host, {"max_storage_moves": 1}):
        first = begin("one")
        follow(host, first, copying)
        ids = [begin("web"), begin("two")]
        assert [place(each) for each in (first, *ids)] == [None, 1, 2]
        shown = limosa(host, "migration", "show", "web")
        assert "waiting, place 1, waits for other moves of disks on this host" in shown.out
        said = limosa(host, "migration", "cancel", "web", "--json")
        assert (said.code, said.object["outcome"], said.object["total_s"]) == (0, "cancelled", 0)
        assert [place(each) for each in (first, ids[1])] == [None, 1]
        assert disks_of(host, "web") == before
        assert len(images(host)) == len(before) + 3, "only the first has begun"
        goes_on(client)
        host.client.call(endpoints.CANCEL_MIGRATION, migration=first)
        follow(host, ids[1], copying)
        host.client.call(endpoints.LIMIT_MIGRATION, api.LimitRequest(bandwidth_mbit_per_s=0), migration=ids[1])
        assert host.outcome(ids[1]).outcome is Outcome.COMPLETED
        assert [path.parent.name for vm in ("one", "two") for path in disks_of(host, vm)] == ["images", "fast"]
    assert_keeps(host, "web", number(client))
    assert images(host) == before
    assert_no_copies(host, disks=2)
    goes_on(client)


def test_one_act_at_a_time_and_the_next_daemon_undoes_it(hosts: list[LabHost], client: LanClient) -> None:
    host = hosts[0]
    before = disks_of(host, "web")
    request = api.DiskMoveRequest(vm="web", location="fast", bandwidth_mbit_per_s=SLOWLY)
    begun = host.client.call(endpoints.MOVE_DISKS, request)
    follow(host, begun.id, copying)
    limosa(host, "vm", "stop", "web")
    assert host.show("web").migration == begun.id, "one act at a time"
    host.restart({})
    wait_until(lambda: host.show("web").migration is None, "the next daemon has undone it")
    assert host.client.call(endpoints.SHOW_MIGRATION, migration=begun.id).outcome is Outcome.FAILED
    assert disks_of(host, "web") == images(host) == before
    assert_keeps(host, "web", number(client))
