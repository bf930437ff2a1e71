"""What the fake machine has beyond the contract: memory to compare, brakes, failures on demand."""

from __future__ import annotations

import asyncio
import socket

import pytest

from limosa.errors import QemuError
from limosa.qemu.protocol import MigrationState, RunState, StreamParameters
from limosa.testing.guest import FakeGuest
from limosa.testing.machine import FakeMachine
from limosa.testing.wire import Stage, Wire

MIB = 1024 * 1024


async def pair(
    wire: Wire, guest: FakeGuest, parameters: StreamParameters | None = None
) -> tuple[FakeMachine, FakeMachine]:
    """A source that runs and has begun to migrate, and its destination."""
    parameters = parameters or StreamParameters()
    source, destination = FakeMachine(wire, guest), FakeMachine(wire, incoming=True)
    await source.resume()
    await source.prepare_outgoing(parameters)
    await destination.prepare_incoming(parameters)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        await destination.receive(theirs)
        await source.migrate(ours)
    return source, destination


async def ending(source: FakeMachine) -> MigrationState:
    over = asyncio.Event()
    endings = (MigrationState.COMPLETED, MigrationState.FAILED, MigrationState.CANCELLED)
    source.on_event(lambda event: over.set() if event.data.get("status") in endings else None)
    await over.wait()
    return (await source.migration()).state


def test_memory_arrives_although_the_guest_writes() -> None:
    async def scenario() -> None:
        source, destination = await pair(Wire(), FakeGuest(64 * MIB, 20e6), StreamParameters(downtime_limit_ms=10))
        assert await ending(source) is MigrationState.COMPLETED
        assert source.guest.pages == destination.guest.pages
        assert any(source.guest.pages)
        look = await source.migration()
        assert look.iteration > 2
        assert 0.5 < look.total_s < 1.0  # 64 MiB and what was written meanwhile, at 125 MB/s

    asyncio.run(scenario())


def test_a_guest_that_writes_faster_than_the_wire_needs_the_throttle() -> None:
    async def scenario() -> None:
        wire = Wire(bandwidth_bytes_per_s=50e6)
        source, _ = await pair(wire, FakeGuest(32 * MIB, 70e6), StreamParameters(downtime_limit_ms=10))
        await wire.passes(20)
        assert (await source.migration()).state is MigrationState.ACTIVE
        await source.set_throttle(99, 30)
        assert await ending(source) is MigrationState.COMPLETED
        assert (await source.migration()).throttle_percent > 30

    asyncio.run(scenario())


@pytest.mark.parametrize("stage", list(Stage))
def test_it_waits_where_it_is_held(stage: Stage) -> None:
    async def scenario() -> None:
        wire = Wire()
        wire.hold(stage)
        source, _ = await pair(wire, FakeGuest(MIB))
        await wire.reached(stage)
        assert (await source.migration()).state is not MigrationState.COMPLETED
        stopped = stage in (Stage.SWITCHOVER, Stage.LOADED)
        assert await source.status() is (RunState.FINISH_MIGRATE if stopped else RunState.RUNNING)
        if stopped:
            with pytest.raises(QemuError, match="cont"):
                await source.resume()
        wire.release(stage)
        assert await ending(source) is MigrationState.COMPLETED

    asyncio.run(scenario())


@pytest.mark.parametrize("stage", list(Stage))
@pytest.mark.parametrize("cancelled", [False, True])
def test_it_breaks_where_it_shall(stage: Stage, cancelled: bool) -> None:
    """The guest goes on at the source; a destination that has the whole state stays, paused."""

    async def scenario() -> None:
        wire = Wire()
        if cancelled:
            wire.hold(stage)
        else:
            wire.failures[stage] = "Broken pipe"
        source, destination = await pair(wire, FakeGuest(MIB))
        if cancelled:
            await wire.reached(stage)
            await source.cancel_migration()
        expected = MigrationState.CANCELLED if cancelled else MigrationState.FAILED
        assert await ending(source) is expected
        assert await source.status() is RunState.RUNNING
        assert destination.gone.is_set() is (stage is not Stage.LOADED)
        if stage is Stage.LOADED:
            assert await destination.status() is RunState.PAUSED

    asyncio.run(scenario())
