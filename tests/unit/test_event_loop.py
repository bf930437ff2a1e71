"""A daemon's event loop never works with an image: with its share dead, everything would wait.

The daemons of the end-to-end tests are kept from that, too.
"""

from __future__ import annotations

import asyncio
import dataclasses
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
import test_host_layers
import test_host_storage
import test_own_disks
from test_host_storage import MIB, TAG, plan
from test_preflight import VM

from harness.shares import WAITS_S, Share
from limosa.background import apart
from limosa.errors import Conflict, InvalidInput, LimosaError, QemuError, StorageError
from limosa.host.launching import Launcher
from limosa.host.layers import Layers
from limosa.host.leftovers import Leftovers
from limosa.host.own_disks import OwnDisks
from limosa.host.parts import Parts
from limosa.host.storage import Storage
from limosa.model.storage import BackingFile, ImageSought, LayerPlan
from limosa.model.vm import Disk
from limosa.qemu.arguments import Launch
from limosa.qemu.machine import Machine
from limosa.storage import images
from limosa.storage.marks import Mark
from limosa.storage.stores import Folder
from limosa.wire.api import NewDisk, NewVm

storage = test_host_storage.storage


@pytest.fixture
def share(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> Share:
    """Where location ``fast`` lies."""
    return Share(storage.places.path("fast"), monkeypatch)


def qcow2(share: Share, name: str = "web1.qcow2") -> Path:
    path = share.folder / name
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), "8M"], check=True)
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write 0 64k", str(path)], check=True, capture_output=True)
    return path


async def refused(work: Awaitable[object], *errors: type[LimosaError]) -> None:
    with pytest.raises(errors):
        await work


def parts(storage: Storage) -> Parts:
    """Those of a host without VMs."""
    some = test_host_storage.TestWhatASourceMayName().incoming(storage)._parts
    vms = SimpleNamespace(all=list, damaged={})
    return dataclasses.replace(some, vms=cast(Any, vms), neighbours=test_own_disks.Neighbourhood())


Act = Callable[[Storage, Share], Awaitable[object]]


async def formats(_: Storage, share: Share) -> None:
    image = share.folder / "web1.qcow2"
    assert await images.detect_format(image) == "qcow2"
    await refused(images.detect_format(share.folder / "none.raw"), StorageError)
    await refused(images.detect_format(share.folder / "some.raw"), InvalidInput)
    assert await images.data_bytes(image, "qcow2") < MIB


async def new_images(_: Storage, share: Share) -> None:
    folder, mark = Folder(str(share.folder)), Mark(host="host1", at=1.0)
    for image_format in ("qcow2", "raw"):
        path = str(share.folder / f"new.{image_format}")
        await folder.create(path, image_format, MIB, mark=mark)
        await refused(folder.create(path, image_format, MIB), StorageError)
    await refused(folder.create(str(share.folder / "huge.qcow2"), "qcow2", 2**62, mark=mark), StorageError)


async def images_of_moves(storage: Storage, share: Share) -> None:
    image = plan(storage)
    await storage.make(image)
    await refused(storage.make(image), StorageError)
    await storage.finish([image.path])
    (fact,) = await storage.facts([Disk(name="vda", path=str(share.folder / "web1.qcow2"), format="qcow2")])
    assert fact.virtual_bytes == 8 * MIB
    assert await storage.remove(image.path) == ""


async def layers_of_moves(storage: Storage, share: Share) -> None:
    layers = Layers(storage, cast(Any, test_host_layers.FakeVms()), storage._files.migrations)
    file = BackingFile(path=str(share.folder / f"golden.{TAG}-1.raw"), format="raw", size=512, digest="d")
    await storage.make_layer(LayerPlan(origin="/vm/golden.raw", file=file, location="fast"), "host1")
    await layers.find(file)
    await layers.finish([file, msgspec.structs.replace(file, path=f"{file.path}.none")])
    await layers.give_up([file], TAG)


async def a_landing(storage: Storage, _: Share) -> None:
    there, image = test_host_storage.TestWhatASourceMayName(), plan(storage)
    await there.incoming(storage).begin(there.request(image), "host1", "10.0.0.2")
    await storage.make(image)
    await refused(there.incoming(storage).begin(there.request(image), "host1", "10.0.0.2"), Conflict)


