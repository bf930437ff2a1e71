"""What waits for a disk waits in a thread: on the event loop another VM may be standing still meanwhile."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import AsyncMock

import pytest
import test_host_storage
from test_again import Move, breaks
from test_journal import VM

from limosa.errors import Conflict, LimosaError, StateError, StorageError
from limosa.host.files import Files
from limosa.host.launching import Launcher
from limosa.host.page import Page
from limosa.host.process_records import ProcessRecords
from limosa.host.storage import Storage
from limosa.host.vms import HostedVm, Vms
from limosa.migration.ownership import DestinationStep, SourceStep
from limosa.migration.settle import Settlement
from limosa.model.vm import Disk, VmState
from limosa.qemu.machine import Machine
from limosa.storage import leases, marks
from limosa.testing.wire import Stage

storage = test_host_storage.storage


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """For each time a disk was waited for, whether an event loop waited with it."""
    waits: list[bool] = []
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        waits.append(asyncio._get_running_loop() is not None)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    yield waits
    assert waits, "nothing was durable"
    assert not any(waits), "the event loop has waited for a disk"


@pytest.fixture
def vms(tmp_path: Path) -> Vms:
    files = Files(tmp_path / "state", tmp_path / "run")
    files.make()
    leasing = SimpleNamespace(give_back=AsyncMock())
    records = SimpleNamespace(forget_ended=lambda _: None)
    return Vms("host1", files, cast(Any, SimpleNamespace(leasing=leasing, records=records)))


def landing(vms: Vms) -> HostedVm:
    hosted = HostedVm(VM, VmState.INCOMING)
    vms._folders.make(VM)
    vms._vms["web1"] = hosted
    return hosted


def test_a_move_that_is_tried_twice(tmp_path: Path, synced: list[bool]) -> None:
    async def scenario() -> None:
        move = Move(tmp_path)
        synced.clear()  # of what the test itself has begun
        breaks(Stage.COPY)(move)
        await move.run()
        assert [one.step for one in move.tries] == [DestinationStep.GONE, DestinationStep.OWNED]

    asyncio.run(scenario())


def test_a_move_that_is_undone(tmp_path: Path, synced: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        move = Move(tmp_path)
        synced.clear()
        monkeypatch.setattr(move.home, "vm_stays", AsyncMock())
        move.script.cancel()
        with pytest.raises(LimosaError) as caught:
            await move.run()
        await Settlement(move.script, caught.value).run()
        undone = [SourceStep.UNDOING, SourceStep.HOME, SourceStep.UNDONE]
        assert [record.step for record in move.journal.records][-3:] == undone

    asyncio.run(scenario())


def test_a_vm_that_lands_gets_other_disks_and_leaves(vms: Vms, synced: list[bool]) -> None:
    async def scenario() -> None:
        hosted = landing(vms)
        await vms.adopt(hosted, running=True)
        await vms.change_disks(hosted, (Disk(name="vda", path="/a.qcow2", format="qcow2"),))
        assert [config.disks for config in vms._folders.read()] == [hosted.config.disks]
        await vms.forget(hosted)
        assert vms._folders.read() == []
        with pytest.raises(Conflict, match="has a VM of that name already"):
            vms.reserve(VM, "abcdefabcdef")
        vms.free_name(hosted)
        assert vms.find("web1") is None

    asyncio.run(scenario())


def test_a_vm_that_is_deleted_is_left_alone_meanwhile(vms: Vms, synced: list[bool]) -> None:
    async def scenario() -> None:
        hosted = landing(vms)
        await vms.adopt(hosted, running=True)
        hosted.state = VmState.STOPPED
        deleting = asyncio.ensure_future(vms.delete(hosted))
        await asyncio.sleep(0)
        with pytest.raises(Conflict):
            await vms.start(hosted)
        await deleting
        assert vms.find("web1") is None

    asyncio.run(scenario())


def at_each_sync(monkeypatch: pytest.MonkeyPatch, look: Callable[[], object]) -> list[object]:
    """What ``look`` sees each time before a disk is waited for."""
    seen: list[object] = []
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        seen.append(look())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    return seen


def test_a_mark_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, synced: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut would leave one that says nothing, for ever."""
    image = str(tmp_path / "web1-vda.abcdefabcdef.qcow2")
    has = at_each_sync(monkeypatch, lambda: marks.has(image))
    marks.begin(image, marks.Mark(host="host1", at=1.5))
    assert has == [False, True], "its contents, then its name"
    (mark,) = tmp_path.iterdir()
    assert mark.stat().st_mode & 0o044 == 0o044


def test_a_mark_that_cannot_be_durable_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(StorageError, match="Input/output error"):
        marks.begin(str(tmp_path / "web1.qcow2"), marks.Mark(host="host1", at=1.5))
    assert list(tmp_path.iterdir()) == []


