"""Images that a VM leaves: who else needs them, and that those stay."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import AsyncMock

import msgspec
import pytest
from test_cli_storage import VIEW
from test_disks import FACT
from test_host_storage import storage
from test_preflight import VM

from harness.landings import header
from harness.lvm import EXTENT, GROUP, FakeLvm
from harness.shares import Share
from limosa.host import claims
from limosa.host.claims import Claims
from limosa.host.disk_moves import _Move
from limosa.host.leasing import Leasing
from limosa.host.looks import Looks, Walks
from limosa.host.neighbours import Answers, Neighbours
from limosa.host.own_disks import OwnDisks
from limosa.host.parts import Parts
from limosa.host.storage import Storage
from limosa.migration import disks
from limosa.migration.journal import Journal
from limosa.migration.ownership import DestinationStep
from limosa.migration.report import Report
from limosa.model.migration import Side
from limosa.model.storage import ImageUse
from limosa.model.vm import Disk, VmConfig
from limosa.storage import layers, leases, lvm, marks, mounts
from limosa.wire.api import ImagesSought, ImageUses

__all__ = ["storage"]

OTHER = msgspec.structs.replace(VM, name="other", uuid="8b0b7d3c-57b8-4f5c-9d5e-2d2f3f1e2a10")


class Neighbourhood(Neighbours):
    """Hosts that say this, by name; a string is why one says nothing."""

    def __init__(self) -> None:
        self.hosts: Mapping[str, ImageUse | str] = {}
        self.asked: list[ImagesSought] = []

    async def ask(self, endpoint: Any, request: Any = None) -> Answers[Any]:
        self.asked.append(request)
        given = {host: said for host, said in self.hosts.items() if isinstance(said, ImageUse)}
        silent = {host: said for host, said in self.hosts.items() if isinstance(said, str)}
        return Answers({host: ImageUses(uses=(use,) * len(request.images)) for host, use in given.items()}, silent)


class World:
    """A host with a VM whose disk lies in location ``fast``."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.image = storage.places.path("fast") / "web1.raw"
        self.image.write_bytes(bytes(65536))
        self.hosted = SimpleNamespace(config=self.with_disk(VM, self.image), machine=None)
        self.all = [self.hosted]
        self.vms = SimpleNamespace(all=lambda: self.all, damaged={})
        self.neighbours = Neighbourhood()
        nobody = cast(Any, None)
        self.parts = Parts(
            name="host2",
            boot="boot",
            files=storage._files,
            page=storage._page,
            vms=cast(Any, self.vms),
            storage=storage,
            leasing=Leasing("host2", "boot", "machine", lambda _: False),
            inspector=nobody,
            multichannel=nobody,
            relays=nobody,
            neighbours=self.neighbours,
        )

    @staticmethod
    def with_disk(config: VmConfig, image: Path, **how: Any) -> VmConfig:
        disk = Disk(name="vda", path=str(image), format="raw" if image.suffix == ".raw" else "qcow2", **how)
        return msgspec.structs.replace(config, disks=(disk,))

    def run(self) -> None:
        self.hosted.machine = object()

    def needed(self) -> str:
        """What a move is told before it begins."""
        (fact,) = asyncio.run(OwnDisks(self.parts, cast(Any, self.hosted)).facts(self.hosted.config.disks))
        return fact.needed

    def leave(self, **how: Any) -> bool:
        """The VM has left its image; returns whether that has gone. Of what is to go and does not it is told."""
        self.told = asyncio.run(OwnDisks(self.parts, cast(Any, self.hosted)).leave([str(self.image)], **how))
        stays = self.image.exists()
        assert [one.code for one in self.told] == ["image-left"] * (stays and "keep" not in how)
        return not stays

    def overlay(self) -> Path:
        path = self.image.with_name("child.qcow2")
        command = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(self.image), "-F", "raw", str(path)]
        subprocess.run(command, check=True)
        return path


@pytest.fixture
def world(storage: Storage) -> World:
    return World(storage)


