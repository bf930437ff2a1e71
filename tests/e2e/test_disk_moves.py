"""Disks of a running guest move between locations of its host: in every form, cancelled, and between other moves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness.commands import Said, limosa
from harness.crashes import disks_of
from harness.disks import assert_keeps, goes_on, number
from harness.guests import LanClient
from harness.hosts import wait_until
from harness.images import MIB, SIZE_MIB, add_location, images, numbering
from harness.labs import LabHost, running_lab
from harness.qmp import assert_no_copies
from harness.steering import follow, move
from limosa.model.migration import Migration, Outcome, Phase
from limosa.wire import api, endpoints

pytestmark = [pytest.mark.qemu, pytest.mark.lab]

#: The copy of the disk would take minutes.
SLOWLY = 4


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
