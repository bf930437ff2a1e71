"""What the next daemon makes of a landing: which images it deletes, and whose the VM is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock

import msgspec
import pytest

from harness.landings import VM, header
from limosa.errors import Conflict, QemuError, StateError
from limosa.host import incoming
from limosa.host.files import Files
from limosa.host.incoming import Incoming
from limosa.host.vms import HostedVm, Vms
from limosa.migration.journal import Journal
from limosa.migration.ownership import DestinationStep
from limosa.model.migration import Outcome, Side
from limosa.model.storage import BackingFile
from limosa.model.vm import Disk, VmConfig, VmState
from limosa.qemu.protocol import MigrationState, RunState
from limosa.settings import toml
from limosa.settings.host import HostSettings
from limosa.testing.guest import FakeGuest
from limosa.testing.machine import FakeMachine
from limosa.testing.wire import Wire
from limosa.wire.peer import DestinationState, Prepare

MIGRATION = "abcdefabcdef"
IMAGE, LAYER = f"/images/vm-vda.{MIGRATION}.qcow2", f"/images/golden.{MIGRATION}-1.qcow2"
LANDED = msgspec.structs.replace(VM, disks=(Disk(name="vda", path=IMAGE, format="qcow2"),))


class World:
    """A host whose daemon starts, and finds a journal that begins in the boot ``boot``, and a VM that is ``here``."""

    def __init__(self, folder: Path, *steps: DestinationStep, boot: str, here: VmConfig | None = None) -> None:
        self.waiting, self.answers = asyncio.Event(), asyncio.Event()
        self.removed: list[str] = []
        self.settled: list[str] = []
        self.given_back: list[str] = []
        files = self.files = Files(folder / "state", folder / "run")
        files.migrations.mkdir(parents=True)
        if here is not None:
            files.vm(here.name).mkdir(parents=True)
            toml.write(files.vm(here.name) / "vm.toml", here)
        files.vms.mkdir(parents=True, exist_ok=True)
        leases = SimpleNamespace(hand_back=self.nothing, settle=self.nothing, claim=self.nothing)
        leasing = SimpleNamespace(landing=lambda *_: leases, give_back=self.give_back)
        self.records = SimpleNamespace(attach=self.nothing)
        launcher = SimpleNamespace(leasing=leasing, records=self.records)
        self.vms = Vms("there", files, cast(Any, launcher))
        storage = SimpleNamespace(
            resume=lambda paths: None,
            settle=self.settled.append,
            finish=self.nothing,
            remove=self.remove,
            arriving=None,
        )
        page = SimpleNamespace(now=HostSettings(), on_change=lambda callback: None)
        parts = SimpleNamespace(
            name="there",
            boot="now",
            files=files,
            page=page,
            vms=self.vms,
            storage=storage,
            leasing=leasing,
            inspector=None,
            relays=None,
        )
        self.incoming = Incoming(cast(Any, parts))
        self.incoming._layers = cast(Any, SimpleNamespace(give_up=self.give_up, finish=self.nothing))
        layer = BackingFile(path=LAYER, format="qcow2", size=1, digest="d")
        self.journal = Journal.begin(
            files.migrations,
            msgspec.structs.replace(
                header(Side.DESTINATION), migration=MIGRATION, vm=LANDED, boot=boot, images=(IMAGE,), layers=(layer,)
            ),
        )
        for step in steps:
            self.journal.record(step, 0.0)

    async def nothing(self, *_: object) -> None: ...

    async def give_back(self, config: VmConfig) -> None:
        self.given_back.append(config.name)

    async def remove(self, path: str) -> None:
        self.removed.append(path)

    async def give_up(self, layers: tuple[BackingFile, ...], migration: str) -> None:
        self.removed += [layer.path for layer in layers]

    async def waits(self, *_: object) -> None:
        """For a share that does not answer."""
        self.waiting.set()
        await self.answers.wait()

    async def start(self) -> None:
        assert await self.vms.load() == []
        await self.recover()

    async def recover(self) -> None:
        landing = await self.incoming.take_up(self.journal)
        assert landing is not None
        await self.incoming.bring_to_end(landing)

    async def answer(self) -> DestinationState:
        found = await self.incoming.find(MIGRATION, "here")
        assert found is not None
        return (await found.standing()).state


@pytest.mark.parametrize("steps", [(), (DestinationStep.RESERVED,)])
@pytest.mark.parametrize("boot", ["before", "now"])
def test_images_that_the_guest_may_have_written_stay(
    tmp_path: Path, steps: tuple[DestinationStep, ...], boot: str
) -> None:
    """In another boot, in which lines were lost that said that it was continued."""

    async def scenario() -> None:
        world = World(tmp_path, *steps, boot=boot)
        await world.start()
        assert world.removed == ([IMAGE, LAYER] if boot == "now" else [])
        assert world.settled == ([] if boot == "now" else [IMAGE, LAYER])
        assert await world.answer() is DestinationState.GONE
        assert world.vms.all() == []

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "steps", [(), (DestinationStep.RESERVED,), (DestinationStep.RESERVED, DestinationStep.CONTINUING)]
)
def test_a_vm_that_is_durably_this_hosts_has_landed_whatever_its_journal_has_lost(
    tmp_path: Path, steps: tuple[DestinationStep, ...]
) -> None:
    async def scenario() -> None:
        world = World(tmp_path, *steps, boot="before", here=LANDED)
        await world.start()
        assert world.removed == []
        assert await world.answer() is DestinationState.OWNED
        assert world.vms.get(VM.name).state is VmState.CRASHED
        assert world.journal.step == DestinationStep.OWNED

    asyncio.run(scenario())


OTHER = msgspec.structs.replace(VM, uuid="0f0f2b9e-0f0e-4c06-8a0b-6d4b7b6f2a11")


@pytest.mark.parametrize("steps", [(), (DestinationStep.RESERVED,)])
@pytest.mark.parametrize(
    ("here", "boot", "migration"),
    [
        pytest.param(OTHER, "now", None, id="another"),
        pytest.param(OTHER, "before", None, id="another, after a reboot"),
        pytest.param(VM, "now", None, id="the same, by another move"),
        pytest.param(LANDED, "before", "leaveleave00", id="the same, which is leaving"),
    ],
)
def test_a_vm_that_did_not_land_by_this_move_is_not_taken_for_the_one_that_was_destroyed(
    tmp_path: Path, steps: tuple[DestinationStep, ...], here: VmConfig, boot: str, migration: str | None
) -> None:
    """Of which that could not be written."""

    async def scenario() -> None:
        world = World(tmp_path, *steps, boot=boot, here=here)
        await world.vms.load()
        hosted, machine = world.vms.get(VM.name), FakeMachine(Wire(), FakeGuest(0))
        await machine.resume()
        hosted.machine, hosted.state, hosted.migration = cast(Any, machine), VmState.RUNNING, migration
        await world.recover()
        assert await world.answer() is DestinationState.GONE
        assert world.vms.get(VM.name) is hosted
        assert (hosted.config, hosted.state, hosted.migration) == (here, VmState.RUNNING, migration)
        assert await machine.status() is RunState.RUNNING
        assert world.vms._folders.read() == [here]

    asyncio.run(scenario())


def test_another_vm_is_not_made_the_one_that_landed(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path, DestinationStep.RESERVED, DestinationStep.CONTINUING, boot="now", here=OTHER)
        with pytest.raises(Conflict, match="another has its name"):
            await world.start()
        hosted = world.vms.get(VM.name)
        assert (hosted.config, hosted.state, hosted.started_at) == (OTHER, VmState.STOPPED, None)
        assert await world.answer() is DestinationState.OWNED
        assert world.removed == []

    asyncio.run(scenario())


SECOND = Prepare(
    migration="second000000", vm=VM, accelerator="kvm", running=True, transport="tcp", credentials=None, post_copy=False
)


def full(world: World, monkeypatch: pytest.MonkeyPatch, *steps: DestinationStep) -> Mock:
    """Have these steps not be written. Returns what is called when it is tried."""
    record, tried = world.journal.record, Mock(side_effect=StateError("cannot write the journal"))
    monkeypatch.setattr(
        world.journal, "record", lambda step, at, **more: (tried if step in steps else record)(step, at, **more)
    )
    return tried


async def until(what: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not what():  # noqa: ASYNC110 - anything may make it true
            await asyncio.sleep(0.001)


@pytest.fixture
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(incoming, "FINISH_EVERY_S", 0.01)


@pytest.mark.usefixtures("_soon")
def test_that_a_landing_was_destroyed_is_written_as_soon_as_it_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        world = World(tmp_path, DestinationStep.RESERVED, boot="now")
        with monkeypatch.context() as patch:
            tried = full(world, patch, DestinationStep.GONE)
            await world.start()
            await until(lambda: tried.call_count > 2)
            assert world.vms.all() == []
            assert [one.outcome for one in world.incoming.migrations()] == [Outcome.FAILED]
        await until(lambda: world.incoming.migrations() == [])
        assert world.journal.step == DestinationStep.GONE

    asyncio.run(scenario())


def test_it_is_before_the_same_vm_begins_to_land_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A restart could not tell whose the QEMU is that it finds."""

    async def scenario() -> None:
        world = World(tmp_path, DestinationStep.RESERVED, boot="now")
        with monkeypatch.context() as patch:
            full(world, patch, DestinationStep.GONE)
            await world.start()
            with pytest.raises(StateError):
                await world.incoming.begin(SECOND, "here", "10.0.0.2")
        assert world.incoming.show(SECOND.migration) is None
        await world.incoming.begin(SECOND, "here", "10.0.0.2")
        assert world.journal.step == DestinationStep.GONE
        assert [one.id for one in world.incoming.migrations()] == [SECOND.migration]
        world.incoming._background.cancel()

    asyncio.run(scenario())


