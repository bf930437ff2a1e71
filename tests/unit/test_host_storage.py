"""Locations, the ledger of what copies will need, and images that a source may not name."""

from __future__ import annotations

import asyncio
import os
import stat
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from test_preflight import VM

from harness.lvm import EXTENT, GROUP, POOL, FakeLvm
from limosa.errors import Conflict, InvalidInput, LimosaError, NotFound, StorageError
from limosa.host.files import Files
from limosa.host.incoming import Incoming
from limosa.host.leasing import Leasing
from limosa.host.looks import Looks
from limosa.host.page import Page
from limosa.host.parts import Parts
from limosa.host.storage import Storage
from limosa.migration import disks
from limosa.model.storage import BackingFile, DiskAction, DiskFacts, DiskPlan, Location, Place
from limosa.model.vm import Disk, DiskFormat
from limosa.storage import chains, images, leases, lvm, marks, stores
from limosa.storage.locations import Locations
from limosa.storage.openers import OpenFiles
from limosa.wire.peer import Prepare

MIB = 1024 * 1024
TAG = "abcdefabcdef"


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """A host with its own location and another, ``fast``."""
    files = Files(tmp_path / "state", tmp_path / "run")
    for folder in (files.images, files.migrations, tmp_path / "fast"):
        folder.mkdir(parents=True)
    page = Page(files.settings)
    asyncio.run(page.change({"locations.fast": {"path": str(tmp_path / "fast")}}))
    return Storage(page, files, None, "host2")


def plan(storage: Storage, name: str = "vda", location: str = "fast", expected: int = 0, **changes: Any) -> DiskPlan:
    path = storage.places.path(location) / f"web1-{name}.{TAG}.qcow2"
    return DiskPlan(
        disk=name,
        action=DiskAction.COPY,
        path=str(path),
        format="qcow2",
        virtual_bytes=8 * MIB,
        expected_bytes=expected,
        location=location,
        **changes,
    )


class TestLocations:
    """Named folders."""

    PLACES = Locations(
        {"fast": Place(path="/srv/fast"), "inner": Place(path="/srv/fast/inner", shared=True)}, "fast", Path("/own")
    )

    @pytest.mark.parametrize(
        ("path", "name"),
        [
            ("/srv/fast/a.raw", "fast"),
            ("/srv/fast/deep/a.raw", "fast"),
            ("/srv/fast/inner/a.raw", "inner"),
            ("/srv/faster/a.raw", ""),
            ("/own/a.raw", "images"),
            ("/etc/shadow", ""),
            ("/srv/fast/../../etc/shadow", ""),
            ("/srv/fast/./a.raw", ""),
            ("srv/fast/a.raw", ""),
        ],
    )
    def test_where_a_file_lies(self, path: str, name: str) -> None:
        assert self.PLACES.of(path) == name

    def test_which_there_are(self) -> None:
        assert self.PLACES.path("inner") == Path("/srv/fast/inner")
        assert self.PLACES.names == {"fast", "images", "inner"}
        assert self.PLACES.shared() == {"inner": "/srv/fast/inner"}
        with pytest.raises(NotFound) as caught:
            self.PLACES.path("nowhere")
        assert "fast, images, inner" in caught.value.todo

    def test_a_host_may_have_its_own_elsewhere(self) -> None:
        assert Locations({"images": Place(path="/big")}, "images", Path("/own")).own == "/big"

    def test_what_the_kernel_says(self, tmp_path: Path) -> None:
        (tmp_path / "a-file").touch()
        named = {"gone": Place(path="/nowhere"), "file": Place(path=f"{tmp_path}/a-file")}
        places = Locations(named, "images", tmp_path)
        here, gone = places.look("images"), places.look("gone")
        assert places.look("file").fault == "it is not a folder"
        assert (here.name, here.default, here.fault) == ("images", True, "")
        assert 0 < here.free_bytes <= here.total_bytes
        assert here.file_system
        assert (gone.free_bytes, gone.default, gone.fault) == (0, False, "No such file or directory")


