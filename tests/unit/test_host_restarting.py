"""VMs that crashed: which of them are started again by themselves."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from harness.landings import VM
from limosa.errors import Conflict, ImageLeased, OwnerUnknown, QemuError, QemuGone, StorageError
from limosa.host import restarting, vms
from limosa.host.files import Files
from limosa.host.outgoing import Outgoing
from limosa.host.process_records import Found
from limosa.host.restarting import CRASH_LOOP_S, Restarting
from limosa.host.vms import LEFT, HostedVm, Vms
from limosa.model.vm import VmConfig, VmState
from limosa.qemu.protocol import Event, RunState
from limosa.settings import toml
from limosa.settings.host import HostSettings
from limosa.testing.guest import FakeGuest
from limosa.testing.machine import FakeMachine
from limosa.testing.wire import Wire
from limosa.wire.api import MoveRequest

RESTARTS = msgspec.structs.replace(VM, on_crash="restart")
LONG_AGO = 0.0
OTHER = "00000000-0000-4000-8000-000000000002"


class FakeLauncher:
    """Starts fake machines, and knows of the QEMU of an earlier daemon what it is told."""

    def __init__(self) -> None:
        self.leasing = SimpleNamespace(take=self.nothing, give_back=self.nothing)
        self.records = self
        self.found: Found | None = None
        self.started: list[FakeMachine] = []
        self.left: list[str] = []
        self.silent = False
        #: how often it was asked for that QEMU
        self.attached = 0
        self.has_images = True
        #: how often images were asked for
        self.claimed = 0
        #: VMs of whose QEMU the next daemon finds nothing
        self.forgotten: list[str] = []
        self.memory_mib = 2**20

    async def nothing(self, *_: object) -> None: ...

    async def attach(self, config: VmConfig) -> Found | None:
        self.attached += 1
        if self.silent:
            raise QemuError("QEMU does not answer")
        return self.found

    def accelerator(self, config: VmConfig) -> str:
        return "tcg"

    def check_memory(self, config: VmConfig, committed_mib: int) -> None:
        if committed_mib + config.memory_mib > self.memory_mib:
            raise Conflict("there is no memory")

    def forget_ended(self, config: VmConfig) -> None: ...

    async def claim_images(self, config: VmConfig) -> None:
        self.claimed += 1
        await asyncio.sleep(0)
        if not self.has_images:
            raise StorageError("the image is missing")

    async def launch(self, config: VmConfig, accelerator: str, *, incoming: bool) -> FakeMachine:
        self.started.append(FakeMachine(Wire(), FakeGuest(0)))
        return self.started[-1]

    def clean_up(self, config: VmConfig, *, crashed: bool) -> None:
        if not crashed:
            self.forgotten.append(config.name)

    def leave_ended(self, config: VmConfig) -> None:
        self.left.append(config.name)


class Detachable(FakeMachine):
    """A fake machine that says whether it was let go of."""

    def __init__(self) -> None:
        super().__init__(Wire(), FakeGuest(0))
        self.pid = 7
        self.detached = False

    async def detach(self) -> None:
        self.detached = True


class Parts(SimpleNamespace):
    """Those that were named; None for all others."""

    def __getattr__(self, name: str) -> None:
        return None


class World:
    """A host with the VM ``vm``, as its daemon finds it when it starts."""

    def __init__(self, folder: Path) -> None:
        self.files = Files(folder / "state", folder / "run")
        self.launcher = FakeLauncher()
        self.vms = Vms("here", self.files, cast(Any, self.launcher))
        self.restarting = Restarting(self.vms, cast(Any, self.launcher.leasing), cast(Any, self.launcher.records))

    def write(self, config: VmConfig) -> None:
        path = self.files.vm(config.name) / "vm.toml"
        path.parent.mkdir(parents=True)
        toml.write(path, config)

    async def load_silent(self, config: VmConfig) -> HostedVm:
        self.write(config)
        self.launcher.silent = True
        assert len(await self.vms.load()) == 1
        return self.vms.get(config.name)

    async def load(self, config: VmConfig, found: Found | None = None) -> HostedVm:
        self.write(config)
        self.launcher.found = found
        assert await self.vms.load() == []
        return self.vms.get(config.name)

    async def in_a_move(self, config: VmConfig, *, started_at: float | None = LONG_AGO) -> HostedVm:
        hosted = await self.load(config)
        await self.vms.start(hosted)
        hosted.started_at = started_at
        hosted.migration = "m1"
        return hosted

    async def hangs(self, act: str) -> tuple[HostedVm, asyncio.Future[None]]:
        """A VM of whose guest something is asked that its QEMU does not answer."""
        hosted = await self.load(VM)
        await self.vms.start(hosted)
        self.launcher.started[0].hang()
        acting = asyncio.ensure_future(getattr(self.vms, act)(hosted))
        await asyncio.sleep(0)
        return hosted, acting

    def outgoing(self) -> Outgoing:
        page = SimpleNamespace(now=HostSettings(), on_change=lambda _: None)
        return Outgoing(cast(Any, Parts(name="here", page=page, vms=self.vms)), Path(), cast(Any, None))

    async def runs(self, hosted: HostedVm) -> None:
        """Return when it runs."""
        await until(lambda: hosted.state is VmState.RUNNING)

    async def idle(self) -> None:
        """Return when nothing is left to do for VMs that do not run."""
        await self.restarting._background.idle()
        await self.vms._background.idle()

    async def broken_off(self, hosted: HostedVm) -> None:
        """Its QEMU has died, and so its move has ended."""
        await self.vms._background.idle()
        hosted.migration = None
        await self.vms.crashed(hosted)


async def until(holds: Callable[[], bool]) -> None:
    """Return when that holds."""
    while not holds():  # noqa: ASYNC110 - the fakes take a few turns
        await asyncio.sleep(0)


@pytest.fixture
def play(tmp_path: Path) -> Callable[[Callable[[World], Awaitable[None]]], None]:
    def run(scenario: Callable[[World], Awaitable[None]]) -> None:
        async def limited() -> None:
            async with asyncio.timeout(20):
                await scenario(World(tmp_path))

        asyncio.run(limited())

    return run


Play = Callable[[Callable[[World], Awaitable[None]]], None]


class TestInAMove:
    """Its QEMU died while the VM moved."""

    def test_it_is_restarted_if_that_is_wanted(self, play: Play) -> None:
        async def scenario(world: World) -> None:
            hosted = await world.in_a_move(RESTARTS)
            world.launcher.started[0].die("")
            await world.broken_off(hosted)
            assert len(world.launcher.started) == 2
            assert hosted.state is VmState.RUNNING

        play(scenario)

    def test_one_that_dies_when_it_has_just_landed_is_restarted_too(self, play: Play) -> None:
        async def scenario(world: World) -> None:
            hosted = await world.in_a_move(RESTARTS, started_at=None)
            world.launcher.started[0].die("")
            await world.idle()
            assert hosted.state is VmState.CRASHED
            world.vms.landed(hosted, "m1")
            await world.runs(hosted)

        play(scenario)

    def test_one_that_has_landed_and_is_silent_is_not(self, play: Play) -> None:
        async def scenario(world: World) -> None:
            hosted = await world.load_silent(RESTARTS)
            hosted.migration = "m1"
            world.vms.landed(hosted, "m1")
            await world.vms._background.idle()
            assert hosted.state is VmState.CRASHED
            assert "restarted" not in hosted.reason
            assert world.launcher.started == []

        play(scenario)

    def test_a_guest_that_shut_down_stays_so(self, play: Play) -> None:
        async def scenario(world: World) -> None:
            hosted = await world.in_a_move(RESTARTS)
            machine = world.launcher.started[0]
            world.vms._on_event(hosted, Event("SHUTDOWN", {"guest": True}, 0.0))
            machine.die("")
            await world.broken_off(hosted)
            assert (hosted.state, len(world.launcher.started)) == (VmState.STOPPED, 1)

        play(scenario)

    def test_why_it_did_not_go_on_is_forgotten_when_it_runs(self, play: Play) -> None:
        async def scenario(world: World) -> None:
            hosted = await world.in_a_move(VM)
            await world.launcher.started[0].pause()
            hosted.reason = "it cannot go on: an image is locked"
            await world.launcher.started[0].resume()
            assert (hosted.state, hosted.reason) == (VmState.RUNNING, "")

        play(scenario)

    def test_one_that_crashes_at_once_is_left_also_by_the_next_daemon(self, play: Play) -> None:
        async def scenario(world: World) -> None:
            hosted = await world.in_a_move(RESTARTS, started_at=time.time() - CRASH_LOOP_S / 2)
            world.launcher.started[0].die("Segmentation fault")
            await world.broken_off(hosted)
            assert (hosted.state, len(world.launcher.started)) == (VmState.CRASHED, 1)
            await world.vms.crashed(hosted)
            assert hosted.reason == f"Segmentation fault; {LEFT}"
            assert "vm" in world.launcher.left

        play(scenario)

    def test_one_that_cannot_be_restarted_says_why_and_the_move_goes_on_to_its_end(self, play: Play) -> None:
        async def scenario(world: World) -> None:
            hosted = await world.in_a_move(RESTARTS)
            world.launcher.memory_mib = 0
            world.launcher.started[0].die("Segmentation fault")
            await world.broken_off(hosted)
            assert hosted.state is VmState.CRASHED
            assert hosted.reason == "Segmentation fault; it could not be restarted: there is no memory"

        play(scenario)


class TestMemory:
    """It is given to one VM at a time."""

    def test_of_two_that_start_at_once_one_is_refused_where_there_is_memory_for_one(self, play: Play) -> None:
        async def scenario(world: World) -> None:
            first = await world.load(VM)
            second = HostedVm(msgspec.structs.replace(VM, name="other", uuid=OTHER), VmState.STOPPED)
            world.vms._vms["other"] = second
            world.launcher.memory_mib = VM.memory_mib
            done = await asyncio.gather(world.vms.start(first), world.vms.start(second), return_exceptions=True)
            assert [type(one) for one in done] == [type(None), Conflict]
            assert len(world.launcher.started) == 1
            await world.vms.stop(first)
            await world.vms.start(second)

        play(scenario)

    def test_one_that_starts_leaves_none_for_one_that_lands(self, play: Play) -> None:
        async def scenario(world: World) -> None:
            hosted = await world.load(VM)
            landing = msgspec.structs.replace(VM, name="other", uuid=OTHER)
            world.launcher.memory_mib = VM.memory_mib
            world.launcher.has_images = False
            starting = asyncio.ensure_future(world.vms.start(hosted))
            await asyncio.sleep(0)
            with pytest.raises(Conflict):
                world.vms.reserve(landing, "m1")
            with pytest.raises(StorageError):
                await starting
            world.vms.reserve(landing, "m1")

        play(scenario)


class TestASilentQemu:
    """It does not answer a daemon that starts."""

    @pytest.fixture(autouse=True)
    def at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(restarting, "ASK_EVERY_S", 0.0)

    def test_it_is_taken_up_when_it_answers(self, play: Play) -> None:
        async def scenario(world: World) -> None:
            hosted = await world.load_silent(VM)
            with pytest.raises(QemuError, match="does not answer"):
                await world.vms.start(hosted)
            world.restarting.ask_again()
            await asyncio.sleep(0.01)
            assert hosted.fault is not None
            assert hosted.fault.__traceback__ is None  # which would hold on to sockets
            machine = FakeMachine(Wire(), FakeGuest(0))
            await machine.resume()
            world.launcher.silent, world.launcher.found = False, Found(cast(Any, machine), "tcg", LONG_AGO)
            await world.runs(hosted)
            await world.vms.pause(hosted)
            assert hosted.reason == ""

        play(scenario)

    def test_one_that_greets_and_then_says_nothing_is_let_go_of_and_asked_again(
        self, play: Play, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(vms, "ATTACH_WITHIN_S", 0.01)

        async def scenario(world: World) -> None:
            machine = Detachable()
            machine.hang()
            world.launcher.found = Found(cast(Any, machine), "tcg", LONG_AGO)
            world.write(VM)
            (fault,) = await world.vms.load()
            assert str(fault) == "QEMU with pid 7 does not answer"
            assert machine.detached
            hosted = world.vms.get(VM.name)
            assert hosted.machine is None
            world.restarting.ask_again()
            answering = Detachable()
            await answering.resume()
            world.launcher.found = Found(cast(Any, answering), "tcg", LONG_AGO)
            await world.runs(hosted)
            assert hosted.machine is cast(Any, answering)
            assert not answering.detached

        play(scenario)

    def test_one_whose_disks_nobody_knows_is_not_taken_up(self, play: Play) -> None:
        async def scenario(world: World) -> None:
            hosted = await world.load_silent(VM)
            world.restarting.ask_again(but={VM.name})
            world.launcher.silent = False
            await asyncio.wait_for(world.idle(), 1)
            assert hosted.fault is not None

        play(scenario)

    @pytest.mark.parametrize(("config", "starts"), [(VM, False), (RESTARTS, True)])
    def test_one_that_ends_has_crashed(self, play: Play, config: VmConfig, starts: bool) -> None:
        async def scenario(world: World) -> None:
            hosted = await world.load_silent(config)
            world.restarting.ask_again()
            world.launcher.silent, world.launcher.found = False, Found(None, "tcg", LONG_AGO)
            if starts:
                await world.runs(hosted)
            else:
                await world.idle()
                assert hosted.state is VmState.CRASHED
                await world.vms.start(hosted)

        play(scenario)

    def test_it_is_left_to_the_move_that_has_it(self, play: Play) -> None:
        async def scenario(world: World) -> None:
            hosted = await world.load_silent(VM)
            hosted.migration = "m1"
            world.restarting.ask_again()
            world.launcher.silent, world.launcher.found = False, Found(None, "tcg", LONG_AGO)
            await asyncio.sleep(0.01)
            assert hosted.fault is not None
            hosted.migration = None
            await world.idle()
            assert hosted.fault is None

        play(scenario)

    @pytest.mark.parametrize("ends", [True, False])
    def test_what_its_move_has_found_of_it_is_left_to_that(self, play: Play, ends: bool) -> None:
        async def scenario(world: World) -> None:
            given_back: list[str] = []

            async def give_back(config: VmConfig) -> None:
                given_back.append(config.name)

            world.launcher.leasing.give_back = give_back
            hosted = await world.load_silent(RESTARTS)
            hosted.migration = "m1"
            world.restarting.ask_again()
            await asyncio.sleep(0)
            machine = FakeMachine(Wire(), FakeGuest(0))
            found = Found(None if ends else cast(Any, machine), "tcg", LONG_AGO)
            world.launcher.silent, world.launcher.found = False, found
            await world.vms.ask_again(hosted)
            hosted.migration = None
            world.launcher.silent = True  # it has a session, and would not take another
            await world.restarting._background.idle()
            assert world.launcher.attached == 2
            assert hosted.fault is None
            assert (given_back, world.launcher.started) == ([], [])
            world.vms._background.cancel()

        play(scenario)

    def test_its_memory_is_given_to_no_other(self, play: Play) -> None:
        async def scenario(world: World) -> None:
            await world.load_silent(VM)
            world.launcher.memory_mib = VM.memory_mib
            with pytest.raises(Conflict):
                world.vms.reserve(msgspec.structs.replace(VM, name="other", uuid=OTHER), "m1")

        play(scenario)

    def test_several_are_waited_for_at_once(self, play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
        async def scenario(world: World) -> None:
            asked: set[str] = set()
            all_are = asyncio.Event()

            async def attach(config: VmConfig) -> None:
                asked.add(config.name)
                if len(asked) == 2:
                    all_are.set()
                await all_are.wait()
                raise QemuError(f"{config.name} does not answer")

            monkeypatch.setattr(world.launcher, "attach", attach)
            world.write(VM)
            world.write(msgspec.structs.replace(VM, name="other", uuid=OTHER))
            assert [str(fault) for fault in await world.vms.load()] == ["other does not answer", "vm does not answer"]

        play(scenario)


class TestWithoutADaemon:
    """Its QEMU ended while no daemon was there."""

    def test_one_that_is_deleted_meanwhile_stays_deleted(self, play: Play) -> None:
        async def scenario(world: World) -> None:
            hosted = await world.load(RESTARTS, Found(None, "tcg", LONG_AGO))
            world.restarting.restart_died()
            await world.vms.delete(hosted)
            await world.idle()
            assert world.launcher.started == []

        play(scenario)

    @pytest.mark.parametrize(
        ("config", "left", "doubt", "starts"),
        [
            (RESTARTS, False, "", True),
            (VM, False, "", False),
            (RESTARTS, True, "", False),
            (RESTARTS, False, "a journal is damaged", False),
        ],
        ids=["restart", "stop", "left by an earlier daemon", "may run elsewhere"],
    )
    def test_it_is_restarted_if_it_is_to_be(
        self, play: Play, config: VmConfig, left: bool, doubt: str, starts: bool
    ) -> None:
        async def scenario(world: World) -> None:
            hosted = await world.load(config, Found(None, "tcg", LONG_AGO, left))
            assert hosted.state is VmState.CRASHED
            world.vms.doubt = doubt
            world.restarting.restart_died()
            if starts:
                await world.runs(hosted)
            else:
                await world.idle()
            assert len(world.launcher.started) == int(starts)
            assert (hosted.reason == LEFT) is left

        play(scenario)

    def test_a_clock_that_was_set_back_makes_no_crash_loop_of_it(self, play: Play) -> None:
        async def scenario(world: World) -> None:
            hosted = await world.load(RESTARTS, Found(None, "tcg", time.time() + 3600))
            world.restarting.restart_died()
            await world.runs(hosted)
            assert world.launcher.left == []

        play(scenario)

    @pytest.mark.parametrize("config", [RESTARTS, VM], ids=["restart", "stop"])
    def test_of_one_in_a_move_it_is_done_when_that_has_ended(
        self, play: Play, config: VmConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(restarting, "ASK_EVERY_S", 0.001)

        async def scenario(world: World) -> None:
            hosted = await world.load(config, Found(None, "tcg", LONG_AGO))
            hosted.migration = "m1"
            world.restarting.restart_died()
            await asyncio.sleep(0.01)
            assert world.launcher.started == []
            hosted.migration = None
            await (world.runs(hosted) if config is RESTARTS else world.idle())
            assert len(world.launcher.started) == int(config is RESTARTS)

        play(scenario)

    def test_it_is_done_once(self, play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whoever ends the move may have done it."""
        monkeypatch.setattr(restarting, "ASK_EVERY_S", 0.001)

        async def scenario(world: World) -> None:
            hosted = await world.load(RESTARTS, Found(None, "tcg", LONG_AGO))
            hosted.migration = "m1"
            world.restarting.restart_died()
            world.launcher.memory_mib = 0
            hosted.migration = None
            await world.vms.crashed(hosted)
            await world.idle()
            assert hosted.reason.count("could not be restarted") == 1

        play(scenario)