def test_a_lease_is_on_the_disk_before_it_counts(
    tmp_path: Path, synced: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut would leave one that nobody can read, and its VM could not be started. Making a change that is
    prepared is in the blackout, and waits for no disk."""
    image = str(tmp_path / "web1.qcow2")
    rule = leases.Rule(image, "host1", "boot", VM.uuid, "machine")
    holders = at_each_sync(monkeypatch, lambda: leases.read(image).host)
    with leases.Change(image, rule.take(leases.read(image))) as change:
        assert holders == ["", ""], "its contents, then its name"
        assert change.make()
    assert leases.read(image).host == "host1"
    assert holders == ["", ""]


class Launched(SimpleNamespace):
    """A QEMU that has just been started."""

    def __init__(self) -> None:
        super().__init__(pid=1, process=SimpleNamespace(start_time=1), was_killed=False)

    def exit_text(self) -> str:
        return ""

    async def kill(self) -> None:
        self.was_killed = True


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Launched:
    """What is launched."""
    launched = Launched()
    monkeypatch.setattr(Machine, "launch", AsyncMock(return_value=launched))
    return launched


@pytest.fixture
def launcher(tmp_path: Path) -> Launcher:
    made = object.__new__(Launcher)
    made._files = Files(tmp_path / "state", tmp_path / "run")
    made._files.make()
    made._files.vm(VM.name).mkdir()
    made.records = ProcessRecords(made._files, "boot")
    made.leasing = cast(Any, SimpleNamespace(give_back=AsyncMock()))
    made.user, made._daemon = None, cast(Any, SimpleNamespace(qemu="/qemu"))
    return made


def test_the_record_of_a_qemu_is_there_after_a_power_cut_until_that_has_been_ended(
    launcher: Launcher, machine: Launched, synced: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says that the VM has to be restarted."""

    async def scenario() -> None:
        has = at_each_sync(monkeypatch, launcher._files.process_record(VM.name).exists)
        hosted = HostedVm(VM, VmState.RUNNING, machine=await launcher.launch(VM, "tcg", incoming=False))
        assert has == [False, True], "its contents, then its name"
        found = await ProcessRecords(launcher._files, "next boot").attach(VM)
        assert found is not None
        assert (found.machine, found.left) == (None, False)
        hosted.ending = True
        await Vms("host1", launcher._files, launcher)._after_end(hosted, cast(Any, machine))
        assert has == [False, True, False]
        assert hosted.state is VmState.STOPPED

    asyncio.run(scenario())


@pytest.mark.parametrize("why", ["the disk is full", "nobody waits any more"])
def test_a_qemu_that_has_no_record_is_ended(
    launcher: Launcher, machine: Launched, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_waiting, may_go_on = threading.Event(), threading.Event()

    def fsync(_: int) -> None:
        is_waiting.set()
        may_go_on.wait(10)
        if why == "the disk is full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)

    async def scenario() -> None:
        launching = asyncio.ensure_future(launcher.launch(VM, "tcg", incoming=False))
        await asyncio.to_thread(is_waiting.wait)
        if why == "nobody waits any more":
            launching.cancel()
            await asyncio.sleep(0)
        may_go_on.set()
        with pytest.raises((StateError, asyncio.CancelledError)):
            await launching
        assert machine.was_killed
        assert not launcher._files.process_record(VM.name).exists()

    asyncio.run(scenario())


def test_settings(tmp_path: Path, synced: list[bool]) -> None:
    async def scenario() -> None:
        page = Page(tmp_path / "settings.toml")
        # Each is a change to what the other has left, though both are asked for at once.
        await asyncio.gather(page.change({"max_outgoing": 7}), page.change({"max_incoming": 9}))
        assert (page.now.max_outgoing, page.now.max_incoming) == (7, 9)
        assert Page(tmp_path / "settings.toml").now == page.now

    asyncio.run(scenario())


def test_settings_hold_also_if_nobody_waits_for_them(tmp_path: Path) -> None:
    async def scenario() -> None:
        page = Page(tmp_path / "settings.toml")
        changing = asyncio.ensure_future(page.change({"max_outgoing": 7}))
        await asyncio.sleep(0)
        changing.cancel()
        await asyncio.wait({changing})
        assert page.now.max_outgoing == Page(tmp_path / "settings.toml").now.max_outgoing == 7

    asyncio.run(scenario())


def test_a_landing_that_is_begun_is_known_to_who_asks_for_it(storage: Storage) -> None:
    async def scenario() -> None:
        there = test_host_storage.TestWhatASourceMayName()
        incoming = there.incoming(storage)
        request = there.request(test_host_storage.plan(storage))
        beginning = asyncio.ensure_future(incoming.begin(request, "host1", "10.0.0.2"))
        while not any(storage._files.migrations.iterdir()):  # noqa: ASYNC110 - a thread makes its journal
            await asyncio.sleep(0)
        assert await incoming.find(request.migration, "host1") is await beginning

    asyncio.run(scenario())