@pytest.mark.usefixtures("_soon")
def test_a_vm_that_a_person_gave_to_this_host_is_its_as_soon_as_that_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        world = World(tmp_path, DestinationStep.RESERVED, boot="now")
        machine = FakeMachine(Wire(), FakeGuest(0), incoming=True)
        machine._loaded(MigrationState.COMPLETED)

        async def take_up(hosted: HostedVm, *, died: VmState) -> None:
            hosted.machine = cast(Any, machine)

        monkeypatch.setattr(world.vms, "take_up", take_up)
        world.vms._files.vm(VM.name).mkdir()
        await world.recover()
        with monkeypatch.context() as patch:
            full(world, patch, DestinationStep.OWNED)
            with pytest.raises(StateError):
                await world.incoming.resolve(MIGRATION, Side.DESTINATION)
            assert await machine.status() is RunState.RUNNING
            # The next daemon would let it run, even if it has been paused by then, or has begun to move on.
            with pytest.raises(Conflict, match=MIGRATION):
                world.vms.check_idle(world.vms.get(VM.name))
        await until(lambda: world.incoming.migrations() == [])
        assert world.journal.step == DestinationStep.OWNED
        world.vms.check_idle(world.vms.get(VM.name))

    asyncio.run(scenario())


@pytest.mark.parametrize("silent", [True, False])
def test_one_whose_qemu_is_silent_keeps_its_leases(tmp_path: Path, silent: bool) -> None:
    async def scenario() -> None:
        world = World(tmp_path, DestinationStep.RESERVED, DestinationStep.CONTINUING, boot="now")

        async def say_nothing(config: VmConfig) -> None:
            raise QemuError("QEMU with pid 7 does not answer")

        if silent:
            world.records.attach = say_nothing
        world.files.vm(VM.name).mkdir()
        await world.start()
        hosted = world.vms.get(VM.name)
        assert world.journal.step == DestinationStep.OWNED
        assert world.given_back == ([] if silent else [VM.name])
        assert hosted.reason == (
            "QEMU with pid 7 does not answer" if silent else "its QEMU ended just after it had landed"
        )

    asyncio.run(scenario())


