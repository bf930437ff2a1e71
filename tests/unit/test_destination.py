"""The destination's script when something is wrong: a QEMU that lives but answers nothing or refuses, a person's word
that nobody needs. Nobody waits for such a QEMU, and nothing is guessed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import msgspec
import pytest

from harness.landings import VM, BareLanding, header
from limosa.errors import (
    Conflict,
    DestinationLost,
    OutcomeUnknown,
    OwnerUnknown,
    QemuError,
    QemuGone,
    StateError,
    StorageError,
)
from limosa.host import incoming
from limosa.migration import destination as script
from limosa.migration import interruption
from limosa.migration.destination import Destination
from limosa.migration.journal import Journal
from limosa.migration.ownership import DestinationStep
from limosa.model.migration import Outcome, Side
from limosa.qemu.protocol import MigrationState, RunState
from limosa.testing.machine import FakeMachine
from limosa.testing.wire import Wire
from limosa.wire.peer import DestinationState, Prepare

IMAGE = "/images/vm-vda.m1.qcow2"


async def prepared(folder: Path, *images: str) -> tuple[Destination, FakeMachine]:
    """A landing that awaits its stream."""
    place = BareLanding(Wire())
    journal = Journal.begin(folder, msgspec.structs.replace(header(Side.DESTINATION), images=images))
    landing = Destination(journal, place, boot="boot")
    request = Prepare(
        migration="m1", vm=VM, accelerator="kvm", running=True, transport="tcp", credentials=None, post_copy=False
    )
    await landing.prepare(request, lambda place: None, lambda layers: None)
    return landing, place.machine


async def loaded(folder: Path, *images: str) -> tuple[Destination, FakeMachine]:
    """The same when the whole state of the guest is there."""
    landing, machine = await prepared(folder, *images)
    machine._loaded(MigrationState.COMPLETED)
    return landing, machine


async def with_silent_qemu(folder: Path) -> tuple[Destination, FakeMachine]:
    """A landing that was prepared, and whose QEMU then hung."""
    landing, machine = await prepared(folder)
    machine.hang()
    return landing, machine


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in ("ANSWER_WITHIN_S", "LOAD_WITHIN_S"):
        monkeypatch.setattr(script, limit, 0.01)
    monkeypatch.setattr(interruption, "DYING_S", 0.01)


def test_it_is_kept_because_it_may_have_the_guest(tmp_path: Path) -> None:
    async def scenario() -> None:
        landing, machine = await with_silent_qemu(tmp_path)
        await landing.abandoned()
        assert landing.step is DestinationStep.RESERVED
        assert not machine.gone.is_set()
        assert (await landing.standing()).state is DestinationState.LOADED
        await landing.abort("the source has it")

    asyncio.run(scenario())


def test_a_source_that_asks_and_aborts_has_it_destroyed(tmp_path: Path) -> None:
    async def scenario() -> None:
        landing, machine = await with_silent_qemu(tmp_path)
        asking = asyncio.ensure_future(landing.standing())
        await asyncio.gather(asking, landing.abort("the move was cancelled"))
        assert landing.step is DestinationStep.GONE
        assert machine.gone.is_set()
        assert (await landing.standing()).state is DestinationState.GONE

    asyncio.run(scenario())


def test_it_is_not_continued_and_the_source_is_told(tmp_path: Path) -> None:
    async def scenario() -> None:
        landing, machine = await with_silent_qemu(tmp_path)
        with pytest.raises(DestinationLost, match="did not arrive completely"):
            await landing.take_over()
        assert landing.step is DestinationStep.GONE
        assert machine.gone.is_set()

    asyncio.run(scenario())


def test_a_person_cannot_have_it_continued(tmp_path: Path) -> None:
    async def scenario() -> None:
        landing, machine = await with_silent_qemu(tmp_path)
        await landing.abandoned()
        with pytest.raises(QemuError, match="does not answer"):
            await landing.resolve(here=True)
        assert not machine.gone.is_set()
        await landing.resolve(here=False)
        assert machine.gone.is_set()

    asyncio.run(scenario())


def refuse(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch, error: QemuError | None = None) -> None:
    """Have ``cont`` fail."""

    async def resume() -> float:
        raise error or QemuError("QEMU refused cont", why='Failed to get "write" lock')

    monkeypatch.setattr(machine, "resume", resume)


def test_a_guest_that_qemu_refuses_to_run_is_given_up_for_the_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        landing, machine = await loaded(tmp_path)
        refuse(machine, monkeypatch)
        with pytest.raises(DestinationLost, match="refused to run it") as caught:
            await landing.take_over()
        assert "write" in caught.value.why
        assert machine.gone.is_set()
        assert (await landing.standing()).state is DestinationState.GONE

    asyncio.run(scenario())


@pytest.mark.parametrize("why", ["no answer", "it has run", "post-copy"])
def test_one_that_may_have_run_or_whose_memory_is_in_two_places_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    async def scenario() -> None:
        landing, machine = await loaded(tmp_path)
        if why == "it has run":
            await machine.resume()
            await machine.pause()
        if why == "post-copy":
            machine._loaded(MigrationState.POSTCOPY_ACTIVE)
        refuse(machine, monkeypatch, OutcomeUnknown("QEMU did not answer cont") if why == "no answer" else None)
        with pytest.raises(QemuError):
            await landing.take_over()
        assert not machine.gone.is_set()
        assert (await landing.standing()).state is DestinationState.OWNED
        landing._unfollow()

    asyncio.run(scenario())


def unwritable(landing: Destination, monkeypatch: pytest.MonkeyPatch, *steps: DestinationStep) -> None:
    """Have these steps not be written."""
    record = landing.journal.record

    def full(step: DestinationStep, at: float, **more: Any) -> None:
        if step in steps:
            raise StateError("cannot write the journal", why="No space left on device")
        record(step, at, **more)

    monkeypatch.setattr(landing.journal, "record", full)


@pytest.mark.parametrize("dies", [False, True])
def test_what_was_destroyed_is_never_taken_for_a_vm_that_crashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies: bool
) -> None:
    """Though the disk was full when its end was to be written, and the source has been told to go on."""

    async def scenario() -> None:
        landing, machine = await loaded(tmp_path)
        unwritable(landing, monkeypatch, DestinationStep.GONE)
        refuse(machine, monkeypatch, QemuGone("QEMU has ended") if dies else None)
        with pytest.raises(DestinationLost):
            await landing.take_over()
        assert (await landing.standing()).state is DestinationState.GONE
        lines = Journal(landing.journal.path, landing.journal.header, list(landing.journal.records))
        following = Destination(lines, landing.landing, "boot")
        assert (await following.standing()).state is DestinationState.GONE
        await following.abandoned()
        assert following.step is DestinationStep.GONE

    asyncio.run(scenario())


def test_it_is_destroyed_once_whatever_becomes_of_the_line_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name may be another's when it is tried again."""

    async def scenario() -> None:
        landing, _ = await loaded(tmp_path)
        release = AsyncMock()
        monkeypatch.setattr(landing.landing, "release", release)
        with monkeypatch.context() as patch:
            unwritable(landing, patch, DestinationStep.GONE)
            await landing.abort("the move was cancelled")
            await landing.abandoned()
            with pytest.raises(DestinationLost):
                await landing.take_over()
            with pytest.raises(StateError):
                await landing.ended()
            assert landing.journal.step == DestinationStep.RESERVED
            assert incoming.view(landing).outcome is Outcome.FAILED
        await landing.ended()
        assert landing.journal.step == DestinationStep.GONE
        release.assert_awaited_once()

    asyncio.run(scenario())