@pytest.fixture(params=["stopped", "running"])
def either(request: pytest.FixtureRequest, world: World) -> World:
    if request.param == "running":
        world.run()
    return world


def test_what_nobody_needs_is_deleted(either: World) -> None:
    assert either.needed() == ""
    assert either.leave()
    assert either.neighbours.asked == [], "nobody else sees it"


def test_who_leaves_nothing_asks_nobody(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Claims, "look")
    asyncio.run(OwnDisks(world.parts, cast(Any, world.hosted)).leave([]))


def test_what_is_to_be_kept_stays(either: World) -> None:
    assert not either.leave(keep=True)


def test_what_cannot_be_deleted_is_told_of_and_nobody_has_a_lease_on_it(
    either: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = leases.Rule(str(either.image), "host2", "boot", VM.uuid, "machine")
    leases.change(str(either.image), rule.take)

    def broken(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as then:
        then.setattr(Path, "unlink", broken)
        assert not either.leave()
    (told,) = either.told
    assert told.what == (
        f"{either.image}, which the VM has left, was not deleted: cannot delete {either.image}: Input/output error"
    )
    assert leases.read(str(either.image)).host == ""


def test_a_move_of_disks_says_what_it_could_not_delete(world: World) -> None:
    """Everything else of it is tested with a QEMU."""
    world.hosted.machine = SimpleNamespace(gone=asyncio.Event())
    before = disks.against_copying(msgspec.structs.replace(FACT, bitmaps=1))
    left = disks.not_deleted("/srv/web1.raw", "it is broken")
    moves = SimpleNamespace(make_images=AsyncMock(), finish=AsyncMock(), remove_old=AsyncMock(return_value=(left,)))

    class Copied(_Move):
        _copy = _settle = _put_to_use = AsyncMock()

    async def scenario() -> None:
        first = msgspec.structs.replace(VIEW, findings=tuple(before))
        report = Report(first, lambda _: None)
        record = SimpleNamespace(vm="web1", old={})
        await Copied(cast(Any, moves), cast(Any, world.hosted), cast(Any, record), report, 0).run()
        assert report.now.findings == (*before, left)

    asyncio.run(scenario())


def test_what_another_vm_names_stays(either: World) -> None:
    either.all.append(SimpleNamespace(config=World.with_disk(OTHER, either.image), machine=None))
    assert either.needed() == "VM 'other' uses it"
    assert not either.leave()
    del either.all[1]
    assert either.leave()


def test_what_lies_below_a_clone_stays(either: World) -> None:
    clone = either.overlay()
    assert either.needed() == f"it is the backing file of {clone}"
    assert not either.leave()


@pytest.mark.parametrize("where", ["{}/deep/below", "{}/../beside"])
def test_what_lies_below_a_clone_in_another_folder_of_its_location_stays(
    either: World, tmp_path: Path, where: str
) -> None:
    """The clone knows it by an absolute path, or by a relative one."""
    asyncio.run(either.storage._page.change({"locations.fast": {"path": str(tmp_path)}}))
    folder = Path(os.path.normpath(where.format(either.image.parent)))
    folder.mkdir(parents=True)
    clone = either.overlay().rename(folder / "clone.qcow2")
    assert either.needed() == f"it is the backing file of {clone}"
    assert not either.leave()
    below = os.path.relpath(either.image, folder)
    subprocess.run(["qemu-img", "rebase", "-q", "-u", "-f", "qcow2", "-b", below, "-F", "raw", str(clone)], check=True)
    assert not either.leave()
    clone.unlink()
    assert either.leave()


class TestAnImageInNoLocation:
    """As the README has it."""

    @pytest.fixture
    def either(self, either: World, tmp_path: Path) -> World:
        folder = tmp_path / "srv"
        folder.mkdir()
        either.image = either.image.rename(folder / "template.raw")
        either.hosted.config = World.with_disk(VM, either.image)
        return either

    @pytest.mark.parametrize("folder", [".", "below"])
    def test_it_stays_below_a_clone(self, either: World, folder: str) -> None:
        (either.image.parent / folder).mkdir(exist_ok=True)
        clone = either.overlay().rename(either.image.parent / folder / "clone.qcow2")
        assert either.needed() == f"it is the backing file of {clone}"
        assert not either.leave()
        clone.unlink()
        assert either.leave()

    def test_it_stays_below_a_clone_beside_a_link_to_it(self, either: World, tmp_path: Path) -> None:
        clone = either.overlay()
        link = tmp_path / "links" / "template.raw"
        link.parent.mkdir()
        link.symlink_to(either.image)
        either.hosted.config = World.with_disk(VM, link)
        assert either.needed() == f"it is the backing file of {clone}"
        clone.unlink()
        subprocess.run(
            ["qemu-img", "create", "-q", "-f", "qcow2", "-b", link.name, "-F", "raw", str(link.with_name("child"))],
            check=True,
        )
        assert either.needed() == f"it is the backing file of {link.with_name('child')}"


def test_what_lies_below_a_clone_in_no_location_stays(either: World, tmp_path: Path) -> None:
    clone = either.overlay().rename(tmp_path / "clone.qcow2")
    either.all.append(SimpleNamespace(config=World.with_disk(OTHER, clone), machine=None))
    assert either.needed() == "VM 'other' uses it as a backing file of disk vda"
    assert not either.leave()


def test_what_a_move_is_receiving_lies_above_nothing_yet(either: World, tmp_path: Path) -> None:
    """It says what lay below its original at the source, until all of it is here."""
    journal = Journal.begin(
        either.parts.files.migrations,
        msgspec.structs.replace(header(Side.DESTINATION), migration="abcdefabcdef"),
    )
    journal.record(DestinationStep.RESERVED, 1.0)
    named = layers.name("/srv/installer.qcow2", journal.header.migration, 1, "qcow2")
    arriving = either.image.with_name(named)
    layers.make(arriving, marks.Mark(host="host2", at=1.0))
    original, below = tmp_path / "installer.qcow2", tmp_path / "below.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(below), "1M"], check=True)
    lies_above = ["-b", str(below), "-F", "qcow2", str(original)]
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *lies_above], check=True)
    arriving.write_bytes(original.read_bytes())
    below.unlink()
    either.all.append(SimpleNamespace(config=World.with_disk(OTHER, arriving, read_only=True), machine=None))
    assert either.needed() == ""
    arriving.write_bytes(b"QFI\xfb")
    assert either.needed() == ""
    layers.finish(arriving, "", None)
    assert "the backing file of" in either.needed()
    assert not either.leave()


