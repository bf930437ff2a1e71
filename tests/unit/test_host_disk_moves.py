"""Disks that move within their host, with a fake QEMU: what else happens to the VM meanwhile, and every way out."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from test_host_restarting import LONG_AGO, FakeLauncher
from test_host_storage import storage
from test_own_disks import Neighbourhood
from test_preflight import VM

from harness.shares import WAITS_S, Share
from limosa.background import apart
from limosa.errors import Conflict, NotFound, OutcomeUnknown, OwnerUnknown, StateError, StorageError
from limosa.host import disk_moves
from limosa.host.disk_moves import DiskMoves
from limosa.host.folders import Folders
from limosa.host.leasing import Leasing
from limosa.host.leftovers import Leftovers
from limosa.host.parts import Parts
from limosa.host.process_records import Found
from limosa.host.restarting import Restarting
from limosa.host.storage import Storage
from limosa.host.views import Views
from limosa.host.vms import HostedVm, Vms
from limosa.migration import mirrors
from limosa.model.migration import Migration
from limosa.model.vm import Disk, VmConfig, VmState
from limosa.qemu.protocol import CopyState, CopyStatistics, ImageFile
from limosa.settings import toml
from limosa.testing.guest import FakeGuest
from limosa.testing.machine import FakeMachine
from limosa.testing.wire import Wire
from limosa.wire.api import DiskMoveRequest

__all__ = ["storage"]

OTHER = "8b0b7d3c-57b8-4f5c-9d5e-2d2f3f1e2a10"


class Machine(FakeMachine):
    """A fake QEMU that copies to files. A copy is ready at once, unless a test says otherwise."""

    def __init__(self) -> None:
        super().__init__(Wire(), FakeGuest(0))
        #: whether copies stay under way
        self.slow = False
        #: bytes a second that a copy was told to keep to, last
        self.caps: dict[str, int] = {}
        #: the disk whose copy has its cap, and is there as soon as ``appears`` is set; it has begun when ``begins`` is
        self.beginning = ""
        self.appears, self.begins = asyncio.Event(), asyncio.Event()
        self.appears.set()
        self.begins.set()
        #: does not give up copies, and how often it has not
        self.stuck, self.refused = False, 0
        #: whether copies are being made alike, which they are as soon as the event is set
        self.settling = False
        self.settles = asyncio.Event()
        self.settles.set()
        #: called when a copy is to take its disk's place, which it then does not
        self.refuses: Callable[[], None] | None = None

    @classmethod
    def which_is_slow(cls) -> Machine:
        made = cls()
        made.slow = True
        return made

    async def copy_to_file(self, disk: str, tag: str, image: ImageFile, bytes_per_s: int, *, whole: bool) -> None:
        await self._answer()
        self.beginning = disk
        await self.appears.wait()
        self.copying[disk] = CopyStatistics(CopyState.COPYING if self.slow else CopyState.READY, 50, 100)
        self.caps[disk] = bytes_per_s
        await self.begins.wait()

    async def cap_copy(self, disk: str, bytes_per_s: int) -> None:
        await super().cap_copy(disk, bytes_per_s)
        if disk in self.copying:
            self.caps[disk] = bytes_per_s

    async def block_writes(self, disk: str) -> None:
        await self._answer()

    async def settle_copy(self, disk: str) -> None:
        await self._answer()
        self.settling = True
        await self.settles.wait()
        self.copying[disk] = replace(self.copying[disk], state=CopyState.SETTLED)

    async def pivot(self, disk: str) -> None:
        await self._answer()
        if self.refuses is not None:
            self.copying[disk] = replace(self.copying[disk], state=CopyState.ENDED, error="Input/output error")
            self.refuses()
            raise StorageError(f"disk {disk} could not be copied", why="Input/output error")
        self.copying.pop(disk, None)

    async def drop_copy(self, disk: str, tag: str) -> None:
        if self.stuck:
            self.refused += 1
            raise OutcomeUnknown("QEMU does not answer")
        await super().drop_copy(disk, tag)


class Launcher(FakeLauncher):
    """Starts such machines."""

    user = None

    def __init__(self) -> None:
        super().__init__()
        self.leasing = Leasing("host2", "boot", "machine", lambda _: False)  # type: ignore[assignment]
        #: what new machines are
        self.make: Callable[[], Machine] = Machine

    async def pin(self, new: VmConfig, identity: str) -> VmConfig:
        return new

    @asynccontextmanager
    async def new_disks(self, new: VmConfig, config: VmConfig) -> AsyncIterator[None]:
        yield

    async def launch(self, config: VmConfig, accelerator: str, *, incoming: bool) -> FakeMachine:
        self.started.append(self.make())
        return self.started[-1]

    async def launch_copier(self, config: VmConfig) -> FakeMachine:
        return await self.launch(config, "", incoming=False)

    async def end_copier(self, config: VmConfig) -> None: ...


class World:
    """A host with a VM ``web1`` whose disks lie in its own location, and with another, ``fast``."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.files = storage._files
        self.files.vms.mkdir()
        self.launcher = Launcher()
        self.views = Views("host2", self.files.migrations)
        self.config = self.with_disks("vda")
        #: done once while a move is planned
        self.meanwhile: Callable[[], Awaitable[object]] | None = None
        self.daemon()

    def daemon(self) -> None:
        """A new one, which knows nothing of the one before."""
        self.vms = Vms("host2", self.files, cast(Any, self.launcher))
        Restarting(self.vms, cast(Any, self.launcher.leasing), cast(Any, self.launcher.records))
        nobody = cast(Any, None)
        self.parts = Parts(
            name="host2",
            boot="boot",
            files=self.files,
            page=self.storage._page,
            vms=self.vms,
            storage=self.storage,
            leasing=cast(Any, self.launcher.leasing),
            inspector=nobody,
            multichannel=nobody,
            relays=nobody,
            neighbours=Neighbourhood(),
        )
        self.moves = DiskMoves(self.parts, self.views, cast(Any, self.launcher))

    def with_disks(self, *names: str, **how: Any) -> VmConfig:
        paths = [self.files.images / f"web1-{name}.raw" for name in names]
        for path in paths:
            path.write_bytes(bytes(65536))
        disks = tuple(Disk(name=name, path=str(path), format="raw") for name, path in zip(names, paths, strict=True))
        return msgspec.structs.replace(VM, disks=disks, **how)

    async def load(self) -> HostedVm:
        """The VM, stopped."""
        path = self.files.vm(self.config.name) / "vm.toml"
        path.parent.mkdir()
        toml.write(path, self.config)
        assert await self.vms.load() == []
        return self.vms.get("web1")

    async def running(self) -> HostedVm:
        """The VM, which has run for long."""
        hosted = await self.load()
        await self.vms.start(hosted)
        hosted.started_at = LONG_AGO
        return hosted

    async def killed(self) -> None:
        """The daemon."""
        self.moves._background.cancel()
        await self.moves._background.idle()
        self.storage._held.clear()

    async def next_daemon(self) -> HostedVm:
        """The VM as that finds it; this one is killed."""
        await self.killed()
        machine = self.vms.get("web1").machine
        self.launcher.found = Found(machine, "tcg", LONG_AGO) if machine is not None else None
        self.daemon()
        assert await self.vms.load() == []
        await self.moves.recover()
        return self.vms.get("web1")

    async def begin(self, **how: Any) -> Migration:
        """Begin to move its disks."""
        return await self.moves.move(DiskMoveRequest(vm="web1", location="fast", **how))

    async def facts(self, disks: Any) -> Any:
        found = await Storage.facts(self.storage, disks)
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile is not None:
            await meanwhile()
        return found

    def images(self) -> list[str]:
        """Where there are images."""
        folders = (self.files.images, self.storage.places.path("fast"))
        return [path.parent.name for folder in folders for path in sorted(folder.iterdir()) if path.name[0] != "."]

    def named(self) -> list[str]:
        """Where those are that the VM's description names."""
        config = toml.read(self.files.vm("web1") / "vm.toml", VmConfig)
        return [Path(disk.path).parent.name for disk in config.disks]

    def records(self) -> list[Path]:
        return list(self.files.migrations.glob("*.disks.json"))