def test_nothing_is_destroyed_while_it_is_written_that_the_guest_is_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        landing, machine = await loaded(tmp_path)
        unwritable(landing, monkeypatch, DestinationStep.RESERVED, DestinationStep.GONE)
        refuse(machine, monkeypatch)
        with pytest.raises(StateError):
            await landing.take_over()
        assert not machine.gone.is_set()
        assert (await landing.standing()).state is DestinationState.OWNED
        ran = landed_as(landing, monkeypatch)
        await landing.adopted()
        assert (landing.step, ran) == (DestinationStep.OWNED, [False])

    asyncio.run(scenario())


def landed_as(landing: Destination, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the VM ran each time that it was made this host's."""
    ran: list[bool] = []

    async def adopt(*, running: bool) -> None:
        ran.append(running)

    monkeypatch.setattr(landing.landing, "adopt", adopt)
    return ran


def test_one_that_a_person_gave_to_this_host_is_its_though_qemu_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        landing, machine = await loaded(tmp_path)
        await landing.abandoned()
        refuse(machine, monkeypatch)
        ran = landed_as(landing, monkeypatch)
        with pytest.raises(QemuError, match="refused cont"):
            await landing.resolve(here=True)
        assert not machine.gone.is_set()
        assert (landing.step, ran) == (DestinationStep.OWNED, [False])

    asyncio.run(scenario())


def test_one_that_a_person_gave_to_this_host_and_whose_qemu_dies_has_crashed_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its disks may be the only ones."""

    async def scenario() -> None:
        landing, machine = await loaded(tmp_path, IMAGE)
        await landing.abandoned()
        machine.die("")
        ran, release = landed_as(landing, monkeypatch), AsyncMock()
        monkeypatch.setattr(landing.landing, "release", release)
        with pytest.raises(QemuGone):
            await landing.resolve(here=True)
        assert (landing.step, ran) == (DestinationStep.OWNED, [False])
        release.assert_not_called()

    asyncio.run(scenario())


@asynccontextmanager
async def in_the_way(
    what: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Destination, FakeMachine]]:
    """A landing that cannot be continued while this lasts; it may have the whole guest."""
    landing, machine = await prepared(folder, IMAGE)
    end_exports = machine.end_exports
    ends = asyncio.Event()

    async def hangs() -> None:
        await ends.wait()
        await end_exports()

    async def broken() -> None:
        raise StorageError("cannot write the lease", why="Input/output error")

    with monkeypatch.context() as patch:
        match what:
            case "the lease":
                patch.setattr(landing.landing, "claim", broken)
            case "the journal":
                unwritable(landing, patch, DestinationStep.CONTINUING)
            case "the exports":
                patch.setattr(machine, "end_exports", hangs)
        if what == "the state":
            machine.hang()
            await landing.abandoned()
            machine.answer_again()
        else:
            machine._loaded(MigrationState.COMPLETED)
            await landing.abandoned()
        yield landing, machine
    ends.set()
    if what == "the state":
        machine._loaded(MigrationState.COMPLETED)


OBSTACLES = ("the lease", "the journal", "the exports", "the state")


@pytest.mark.parametrize("what", OBSTACLES)
def test_what_a_person_gave_to_this_host_is_kept_whatever_is_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """It may be the only copy."""

    async def scenario() -> None:
        async with in_the_way(what, tmp_path, monkeypatch) as (landing, machine):
            for _ in range(2):
                with pytest.raises(OwnerUnknown, match="is kept there"):
                    await landing.resolve(here=True)
                assert landing.step is DestinationStep.RESERVED
                assert not machine.gone.is_set()
        await landing.resolve(here=True)
        assert landing.step is DestinationStep.OWNED
        assert await machine.status() is RunState.RUNNING

    asyncio.run(scenario())


@pytest.mark.parametrize("what", OBSTACLES)
def test_what_the_source_hands_over_is_given_up_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    async def scenario() -> None:
        async with in_the_way(what, tmp_path, monkeypatch) as (landing, machine):
            with pytest.raises(DestinationLost):
                await landing.take_over()
            assert landing.step is DestinationStep.GONE
            assert machine.gone.is_set()

    asyncio.run(scenario())


def test_it_is_unresolved_while_no_session_with_its_source_lasts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        landing, _ = await loaded(tmp_path)
        landing.attended()
        shown = [incoming.view(landing).outcome]
        await landing.abandoned()
        shown.append(incoming.view(landing).outcome)
        landing.attended()
        shown.append(incoming.view(landing).outcome)
        assert shown == [Outcome.UNDER_WAY, Outcome.UNRESOLVED, Outcome.UNDER_WAY]
        await landing.take_over()
        await landing.abandoned()
        assert incoming.view(landing).outcome is Outcome.COMPLETED

    monkeypatch.setattr(script, "UNRESOLVED_AFTER_S", 0.0)
    asyncio.run(scenario())


def test_it_is_not_called_unresolved_at_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        landing, _ = await loaded(tmp_path)
        await landing.abandoned()
        assert not landing.is_unresolved

    asyncio.run(scenario())


@pytest.mark.parametrize("here", [False, True])
def test_a_person_decides_only_when_the_source_has_gone_away(tmp_path: Path, here: bool) -> None:
    async def scenario() -> None:
        landing, machine = await loaded(tmp_path)
        with pytest.raises(Conflict, match="needs no decision"):
            await landing.resolve(here=here)
        assert landing.step is DestinationStep.RESERVED
        assert await machine.status() is RunState.PAUSED
        await landing.abandoned()
        landing.attended()
        landing.attended()
        await landing.abandoned()  # of two sessions the one that had broken
        with pytest.raises(Conflict, match="needs no decision"):
            await landing.resolve(here=here)
        await landing.abandoned()
        await landing.resolve(here=here)
        assert landing.step is (DestinationStep.OWNED if here else DestinationStep.GONE)

    asyncio.run(scenario())


def test_a_guest_that_was_continued_runs_though_its_qemu_waits_for_a_page(tmp_path: Path) -> None:
    async def scenario() -> None:
        landing, _ = await with_silent_qemu(tmp_path)
        landing.journal.record(DestinationStep.CONTINUING, 0.0)
        landing._resumed_at = 1.0
        await landing.adopted()  # BareLanding asserts that it runs
        assert landing.step is DestinationStep.OWNED

    asyncio.run(scenario())


LONG_S = 1000.0


@pytest.mark.parametrize("whole", [False, True])
def test_what_waits_here_is_kept_if_the_source_comes_back(tmp_path: Path, whole: bool) -> None:
    async def scenario() -> None:
        landing, machine = await prepared(tmp_path)
        landing.attended()
        ending = asyncio.ensure_future(landing.abandoned(wait_s=LONG_S))
        await asyncio.sleep(0)
        if whole:
            machine._loaded(MigrationState.COMPLETED)
        landing.attended()
        await ending
        state = (await landing.standing()).state
        assert state is (DestinationState.LOADED if whole else DestinationState.INCOMING)
        assert not landing._given_up.is_set()
        assert not landing.is_unresolved
        await landing.abandoned()
        assert landing.step is (DestinationStep.RESERVED if whole else DestinationStep.GONE)
        landing._unfollow()

    asyncio.run(scenario())


def test_nothing_is_decided_while_there_is_another_session(tmp_path: Path) -> None:
    async def scenario() -> None:
        landing, _ = await prepared(tmp_path)
        landing.attended()
        landing.attended()
        await landing.abandoned(wait_s=LONG_S)
        assert (await landing.standing()).state is DestinationState.INCOMING
        await landing.abandoned()
        assert landing.step is DestinationStep.GONE

    asyncio.run(scenario())


def test_what_is_incomplete_is_destroyed_if_the_source_does_not_come_back(tmp_path: Path) -> None:
    async def scenario() -> None:
        landing, machine = await prepared(tmp_path)
        landing.attended()
        await landing.abandoned(wait_s=0.01)
        assert landing.step is DestinationStep.GONE
        assert machine.gone.is_set()

    asyncio.run(scenario())


@pytest.mark.parametrize("why", ["QEMU dies", "the daemon ends", "it is aborted", "a person decides"])
def test_nobody_is_waited_for_any_more(tmp_path: Path, why: str) -> None:
    async def scenario() -> None:
        landing, machine = await prepared(tmp_path)
        landing.attended()
        ending = asyncio.ensure_future(landing.abandoned(wait_s=LONG_S))
        await asyncio.sleep(0)
        match why:
            case "QEMU dies":
                machine.die("")
            case "the daemon ends":
                landing.expect_nobody()
            case "it is aborted":
                await landing.abort("the move was undone")
            case _:
                await landing.resolve(here=False)
        await ending
        assert landing.step is DestinationStep.GONE

    asyncio.run(scenario())


def test_it_is_given_to_this_host_only_when_nobody_is_waited_for_any_more(tmp_path: Path) -> None:
    async def scenario() -> None:
        landing, _ = await loaded(tmp_path)
        landing.attended()
        ending = asyncio.ensure_future(landing.abandoned(wait_s=LONG_S))
        await asyncio.sleep(0)
        with pytest.raises(Conflict, match="cannot be decided yet"):
            await landing.resolve(here=True)
        landing.expect_nobody()
        await ending
        await landing.resolve(here=True)
        assert landing.step is DestinationStep.OWNED

    asyncio.run(scenario())


def test_a_whole_guest_is_held_from_the_end_of_the_session_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "UNRESOLVED_AFTER_S", 0.01)

    async def scenario() -> None:
        landing, _ = await loaded(tmp_path)
        landing.attended()
        await landing.abandoned(wait_s=0.01)
        assert landing.is_unresolved
        landing._unfollow()

    asyncio.run(scenario())


def test_a_session_that_was_waited_for_in_vain_and_begins_late_finds_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        landing, _ = await prepared(tmp_path)
        landing.attended()
        await landing.abandoned(wait_s=0.01)
        landing.attended()
        assert (await landing.standing()).state is DestinationState.GONE
        with pytest.raises(DestinationLost):
            await landing.take_over()

    asyncio.run(scenario())
