"""Files below disks at the destination: what a source may name, and which of them a move that is undone removes."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Collection, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from test_host_storage import TAG, TestWhatASourceMayName, plan, storage
from test_preflight import VM

from harness.lvm import GROUP, FakeLvm
from harness.shares import Share
from limosa.errors import Conflict, InvalidInput, LimosaError, StorageError
from limosa.host.layers import Layers
from limosa.host.looks import Walks
from limosa.host.storage import Storage
from limosa.host.vms import Vms
from limosa.migration.journal import Header, Journal
from limosa.migration.ownership import DestinationStep
from limosa.model.migration import Side
from limosa.model.storage import BackingFile, DiskAction, DiskPlan, LayerPlan
from limosa.model.vm import Disk, VmConfig
from limosa.storage import lvm, marks
from limosa.wire.peer import Prepare

__all__ = ["storage"]

OTHER = "bcdefabcdefa"


class FakeVms:
    """VMs of a host as far as their disks matter."""

    def __init__(self, *configs: VmConfig) -> None:
        self.configs = configs
        self.is_unsure = False

    def all(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(config=config) for config in self.configs]


class World:
    """A host to which a move has brought a raw file."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.vms = FakeVms()
        self.layers = Layers(storage, cast(Vms, self.vms), storage._files.migrations)
        self.path = storage.places.path("fast") / f"golden.{TAG}-1.raw"
        self.path.write_bytes(b"golden" * 100_000)
        self.brought = asyncio.run(storage.digest(BackingFile(path=str(self.path), format="raw", size=600_000)))

    def give_up(self) -> bool:
        """Undo the move; returns whether the file has gone."""
        asyncio.run(self.layers.give_up([self.brought], TAG))
        return not self.path.exists()

    def above(self, name: str = "other.qcow2") -> Path:
        """A new image above the file."""
        path = self.path.with_name(name)
        words = ["-f", "qcow2", "-b", str(self.path), "-F", "raw", str(path)]
        subprocess.run(["qemu-img", "create", "-q", *words], check=True)
        return path

    def landing(self, disk: Path, *steps: DestinationStep, migration: str = OTHER, **more: Any) -> None:
        """The journal of another VM that lands here."""
        header = Header(
            migration=migration,
            side=Side.DESTINATION,
            vm=using(disk),
            accelerator="tcg",
            source="host1",
            destination="host2",
            address="",
            accepted_at=0.0,
            boot="boot",
            **more,
        )
        journal = Journal.begin(self.storage._files.migrations, header)
        for step in steps:
            journal.record(step, 0.0)
        journal.close()


def using(disk: Path) -> VmConfig:
    return msgspec.structs.replace(VM, disks=(Disk(name="vda", path=str(disk), format="qcow2"),))


@pytest.fixture
def world(storage: Storage) -> World:
    return World(storage)


def test_a_disk_that_a_vm_writes_lies_below_no_other(world: World) -> None:
    """It may be started, and changes then; and it goes when that VM moves."""
    link = world.path.with_name("link")
    link.symlink_to(world.path)
    disk = Disk(name="vda", path=str(link), format="raw")
    world.vms.configs = (msgspec.structs.replace(VM, disks=(disk,)),)
    assert asyncio.run(world.layers.find(world.brought)) is None
    world.vms.configs = (msgspec.structs.replace(VM, disks=(msgspec.structs.replace(disk, read_only=True),)),)
    assert asyncio.run(world.layers.find(world.brought)) is not None