async def an_image_that_a_vm_leaves(storage: Storage, share: Share) -> None:
    hosted = SimpleNamespace(config=VM, machine=None)
    own = OwnDisks(parts(storage), cast(Any, hosted))
    (fact,) = await own.facts([Disk(name="vda", path=str(share.folder / "web1.qcow2"), format="qcow2")])
    assert fact.needed == ""
    assert await own.leave([fact.path], keep=True) == ()
    assert await own.leave([fact.path]) == ()


async def leftovers(storage: Storage, share: Share) -> None:
    await storage.make(plan(storage))
    (found,) = (one for one in await Leftovers(parts(storage)).look() if one.migration)
    assert found.doubts == ()
    report = await Leftovers(parts(storage)).clean([found.path])
    assert [one.path for one in report.removed] == [found.path]
    await Leftovers(parts(storage)).uses([ImageSought(migration=TAG, location="fast", name="web1.qcow2", share="")])


async def a_new_vm(storage: Storage, share: Share) -> None:
    launcher = object.__new__(Launcher)
    launcher._files, launcher._page, launcher.user, launcher._own = storage._files, storage._page, None, ()
    for disk in (
        NewDisk(path=str(share.folder / "web1.qcow2")),
        NewDisk(path=str(share.folder / "made.qcow2"), size_mib=1),
    ):
        new = NewVm(name="web1", memory_mib=32, disks=(disk,))
        config = msgspec.structs.replace(VM, disks=(await launcher._pin_disk(disk, "vda"),))
        async with launcher.new_disks(new, config):
            pass
        await launcher.claim_images(config)


async def a_start(storage: Storage, share: Share) -> None:
    disk = Disk(name="vda", path=str(share.folder / "web1.qcow2"), format="qcow2")
    folder = storage._files.state

    def make(qmp: int, console: int) -> Launch:
        return Launch(
            config=msgspec.structs.replace(VM, disks=(disk,), nics=()),
            accelerator="tcg",
            incoming=False,
            tap_fds=(),
            qmp_fd=qmp,
            console_fd=console,
            console_log=folder / "console",
            vnc_socket=folder / "vnc",
            firmware_code=None,
            firmware_vars=None,
            seed=None,
        )

    await refused(Machine.launch(Path("/bin/false"), make, folder / "run", folder / "log", None), QemuError)


@pytest.mark.parametrize(
    "act",
    [
        formats,
        new_images,
        images_of_moves,
        layers_of_moves,
        a_landing,
        an_image_that_a_vm_leaves,
        leftovers,
        a_new_vm,
        a_start,
    ],
    ids=lambda act: act.__name__,
)
def test_it_works_with_no_image(storage: Storage, share: Share, act: Act) -> None:
    qcow2(share)
    qcow2(share, "some.raw")
    asyncio.run(cast(Any, act(storage, share)))


async def cancelled_while_dead(share: Share, image: Path) -> None:
    """The making of an image is cancelled while its share is dead."""
    share.die()
    making = asyncio.ensure_future(images.create(image, "raw", MIB))
    assert await apart(share.waiting.acquire, timeout=WAITS_S)
    making.cancel()
    share.answer()
    with pytest.raises(asyncio.CancelledError):
        await making


class TestWhoIsCancelled:
    """While an image is made: nothing is left."""

    def test_where_it_is_to_be_the_share_is_dead(self, share: Share) -> None:
        asyncio.run(cancelled_while_dead(share, share.folder / "new.raw"))
        assert list(share.folder.iterdir()) == []

    def test_qemu_img_does_not_end(self, share: Share, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        program = tmp_path / "qemu-img"
        program.write_text("#!/bin/sh\ntouch $(dirname $0)/begun\nexec sleep 60\n")
        program.chmod(0o755)
        monkeypatch.setattr(images, "_QEMU_IMG", str(program))
        mark = Mark(host="host1", at=1.0)

        async def scenario() -> None:
            folder = Folder(str(share.folder))
            making = asyncio.ensure_future(folder.create(str(share.folder / "new.raw"), "raw", MIB, mark=mark))
            while not (tmp_path / "begun").exists():  # noqa: ASYNC110 - a program says so
                await asyncio.sleep(0.01)
            making.cancel()
            with pytest.raises(asyncio.CancelledError):
                await making

        asyncio.run(scenario())
        assert list(share.folder.iterdir()) == []


def test_an_image_that_is_somebodys_stays_when_its_making_is_cancelled(share: Share) -> None:
    image = share.folder / "web1.raw"
    image.write_bytes(b"precious")

    asyncio.run(cancelled_while_dead(share, image))
    assert image.read_bytes() == b"precious"