class TestWhatCannotBeRead:
    """It may lie above any image, or name it."""

    def check(self, world: World, why: str) -> None:
        assert world.needed() == why
        assert not world.leave()

    def test_an_image(self, either: World, monkeypatch: pytest.MonkeyPatch) -> None:
        clone, pread = either.overlay(), os.pread

        def broken(descriptor: int, *where: int) -> bytes:
            if os.path.samestat(os.fstat(descriptor), clone.stat()):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return pread(descriptor, *where)

        monkeypatch.setattr(os, "pread", broken)
        self.check(either, f"the backing file of {clone} is unknown: cannot read {clone}: Input/output error")

    def test_an_image_that_is_damaged(self, either: World) -> None:
        clone = either.overlay()
        with clone.open("r+b") as stream:
            stream.truncate(50)
        self.check(
            either, f"the backing file of {clone} is unknown: {clone} is not a valid qcow2 image: it is cut short"
        )

    def test_a_location(self, either: World) -> None:
        folder = either.storage.places.path("images")
        folder.rmdir()
        self.check(either, f"the contents of {folder} are unknown: No such file or directory")

    def test_a_location_that_does_not_answer(self, either: World) -> None:
        """The move is refused for that reason, with any other, unless the images are to be kept."""

        class Dead(Looks[Any]):
            async def look(self, *_: Any, **__: Any) -> None:
                return None

        either.storage._looks = Dead(0.0)
        self.check(either, "location 'fast' does not answer: so what is stored there is unknown")

    def test_a_folder_in_a_location(self, either: World, monkeypatch: pytest.MonkeyPatch) -> None:
        folder, scandir = either.image.with_name("private"), os.scandir
        folder.mkdir()

        def closed(path: Path) -> Any:
            if path == folder:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return scandir(path)

        monkeypatch.setattr(os, "scandir", closed)
        self.check(either, f"the contents of {folder} are unknown: Permission denied")

    def test_a_location_with_too_much_in_it(self, either: World, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = either.image.with_name("many")
        folder.mkdir()
        for number in range(5):
            (folder / str(number)).touch()
        monkeypatch.setattr(claims, "MOST_FILES", 5)
        self.check(either, f"the contents of {either.image.parent} are unknown: it holds more than 5 files")

    def test_not_looked_into_is_what_is_mounted_there_and_what_a_link_leads_to(
        self, either: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A server may be gone; who keeps images there names it as a location."""
        mounted, lost, linked = (either.image.with_name(name) for name in ("nas", "lost+found", "link"))
        mounted.mkdir()
        lost.mkdir()
        linked.symlink_to("/proc")
        monkeypatch.setattr(mounts, "points", lambda: frozenset({str(mounted)}))
        scandir = os.scandir

        def hangs(path: Path) -> Any:
            assert path not in (mounted, lost, linked)
            return scandir(path)

        monkeypatch.setattr(os, "scandir", hangs)
        assert either.needed() == ""
        asyncio.run(either.storage._page.change({"locations.nas": {"path": str(mounted)}}))
        with pytest.raises(AssertionError):
            either.needed()

    def test_the_file_of_a_vm(self, either: World) -> None:
        either.vms.damaged["other"] = "nonsense"
        self.check(either, "the file of VM 'other' cannot be read: nonsense")

    def test_what_is_certainly_no_image_that_lies_above_others(self, either: World) -> None:
        for name, data in (("empty", b""), ("short", b"QFI"), ("notes.txt", b"text"), ("other.raw", bytes(65536))):
            either.image.with_name(name).write_bytes(data)
        either.image.with_name("folder").mkdir()
        assert either.needed() == ""
        assert either.leave()

    def test_an_image_that_a_move_is_about_to_make_is_above_nothing_yet(self, either: World) -> None:
        coming = either.image.with_name("other-vda.abcdefabcdef.qcow2")
        either.all.append(SimpleNamespace(config=World.with_disk(OTHER, coming), machine=None))
        assert f"cannot read {coming}" in either.needed()
        (either.storage._files.migrations / "abcdefabcdef.disks.json").write_text("{}")
        assert either.needed() == ""
        assert either.leave()


class TestOnAShareThatDoesNotAnswer:
    """In no location; the image that the VM leaves is elsewhere."""

    @pytest.fixture
    def dead(self, either: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Share]:
        either.storage.walks = Walks(1.0)
        share = Share(tmp_path / "dead", monkeypatch)
        share.folder.mkdir()
        share.die()
        yield share
        share.answer()

    @pytest.mark.parametrize("name", ["other.raw", "other.qcow2"])
    def test_another_vm_may_need_the_image(self, either: World, dead: Share, name: str) -> None:
        image = dead.folder / name
        either.all.append(SimpleNamespace(config=World.with_disk(OTHER, image), machine=None))
        assert either.needed() == f"{image} of VM 'other' does not answer: so what is stored there is unknown"
        assert not either.leave()
        either.all.pop()
        assert either.leave()

    def test_what_lies_below_another_vm_s_disk_may_be_the_image(self, either: World, dead: Share) -> None:
        clone, below = either.overlay(), dead.folder / "golden.raw"
        subprocess.run(["qemu-img", "rebase", "-q", "-u", "-f", "qcow2", "-b", below, "-F", "raw", clone], check=True)
        either.all.append(SimpleNamespace(config=World.with_disk(OTHER, clone), machine=None))
        assert either.needed() == f"{below} of VM 'other' does not answer: so what is stored there is unknown"
        assert not either.leave()

    @pytest.mark.parametrize("keep", [False, True])
    def test_an_image_that_itself_does_not_answer_stays_with_its_lease(
        self, either: World, dead: Share, keep: bool
    ) -> None:
        dead.answer()
        either.image = either.image.rename(dead.folder / "web1.raw")
        rule = leases.Rule(str(either.image), "host2", "boot", VM.uuid, "machine")
        leases.change(str(either.image), rule.take)
        dead.die()
        told = asyncio.run(OwnDisks(either.parts, cast(Any, either.hosted)).leave([str(either.image)], keep=keep))
        assert [one.code for one in told] == ["image-left"] * (not keep)
        dead.answer()
        assert either.image.exists()
        assert leases.read(str(either.image)).host == "host2"


def test_what_a_process_has_open_is_only_its_own_qemu_s_while_it_runs(world: World) -> None:
    with subprocess.Popen(["sleep", "60"], stdin=world.image.open("rb")) as process:
        assert f"process {process.pid} has it open" in world.needed()
        world.run()
        assert world.needed() == ""
        assert not world.leave(), "its QEMU has closed it, so it is somebody else"
        process.kill()


def test_a_volume_with_snapshots_is_needed(either: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeLvm(tmp_path)
    monkeypatch.setattr(lvm, "PROGRAM", str(fake.program))
    asyncio.run(either.storage._page.change({"locations.bulk": {"lvm": GROUP}}))
    lvm.create(GROUP, "", "web1.raw", EXTENT)
    image = Path(f"/dev/{GROUP}/web1.raw")
    either.hosted.config = World.with_disk(VM, image, size_bytes=EXTENT)
    assert either.needed() == ""
    snapshot = {"size": EXTENT, "thin": False, "tags": [], "made": 0, "origin": "web1.raw"}
    fake.change(lvs=fake.volumes | {"before-upgrade": snapshot})
    assert either.needed() == "LVM would remove its snapshots, too"
    own = OwnDisks(either.parts, cast(Any, either.hosted))
    asyncio.run(own.leave([str(image)]))
    assert set(fake.volumes) == {"web1.raw", "before-upgrade"}
    lvm.remove(GROUP, "before-upgrade")
    asyncio.run(own.leave([str(image)]))
    assert fake.volumes == {}


class TestOnSharedStorage:
    """Other hosts may have all of that."""

    @pytest.fixture(autouse=True)
    def _shared(self, storage: Storage) -> None:
        asyncio.run(
            storage._page.change({"locations.fast": {"path": str(storage.places.path("fast")), "shared": True}})
        )

    @pytest.mark.parametrize(
        ("said", "needed"),
        [
            (ImageUse(use=""), ""),
            (
                ImageUse(use="/nas/child.qcow2 lies above it", named=True),
                "on host 'host3': /nas/child.qcow2 lies above it",
            ),
            ("no route", "host 'host3', which may need it, cannot be asked: no route"),
        ],
    )
    def test_they_are_asked(self, either: World, said: ImageUse | str, needed: str) -> None:
        either.neighbours.hosts = {"host1": ImageUse(use=""), "host3": said}
        assert either.needed() == needed
        assert either.leave() is (needed == "")
        sought = [image for asked in either.neighbours.asked for image in asked.images]
        assert {(image.location, image.name) for image in sought} == {("fast", "web1.raw")}

    def test_that_the_vm_itself_has_it_open_they_may_see_too(self, world: World) -> None:
        world.neighbours.hosts = {"host3": ImageUse(use="a QEMU holds its lock")}
        assert world.needed() == "on host 'host3': a QEMU holds its lock"
        world.run()
        assert world.needed() == ""
        assert not world.leave()

    def test_where_none_is_known_none_is_asked(self, world: World) -> None:
        assert world.leave()
