"""A guest with an ext4 file system, in which it writes files all the time: its disk moves, or cannot be read, and the
file system is sound and has every file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from harness.commands import limosa
from harness.crashes import disks_of
from harness.disks import goes_on, number
from harness.files import assert_keeps_files, keeping_files, unreadable, unreadable_image
from harness.guests import LanClient, console_log
from harness.images import add_location, images
from harness.labs import LabHost, running_lab
from harness.qmp import assert_no_copies
from harness.steering import move, settings
from limosa.wire import api

pytestmark = [pytest.mark.qemu, pytest.mark.lab]

#: A copy takes a second or two, in Mbit/s, and is faster than the guest writes.
SLOWLY = "96"


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[LabHost]]:
    with running_lab() as made:
        add_location(made[0], "fast")
        yield made


@pytest.fixture(scope="module")
def broken(hosts: list[LabHost]) -> Path:
    """An image with a spot that can be made unreadable."""
    return unreadable_image(hosts[0].state / "images" / "broken.qcow2")


@pytest.fixture(scope="module")
def client(hosts: list[LabHost], broken: Path) -> LanClient:
    """A client of a guest ``web`` on the first host, whose second disk is that image."""
    return keeping_files(hosts[0], api.NewDisk(path=str(broken), format="qcow2"))


@contextmanager
def writing(client: LanClient) -> Iterator[None]:
    """During the block the guest writes files."""
    before = number(client)
    yield
    assert number(client) > before + 2


def assert_sound(host: LabHost, client: LanClient) -> None:
    """The guest goes on, finds every file as it was, and so does who looks at its disk from outside."""
    goes_on(client)
    assert_keeps_files(host, "web", number(client))
    assert "LIMOSA LOST" not in console_log(host, "web")
    goes_on(client)


def test_a_source_that_cannot_be_read(hosts: list[LabHost], client: LanClient, broken: Path) -> None:
    """Neither kind of move ends; it says why, and everything is as it was."""
    host, other = hosts
    before = disks_of(host, "web")
    with unreadable(broken):
        for words in (("move", "web", "--to", other.name), ("storage", "move", "web", "--to", "fast")):
            said = limosa(host, *words, "--json")
            assert said.object["outcome"] == "failed"
            # By whether the copy fails while it begins or afterwards.
            assert said.object["fault"]["code"] in ("storage-error", "migration-failed")
            assert "disk vdb could not be copied" in said.object["fault"]["what"]
            assert said.object["fault"]["why"] == "Input/output error"
            assert_sound(host, client)
            assert disks_of(host, "web") == before
            assert images(host) == sorted(before)
            assert_no_copies(host, disks=2)
            other.wait_until_bare()
            assert images(other) == []


def test_it_moves_to_another_location_and_back(hosts: list[LabHost], client: LanClient) -> None:
    host = hosts[0]
    for location, image_format in (("fast", "qcow2"), ("images", "raw")):
        words = ("--to", location, "--format", image_format, "--bandwidth", SLOWLY)
        with writing(client):
            said = limosa(host, "storage", "move", "web", *words, "--json")
        assert said.object["outcome"] == "completed"
        assert {path.parent.name for path in disks_of(host, "web")} == {location}
        assert_sound(host, client)


def test_it_moves_to_another_host_and_back(hosts: list[LabHost], client: LanClient) -> None:
    for source, destination in (hosts, hosts[::-1]):
        with settings(source, {"storage_bandwidth_mbit_per_s": int(SLOWLY)}), writing(client):
            moved = move(source, "web", destination)
        disk = moved.progress.disks[0]
        assert 0 < (disk.sent_bytes or 0) < disk.copied_bytes / 2, "holes are not sent"
        assert_sound(destination, client)
        assert images(source) == []
