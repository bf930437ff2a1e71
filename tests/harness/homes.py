"""A source's home without a host daemon: what a script needs of it when nothing but memory moves."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Iterable, Sequence

from limosa.migration.examination import DisksHere
from limosa.model.facts import VmFacts
from limosa.model.finding import Finding
from limosa.model.network import Carried, HostNetwork
from limosa.model.route import Route
from limosa.model.storage import BackingFile, DiskFacts
from limosa.model.vm import Disk
from limosa.qemu.protocol import MachineProtocol
from limosa.transport import tcp
from limosa.transport.channel import Channel, SocketChannel
from limosa.transport.shares import Kind
from limosa.wire.peer import LayersAwaited, Prepared, RelayPlace, RestAwaited


class NoDisks:
    """Is not asked anything."""

    async def facts(self, disks: Iterable[Disk]) -> tuple[DiskFacts, ...]:
        raise AssertionError("no disk moves along")

    async def digest(self, backing: BackingFile) -> BackingFile:
        raise AssertionError("no disk moves along")


class BareHome:
    """The base of :class:`limosa.migration.home.Home` for tests; who begins a move has ``facts`` and ``connect``."""

    def __init__(self, machine: MachineProtocol) -> None:
        self.own_cap = 0
        self.disks_here: DisksHere = NoDisks()
        self.left = False
        self._machine = machine

    async def facts(self) -> VmFacts:
        raise AssertionError("the move has begun")

    async def connect(self, route: Route, prepared: Prepared) -> Channel:
        raise AssertionError("the move has begun")

    async def qemu(self) -> MachineProtocol | None:
        raise AssertionError("the move has it")

    def carry_on(self) -> dict[str, str]:
        return {}

    async def promise(self, destination: str, copied: Collection[str]) -> None:
        assert not copied, "no disk moves along"

    async def reclaim(self) -> None:
        raise AssertionError("the move failed")

    async def take_storage_slot(self, in_line: Callable[[int], None]) -> None:
        raise AssertionError("no disk moves along")

    async def seats(self, destination: str, route: Route, count: int, *, encrypt: bool) -> list[RelayPlace]:
        return []

    async def connect_rest(self, awaited: RestAwaited) -> SocketChannel:
        return await tcp.connect_any(awaited.addresses, awaited.port, awaited.token)

    def disconnect(self) -> None:
        pass

    async def connect_disks(self, route: Route, prepared: Prepared, count: int) -> list[SocketChannel]:
        raise AssertionError("no disk moves along")

    async def connect_layers(self, route: Route, awaited: LayersAwaited) -> SocketChannel:
        raise AssertionError("no disk moves along")

    async def networks(self) -> AsyncIterator[HostNetwork]:
        never: tuple[HostNetwork, ...] = ()
        for one in never:
            yield one

    def learn(self, carried: Collection[Carried]) -> None:
        pass

    def bandwidth(self, kind: Kind) -> int:
        return 0

    async def sending(self) -> None:
        pass

    async def end_qemu(self) -> None:
        await self._machine.kill()

    async def vm_left(self, images: Sequence[str]) -> tuple[Finding, ...]:
        self.left = True
        return ()

    def free_name(self) -> None:
        pass

    async def vm_stays(self, why_stopped: str = "") -> None:
        raise AssertionError("the move failed")

    async def withdraw(self) -> None:
        raise AssertionError("the source's QEMU died")

    async def vm_crashed(self) -> None:
        raise AssertionError("the source's QEMU died")
