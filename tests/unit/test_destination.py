"""The destination's script with a QEMU that lives but answers nothing: nobody waits for it, and nothing is guessed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from limosa.errors import DestinationLost, QemuError
from limosa.migration import destination as script
from limosa.migration.destination import Destination
from limosa.migration.journal import Header, Journal
from limosa.migration.ownership import DestinationStep
from limosa.model.migration import Side
from limosa.model.vm import VmConfig
from limosa.qemu.protocol import MachineProtocol
from limosa.testing.guest import FakeGuest
from limosa.testing.machine import FakeMachine
from limosa.testing.wire import Wire
from limosa.transport import tcp
from limosa.transport.channel import Doorway
from limosa.wire.peer import DestinationState, Prepare

VM = VmConfig(
    name="vm",
    uuid="5c7a2b9e-0f0e-4c06-8a0b-6d4b7b6f2a11",
    memory_mib=16,
    cpus=1,
    machine="pc-q35-10.0",
    cpu="x86-64-v2",
)


class Place:
    """The :class:`limosa.migration.destination.Landing` of one VM."""

    def __init__(self) -> None:
        self.machine = FakeMachine(Wire(), FakeGuest(0), incoming=True)

    async def reserve(self, in_line: Callable[[int], None]) -> None:
        pass

    async def launch(self, request: Prepare) -> MachineProtocol:
        return self.machine

    async def open_door(self, request: Prepare, machine: MachineProtocol) -> Doorway:
        return tcp.TcpDoorway("127.0.0.1", (41000, 41900))

    async def open_disks(self, request: Prepare, machine: MachineProtocol) -> Doorway | None:
        raise AssertionError("there are no disks")

    async def claim(self) -> None:
        raise AssertionError("the state never was whole")

    async def adopt(self, *, running: bool) -> None:
        raise AssertionError("the state never was whole")

    async def release(self, machine: MachineProtocol | None) -> None:
        await self.machine.kill()


async def with_silent_qemu(folder: Path) -> tuple[Destination, FakeMachine]:
    """A landing that was prepared, and whose QEMU then hung."""
    header = Header(
        migration="m1",
        side=Side.DESTINATION,
        vm=VM,
        accelerator="kvm",
        source="here",
        destination="there",
        address="",
        accepted_at=0.0,
        boot="boot",
    )
    place = Place()
    landing = Destination(Journal.begin(folder, header), place, boot="boot")
    request = Prepare(
        migration="m1", vm=VM, accelerator="kvm", running=True, transport="tcp", credentials=None, post_copy=False
    )
    await landing.prepare(request, lambda place: None)
    place.machine.hang()
    return landing, place.machine


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in ("ANSWER_WITHIN_S", "DYING_S", "LOAD_WITHIN_S"):
        monkeypatch.setattr(script, limit, 0.01)


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
        with pytest.raises(DestinationLost, match="did not arrive whole"):
            await landing.take_over()
        assert landing.step is DestinationStep.GONE
        assert machine.gone.is_set()

    asyncio.run(scenario())


def test_a_person_cannot_have_it_continued(tmp_path: Path) -> None:
    async def scenario() -> None:
        landing, machine = await with_silent_qemu(tmp_path)
        with pytest.raises(QemuError, match="does not answer"):
            await landing.resolve(here=True)
        assert not machine.gone.is_set()
        await landing.resolve(here=False)
        assert machine.gone.is_set()

    asyncio.run(scenario())
