"""Steering a copy that runs, by looks at QEMU alone: what waits on the way, what is cut off, who stands still."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

import pytest

from harness.channels import BareChannel
from harness.landings import header
from limosa.errors import MigrationFailed, NotConverging, QemuError
from limosa.migration import convergence, steering
from limosa.migration.steering import Steering
from limosa.model.migration import Side
from limosa.model.storage import DiskAction, DiskPlan
from limosa.qemu.protocol import MigrationState, MigrationStatistics, RunState
from limosa.settings.host import ConvergencePolicy
from limosa.testing.guest import FakeGuest
from limosa.testing.machine import FakeMachine
from limosa.testing.wire import Wire

PACE = 100.0


class Channel(BareChannel):
    """A stream that notes in ``asked`` whether little may wait in it, and in ``paced`` how fast it may be."""

    def __init__(self, stream: socket.socket) -> None:
        self.stream = stream
        self.asked: list[bool] = []
        self.paced = 0

    def set_short(self, short: bool, pace: float) -> None:
        self.asked.append(short)

    def pace(self, bytes_per_s: int) -> bool:
        self.paced = bytes_per_s
        return True

    def close(self) -> None:
        self.stream.close()


class World:
    """A guest whose memory is sent under a policy."""

    def __init__(self, **policy: Any) -> None:
        self.machine = FakeMachine(Wire(), FakeGuest(0))
        ours, self.theirs = socket.socketpair()
        self.channel = Channel(ours)
        self.steering = Steering(
            self.machine, header(Side.SOURCE), ConvergencePolicy(auto_converge=False, **policy), lambda _: 0
        )
        self.steering.take_memory(self.channel)
        self.sent = 0

    async def look(self, remaining: int, rate: float = PACE) -> None:
        self.sent += 1
        look = MigrationStatistics(
            MigrationState.ACTIVE,
            transferred_bytes=self.sent,
            remaining_bytes=remaining,
            rate_bytes_per_s=rate,
            iteration=2,
        )
        await self.steering.steer(look, PACE)

    async def asked(self, *remaining: int) -> list[bool]:
        for one in remaining:
            await self.look(one)
        return self.channel.asked


def play(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def within_time() -> None:
        async with asyncio.timeout(20):
            await scenario()

    asyncio.run(within_time())


@pytest.fixture
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look that shows no progress is enough for the next step."""
    monkeypatch.setattr(convergence, "STALL_S", 0.0)


def test_little_waits_on_the_way_when_the_guest_may_stop_soon() -> None:
    async def scenario() -> None:
        assert await World(first_downtime_ms=2).asked(100, 20, 100) == [True, False]
        assert await World(first_downtime_ms=2000, blackout_budget_ms=2000).asked(200, 400) == [True, False]

    play(scenario)


@pytest.mark.usefixtures("_impatient")
def test_little_waits_on_the_way_in_post_copy() -> None:
    async def scenario() -> None:
        world = World(first_downtime_ms=2, blackout_budget_ms=2, post_copy=True)
        with suppress(QemuError):  # whatever it answers
            await world.asked(400, 400)
        assert world.channel.asked == [True]

    play(scenario)


def test_a_stream_is_told_again_when_it_has_become_much_faster_or_slower() -> None:
    async def scenario() -> None:
        world = World(first_downtime_ms=2)
        for rate in (100.0, 100.0, 300.0, 400.0, 100.0):
            await world.look(20, rate)
        assert world.channel.asked == [True, True, True]  # the first time, and for 300 and the last

    play(scenario)


def test_little_waits_on_the_way_from_the_second_pass_on() -> None:
    async def scenario() -> None:
        world = World()
        world.steering.pass_began()
        assert world.channel.asked == [True]
        world.steering.close()
        world.steering.pass_began()
        assert world.channel.asked == [True]

    play(scenario)


class Beginning(FakeMachine):
    """A QEMU whose copies take their time to begin, with their caps."""

    def __init__(self) -> None:
        super().__init__(Wire(), FakeGuest(0))
        self.caps: dict[str, int] = {}
        self.asked: asyncio.Queue[str] = asyncio.Queue()
        #: there are jobs from now on, and they keep account of writes from now on
        self.is_there, self.has_begun = asyncio.Event(), asyncio.Event()

    async def copy_to_host(
        self, disk: str, tag: str, stream: socket.socket, bytes_per_s: int, *, whole: bool, encrypt: bool
    ) -> None:
        self.asked.put_nowait(disk)
        await self.is_there.wait()
        self.caps[disk] = bytes_per_s
        await self.has_begun.wait()

    async def cap_copy(self, disk: str, bytes_per_s: int) -> None:
        if disk in self.caps:
            self.caps[disk] = bytes_per_s