class TestOnAShareThatDoesNotAnswer:
    """Another VM has its disk there."""

    @pytest.fixture(autouse=True)
    def _dead(self, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        world.storage.walks = Walks(1.0)
        share = Share(tmp_path / "dead", monkeypatch)
        world.vms.configs = (using(share.folder / "other.qcow2"),)
        share.die()
        yield
        share.answer()

    def test_it_may_lie_above_the_file(self, world: World) -> None:
        assert not world.give_up()

    def test_it_may_be_the_file(self, world: World) -> None:
        with pytest.raises(StorageError, match=r"other\.qcow2 does not answer"):
            asyncio.run(world.layers.find(world.brought))


class TestWhatIsRemoved:
    """A file of this move, unless it may be somebody's by now."""

    def test_nobody_uses_it(self, world: World) -> None:
        world.vms.configs = (using(world.path.with_name("not-made-yet.qcow2")),)
        assert world.give_up()
        assert world.give_up(), "it is no fault if it has gone"

    def test_a_vm_lies_above_it(self, world: World) -> None:
        world.vms.configs = (using(world.above()),)
        assert not world.give_up()

    def test_a_vm_uses_it_as_its_disk(self, world: World) -> None:
        disk = Disk(name="vda", path=str(world.path), format="raw", read_only=True)
        world.vms.configs = (msgspec.structs.replace(VM, disks=(disk,)),)
        assert not world.give_up()

    def test_by_another_name_it_is_the_same(self, world: World) -> None:
        link = world.path.with_name("link")
        link.symlink_to(world.path.parent)
        disk = world.path.with_name("other.qcow2")
        words = ["-f", "qcow2", "-b", str(link / world.path.name), "-F", "raw", str(disk)]
        subprocess.run(["qemu-img", "create", "-q", *words], check=True)
        world.vms.configs = (using(disk),)
        assert not world.give_up()

    def test_a_vm_that_lands_lies_above_it(self, world: World) -> None:
        world.landing(world.above(), DestinationStep.RESERVED)
        assert not world.give_up()

    def test_a_file_that_comes_with_another_vm_lies_above_it(self, world: World) -> None:
        middle = BackingFile(path=str(world.above()), format="qcow2", size=1, digest="d")
        world.landing(world.path.with_name("not-made-yet.qcow2"), layers=(middle,))
        assert not world.give_up()

    def test_a_landing_that_has_ended_does_not_count(self, world: World) -> None:
        world.landing(world.above(), DestinationStep.RESERVED, DestinationStep.GONE)
        assert world.give_up()

    def test_a_line_that_another_landing_is_writing_is_left_alone(self, world: World) -> None:
        world.landing(world.above(), DestinationStep.RESERVED)
        journal = world.storage._files.migrations / f"{OTHER}.destination.jsonl"
        with journal.open("ab") as stream:
            stream.write(b'{"step":"gone",')
        before = journal.read_bytes()
        assert not world.give_up()
        assert journal.read_bytes() == before

    def test_nor_does_its_own(self, world: World) -> None:
        world.landing(world.above(), DestinationStep.RESERVED, migration=TAG)
        assert world.give_up()

    @pytest.mark.parametrize("damage", ["image", "journal", "vm"])
    def test_what_cannot_be_read_may_lie_above_anything(self, world: World, damage: str) -> None:
        if damage == "image":
            broken = world.path.with_name("broken.qcow2")
            broken.write_bytes(b"")
            world.vms.configs = (using(broken),)
        elif damage == "journal":
            (world.storage._files.migrations / f"{OTHER}.destination.jsonl").write_bytes(b"nonsense\n")
        else:
            world.vms.is_unsure = True
        assert not world.give_up()

    @pytest.mark.parametrize("whole", [True, False])
    def test_others_may_have_found_it_on_a_share(self, world: World, *, whole: bool) -> None:
        page = world.storage._page
        asyncio.run(page.change({"locations.fast": {"path": str(world.path.parent), "shared": True}}))
        if not whole:
            world.path.write_bytes(b"golden")
        assert world.give_up() is not whole


class TestImagesAboveIt:
    """They lie above what is there, or are not made."""

    def overlay(self, world: World, **changes: Any) -> Any:
        backing = msgspec.structs.replace(world.brought, **changes)
        return msgspec.structs.replace(plan(world.storage), action=DiskAction.COPY_OVERLAY, backing=backing)

    def test_what_another_move_brought_is_as_good(self, world: World) -> None:
        planned = world.path.with_name(f"golden.{OTHER}-1.raw")
        image = self.overlay(world, path=str(planned))
        asyncio.run(world.layers.make_above(image, (), "host1"))
        said = subprocess.run(["qemu-img", "info", image.path], check=True, capture_output=True, text=True).stdout
        assert f"backing file: {world.path}" in said

    def test_what_has_changed(self, world: World) -> None:
        world.path.write_bytes(b"Golden" * 100_000)
        image = self.overlay(world)
        with pytest.raises(StorageError, match="no longer the backing file that was found"):
            asyncio.run(world.layers.make_above(image, (), "host1"))
        assert not Path(image.path).exists()


class TestDisksThatAreOnlyRead:
    """A VM's description names them, so they lie where that says."""

    def test_one_is_awaited_though_another_move_brought_it_elsewhere(self, world: World) -> None:
        path = world.path.with_name(f"golden.{OTHER}-1.raw")
        layer = LayerPlan(
            origin="/iso/golden.raw", file=msgspec.structs.replace(world.brought, path=str(path)), location="fast"
        )

        async def door() -> Any:
            raise StorageError("it is awaited")

        async def take(disks: Collection[str]) -> None:
            await world.layers.take([layer], None, door, lambda _: None, "host1", disks)

        asyncio.run(take(()))
        with pytest.raises(StorageError, match="it is awaited"):
            asyncio.run(take({str(path)}))

    def test_one_that_was_found_is_nobody_elses_to_remove(self, world: World) -> None:
        disk = Disk(name="vdb", path=str(world.path), format="raw", read_only=True)
        marks.begin(str(world.path), marks.Mark(host="host2", at=7.0))
        asyncio.run(world.layers.use(disk, {str(world.path)}))
        assert marks.has(str(world.path)), "its own move has brought it, which may be undone"
        asyncio.run(world.layers.use(disk, ()))
        assert not marks.has(str(world.path))


class TestTheMark:
    """A layer is an unfinished copy until its move commits, or another one builds on it."""

    @pytest.fixture
    def image(self, world: World) -> DiskPlan:
        marks.begin(str(world.path), marks.Mark(host="host2", at=7.0))
        return msgspec.structs.replace(plan(world.storage), action=DiskAction.COPY_OVERLAY, backing=world.brought)

    def test_it_is_there_from_the_beginning(self, storage: Storage) -> None:
        layer = TestWhatASourceMaySend().layer(storage)
        asyncio.run(storage.make_layer(layer, "host1"))
        (found,) = marks.find(storage.places.path("fast"))
        assert (str(found.image), found.mark and found.mark.host) == (layer.file.path, "host2")

    def test_its_own_move_takes_it_away_at_the_end(self, world: World, image: DiskPlan) -> None:
        asyncio.run(world.layers.make_above(image, {world.brought.path}, "host1"))
        assert marks.has(world.brought.path)
        never_made = msgspec.structs.replace(world.brought, path="/nowhere/golden.raw")
        asyncio.run(world.layers.finish([world.brought, never_made]))
        assert not marks.has(world.brought.path)

    def test_another_move_takes_it_away_before_it_builds_on_it(self, world: World, image: DiskPlan) -> None:
        asyncio.run(world.layers.make_above(image, (), "host1"))
        assert not marks.has(world.brought.path)

    def test_what_is_being_removed_is_not_built_on(self, world: World, image: DiskPlan) -> None:
        assert marks.condemn(world.brought.path)
        with pytest.raises(Conflict, match="is being removed"):
            asyncio.run(world.layers.make_above(image, (), "host1"))

    def test_it_goes_with_the_layer(self, world: World, image: DiskPlan) -> None:
        assert world.give_up()
        assert not marks.has(world.brought.path)


class TestWhatASourceMaySend:
    """Files are made and removed for a source only where nobody else's can be."""

    def layer(self, storage: Storage, **changes: Any) -> LayerPlan:
        path = storage.places.path("fast") / f"golden.{TAG}-1.raw"
        file = BackingFile(path=str(path), format="raw", size=1, digest="d", location="fast")
        return msgspec.structs.replace(LayerPlan(origin="/vm/golden.raw", file=file, location="fast"), **changes)

    def request(self, storage: Storage, layer: LayerPlan) -> Prepare:
        whole = TestWhatASourceMayName().request(plan(storage))
        return msgspec.structs.replace(whole, layers=(layer,))

    def refusal(self, storage: Storage, layer: LayerPlan) -> LimosaError:
        return TestWhatASourceMayName().refusal(storage, self.request(storage, layer))

    def test_what_a_move_sends(self, storage: Storage) -> None:
        async def scenario() -> None:
            layer = self.layer(storage)
            incoming = TestWhatASourceMayName().incoming(storage)
            begun = await incoming.begin(self.request(storage, layer), "host1", "10.0.0.2")
            assert begun.journal.header.layers == (layer.file,)

        asyncio.run(scenario())

    @pytest.mark.parametrize("name", ["golden.raw", f"golden.{OTHER}-1.raw", f"golden.{TAG}-2.raw", f"x.{TAG}-1.raw"])
    def test_another_name(self, storage: Storage, name: str) -> None:
        file = self.layer(storage).file
        path = str(storage.places.path("fast") / name)
        layer = self.layer(storage, file=msgspec.structs.replace(file, path=path))
        assert isinstance(self.refusal(storage, layer), InvalidInput)

    def test_a_file_among_volumes(self, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(lvm, "PROGRAM", str(FakeLvm(tmp_path).program))
        asyncio.run(storage._page.change({"locations.bulk": {"lvm": GROUP}}))
        file = msgspec.structs.replace(
            self.layer(storage).file, path=f"/dev/{GROUP}/golden.{TAG}-1.raw", location="bulk"
        )
        assert isinstance(self.refusal(storage, self.layer(storage, file=file, location="bulk")), InvalidInput)

    def test_a_file_that_is_somebodys(self, storage: Storage) -> None:
        layer = self.layer(storage)
        Path(layer.file.path).write_bytes(b"precious")
        assert isinstance(self.refusal(storage, layer), Conflict)
        assert Path(layer.file.path).read_bytes() == b"precious"

    def test_a_disk_that_is_only_read(self, storage: Storage) -> None:
        async def scenario() -> None:
            layer, named = self.layer(storage), TestWhatASourceMayName()
            disk = Disk(name="vdb", path=layer.file.path, format="raw", read_only=True)
            vm = msgspec.structs.replace(VM, disks=(disk,))
            request = msgspec.structs.replace(self.request(storage, layer), vm=vm, disks=())
            landing = await named.incoming(storage).begin(request, "host1", "10.0.0.2")
            assert landing.journal.header.images == ()

        asyncio.run(scenario())

    def test_a_file_that_is_no_disk_and_below_none(self, storage: Storage) -> None:
        request = msgspec.structs.replace(self.request(storage, self.layer(storage)), disks=())
        assert isinstance(TestWhatASourceMayName().refusal(storage, request), InvalidInput)

    def test_a_secret_below_it(self, storage: Storage) -> None:
        secret = BackingFile(path="/etc/shadow", format="raw", size=1, digest="d")
        assert isinstance(self.refusal(storage, self.layer(storage, backing=secret)), InvalidInput)