class TestNewLocations:
    """Settings that name a place which cannot be one are refused."""

    @pytest.mark.parametrize("place", ["gone", "a-file"])
    def test_a_place_that_is_none_changes_nothing(self, storage: Storage, tmp_path: Path, place: str) -> None:
        (tmp_path / "a-file").touch()
        before = storage._page.now
        with pytest.raises(InvalidInput, match=f"{place} cannot be location 'new'"):
            asyncio.run(
                storage._page.change({"locations.new": {"path": f"{tmp_path}/{place}"}, "default_location": "new"})
            )
        assert storage._page.now == before

    def test_nor_one_that_does_not_answer(
        self, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        answers = threading.Event()
        monkeypatch.setattr(stores.Folder, "look", lambda *_, **__: answers.wait())
        monkeypatch.setattr(storage, "_looks", Looks(0.01))
        with pytest.raises(InvalidInput) as caught:
            asyncio.run(storage._page.change({"locations.new": {"path": str(tmp_path)}}))
        answers.set()
        assert caught.value.why == "it does not answer"

    def test_one_that_has_gone_since_is_in_nobodys_way(self, storage: Storage, tmp_path: Path) -> None:
        (tmp_path / "fast").rmdir()
        asyncio.run(storage._page.change({"locations.fast": {"path": f"{tmp_path}/fast", "shared": True}}))
        assert storage.places.shared() == {"fast": f"{tmp_path}/fast"}


class TestTheLedger:
    """What copies under way will still need is not free."""

    def free(self, storage: Storage, name: str = "fast") -> int:
        return next(one.free_bytes for one in asyncio.run(storage.locations()) if one.name == name)

    def test_it_is_held_and_given_back(self, storage: Storage) -> None:
        before = self.free(storage)
        image = plan(storage, needed_bytes=before // 2)
        asyncio.run(storage.make(image))
        assert Path(image.path).stat().st_mode & 0o777 == 0o600
        # Both locations are on one file system, and others use it too.
        assert self.free(storage) < before * 0.6
        assert self.free(storage, "images") < before * 0.6
        storage.settle(image.path)
        assert self.free(storage) > before * 0.9
        for _ in range(2):
            asyncio.run(storage.remove(image.path))
        assert not Path(image.path).exists()

    def test_what_is_held_before_counts_once(self, storage: Storage) -> None:
        before = self.free(storage)
        image = plan(storage, expected=before * 2 // 3)
        asyncio.run(storage.hold([image]))
        assert not Path(image.path).exists()
        assert self.free(storage) < before * 0.5
        with pytest.raises(StorageError, match="no room"):
            asyncio.run(storage.make(plan(storage, "vdb", expected=before * 2 // 3)))
        asyncio.run(storage.make(image))
        assert self.free(storage) > before * 0.2
        asyncio.run(storage.remove(image.path))
        assert storage._held == {}

    def test_what_has_been_written_counts_once(self, storage: Storage) -> None:
        image = plan(storage, expected=64 * MIB)
        asyncio.run(storage.make(image))
        pool = storage.places.store("fast").pool
        held = storage._needed_in(pool)
        with Path(image.path).open("ab") as stream:
            stream.write(bytes(range(1, 256)) * (16 * MIB // 255))
        assert held - storage._needed_in(pool) >= 15 * MIB

    def test_a_location_stays_what_it_is_while_an_image_is_made_in_it(
        self, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(lvm, "PROGRAM", str(FakeLvm(tmp_path).program))
        (tmp_path / "elsewhere").mkdir()
        elsewhere = {"path": f"{tmp_path}/elsewhere"}
        image = plan(storage)
        asyncio.run(storage.make(image))
        root = str(storage.places.path("fast"))
        for change in (None, elsewhere, {"lvm": GROUP}):
            with pytest.raises(Conflict, match="location 'fast' is in use"):
                asyncio.run(storage._page.change({"locations.fast": change}))
        with pytest.raises(Conflict, match="location 'fast' is in use"):
            asyncio.run(storage._page.change({"locations.inner": {"path": root}, "locations.fast": None}))
        more = {"locations.fast": {"path": root, "shared": True}, "locations.more": elsewhere}
        asyncio.run(storage._page.change(more))
        storage.settle(image.path)
        asyncio.run(storage._page.change({"locations.fast": None}))
        storage.resume([str(tmp_path / "state" / "images" / "left-by-an-earlier-daemon.raw")])
        with pytest.raises(Conflict, match="location 'images' is in use"):
            asyncio.run(storage._page.change({"locations.images": elsewhere}))

    def test_two_that_fit_one_by_one_do_not_fit_together(self, storage: Storage) -> None:
        async def scenario() -> list[object]:
            half = self.free_of(await storage.locations()) * 2 // 3
            images = [plan(storage, name, expected=half) for name in ("vda", "vdb")]
            return list(await asyncio.gather(*(storage.make(one) for one in images), return_exceptions=True))

        made = asyncio.run(scenario())
        assert sorted(type(one).__name__ for one in made) == ["NoneType", "StorageError"]
        assert len(list(storage.places.path("fast").glob("*.qcow2"))) == 1

    @staticmethod
    def free_of(locations: Any) -> int:
        return int(next(one.free_bytes for one in locations if one.name == "fast"))

    def test_nothing_is_held_for_what_could_not_be_made(self, storage: Storage) -> None:
        image = plan(storage, expected=MIB)
        Path(image.path).write_bytes(b"precious")
        with pytest.raises(StorageError, match="exists"):
            asyncio.run(storage.make(image))
        assert storage._held == {}
        assert Path(image.path).read_bytes() == b"precious"

    def test_a_location_that_has_gone(self, storage: Storage) -> None:
        image = plan(storage)
        storage.places.path("fast").rmdir()
        with pytest.raises(StorageError):
            asyncio.run(storage.make(image))


class Dead:
    """A server that does not answer before it comes back, of the folder ``root``."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._look = stores.Folder.look
        self.comes_back = threading.Event()
        self.looks = 0

    def look(self, folder: stores.Folder, name: str, *, default: bool) -> Location:
        if folder.root == self._root:
            self.looks += 1
            self.comes_back.wait()
        return self._look(folder, name, default=default)


class TestOneThatDoesNotAnswer:
    """A location whose server is gone: a look at it does not end before that comes back."""

    @pytest.fixture
    def dead(self, storage: Storage, monkeypatch: pytest.MonkeyPatch) -> Iterator[Dead]:
        dead = Dead(storage.places.store("fast").root)

        def look(folder: stores.Folder, name: str, *, default: bool) -> Location:
            return dead.look(folder, name, default=default)

        monkeypatch.setattr(stores.Folder, "look", look)
        storage._looks = Looks(0.5)
        yield dead
        dead.comes_back.set()

    def test_others_are_used_and_one_thread_waits(self, storage: Storage, dead: Dead) -> None:
        async def scenario() -> None:
            for _ in range(3):
                fast, images = await storage.locations()
                assert (fast.name, fast.fault) == ("fast", "it does not answer")
                assert images.fault == ""
            assert dead.looks == 1
            with pytest.raises(StorageError) as caught:
                await storage.make(plan(storage, location="fast"))
            assert caught.value.why == fast.fault
            await storage.make(plan(storage, location="images"))
            await storage.check_answer(["images"])
            with pytest.raises(StorageError, match="fast"):
                await storage.check_answer()
            assert dead.looks == 1

        asyncio.run(scenario())

    def test_it_is_used_again_when_it_answers(self, storage: Storage, dead: Dead) -> None:
        async def scenario() -> None:
            assert (await storage.locations())[0].fault
            dead.comes_back.set()
            while (await storage.locations())[0].fault:  # noqa: ASYNC110 - its thread says when
                await asyncio.sleep(0)
            await storage.make(plan(storage, location="fast"))
            await storage.check_answer()

        asyncio.run(scenario())

    def test_what_lies_below_disks_is_not_sought_there(self, storage: Storage, dead: Dead) -> None:
        image = storage.places.path("images") / "golden.raw"
        for path in (image, storage.places.path("fast") / image.name):
            path.write_bytes(b"x" * 512)
        wanted = BackingFile(
            path=str(storage.places.path("fast") / image.name),
            format="raw",
            size=512,
            digest=chains.digest(str(image), "raw"),
        )
        found = asyncio.run(storage.find(wanted))
        assert found is not None
        assert found.path == str(image)


def test_a_disk_has_whole_sectors(storage: Storage, tmp_path: Path) -> None:
    path = tmp_path / "odd.raw"
    path.write_bytes(bytes(1000))
    (fact,) = asyncio.run(storage.facts([Disk(name="vda", path=str(path), format="raw")]))
    assert fact.virtual_bytes == 1024


def test_of_an_image_behind_a_link_nothing_is_left(storage: Storage, tmp_path: Path) -> None:
    link, image = storage.places.path("fast") / "web1.qcow2", tmp_path / "elsewhere.qcow2"
    image.touch()
    link.symlink_to(image)
    leases.change(str(link), leases.Rule(str(link), "host2", "boot", VM.uuid).take)
    marks.begin(str(link), marks.Mark(host="host2", at=0.0))
    asyncio.run(storage.remove(str(link)))
    assert not link.is_symlink()
    assert [path for path in tmp_path.iterdir() if "elsewhere" in path.name] == []


class TestVolumes:
    """The same of a volume group: a pretended one."""

    @pytest.fixture
    def group(self, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeLvm:
        fake = FakeLvm(tmp_path)
        monkeypatch.setattr(lvm, "PROGRAM", str(fake.program))
        asyncio.run(storage._page.change({"locations.bulk": {"lvm": GROUP}}))
        return fake

    def plan(self, size: int = 8 * EXTENT, *, thin: bool = False) -> DiskPlan:
        where = Location(name="bulk", path=f"/dev/{GROUP}", kind="lvm", thin=thin, unit_bytes=EXTENT)
        disk = DiskFacts(name="vda", path="/a.qcow2", format="qcow2", virtual_bytes=size, allocated_bytes=0)
        return disks.copied("web1", disk, where, TAG)

    def free(self, storage: Storage, name: str) -> int:
        return next(one.free_bytes for one in asyncio.run(storage.locations()) if one.name == name)

    def test_it_takes_its_space_at_once_and_gives_it_back(self, storage: Storage, group: FakeLvm) -> None:
        before, image = self.free(storage, "bulk"), self.plan()
        asyncio.run(storage.make(image))
        assert list(group.volumes) == [f"web1-vda.{TAG}.raw"]
        assert self.free(storage, "bulk") == before - 8 * EXTENT
        storage.settle(image.path)
        assert self.free(storage, "bulk") == before - 8 * EXTENT
        for _ in range(2):
            asyncio.run(storage.remove(image.path))
        assert group.volumes == {}
        assert self.free(storage, "bulk") == before

    def test_a_thin_one_will_still_need_its_space(self, storage: Storage, group: FakeLvm) -> None:
        asyncio.run(storage._page.change({"locations.bulk": {"lvm": f"{GROUP}/{POOL}"}}))
        before = self.free(storage, "bulk")
        image = msgspec.structs.replace(self.plan(thin=True), needed_bytes=EXTENT)
        asyncio.run(storage.make(image))
        assert self.free(storage, "bulk") == before - EXTENT
        storage.settle(image.path)
        assert self.free(storage, "bulk") == before

    def test_a_group_is_one_location(self, storage: Storage, group: FakeLvm) -> None:
        with pytest.raises(InvalidInput) as caught:
            asyncio.run(storage._page.change({"locations.thin": {"lvm": f"{GROUP}/{POOL}"}}))
        assert "bulk is in this volume group already" in caught.value.why
        assert storage.places.names == {"fast", "images", "bulk"}

    def test_two_that_fit_one_by_one_do_not_fit_together(self, storage: Storage, group: FakeLvm) -> None:
        half = self.free(storage, "bulk") * 2 // 3 // EXTENT * EXTENT
        one = self.plan(size=half)
        two = msgspec.structs.replace(one, path=one.path.replace("vda", "vdb"))

        async def both() -> list[object]:
            return list(await asyncio.gather(storage.make(one), storage.make(two), return_exceptions=True))

        assert sorted(type(end).__name__ for end in asyncio.run(both())) == ["NoneType", "StorageError"]
        assert len(group.volumes) == 1

    def test_who_gives_up_while_it_is_made_leaves_nothing(
        self, storage: Storage, group: FakeLvm, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        begun, create = threading.Event(), lvm.create

        def created(*arguments: Any) -> None:
            begun.set()
            create(*arguments)

        async def scenario() -> None:
            making = asyncio.ensure_future(storage.make(self.plan()))
            monkeypatch.setattr(lvm, "create", created)
            await asyncio.to_thread(begun.wait)
            making.cancel()
            with pytest.raises(asyncio.CancelledError):
                await making

        asyncio.run(scenario())
        assert group.volumes == {}
        assert storage._held == {}

    def test_who_gives_up_keeps_his_hands_off_what_was_there(
        self, storage: Storage, group: FakeLvm, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        image, begun = self.plan(), threading.Event()
        store, run = storage.places.store("bulk"), lvm._run
        asyncio.run(store.create(image.path, "raw", EXTENT, blank=False))

        def said(*arguments: str) -> bytes:
            begun.set()
            return run(*arguments)

        async def scenario() -> None:
            making = asyncio.ensure_future(store.create(image.path, "raw", EXTENT, blank=False))
            await asyncio.to_thread(begun.wait)
            making.cancel()
            with pytest.raises(asyncio.CancelledError):
                await making

        monkeypatch.setattr(lvm, "_run", said)
        asyncio.run(scenario())
        assert list(group.volumes) == [f"web1-vda.{TAG}.raw"]

    def test_a_copy_bears_a_mark_until_it_is_finished(self, storage: Storage, group: FakeLvm) -> None:
        image = self.plan()
        asyncio.run(storage.make(image))
        (found,) = [one for one in storage.places.store("bulk").unfinished.find() if one.mark is not None]
        assert found.mark is not None
        assert (found.path, found.mark.host) == (image.path, "host2")
        asyncio.run(storage.finish([image.path]))
        assert group.volumes[f"web1-vda.{TAG}.raw"]["tags"] == [lvm.TAG]

    @pytest.mark.parametrize(
        ("state", "why"),
        [
            ({}, ""),
            ({"open": "open"}, "somebody has it open"),
            ({"role": "public,origin,thickorigin"}, "its snapshots"),
            ({"role": "public,origin,extthinorigin,multiextthinorigin"}, "the volumes above or in it"),
            ({"role": "public,origin,thinorigin,multithinorigin"}, ""),
        ],
    )
    def test_who_has_it(self, storage: Storage, group: FakeLvm, state: dict[str, str], why: str) -> None:
        image = self.plan()
        asyncio.run(storage.make(image))
        group.change(lvs={name: lv | state for name, lv in group.volumes.items()})
        said = storage.places.store("bulk").unfinished.user(image.path, OpenFiles())
        assert why in said
        assert bool(why) is bool(said)

    @pytest.mark.parametrize(
        ("name", "path"),
        [
            ("bulk-web1--vda.abcdefabcdef.raw", "/dev/bulk/web1-vda.abcdefabcdef.raw"),
            ("my--group-a", "/dev/my-group/a"),
            ("group---a", "/dev/group-/a"),
            ("bulk-thin-tpool", ""),
            ("bulk-thin_tdata-real", ""),
        ],
    )
    def test_a_volume_is_known_by_its_device(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, path: str
    ) -> None:
        device = tmp_path / "dm-3"
        os.mknod(device, 0o600 | stat.S_IFBLK, os.makedev(253, 77))
        folder = tmp_path / "253:77" / "dm"
        folder.mkdir(parents=True)
        monkeypatch.setattr(lvm, "_DEVICES", tmp_path)
        for uuid, expected in (("LVM-x\n", path), ("CRYPT-x\n", "")):
            (folder / "uuid").write_text(uuid)
            (folder / "name").write_text(name + "\n")
            assert lvm.path_of(str(device)) == expected
        assert lvm.path_of(str(folder)) == lvm.path_of(str(tmp_path / "none")) == ""

    def test_a_vm_gets_it_whichever_way_it_is_named(
        self, storage: Storage, group: FakeLvm, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        image = self.plan()
        asyncio.run(storage.make(image))
        monkeypatch.setattr(lvm, "path_of", lambda path: image.path if path == "/dev/mapper/x" else "")
        storage.places.claim("/dev/mapper/x")
        assert not storage.places.store("bulk").unfinished.condemn(image.path)

    @pytest.mark.parametrize(
        ("named", "change", "fault"),
        [
            (GROUP, {"partial": "partial"}, "devices of the volume group are missing"),
            (GROUP, {"permissions": "read-only"}, "the volume group is read-only"),
            (f"{GROUP}/{POOL}", {"zero": ""}, "the pool gives away what others left in it; see lvchange --zero y"),
        ],
    )
    def test_what_keeps_it_from_use(
        self, storage: Storage, group: FakeLvm, named: str, change: dict[str, str], fault: str
    ) -> None:
        asyncio.run(storage._page.change({"locations.bulk": {"lvm": named}}))
        group.change(**change)
        assert next(one.fault for one in asyncio.run(storage.locations()) if one.name == "bulk") == fault

    def test_no_volume_lies_below_a_disk(self, storage: Storage, group: FakeLvm) -> None:
        wanted = BackingFile(
            path=f"/dev/{GROUP}/golden.raw",
            format="raw",
            size=1,
            digest="d",
            location="bulk",
            location_path="golden.raw",
        )
        folders = [storage.places.path(name) for name in ("fast", "images")]
        assert storage._candidates(wanted, storage.places.names) == [str(folder / "golden.raw") for folder in folders]

    def test_a_program_that_is_not_there(
        self, storage: Storage, group: FakeLvm, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(lvm, "PROGRAM", "/nowhere/lvm")
        fault = next(one.fault for one in asyncio.run(storage.locations()) if one.name == "bulk")
        assert fault == "No such file or directory"
        asyncio.run(storage.remove(self.plan().path))  # it is logged

    def test_only_what_bears_our_tag_is_given_away(self, group: FakeLvm) -> None:
        lvm.create(GROUP, "", "ours.raw", EXTENT)
        group.change(lvs=group.volumes | {"root": {"size": EXTENT, "thin": False, "tags": [], "made": 0}})
        folder = Path(f"/dev/{GROUP}")
        assert lvm.is_ours(folder / "ours.raw", os.makedev(253, 1))
        assert not lvm.is_ours(folder / "ours.raw", os.makedev(253, 2)), "it is another device"
        assert not lvm.is_ours(folder / "root", os.makedev(253, 2))
        assert not lvm.is_ours(folder / POOL, os.makedev(253, 0))
        assert not lvm.is_ours(folder / "none", os.makedev(253, 1))
        assert not lvm.is_ours(Path("/dev/mapper/bulk-ours.raw/x"), os.makedev(253, 1))

    def test_what_others_depend_on_stays(self, storage: Storage, group: FakeLvm) -> None:
        """LVM would remove the snapshots of a volume with it."""
        image = self.plan()
        asyncio.run(storage.make(image))
        snapshot = {"size": EXTENT, "thin": False, "tags": [], "made": 0, "origin": f"web1-vda.{TAG}.raw"}
        group.change(lvs=group.volumes | {"before-upgrade": snapshot})
        asyncio.run(storage.remove(image.path))  # it is logged
        assert set(group.volumes) == {f"web1-vda.{TAG}.raw", "before-upgrade"}
        with pytest.raises(StorageError, match="is not removed"):
            lvm.remove(GROUP, POOL)

    @pytest.mark.parametrize("name", ["", "-rf", "a b", 'a" || lv_name!="', "../x", "a/b", "@tag"])
    def test_a_name_that_is_none(self, group: FakeLvm, name: str) -> None:
        with pytest.raises(StorageError, match="cannot be the name"):
            lvm.remove(GROUP, name)


class TestWhatASourceMayName:
    """Images are made and deleted for a source only where nobody else's can be."""

    def incoming(self, storage: Storage) -> Incoming:
        """A host that takes VMs, as far as it looks at what it is asked."""
        nobody = cast(Any, None)
        return Incoming(
            Parts(
                name="host2",
                boot="boot",
                files=storage._files,
                page=storage._page,
                vms=nobody,
                storage=storage,
                leasing=Leasing("host2", "boot", "machine", lambda _: False),
                inspector=nobody,
                multichannel=nobody,
                relays=nobody,
                neighbours=nobody,
            )
        )

    def request(self, image: DiskPlan, *, named: str | None = None) -> Prepare:
        disk = Disk(name=image.disk, path=named or image.path, format=image.format)
        return Prepare(
            migration=TAG,
            vm=msgspec.structs.replace(VM, disks=(disk,)),
            accelerator="tcg",
            transport="tcp",
            credentials=None,
            post_copy=False,
            running=True,
            disks=(image,),
        )

    def refusal(self, storage: Storage, request: Prepare) -> LimosaError:
        with pytest.raises(LimosaError) as caught:
            asyncio.run(self.incoming(storage).begin(request, "host1", "10.0.0.2"))
        assert list(storage._files.migrations.iterdir()) == [], "it has left a journal"
        return caught.value

    def test_what_a_move_makes(self, storage: Storage) -> None:
        async def scenario() -> None:
            begun = await self.incoming(storage).begin(self.request(plan(storage)), "host1", "10.0.0.2")
            assert begun.journal.header.images == (plan(storage).path,)

        asyncio.run(scenario())

    @pytest.mark.parametrize(
        "path",
        [
            "/etc/shadow",
            "{fast}/other.qcow2",
            "{fast}/web1-vda.otherothero.qcow2",
            "{fast}/web1-vdb.abcdefabcdef.qcow2",
            "{images}/web1-vda.abcdefabcdef.qcow2",
        ],
    )
    def test_another_path(self, storage: Storage, path: str) -> None:
        places = {name: storage.places.path(name) for name in storage.places.names}
        image = msgspec.structs.replace(plan(storage), path=path.format(**places))
        assert isinstance(self.refusal(storage, self.request(image)), InvalidInput)

    def test_a_location_nobody_has(self, storage: Storage) -> None:
        image = msgspec.structs.replace(plan(storage), location="nowhere")
        assert isinstance(self.refusal(storage, self.request(image)), NotFound)

    def test_an_image_the_vm_does_not_use(self, storage: Storage) -> None:
        assert isinstance(self.refusal(storage, self.request(plan(storage), named="/other")), InvalidInput)

    def test_an_image_that_is_somebodys(self, storage: Storage) -> None:
        """One that another move has brought here; it must be there when this one is given up, too."""
        image = Path(plan(storage).path)
        image.write_bytes(b"precious")
        assert isinstance(self.refusal(storage, self.request(plan(storage))), Conflict)
        assert image.read_bytes() == b"precious"

    @pytest.mark.parametrize("path", ["/etc/shadow", "{fast}/../../../../../../../etc/shadow"])
    def test_a_secret_below_it(self, storage: Storage, path: str) -> None:
        base = BackingFile(path=path.format(fast=storage.places.path("fast")), format="raw", size=1, digest="d")
        assert isinstance(self.refusal(storage, self.request(plan(storage, backing=base))), InvalidInput)

    def test_the_same_move_twice(self, storage: Storage) -> None:
        async def scenario() -> None:
            incoming = self.incoming(storage)
            await incoming.begin(self.request(plan(storage)), "host1", "10.0.0.2")
            with pytest.raises(Conflict):
                await incoming.begin(self.request(plan(storage)), "host1", "10.0.0.2")

        asyncio.run(scenario())


class TestWhatACopyTakes:
    """It is written uncompressed, whatever the image takes."""

    def facts(self, storage: Storage, path: Path, image_format: DiskFormat = "qcow2") -> DiskFacts:
        (found,) = asyncio.run(storage.facts([Disk(name="vda", path=str(path), format=image_format)]))
        return found

    def made(self, folder: Path, *options: str) -> Path:
        """An image with 4 MiB of data that can be compressed, in a disk of 64."""
        plain, image = folder / "plain.raw", folder / "image.qcow2"
        plain.write_bytes(b"ab" * (2 * MIB))
        os.truncate(plain, 64 * MIB + 512)
        subprocess.run(["qemu-img", "convert", *options, "-O", "qcow2", plain, image], check=True)
        return image

    def test_a_compressed_image(self, storage: Storage, tmp_path: Path) -> None:
        image = self.made(tmp_path, "-c")
        assert image.stat().st_blocks * 512 < MIB
        found = self.facts(storage, image)
        assert (found.allocated_bytes, found.chain_bytes) == (4 * MIB, 4 * MIB)

    def test_one_above_a_compressed_one(self, storage: Storage, tmp_path: Path) -> None:
        image, top = self.made(tmp_path, "-c"), tmp_path / "top.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", image, "-F", "qcow2", top], check=True)
        found = self.facts(storage, top)
        assert found.allocated_bytes < MIB
        assert 4 * MIB <= found.chain_bytes < 5 * MIB
        assert found.below[0].allocated_bytes < MIB, "what is sent as it is stays compressed"

    def test_a_sparse_file(self, storage: Storage, tmp_path: Path) -> None:
        self.made(tmp_path)
        assert 4 * MIB <= self.facts(storage, tmp_path / "plain.raw", "raw").chain_bytes < 5 * MIB

    def test_one_that_cannot_be_measured(
        self, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        image = self.made(tmp_path, "-c")
        monkeypatch.setattr(images, "_QEMU_IMG", "/bin/false")
        assert self.facts(storage, image).chain_bytes == image.stat().st_blocks * 512
