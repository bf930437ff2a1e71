"""A landing of a VM that has nothing but memory, for tests of the destination's script."""

from __future__ import annotations

from collections.abc import Callable

from limosa.migration.journal import Header
from limosa.model.migration import Migration, Outcome, Phase, Progress, Side
from limosa.model.vm import VmConfig
from limosa.qemu.protocol import MachineProtocol
from limosa.testing.guest import FakeGuest
from limosa.testing.machine import FakeMachine
from limosa.testing.wire import Wire
from limosa.transport import tcp
from limosa.transport.channel import Doorway
from limosa.wire.peer import LayersAwaited, Prepare

ADDRESS, PORTS = "127.0.0.2", (41000, 41900)
VM = VmConfig(
    name="vm",
    uuid="5c7a2b9e-0f0e-4c06-8a0b-6d4b7b6f2a11",
    memory_mib=16,
    cpus=1,
    machine="pc-q35-10.0",
    cpu="x86-64-v2",
)


def header(side: Side) -> Header:
    """Of the move ``m1`` of that VM."""
    return Header(
        migration="m1",
        side=side,
        vm=VM,
        accelerator="kvm",
        source="here",
        destination="there",
        address="",
        accepted_at=0.0,
        boot="boot",
    )


def first_view() -> Migration:
    """What the source shows of that move before it has begun."""
    return Migration(
        id="m1",
        vm=VM.name,
        source="here",
        destination="there",
        side=Side.SOURCE,
        transport="tcp",
        phase=Phase.WAITING,
        outcome=Outcome.UNDER_WAY,
        progress=Progress(),
        accepted_at=0.0,
    )


class MemoryLanding:
    """The base of :class:`limosa.migration.destination.Landing` for tests; the machine and its door are theirs."""

    async def reserve(self, in_line: Callable[[int], None]) -> None:
        pass

    async def take_layers(self, request: Prepare, tell: Callable[[LayersAwaited], None]) -> None:
        raise AssertionError("there are no disks")

    async def open_disks(self, request: Prepare, machine: MachineProtocol) -> Doorway | None:
        raise AssertionError("there are no disks")

    async def claim(self) -> None:
        pass

    async def adopt(self, *, running: bool) -> None:
        assert running

    def free(self) -> None:
        pass


class BareLanding(MemoryLanding):
    """A landing with a fake machine."""

    def __init__(self, wire: Wire) -> None:
        self.machine = FakeMachine(wire, FakeGuest(0), incoming=True)

    async def launch(self, request: Prepare) -> MachineProtocol:
        return self.machine

    async def open_door(self, request: Prepare, machine: MachineProtocol) -> Doorway:
        return tcp.TcpDoorway(ADDRESS, PORTS)

    async def release(self, machine: MachineProtocol | None) -> None:
        await self.machine.kill()
