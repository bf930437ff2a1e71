"""What the source's script is given: the terms of the move, and the host it runs on."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import msgspec

from limosa.migration.examination import DisksHere
from limosa.model.facts import VmFacts
from limosa.model.finding import Finding
from limosa.model.network import Carried, HostNetwork
from limosa.model.route import Route
from limosa.model.storage import Chain
from limosa.qemu.protocol import MachineProtocol
from limosa.settings.host import ConvergencePolicy
from limosa.transport.channel import Channel, SocketChannel
from limosa.transport.shares import Kind
from limosa.wire.peer import LayersAwaited, Prepared, RelayPlace, RestAwaited


@dataclass(frozen=True)
class Terms:
    """Under which terms a VM moves: the host's settings with what was asked for this move."""

    policy: ConvergencePolicy
    transport: str
    encrypt: bool
    #: which location of the destination a disk goes to, by the disk's name
    storage: Mapping[str, str] = field(default_factory=dict)
    #: whether files below disks that are copied stay files below them
    chain: Chain = "keep"
    #: whether images the VM leaves behind are kept
    keep: bool = False
    rdma_pin_all: bool = False
    #: why RDMA, by which the move began, is not to be tried again; empty if it was not tried
    rdma_failed: str = ""
    #: the guest is to be slowed if need be, though that is not safe: without it the move does not come to its end
    must_slow: bool = False

    def without_post_copy(self) -> Terms:
        """The same, with post-copy forbidden."""
        return replace(self, policy=msgspec.structs.replace(self.policy, post_copy=False))


class Home(Protocol):
    """What the source's script needs of the host it runs on, so that it knows no daemon. A daemon has it as
    :class:`limosa.host.home.HomeHere`; the destination's counterpart is :class:`limosa.migration.destination.Landing`.
    """

    async def facts(self) -> VmFacts:
        """What preflight needs to know about the VM here."""

    async def qemu(self) -> MachineProtocol | None:
        """The VM's QEMU, also one that did not answer when this daemon started; None if it has ended.

        Raises :class:`limosa.errors.QemuError` if it lives and still does not answer.
        """

    def carry_on(self) -> dict[str, str]:
        """Small files of the VM's own that go along, base64 by name."""

    async def promise(self, destination: str, copied: Collection[str]) -> None:
        """Let ``destination`` write the VM's disks from its take-over on, where hosts say so on the storage they share.
        Those whose paths are ``copied`` stay ours. Raises if they are not ours to promise."""

    async def reclaim(self) -> None:
        """The disks are this host's alone again, before the guest goes on here. Raises if that cannot be said."""

    @property
    def disks_here(self) -> DisksHere:
        """What is asked about disks that are to be copied."""

    async def connect_disks(self, route: Route, prepared: Prepared, count: int) -> list[SocketChannel]:
        """As :meth:`connect`, for so many disks."""

    async def connect_layers(self, route: Route, awaited: LayersAwaited) -> SocketChannel:
        """As :meth:`connect`, for files below disks."""

    async def take_storage_slot(self, in_line: Callable[[int], None]) -> None:
        """Wait for a place among the moves that copy disks; :meth:`disconnect` gives it back. The one it has among
        those of memory alone is another's from now on."""

    async def seats(self, destination: str, route: Route, count: int, *, encrypt: bool) -> list[RelayPlace]:
        """Places in a session of relays for so many streams of this move; none if its route takes no relay.

        Raises :class:`RelayFailed`.
        """

    async def connect(self, route: Route, prepared: Prepared) -> Channel:
        """A connection to the destination for the guest's memory, by the transport of ``route``.

        Raises :class:`DestinationLost`, :class:`RelayFailed` and :class:`NetworkError`.
        """

    async def connect_rest(self, awaited: RestAwaited) -> SocketChannel:
        """As :meth:`connect`, by plain TCP, for the rest of a post-copy whose stream broke."""

    def disconnect(self) -> None:
        """Let go of what :meth:`take_storage_slot`, :meth:`seats` and :meth:`connect` took. May be repeated."""

    def networks(self) -> AsyncIterator[HostNetwork]:
        """This host's network, again after each change."""

    def learn(self, carried: Collection[Carried]) -> None:
        """Remember how fast the networks of this move were. Never raises."""

    def bandwidth(self, kind: Kind) -> int:
        """Bytes per second this move may send of ``kind`` now, 0: no cap, or it sends none."""

    async def sending(self) -> None:
        """Other than before is sent from now on: share what may be used anew. Waits a second at most for a QEMU that
        does not answer."""

    #: bytes per second asked for this move, 0: none
    own_cap: int

    async def end_qemu(self) -> None:
        """End the VM's QEMU here, which will never run the guest again."""

    async def vm_left(self, images: Sequence[str]) -> tuple[Finding, ...]:
        """The VM belongs to the destination, durably: forget it here, durably, and delete the images it has left. Its
        name stays taken. Returns what is to be said of those that could not be deleted."""

    def free_name(self) -> None:
        """That the VM has left is durable: it may come back."""

    async def vm_stays(self, why_stopped: str = "") -> None:
        """The VM goes on here, or says why it cannot; it may be operated again."""

    async def withdraw(self) -> None:
        """As :meth:`reclaim`, for a guest that has died: the disks are nobody's. Never fails."""

    async def vm_crashed(self) -> None:
        """The VM's QEMU died here before anything was handed over."""
