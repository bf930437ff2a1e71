"""A VM moves between hosts that share no storage, and its disks on a host: nothing it was told is written is lost."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest

from harness.crashes import disks_of, images
from harness.disks import assert_sound
from harness.guests import LanClient, address_of, linux, wait_until_it_serves
from harness.hosts import wait_until
from harness.labs import LabHost, running_lab
from harness.steering import move
from limosa.model.migration import Outcome, Phase
from limosa.wire import api, endpoints

pytestmark = [pytest.mark.qemu, pytest.mark.lab]

SIZE_MIB = 256


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[LabHost]]:
    with running_lab() as made:
        yield made


@pytest.fixture(scope="module")
def client(hosts: list[LabHost]) -> LanClient:
    """A client of a guest ``web`` on the first host, which writes numbers on a disk only that host sees."""
    path = hosts[0].state / "images" / "web.qcow2"
    disk = api.NewDisk(path=str(path), size_mib=SIZE_MIB)
    hosts[0].create(msgspec.structs.replace(linux("web", load={"disk": "vda"}), disks=(disk,)))
    client = LanClient(hosts[0].lab, address_of(1))
    wait_until_it_serves(client)
    wait_until(lambda: number(client) > 3, "the guest numbers its disk")
    return client


def number(client: LanClient) -> int:
    return int(client.facts()["number"])


def test_the_disk_goes_along_there_and_back(hosts: list[LabHost], client: LanClient) -> None:
    with client.talking() as conversation:
        for source, destination in ((hosts[0], hosts[1]), (hosts[1], hosts[0])):
            ended = move(source, "web", destination)
            assert ended.outcome is Outcome.COMPLETED
            assert ended.phases[Phase.STORAGE] > 0
            before = number(client)
            wait_until(lambda before=before: number(client) > before + 3, "the guest goes on numbering")
            assert images(destination) == disks_of(destination, "web")
            assert images(source) == [], "what the VM has left is gone"
    assert conversation.faults == []


def test_nothing_is_lost(hosts: list[LabHost], client: LanClient) -> None:
    """Both ways and then the image as it is on the disk, without the guest having been asked to flush."""
    move(hosts[0], "web", hosts[1])
    last = number(client)
    (image,) = disks_of(hosts[1], "web")
    hosts[1].client.call(endpoints.STOP_VM, vm="web")
    assert_sound(image, last)
    hosts[1].client.call(endpoints.START_VM, vm="web")
    wait_until_it_serves(client)
    move(hosts[1], "web", hosts[0])
