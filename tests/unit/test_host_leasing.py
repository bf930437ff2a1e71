"""Which images of VMs have leases, and when they are taken."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest
from test_preflight import VM

from limosa.errors import Conflict, ImageLeased
from limosa.host.leasing import Leasing
from limosa.model.vm import Disk, VmConfig
from limosa.storage import leases, mounts
from limosa.storage.mounts import Mount

MOVE = "aaaaaaaaaaaa"


@pytest.fixture
def image(tmp_path: Path) -> str:
    path = tmp_path / "web1.qcow2"
    path.touch()
    return str(path)


def using(image: str) -> VmConfig:
    return msgspec.structs.replace(VM, disks=(Disk(name="vda", path=image, format="qcow2"),))


def host(name: str, *, shared: bool, machine: str = "first") -> Leasing:
    return Leasing(name, "boot", machine, lambda _: shared)


def holder(image: str) -> str:
    return leases.read(image).host


@pytest.mark.parametrize(
    ("shared", "mount", "held"),
    [
        (True, Mount("ext4", "/dev/sda1"), True),
        (False, Mount("ext4", "/dev/sda1"), False),
        (True, Mount("nfs4", "server:/vms"), False),
        (False, Mount("cifs", "//server/vms"), True),
        (False, Mount("fuse.sshfs", "server:/vms"), True),
        (True, Mount("9p", "vms"), True),
    ],
)
def test_where_a_vm_that_starts_takes_one(
    image: str, monkeypatch: pytest.MonkeyPatch, shared: bool, mount: Mount, held: bool
) -> None:
    monkeypatch.setattr(mounts, "of", lambda _: mount)
    asyncio.run(host("server", shared=shared).take(using(image)))
    assert bool(holder(image)) is held


def test_who_has_it_by_smb_finds_the_server_s(image: str, monkeypatch: pytest.MonkeyPatch) -> None:
    server = host("server", shared=True)
    asyncio.run(server.take(using(image)))
    with monkeypatch.context() as there:
        there.setattr(mounts, "of", lambda _: Mount("cifs", "//server/vms"))
        with pytest.raises(ImageLeased):
            asyncio.run(host("client", shared=True).take(using(image)))
    asyncio.run(server.give_back(using(image)))
    assert holder(image) == ""


@pytest.mark.parametrize("mount", [Mount("ext4", "/dev/sda1"), Mount("fuse.sshfs", "server:/vms")])
def test_a_vm_that_runs_without_one_moves_without_one(
    image: str, monkeypatch: pytest.MonkeyPatch, mount: Mount
) -> None:
    """Its location has been called shared since it was started, or it was started by an earlier version."""
    monkeypatch.setattr(mounts, "of", lambda _: mount)

    async def scenario() -> None:
        server, client = host("server", shared=True), host("client", shared=True)
        assert await server.conflicts(using(image), MOVE) == ()
        await server.promise(using(image), "client", MOVE, ())
        landing = client.landing(using(image), "server", MOVE, ())
        await landing.prepare()
        await landing.claim()

    asyncio.run(scenario())
    assert not leases.folder_of(image).exists()


def test_where_locks_may_not_reach_the_other_host_it_goes_with_the_vm(
    image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mounts, "of", lambda _: Mount("fuse.sshfs", "server:/vms"))

    async def scenario() -> None:
        one, other = host("one", shared=True), host("other", shared=True, machine="second")
        await one.take(using(image))
        with pytest.raises(ImageLeased):
            await other.take(using(image))
        await one.promise(using(image), "other", MOVE, ())
        landing = other.landing(using(image), "one", MOVE, ())
        await landing.prepare()
        await landing.claim()
        await landing.settle()

    asyncio.run(scenario())
    assert holder(image) == "other"


def test_a_new_image_of_a_vm_that_lands_has_one(image: str) -> None:
    asyncio.run(host("server", shared=True).landing(using(image), "client", MOVE, (image,)).prepare())
    assert holder(image) == "server"


def test_a_person_releases_that_of_another_machine_of_our_name(image: str) -> None:
    asyncio.run(host("server", shared=True).take(using(image)))
    with pytest.raises(Conflict, match="it is this one"):
        asyncio.run(host("server", shared=True).release(image, "server"))
    asyncio.run(host("server", shared=True, machine="second").release(image, "server"))
    assert holder(image) == ""