class TestWithoutItsStorage:
    """It is to be restarted, and its image is not there, as on a share that is mounted late."""

    @pytest.fixture(autouse=True)
    def soon(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(restarting, "TRY_EVERY_S", 0.0)

    async def waiting(self, world: World) -> HostedVm:
        """The VM, which could not be started when the daemon came."""
        hosted = await world.load(RESTARTS, Found(None, "tcg", LONG_AGO))
        world.launcher.has_images = False
        world.restarting.restart_died()
        await until(lambda: hosted.awaits is not None)
        return hosted

    def test_it_starts_when_that_is_there(self, play: Play, caplog: pytest.LogCaptureFixture) -> None:
        async def scenario(world: World) -> None:
            hosted = await self.waiting(world)
            assert world.vms.view(hosted).reason == (
                "its QEMU ended while the host daemon was not running; it is restarted once this has passed: "
                "the image is missing"
            )
            await until(lambda: world.launcher.claimed > 2)
            world.launcher.has_images = True
            await world.runs(hosted)
            assert hosted.why == ""
            assert len(world.launcher.started) == 1
            await world.restarting._background.idle()
            assert [record.message for record in caplog.records] == [
                "VM vm is not restarted yet: the image is missing; tried again every 0 s"
            ]

        play(scenario)

    def test_one_that_dies_of_it_under_this_daemon_does_too(self, play: Play) -> None:
        async def scenario(world: World) -> None:
            hosted = await world.load(RESTARTS)
            await world.vms.start(hosted)
            hosted.started_at = LONG_AGO
            world.launcher.has_images = False
            world.launcher.started[0].die("Input/output error")
            await until(lambda: hosted.awaits is not None)
            world.launcher.has_images = True
            await world.runs(hosted)

        play(scenario)

    def test_it_is_given_up_in_the_end(self, play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(restarting, "TRY_FOR_S", 0.0)

        async def scenario(world: World) -> None:
            hosted = await self.waiting(world)
            await world.idle()
            assert hosted.state is VmState.CRASHED
            assert world.vms.view(hosted).reason.endswith("running; it could not be restarted: the image is missing")
            assert world.launcher.claimed == 2

        play(scenario)

    def test_what_no_waiting_mends_ends_it(self, play: Play) -> None:
        async def scenario(world: World) -> None:
            hosted = await self.waiting(world)
            world.launcher.has_images = True
            world.launcher.memory_mib = 0
            await world.idle()
            assert world.vms.view(hosted).reason.endswith("it could not be restarted: there is no memory")

        play(scenario)

    def test_nor_is_a_lease_of_another_host_waited_for(self, play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
        async def refuse(config: VmConfig) -> None:
            raise ImageLeased("another host has it")

        async def scenario(world: World) -> None:
            monkeypatch.setattr(world.launcher, "claim_images", refuse)
            hosted = await world.load(RESTARTS, Found(None, "tcg", LONG_AGO))
            world.restarting.restart_died()
            await world.idle()
            assert hosted.reason.endswith("it could not be restarted: another host has it")

        play(scenario)

    @pytest.mark.parametrize("act", ["start", "stop", "delete"])
    def test_a_persons_act_ends_it(self, play: Play, act: str) -> None:
        async def scenario(world: World) -> None:
            hosted = await self.waiting(world)
            while True:
                with suppress(Conflict):  # it is just being tried
                    try:
                        await getattr(world.vms, act)(hosted)
                    except StorageError:
                        assert act == "start"
                    break
                await asyncio.sleep(0)
            world.launcher.has_images = True
            await world.idle()
            assert world.launcher.started == []
            assert hosted.awaits is None or act == "delete"
            if act == "stop":
                assert (hosted.state, hosted.reason) == (VmState.STOPPED, "")
                assert world.launcher.forgotten == ["vm"], "the next daemon does not restart it either"

        play(scenario)

    def test_it_is_not_tried_while_its_disks_move(self, play: Play) -> None:
        async def scenario(world: World) -> None:
            hosted = await self.waiting(world)
            await until(lambda: not hosted.lock.locked())
            hosted.migration, tried = "m1", world.launcher.claimed
            world.launcher.has_images = True
            for _ in range(20):
                await asyncio.sleep(0)
            assert world.launcher.claimed == tried
            hosted.migration = None
            await world.runs(hosted)

        play(scenario)


class TestWhileItIsPausedOrResumed:
    """An act of a person that QEMU has not answered yet."""

    @pytest.mark.parametrize("act", ["pause", "resume"])
    def test_no_move_begins(self, play: Play, act: str) -> None:
        async def scenario(world: World) -> None:
            hosted, acting = await world.hangs(act)
            with pytest.raises(Conflict, match="is being paused or resumed"):
                await world.outgoing().move(MoveRequest(vm="vm", destination="there"))
            assert hosted.migration is None
            world.launcher.started[0]._answers.set()
            await acting
            world.vms.check_movable(hosted)

        play(scenario)

    @pytest.mark.parametrize("act", ["pause", "resume"])
    def test_a_qemu_that_does_not_answer_can_be_ended(self, play: Play, act: str) -> None:
        async def scenario(world: World) -> None:
            hosted, acting = await world.hangs(act)
            await world.vms.stop(hosted)
            with pytest.raises(QemuGone):
                await acting
            assert (hosted.state, hosted.steered) == (VmState.STOPPED, 0)

        play(scenario)


class TestWhileAJournalIsDamaged:
    """It may be that of any VM, and say that the VM has left."""

    @pytest.mark.parametrize("state", [RunState.POSTMIGRATE, RunState.FINISH_MIGRATE])
    @pytest.mark.parametrize("config", [VM, RESTARTS])
    def test_a_vm_that_was_sent_away_is_not_run_again(self, play: Play, config: VmConfig, state: RunState) -> None:
        async def scenario(world: World) -> None:
            machine = FakeMachine(Wire(), FakeGuest(0))
            machine._run_state = state
            hosted = await world.load(config, Found(cast(Any, machine), "tcg", LONG_AGO))
            world.vms.doubt = "a journal is damaged"
            with pytest.raises(OwnerUnknown, match="a journal is damaged"):
                await world.vms.resume(hosted)
            if config is VM:
                await world.vms.stop(hosted)
            else:
                machine.die("")
            await world.idle()
            with pytest.raises(OwnerUnknown, match="a journal is damaged"):
                await world.vms.start(hosted)
            assert world.launcher.started == []

        play(scenario)

    def test_one_that_did_not_run_is_not_started(self, play: Play) -> None:
        async def scenario(world: World) -> None:
            hosted = await world.load(VM)
            world.vms.doubt = "a journal is damaged"
            with pytest.raises(OwnerUnknown):
                await world.vms.start(hosted)
            assert world.launcher.started == []

        play(scenario)

    def test_one_that_ran_here_works_as_ever(self, play: Play) -> None:
        async def scenario(world: World) -> None:
            machine = FakeMachine(Wire(), FakeGuest(0))
            await machine.resume()
            hosted = await world.load(VM, Found(cast(Any, machine), "tcg", LONG_AGO))
            world.vms.doubt = "a journal is damaged"
            await world.vms.pause(hosted)
            await world.vms.resume(hosted)
            await world.vms.stop(hosted)
            await world.vms.start(hosted)
            assert len(world.launcher.started) == 1

        play(scenario)

    def test_one_whose_own_move_says_that_it_stayed_is_restarted(self, play: Play) -> None:
        async def scenario(world: World) -> None:
            hosted = await world.load(RESTARTS, Found(None, "tcg", LONG_AGO))
            world.vms.doubt = "a journal is damaged"
            await world.vms.crashed(hosted)  # as after a move of its disks, which says nothing of that
            assert world.launcher.started == []
            hosted.stayed()
            await world.vms.crashed(hosted)
            assert len(world.launcher.started) == 1

        play(scenario)
