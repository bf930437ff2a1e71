"""How the source's script knows its destination: a small protocol that a network session and the destination's own
script in one process both are."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, Protocol

from limosa.model.base import MigrationId
from limosa.model.facts import DestinationFacts
from limosa.model.storage import BackingFile
from limosa.model.vm import Accelerator, VmConfig
from limosa.wire.peer import LayersAwaited, Offered, Prepare, Prepared, RestAwaited, Running, Standing

#: Sends the files below disks that the destination awaits.
SendLayers = Callable[[LayersAwaited], Coroutine[Any, Any, None]]


class Peer(Protocol):
    """One session with a destination. Any call may raise what the destination raised, or
    :class:`limosa.errors.HostUnreachable` when the session broke: whether it took effect is then not known."""

    #: the destination's name
    host: str
    #: done, with an exception, when the session broke or the waiting QEMU at the destination died
    lost: asyncio.Future[None]

    async def inspect(self, vm: VmConfig, accelerator: Accelerator) -> tuple[DestinationFacts, float]:
        """Facts for preflight, and the destination's clock less ours in seconds."""

    async def find_files(self, files: Sequence[BackingFile]) -> tuple[BackingFile | None, ...]:
        """Where the destination has files with the same contents, in the order asked; None where it has not."""

    async def prepare(self, request: Prepare, in_line: Callable[[int], None], send_layers: SendLayers) -> Prepared:
        """Wait for a slot (``in_line`` gets the place), reserve and build everything; ``send_layers`` when files below
        disks are awaited. On failure nothing is kept."""

    async def announce(self, addresses: Sequence[str]) -> None:
        """A way to these addresses of the destination has appeared here; the stream may use them, if it can."""

    async def disks_whole(self) -> None:
        """The copies of disks have ended; the destination can let nobody write them any more, while the last memory
        comes."""

    def offers(self) -> AsyncIterator[Offered]:
        """The destination's network, again after each change, while a stream may be spread over paths that appear."""

    async def take_over(self) -> Running:
        """Give the word: the guest is the destination's, and goes on there."""

    async def adopted(self) -> None:
        """Return when it is durable at the destination that the VM belongs to it."""

    async def await_rest(self) -> RestAwaited:
        """Have another stream awaited for the rest of a post-copy whose own broke, while this session lasts. Raises
        :class:`limosa.errors.QemuGone` if the guest has ended there."""

    async def abort(self, reason: str) -> None:
        """Have everything destroyed. On return nothing is left there and the guest never ran there."""

    async def attach(self, migration: MigrationId) -> Standing:
        """Take up an earlier migration and ask how it stands."""

    async def close(self) -> None:
        """End the session. Never raises."""


class Dialler(Protocol):
    """Opens sessions with one destination."""

    async def __call__(self) -> Peer:
        """A new session. Raises :class:`limosa.errors.HostUnreachable`."""
