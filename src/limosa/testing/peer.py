"""A destination in the same process: the source's script talks to the destination's without a network between.

Both scripts are the product's own, and so is what they command; only the session is missing. What a session does when
it breaks is tested with real ones.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence

import msgspec

from limosa.errors import QemuGone
from limosa.migration.destination import Destination
from limosa.migration.peer import SendLayers
from limosa.model.base import MigrationId
from limosa.model.facts import DestinationFacts
from limosa.model.storage import BackingFile
from limosa.model.vm import Accelerator, VmConfig
from limosa.qemu.protocol import MachineProtocol
from limosa.transport import tcp, trials
from limosa.wire.peer import LayersAwaited, Offered, Prepare, Prepared, RestAwaited, Running, Standing


class LocalPeer:
    """A :class:`limosa.migration.peer.Peer`. ``facts`` are told to whoever asks, with a trial port that is open."""

    def __init__(self, destination: Destination, facts: DestinationFacts, ports: tuple[int, int]) -> None:
        self.host = destination.journal.header.destination
        self.lost: asyncio.Future[None] = destination.lost
        self._destination = destination
        self._facts = facts
        self._ports = ports
        self._trial = contextlib.AsyncExitStack()
        self._rest: asyncio.Task[None] | None = None

    async def inspect(self, vm: VmConfig, accelerator: Accelerator) -> tuple[DestinationFacts, float]:
        """See :class:`limosa.migration.peer.Peer`."""
        port = await self._trial.enter_async_context(trials.trial(self._facts.addresses, self._ports))
        return msgspec.structs.replace(self._facts, trial_port=port, trial_answers=True), 0.0

    async def find_files(self, files: Sequence[BackingFile]) -> tuple[BackingFile | None, ...]:
        """See :class:`limosa.migration.peer.Peer`: it has none."""
        return (None,) * len(files)

    async def prepare(self, request: Prepare, in_line: Callable[[int], None], send_layers: SendLayers) -> Prepared:
        """See :class:`limosa.migration.peer.Peer`."""
        await self._trial.aclose()
        return await self._destination.prepare(request, in_line, _no_layers)

    async def announce(self, addresses: Sequence[str]) -> None:
        """See :class:`limosa.migration.peer.Peer`."""
        self._destination.announce(addresses)

    async def disks_whole(self) -> None:
        """See :class:`limosa.migration.peer.Peer`."""
        self._destination.disks_whole()

    async def offers(self) -> AsyncIterator[Offered]:
        """See :class:`limosa.migration.peer.Peer`: nothing changes."""
        yield Offered(network=self._facts.network, addresses=self._facts.addresses)

    async def take_over(self) -> Running:
        """See :class:`limosa.migration.peer.Peer`."""
        return await self._destination.take_over()

    async def adopted(self) -> None:
        """See :class:`limosa.migration.peer.Peer`."""
        await self._destination.adopted()

    async def await_rest(self) -> RestAwaited:
        """See :class:`limosa.migration.peer.Peer`."""
        machine = self._destination.machine
        assert machine is not None
        if machine.gone.is_set():
            raise QemuGone("the VM does not run any more")
        door = tcp.TcpDoorway(self._facts.addresses[0], self._ports)
        self._rest = asyncio.ensure_future(self._receive_rest(door, machine))
        return RestAwaited(addresses=self._facts.addresses, port=door.port, token=door.token)

    async def _receive_rest(self, door: tcp.TcpDoorway, machine: MachineProtocol) -> None:
        with contextlib.closing(door):
            await machine.receive_rest(await door.accept())

    async def abort(self, reason: str) -> None:
        """See :class:`limosa.migration.peer.Peer`."""
        await self._destination.abort(reason)

    async def attach(self, migration: MigrationId) -> Standing:
        """See :class:`limosa.migration.peer.Peer`."""
        return await self._destination.standing()

    async def close(self) -> None:
        """See :class:`limosa.migration.peer.Peer`."""
        if self._rest is not None:
            self._rest.cancel()
        await self._trial.aclose()


def _no_layers(awaited: LayersAwaited) -> None:
    raise AssertionError("nothing lies below the disks")
