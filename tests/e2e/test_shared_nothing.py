"""A VM moves between hosts that share no storage, and its disks on a host: nothing it was told is written is lost."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from harness.commands import limosa
from harness.crashes import disks_of, images
from harness.disks import assert_sound, goes_on, number, raw_copy
from harness.guests import LanClient, address_of, linux, wait_until_it_serves
from harness.hosts import wait_until
from harness.labs import LabHost, running_lab
from harness.steering import move, remove
from limosa.model.migration import Migration, Outcome, Phase
from limosa.settings.host import Transport
from limosa.wire import api, endpoints

pytestmark = [pytest.mark.qemu, pytest.mark.lab]

SIZE_MIB = 256


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[LabHost]]:
    with running_lab(nics=2, speed_mbit_per_s=1000) as made:
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


@pytest.mark.parametrize("transport", ["tcp", "multichannel", "compression"])
def test_the_disk_goes_along_there_and_back(hosts: list[LabHost], client: LanClient, transport: Transport) -> None:
    with client.talking() as conversation:
        for source, destination in ((hosts[0], hosts[1]), (hosts[1], hosts[0])):
            ended = move_over(transport, source, destination)
            assert ended.outcome is Outcome.COMPLETED, ended.fault
            assert ended.transport == transport
            assert ended.phases[Phase.STORAGE] > 0
            assert ended.route is not None
            assert (ended.route.compressed is not None) is (transport == "compression")
            assert any(path.connections and path.sent_bytes for path in ended.route.paths)
            goes_on(client)
            assert images(destination) == disks_of(destination, "web")
            assert images(source) == [], "what the VM has left is gone"
    assert conversation.faults == []


def move_over(transport: Transport, source: LabHost, destination: LabHost) -> Migration:
    options = api.MoveOptions(transport=transport)
    request = api.MoveRequest(vm="web", destination=destination.name, options=options)
    return source.outcome(source.client.call(endpoints.MOVE, request).id)


def test_nothing_is_lost(hosts: list[LabHost], client: LanClient) -> None:
    """Both ways and then the image as it is on the disk, without the guest having been asked to flush."""
    move(hosts[0], "web", hosts[1])
    last = number(client)
    image = disks_of(hosts[1], "web")[0]
    hosts[1].client.call(endpoints.STOP_VM, vm="web")
    assert_sound(image, last)
    hosts[1].client.call(endpoints.START_VM, vm="web")
    wait_until_it_serves(client)
    move(hosts[1], "web", hosts[0])


class TestOverlay:
    """A disk above a golden image."""

    @pytest.fixture
    def overlay(self, hosts: list[LabHost]) -> Iterator[str]:
        """A VM ``thin`` whose disk has a little of its own above 32 MiB that each host has in a location."""
        for host in hosts:
            golden = host.state / "images" / "golden.raw"
            golden.write_bytes(GOLDEN)
            golden.chmod(0o644)
        top = hosts[0].state / "images" / "thin.qcow2"
        run("qemu-img", "create", "-q", "-f", "qcow2", "-b", str(top.with_name("golden.raw")), "-F", "raw", str(top))
        run("qemu-io", "-f", "qcow2", "-c", "write -P 7 1M 64k", str(top))
        hosts[0].create(api.NewVm(name="thin", memory_mib=32, accelerator="tcg", disks=(api.NewDisk(path=str(top)),)))
        yield "thin"
        for host in hosts:
            if host.vm("thin") is not None:
                disks_of(host, "thin")[0].unlink()
                remove(host, "thin")
            (host.state / "images" / "golden.raw").unlink()

    def test_what_the_destination_has_is_not_sent(self, hosts: list[LabHost], overlay: str) -> None:
        assert planned(hosts[0], overlay)["action"] == "copy-overlay"
        moved = move(hosts[0], overlay, hosts[1])
        assert moved.disks[0].expected_bytes < 1024 * 1024
        image = disks_of(hosts[1], overlay)[0]
        info = json.loads(subprocess.check_output(["qemu-img", "info", "-U", "--output=json", str(image)]))
        assert info["full-backing-filename"] == str(hosts[1].state / "images" / "golden.raw")
        assert seen_by_guest(hosts[1], overlay) == expected()

    def test_another_file_of_that_name_is_not_taken_for_it(self, hosts: list[LabHost], overlay: str) -> None:
        other = hosts[1].state / "images" / "golden.raw"
        other.write_bytes(GOLDEN[:-1] + b"x")
        moved = move(hosts[0], overlay, hosts[1])
        (layer,) = moved.layers
        assert layer.file.path != str(other)
        assert seen_by_guest(hosts[1], overlay) == expected()
        Path(layer.file.path).unlink()

    def test_it_goes_in_one_piece_if_that_is_wanted(self, hosts: list[LabHost], overlay: str) -> None:
        assert planned(hosts[0], overlay, "--chain", "flatten")["action"] == "copy"


class TestDiskThatIsOnlyRead:
    """An image of a CD-ROM that only one host has."""

    @pytest.fixture
    def cd(self, hosts: list[LabHost]) -> Iterator[str]:
        """A VM ``cd`` on the first host with nothing else."""
        path = hosts[0].state / "images" / "cd.iso"
        path.write_bytes(GOLDEN)
        path.chmod(0o644)
        disk = api.NewDisk(path=str(path), format="raw", read_only=True)
        hosts[0].create(api.NewVm(name="cd", memory_mib=32, accelerator="tcg", disks=(disk,)))
        yield "cd"
        for host in hosts:
            if host.vm("cd") is not None:
                remove(host, "cd")
        path.unlink()

    @pytest.mark.parametrize("transport", ["tcp", "compression"])
    def test_it_is_sent_and_found_on_the_way_back(self, hosts: list[LabHost], cd: str, transport: Transport) -> None:
        (here,) = disks_of(hosts[0], cd)
        said = limosa(hosts[0], "check", cd, "--to", "host2")
        assert said.code == 0
        assert "read-only, sent as" in said.out
        options = api.MoveOptions(transport=transport)
        for source, destination in ((hosts[0], hosts[1]), (hosts[1], hosts[0])):
            request = api.MoveRequest(vm=cd, destination=destination.name, options=options)
            ended = source.outcome(source.client.call(endpoints.MOVE, request).id)
            assert ended.outcome is Outcome.COMPLETED, ended.fault
            (path,) = disks_of(destination, cd)
            assert path.read_bytes() == GOLDEN
            assert len(ended.layers) == (destination is hosts[1])
            if destination is hosts[1]:
                there = path
        assert disks_of(hosts[0], cd) == [here]
        there.unlink()


GOLDEN = bytes(range(1, 256)) * (32 * 1024 * 1024 // 255) + bytes(32 * 1024 * 1024 % 255)


def expected() -> bytes:
    """What the guest's disk holds: the golden image with a little of its own."""
    return GOLDEN[: 1 << 20] + b"\7" * 65536 + GOLDEN[(1 << 20) + 65536 :]


def seen_by_guest(host: LabHost, vm: str) -> bytes:
    image = disks_of(host, vm)[0]
    host.client.call(endpoints.STOP_VM, vm=vm)
    copy = raw_copy(image)
    try:
        return copy.read_bytes()
    finally:
        copy.unlink()
        host.client.call(endpoints.START_VM, vm=vm)


def planned(host: LabHost, vm: str, *words: str) -> dict[str, Any]:
    """The plan for the VM's one disk."""
    said = limosa(host, "check", vm, "--to", "host2", *words, "--json")
    assert said.code == 0, said.error
    (plan,) = said.object["disks"]
    return dict(plan)


def run(*command: str) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
