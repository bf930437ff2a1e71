"""This host as the home of one VM that leaves it."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from functools import partial

from limosa.host.bandwidth import Bandwidth
from limosa.host.departure import Departure
from limosa.host.own_disks import OwnDisks
from limosa.host.parts import Parts
from limosa.host.slots import Place
from limosa.host.vms import HostedVm
from limosa.model.facts import VmFacts
from limosa.model.finding import Finding
from limosa.model.network import Carried, HostNetwork
from limosa.model.route import Route
from limosa.qemu.protocol import MachineProtocol
from limosa.transport import tcp
from limosa.transport.channel import Channel, SocketChannel
from limosa.transport.choice import is_allowed
from limosa.transport.shares import Kind
from limosa.wire.peer import LayersAwaited, Prepared, RelayPlace, RestAwaited


class HomeHere:
    """This host's :class:`limosa.migration.home.Home`: what the daemon has, from slots to leases, as the script of one
    move out needs it."""

    def __init__(
        self,
        parts: Parts,
        hosted: HostedVm | None,
        bandwidth: Bandwidth,
        migration: str,
        cap: int,
        place: Place,
    ) -> None:
        self._vms = parts.vms
        self._inspector = parts.inspector
        self.disks_here = OwnDisks(parts, hosted)
        self._leasing = parts.leasing
        self._hosted = hosted
        self._departure = Departure(parts, partial(bandwidth.of_lane, migration))
        #: among those that leave without disks, and among those that copy some
        self._place = place
        self._storage_place = Place(parts.storage.leaving)
        self._bandwidth = bandwidth
        self._migration = migration
        #: bytes per second asked for this move, 0: none
        self.own_cap = cap

    async def facts(self) -> VmFacts:
        """See :class:`limosa.migration.home.Home`."""
        assert self._hosted is not None
        return await self._inspector.vm_facts(self._hosted)

    async def qemu(self) -> MachineProtocol | None:
        """See :class:`limosa.migration.home.Home`."""
        if self._hosted is None:
            return None
        if self._hosted.fault is not None:
            await self._vms.ask_again(self._hosted)
        return self._hosted.machine

    async def promise(self, destination: str, copied: Collection[str]) -> None:
        """See :class:`limosa.migration.home.Home`."""
        assert self._hosted is not None
        await self._leasing.promise(self._hosted.config, destination, self._migration, copied)

    async def reclaim(self) -> None:
        """See :class:`limosa.migration.home.Home`."""
        if self._hosted is not None:
            await self._leasing.reclaim(self._hosted.config, self._migration)

    def carry_on(self) -> dict[str, str]:
        """See :class:`limosa.migration.home.Home`."""
        assert self._hosted is not None
        seed = self._vms.seed_of(self._hosted.config)
        return {"seed.iso": base64.b64encode(seed).decode()} if seed is not None else {}

    async def take_storage_slot(self, in_line: Callable[[int], None]) -> None:
        """See :class:`limosa.migration.home.Home`."""
        self._place.give_back()
        await self._storage_place.take(in_line)

    async def seats(self, destination: str, route: Route, count: int, *, encrypt: bool) -> list[RelayPlace]:
        """See :class:`limosa.migration.home.Home`."""
        return await self._departure.seats(destination, route, count, encrypt=encrypt)

    def disconnect(self) -> None:
        """See :class:`limosa.migration.home.Home`."""
        self._departure.release()
        self._storage_place.give_back()

    async def connect(self, route: Route, prepared: Prepared) -> Channel:
        """See :class:`limosa.migration.home.Home`."""
        return await self._departure.connect(route, prepared)

    async def connect_disks(self, route: Route, prepared: Prepared, count: int) -> list[SocketChannel]:
        """See :class:`limosa.migration.home.Home`."""
        return await self._departure.connect_disks(route, prepared, count)

    async def connect_layers(self, route: Route, awaited: LayersAwaited) -> SocketChannel:
        """See :class:`limosa.migration.home.Home`."""
        return await self._departure.connect_layers(route, awaited)

    async def connect_rest(self, awaited: RestAwaited) -> SocketChannel:
        """See :class:`limosa.migration.home.Home`."""
        allowed = (await self._inspector.network()).allowed
        addresses = [address for address in awaited.addresses if is_allowed(address, allowed)]
        return await tcp.connect_any(addresses, awaited.port, awaited.token)

    def networks(self) -> AsyncIterator[HostNetwork]:
        """See :class:`limosa.migration.home.Home`."""
        return self._inspector.networks()

    def learn(self, carried: Collection[Carried]) -> None:
        """See :class:`limosa.migration.home.Home`."""
        if carried:
            self._inspector.goodputs.learn(carried)

    def bandwidth(self, kind: Kind) -> int:
        """See :class:`limosa.migration.home.Home`."""
        return self._bandwidth.allowance(self._migration, kind)

    async def sending(self) -> None:
        """See :class:`limosa.migration.home.Home`."""
        await self._bandwidth.share()

    async def end_qemu(self) -> None:
        """See :class:`limosa.migration.home.Home`."""
        if self._hosted is not None:
            await self._vms.end_handed_over(self._hosted)

    async def vm_left(self, images: Sequence[str]) -> tuple[Finding, ...]:
        """See :class:`limosa.migration.home.Home`."""
        if self._hosted is not None:
            await self._leasing.give_back(self._hosted.config)  # images that stay behind and were not claimed
            await self._vms.forget(self._hosted)
        return await self.disks_here.leave(images)

    def free_name(self) -> None:
        """See :class:`limosa.migration.home.Home`."""
        if self._hosted is not None:
            self._vms.free_name(self._hosted)

    async def vm_stays(self, why_stopped: str = "") -> None:
        """See :class:`limosa.migration.home.Home`."""
        if self._hosted is not None:
            self._hosted.stayed()
            self._hosted.reason = why_stopped or self._hosted.reason

    async def withdraw(self) -> None:
        """See :class:`limosa.migration.home.Home`."""
        if self._hosted is not None:
            await self._leasing.withdraw(self._hosted.config, self._migration)

    async def vm_crashed(self) -> None:
        """See :class:`limosa.migration.home.Home`."""
        if self._hosted is not None:
            self._hosted.stayed()
            await self._vms.crashed(self._hosted)