@pytest.mark.parametrize("is_there", [True, False])
def test_a_cap_that_changes_while_copies_begin_is_kept(is_there: bool) -> None:
    """From zeroing on, which may take minutes."""

    async def scenario() -> None:
        machine = Beginning()
        steered = Steering(machine, header(Side.SOURCE), ConvergencePolicy(), lambda _: 40)
        plans = [DiskPlan(disk=disk, action=DiskAction.COPY, path="/d", format="raw") for disk in ("vda", "vdb")]
        channels = [Channel(stream) for stream in socket.socketpair()]
        beginning = asyncio.ensure_future(steered.copy_disks(plans, channels, None))
        assert await machine.asked.get() == "vda"
        if is_there:
            machine.is_there.set()
            await asyncio.sleep(0)
        await steered.cap_copies(100)
        assert machine.caps == ({"vda": 50} if is_there else {})
        assert [channel.paced for channel in channels] == [50, 50]
        machine.is_there.set()
        machine.has_begun.set()
        await beginning
        assert machine.caps == {"vda": 50, "vdb": 50}
        steered.close()

    play(scenario)


def test_what_the_guest_writes_to_disks_is_copied_at_once_while_it_may_stop() -> None:
    async def scenario() -> None:
        world = World(first_downtime_ms=2)
        plan = DiskPlan(disk="vda", action=DiskAction.COPY, path="/d", format="raw")
        disk_channel = Channel(world.channel.stream.dup())
        await world.steering.copy_disks([plan], [disk_channel], None)
        hurrying = asyncio.ensure_future(world.steering.hurry_copies())
        await world.look(100)
        await asyncio.sleep(0)
        assert (world.machine.hurried, disk_channel.asked) == ([], [])
        await world.look(20)
        while len(world.machine.hurried) < 3:  # noqa: ASYNC110 - the fake tells nobody
            await asyncio.sleep(0)
        assert disk_channel.asked == [True]
        world.steering.guest_stopped()
        await hurrying
        world.steering.close()

    play(scenario)


def test_without_disks_there_is_nothing_to_hurry() -> None:
    async def scenario() -> None:
        world = World()
        world.steering.pass_began()
        await world.steering.hurry_copies()
        assert world.machine.hurried == []

    play(scenario)


@pytest.mark.usefixtures("_impatient")
@pytest.mark.parametrize("way", ["post-copy", "sent", "not sent"])
def test_only_a_stream_that_has_more_and_a_way_back_is_cut_off(way: str) -> None:
    async def scenario() -> None:
        world = World(first_downtime_ms=2, blackout_budget_ms=2, post_copy=way == "post-copy")
        if way == "post-copy":
            with suppress(QemuError):  # whatever it answers
                await world.asked(400, 400)
        world.steering.cut_off(sent=way == "sent")
        if way == "not sent":
            with pytest.raises(BrokenPipeError):
                world.channel.stream.send(b"a page")
        else:
            world.channel.stream.send(b"a page")

    play(scenario)


@pytest.mark.usefixtures("_impatient")
def test_a_move_that_nothing_helps_is_given_up() -> None:
    async def scenario() -> None:
        world = World(first_downtime_ms=2, blackout_budget_ms=2, patience_s=0)
        await world.look(400)
        with pytest.raises(NotConverging, match="does not converge"):
            await world.look(400)

    play(scenario)


@pytest.mark.parametrize("state", list(RunState))
def test_only_a_guest_that_the_move_has_stopped_stands_still_too_long(
    monkeypatch: pytest.MonkeyPatch, state: RunState
) -> None:
    monkeypatch.setattr(steering, "STANDS_STILL_S", 0.0)

    async def scenario() -> None:
        world = World()

        async def status() -> RunState:
            return state

        monkeypatch.setattr(world.machine, "status", status)
        waiting = asyncio.ensure_future(world.steering.stands_still_too_long())
        await asyncio.sleep(0)
        assert not waiting.done()
        world.steering.guest_stopped()
        if state is RunState.FINISH_MIGRATE:
            with pytest.raises(MigrationFailed, match="did not load the rest"):
                await waiting
        else:
            await waiting

    play(scenario)