class TestWhileItsShareDoesNotAnswer:
    """Nobody does anything to the VM, and a source that asks is kept waiting rather than told what is not known."""

    def test_one_that_has_landed(self, tmp_path: Path) -> None:
        async def scenario() -> None:
            world = World(tmp_path, DestinationStep.RESERVED, DestinationStep.CONTINUING, boot="now", here=LANDED)
            cast(Any, world.incoming._storage).finish = world.waits
            starting = asyncio.ensure_future(world.start())
            await world.waiting.wait()
            hosted = world.vms.get(VM.name)
            with pytest.raises(Conflict, match=MIGRATION):
                world.vms.check_idle(hosted)
            asked = asyncio.ensure_future(world.answer())
            world.answers.set()
            await starting
            assert await asked is DestinationState.OWNED
            world.vms.check_idle(hosted)

        asyncio.run(scenario())

    def test_one_that_is_given_up(self, tmp_path: Path) -> None:
        async def scenario() -> None:
            world = World(tmp_path, DestinationStep.RESERVED, boot="now")
            cast(Any, world.incoming._storage).remove = world.waits
            starting = asyncio.ensure_future(world.start())
            await world.waiting.wait()
            assert [landing.id for landing in world.incoming.migrations()] == [MIGRATION]
            asked = asyncio.ensure_future(world.answer())
            await asyncio.sleep(0)
            assert not asked.done()
            world.answers.set()
            await starting
            assert await asked is DestinationState.GONE
            assert world.incoming.migrations() == []

        asyncio.run(scenario())


def test_a_vm_that_has_left_again_stays_in_that_move(tmp_path: Path) -> None:
    """The line that says that its landing is over was not written."""

    async def scenario() -> None:
        world = World(tmp_path, DestinationStep.RESERVED, DestinationStep.CONTINUING, boot="now", here=LANDED)
        cast(Any, world.incoming._storage).finish = world.waits
        starting = asyncio.ensure_future(world.start())
        await world.waiting.wait()
        world.vms.get(VM.name).migration = "bcdefabcdefa"
        world.answers.set()
        await starting
        assert world.vms.get(VM.name).migration == "bcdefabcdefa"

    asyncio.run(scenario())