@pytest.fixture
def world(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> World:
    made = World(storage)
    monkeypatch.setattr(storage, "facts", made.facts)
    return made


async def until(told: Callable[[], bool]) -> None:
    while not told():  # noqa: ASYNC110 - it takes a few turns
        await asyncio.sleep(0.001)


def play(scenario: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(20):
            await scenario

    asyncio.run(limited())


@pytest.mark.parametrize("runs", [False, True], ids=["stopped", "running"])
def test_without_anything_else_the_disks_move(world: World, runs: bool) -> None:
    async def scenario() -> None:
        hosted = await (world.running() if runs else world.load())
        begun = await world.begin()
        assert (await world.views.ended(begun.id)).outcome == "completed"
        await world.moves._background.idle()
        assert world.images() == world.named() == ["fast"]
        assert (hosted.migration, hosted.state) == (None, VmState.RUNNING if runs else VmState.STOPPED)
        assert world.records() == []

    play(scenario())


def test_a_copy_that_fails_says_of_which_vm_and_where_more_is_said(world: World) -> None:
    async def scenario() -> None:
        machine = cast(Machine, (await world.running()).machine)
        machine.slow = True
        begun = await world.begin()
        await until(lambda: "vda" in machine.copying)
        machine.copying["vda"] = replace(machine.copying["vda"], error="No space left on device")
        fault = (await world.views.ended(begun.id)).fault
        assert fault is not None
        assert (fault.vm, fault.host, fault.todo) == ("web1", "host2", "see the log of this host")
        assert fault.why == "No space left on device"

    play(scenario())


def test_a_vm_without_disks_is_not_said_to_have_all_of_them_there(world: World) -> None:
    async def scenario() -> None:
        world.config = world.with_disks()
        await world.load()
        with pytest.raises(Conflict, match="VM 'web1' has no disk that could be moved"):
            await world.begin()

    play(scenario())


def test_of_a_vm_that_may_be_away_none_begins(world: World) -> None:
    async def scenario() -> None:
        await world.load()
        world.vms.doubt = "a journal is damaged"
        with pytest.raises(OwnerUnknown):
            await world.begin()
        assert (world.views.list(), world.records()) == ([], [])

    play(scenario())


class TestMeanwhile:
    """To plan a move takes seconds."""

    @pytest.mark.parametrize("again", [False, True], ids=["deleted", "and created again"])
    def test_a_vm_that_is_deleted_stays_so(self, world: World, again: bool) -> None:
        async def scenario() -> None:
            hosted = await world.load()
            another = msgspec.structs.replace(world.config, uuid=OTHER, disks=())

            async def meanwhile() -> None:
                await world.vms.delete(hosted)
                if again:
                    await world.vms.create(cast(Any, another))

            world.meanwhile = meanwhile
            with pytest.raises(Conflict if again else NotFound):
                await world.begin()
            await world.moves._background.idle()
            assert [one.config for one in world.vms.all()] == [another] * again
            assert world.images() == ["images"]
            assert (world.views.list(), world.records()) == ([], [])

        play(scenario())

    def test_of_two_moves_only_one_knows_where_the_disks_are(self, world: World) -> None:
        async def scenario() -> None:
            await world.load()

            async def meanwhile() -> None:
                await world.views.ended((await world.begin()).id)
                await world.moves._background.idle()

            world.meanwhile = meanwhile
            with pytest.raises(Conflict, match="changed"):
                await world.begin()
            assert world.images() == world.named() == ["fast"]

        play(scenario())


def test_a_cap_is_for_the_disks_that_are_still_copied(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirrors, "LOOK_EVERY_S", 0.001)

    async def scenario() -> None:
        world.config = world.with_disks("vda", "vdb", "vdc")
        world.launcher.make = Machine.which_is_slow
        hosted = await world.running()
        machine = cast(Machine, hosted.machine)
        begun = await world.begin(bandwidth_mbit_per_s=24)
        await until(lambda: machine.caps == {"vda": 1_000_000, "vdb": 1_000_000, "vdc": 1_000_000})
        await until(lambda: bool(world.views.show(begun.id).progress.disks))
        machine.copy_is("vda", CopyState.READY)
        await until(lambda: machine.caps["vdb"] == machine.caps["vdc"] == 1_500_000)
        await world.moves.limit(begun.id, 48)
        assert machine.caps["vdb"] == machine.caps["vdc"] == 3_000_000
        machine.copy_is("vdb", CopyState.READY)
        await until(lambda: machine.caps["vdc"] == 6_000_000)
        machine.copy_is("vdc", CopyState.READY)
        assert (await world.views.ended(begun.id)).outcome == "completed"
        await world.moves._background.idle()

    play(scenario())


@pytest.mark.parametrize("appeared", [True, False])
def test_a_cap_that_changes_while_copies_begin_is_kept(world: World, appeared: bool) -> None:
    """From zeroing on, which may take minutes."""

    async def scenario() -> None:
        world.config = world.with_disks("vda", "vdb")
        world.launcher.make = Machine.which_is_slow
        machine = cast(Machine, (await world.running()).machine)
        (machine.begins if appeared else machine.appears).clear()
        begun = await world.begin(bandwidth_mbit_per_s=16)
        await until(lambda: machine.beginning == "vda")
        assert machine.caps == ({"vda": 1_000_000} if appeared else {})
        await world.moves.limit(begun.id, 32)
        assert machine.caps == ({"vda": 2_000_000} if appeared else {})
        machine.appears.set()
        machine.begins.set()
        await until(lambda: machine.caps == {"vda": 2_000_000, "vdb": 2_000_000})
        machine.slow = False
        for disk in ("vda", "vdb"):
            machine.copy_is(disk, CopyState.READY)
        assert (await world.views.ended(begun.id)).outcome == "completed"
        await world.moves._background.idle()

    play(scenario())


class TestInLine:
    """A move is written down before it waits."""

    def test_the_next_daemon_says_that_it_has_failed(self, world: World) -> None:
        async def scenario() -> None:
            await world.running()
            while not world.storage.leaving.is_full:
                await world.storage.leaving.acquire(lambda _: None)
            begun = await world.begin()
            await until(lambda: world.views.show(begun.id).place == 1)
            world.views = Views("host2", world.files.migrations)
            hosted = await world.next_daemon()
            told = world.views.show(begun.id)
            assert told.outcome == "failed"
            assert told.fault is not None
            assert "restarted" in told.fault.what
            assert world.images() == world.named() == ["images"]
            assert (hosted.migration, world.records()) == (None, [])

        play(scenario())

    def test_what_cannot_be_written_down_is_refused(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(path: Path, data: bytes) -> None:
            raise StateError(f"cannot write {path}", why="No space left on device")

        async def scenario() -> None:
            hosted = await world.running()
            monkeypatch.setattr(toml, "write_atomically", fail)
            with pytest.raises(StateError):
                await world.begin()
            assert (hosted.migration, world.views.list(), world.records()) == (None, [], [])

        play(scenario())


class TestACancel:
    def test_while_the_copies_are_made_alike_is_heeded_afterwards(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def scenario() -> None:
            hosted = await world.running()
            machine = cast(Machine, hosted.machine)
            machine.settles.clear()
            begun = await world.begin()
            await until(lambda: machine.settling)
            with pytest.raises(OutcomeUnknown, match="not cancelled yet"):
                await world.moves.cancel(begun.id)
            assert machine.copying
            machine.settles.set()
            assert (await world.views.ended(begun.id)).outcome == "cancelled"
            await world.moves._background.idle()
            assert world.images() == world.named() == ["images"]
            assert (hosted.migration, world.records(), machine.copying) == (None, [], {})

        monkeypatch.setattr(disk_moves, "CANCEL_WITHIN_S", 0.05)
        play(scenario())


class TestACrash:
    """QEMU dies, or has died."""

    @pytest.mark.parametrize("wanted", ["restart", "stop"])
    def test_does_what_on_crash_says_as_soon_as_the_move_is_undone(self, world: World, wanted: str) -> None:
        async def scenario() -> None:
            world.config = msgspec.structs.replace(world.config, on_crash=wanted)
            world.launcher.make = Machine.which_is_slow
            hosted = await world.running()
            machine = cast(Machine, hosted.machine)
            begun = await world.begin()
            await until(lambda: bool(machine.copying))
            machine.die("")
            assert (await world.views.ended(begun.id)).outcome == "failed"
            await world.moves._background.idle()
            assert world.images() == world.named() == ["images"]
            await until(lambda: hosted.state is (VmState.RUNNING if wanted == "restart" else VmState.CRASHED))
            assert len(world.launcher.started) == (2 if wanted == "restart" else 1)

        play(scenario())

    def test_before_the_move_is_no_crash_in_it(self, world: World) -> None:
        async def scenario() -> None:
            world.config = msgspec.structs.replace(world.config, on_crash="restart")
            hosted = await world.load()
            hosted.state = VmState.CRASHED
            begun = await world.begin()
            assert (await world.views.ended(begun.id)).outcome == "completed"
            await world.moves._background.idle()
            assert (hosted.state, len(world.launcher.started)) == (VmState.CRASHED, 1), "only what copied"

        play(scenario())


def test_a_location_that_is_not_there_is_said_so_also_of_a_vm_without_disks(world: World) -> None:
    async def scenario() -> None:
        world.config = msgspec.structs.replace(world.config, disks=())
        await world.load()
        with pytest.raises(NotFound):
            await world.moves.move(DiskMoveRequest(vm="web1", location="nowhere"))

    play(scenario())


def test_it_is_known_which_vms_have_one_that_is_not_at_its_end(world: World) -> None:
    async def scenario() -> None:
        hosted = await world.running()
        cast(Machine, hosted.machine).slow = True
        assert world.moves.not_ended() == set()
        await world.begin()
        assert world.moves.not_ended() == {"web1"}
        (record,) = world.records()
        await world.killed()
        record.write_bytes(b"{")
        assert world.moves.not_ended() is None

    play(scenario())


class TestWhatCannotBeUndone:
    """It is tried again, and nobody does anything to the VM meanwhile."""

    @pytest.fixture(autouse=True)
    def _often(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(disk_moves, "UNDO_EVERY_S", 0.01)
        monkeypatch.setattr(disk_moves, "CANCEL_WITHIN_S", 0.05)

    @pytest.mark.parametrize("restarted", [False, True], ids=["same daemon", "next daemon"])
    def test_a_copy_that_qemu_does_not_give_up(
        self, world: World, restarted: bool, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def scenario() -> None:
            hosted = await world.running()
            machine = cast(Machine, hosted.machine)
            machine.slow = machine.stuck = True
            begun = await world.begin()
            await until(lambda: bool(machine.copying))
            if restarted:
                hosted = await world.next_daemon()
            else:
                with pytest.raises(OutcomeUnknown, match="the disks of VM 'web1' is not cancelled yet"):
                    await world.moves.cancel(begun.id)
            await until(lambda: "does not answer" in world.views.show(begun.id).progress.note)
            tries = machine.refused
            await until(lambda: machine.refused > tries + 2)
            assert len([one for one in caplog.messages if "could not be undone" in one]) == 1
            with pytest.raises(Conflict, match=begun.id):
                await world.vms.stop(hosted)
            assert len(world.records()) == 1
            assert sorted(world.images()) == ["fast", "images"]  # QEMU may write it
            machine.stuck = False
            ended = await world.views.ended(begun.id)
            assert ended.outcome == ("failed" if restarted else "cancelled")
            await world.moves._background.idle()
            assert world.images() == world.named() == ["images"]
            assert (hosted.migration, world.records(), machine.copying) == (None, [], {})
            await world.vms.stop(hosted)

        play(scenario())

    @pytest.mark.parametrize("dies", [False, True], ids=["", "and then qemu dies"])
    def test_a_disk_is_what_qemu_writes_also_where_that_cannot_be_written_down(
        self, world: World, monkeypatch: pytest.MonkeyPatch, dies: bool
    ) -> None:
        """QEMU did not put the new image in its place, and the disk with the VM's description is full."""
        full: list[bool] = []
        keep = Folders.keep

        def keep_if_there_is_room(folders: Folders, config: VmConfig) -> None:
            if full:
                raise StateError("cannot write vm.toml", why="No space left on device")
            keep(folders, config)

        monkeypatch.setattr(Folders, "keep", keep_if_there_is_room)

        async def scenario() -> None:
            hosted = await world.running()
            machine = cast(Machine, hosted.machine)
            machine.refuses = lambda: full.append(True)
            begun = await world.begin()
            await until(lambda: "No space" in world.views.show(begun.id).progress.note)
            assert world.named() == ["fast"], "which is not what QEMU writes"
            assert hosted.migration == begun.id
            if dies:
                machine.die("")
                await until(lambda: hosted.machine is None)
            full.clear()
            assert (await world.views.ended(begun.id)).outcome == "failed"
            await world.moves._background.idle()
            assert world.images() == world.named() == ["images"]
            assert hosted.migration is None

        play(scenario())

    @pytest.mark.parametrize("runs", [False, True], ids=["stopped", "running"])
    def test_images_stay_that_the_vm_s_file_names_since_a_commit_that_could_not_be_made_durable(
        self, world: World, monkeypatch: pytest.MonkeyPatch, runs: bool
    ) -> None:
        folder, sync_folder, broken = world.files.vm("web1"), toml.sync_folder, False

        def breaks(synced: Path) -> None:
            if synced == folder and broken and world.named() == ["fast"]:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            sync_folder(synced)

        def replaces(path: Path, target: Path) -> Path:
            if target == folder / "vm.toml" and broken and world.named() == ["fast"]:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            os.replace(path, target)
            return target

        monkeypatch.setattr(toml, "sync_folder", breaks)
        monkeypatch.setattr(Path, "replace", replaces)

        async def scenario() -> None:
            nonlocal broken
            hosted = await (world.running() if runs else world.load())
            broken = True
            begun = await world.begin()
            await until(lambda: "Input/output error" in world.views.show(begun.id).progress.note)
            assert world.named() == ["fast"]
            assert world.images() == ["images", "fast"], "the next daemon needs what is named, this one the other"
            broken = False
            assert (await world.views.ended(begun.id)).outcome == "failed"
            await world.moves._background.idle()
            assert world.images() == world.named() == ["images"]
            assert hosted.migration is None

        play(scenario())

    def test_one_that_was_not_committed_at_all_needs_no_space_to_be_undone(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The guest's I/O is held back until then."""

        def full(path: Path, data: bytes, **_: Any) -> None:
            raise StateError(f"cannot write {path}", why="No space left on device")

        async def scenario() -> None:
            hosted = await world.running()
            machine = cast(Machine, hosted.machine)
            machine.settles.clear()
            begun = await world.begin()
            await until(lambda: world.views.show(begun.id).phase == "switchover")
            monkeypatch.setattr(toml, "write_atomically", full)
            machine.settles.set()
            assert (await world.views.ended(begun.id)).outcome == "failed"
            await world.moves._background.idle()
            assert world.images() == world.named() == ["images"]

        play(scenario())


class TestOnAShareThatDoesNotAnswer:
    """The daemon was killed while the disk was copied there."""

    @pytest.fixture
    def share(self, world: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[Share]:
        share = Share(world.storage.places.path("fast"), monkeypatch)
        yield share
        share.answer()

    def test_the_next_one_keeps_the_vm_locked_until_it_is_undone(self, world: World, share: Share) -> None:
        async def scenario() -> None:
            machine = cast(Machine, (await world.running()).machine)
            machine.slow = True
            begun = await world.begin()
            await until(lambda: "vda" in machine.copying)
            share.die()
            starting = asyncio.ensure_future(world.next_daemon())
            assert await apart(share.waiting.acquire, timeout=WAITS_S)
            hosted = world.vms.get("web1")
            assert (hosted.migration, len(world.records())) == (begun.id, 1)
            with pytest.raises(Conflict):
                await world.vms.stop(hosted)
            share.answer()
            await starting
            assert (await world.views.ended(begun.id)).outcome == "failed"
            assert (hosted.migration, world.records()) == (None, [])

        play(scenario())
        assert world.images() == world.named() == ["images"]

    def test_of_all_of_them_each_is_locked_at_once(self, world: World, share: Share) -> None:
        async def scenario() -> None:
            await world.running()
            await world.vms.create(cast(Any, msgspec.structs.replace(VM, name="web2", uuid=OTHER, disks=())))
            record = {"plans": [], "old": {}, "keep": False}
            for vm, migration in (("web1", "abcdefabcdef"), ("web2", "bcdefabcdefa")):
                path = world.files.migrations / f"{migration}.disks.json"
                path.write_bytes(msgspec.json.encode(record | {"vm": vm, "migration": migration}))
            recovering = asyncio.ensure_future(world.moves.recover())
            await asyncio.sleep(0)
            locked = {hosted.config.name: hosted.migration for hosted in world.vms.all()}
            assert locked == {"web1": "abcdefabcdef", "web2": "bcdefabcdefa"}
            await recovering
            assert world.records() == []

        play(scenario())


def overlay_of(image: Path) -> Path:
    path = image.with_name("clone.qcow2")
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(image), "-F", "raw", str(path)]
    subprocess.run(command, check=True)
    return path


def test_what_the_next_daemon_leaves_is_said(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """It brings a move to its end whose images are in use, and somebody needs the old one by now."""
    reached = asyncio.Event()

    async def killed_here(moves: DiskMoves, *_: object) -> None:
        reached.set()
        await asyncio.Event().wait()

    async def scenario() -> None:
        await world.running()
        with monkeypatch.context() as then:
            then.setattr(DiskMoves, "remove_old", killed_here)
            begun = await world.begin()
            await reached.wait()
            image = world.files.images / "web1-vda.raw"
            clone = overlay_of(image)
            await world.next_daemon()
        told = world.views.show(begun.id)
        assert told.outcome == "completed"
        assert [one.code for one in told.findings] == ["image-left"]
        assert f"it is the backing file of {clone}" in told.findings[0].what
        assert image.exists()

    play(scenario())


class TestWithoutItsVm:
    """A daemon finds the record of a move, and no VM that it is about."""

    async def begun(self, world: World) -> Path:
        """The VM's description; its move was under way when the daemon was killed."""
        hosted = await world.load()
        world.launcher.make = Machine.which_is_slow
        await world.begin()
        await until(lambda: bool(world.launcher.started and world.launcher.started[0].copying))
        await world.killed()
        world.launcher.started[0].die("")
        world.daemon()
        return world.files.vm(hosted.config.name) / "vm.toml"

    async def recover(self, world: World, *, faults: int = 0) -> None:
        assert len(await world.vms.load()) == faults
        await world.moves.recover()

    def forget_location(self, world: World) -> Coroutine[Any, Any, Any]:
        return world.storage._page.change({"locations.fast": None})

    def test_its_images_stay_and_are_found(self, world: World) -> None:
        async def scenario() -> None:
            (await self.begun(world)).unlink()
            await self.recover(world)
            assert world.images() == ["images", "fast"]
            (found,) = await Leftovers(world.parts).look()
            assert (Path(found.path).parent.name, found.doubts) == ("fast", ())
            (told,) = world.views.list()
            assert told.fault is not None
            assert "has gone" in told.fault.what
            assert world.records() == []
            await self.forget_location(world)

        play(scenario())

    def test_another_of_its_name_has_nothing_to_do_with_it(self, world: World) -> None:
        async def scenario() -> None:
            toml.write(await self.begun(world), msgspec.structs.replace(world.config, uuid=OTHER, disks=()))
            await self.recover(world)
            assert world.images() == ["images", "fast"]
            assert world.vms.get("web1").migration is None
            assert world.records() == []

        play(scenario())

    def test_one_that_cannot_be_read_may_be_it(self, world: World) -> None:
        async def scenario() -> None:
            (await self.begun(world)).write_text("damaged")
            await self.recover(world, faults=1)
            assert world.images() == ["images", "fast"]
            assert await Leftovers(world.parts).look() == ()
            with pytest.raises(Conflict, match="in use"):
                await self.forget_location(world)
            world.daemon()
            toml.write(world.files.vm("web1") / "vm.toml", world.config)
            await self.recover(world)
            assert (world.images(), world.records()) == (["images"], [])

        play(scenario())
