"""Gathering the facts that preflight judges and that ``limosa host status`` shows."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path

from limosa.errors import StorageError
from limosa.host.goodput import Goodputs
from limosa.host.leasing import Leasing
from limosa.host.looks import Looks
from limosa.host.memory import available_mib
from limosa.host.page import Page
from limosa.host.storage import Storage
from limosa.host.vms import HostedVm, Vms
from limosa.model.facts import DestinationFacts, FileIdentity, LeaseConflict, VmFacts
from limosa.model.network import HostNetwork
from limosa.model.vm import Accelerator, VmConfig, VmState
from limosa.network import mptcp
from limosa.network.changes import changes
from limosa.network.netlink import Netlink
from limosa.network.nics import inventory
from limosa.network.switches import switches
from limosa.qemu.capabilities import QemuCapabilities
from limosa.qemu.process import lockable_mib
from limosa.security.tls import valid_until
from limosa.settings.daemon import DaemonSettings
from limosa.storage import chains
from limosa.storage.identity import identify
from limosa.transport.relay.frames import VERSION as RELAY_VERSION

#: The files of a VM have been looked at within this, or a preflight fails; kernels and the like are read for it.
FILES_WITHIN_S = 20.0


class Inspector:
    """Looks at this host."""

    def __init__(
        self,
        daemon: DaemonSettings,
        page: Page,
        vms: Vms,
        capabilities: QemuCapabilities,
        netlink: Netlink,
        storage: Storage,
        leasing: Leasing,
        goodputs: Goodputs,
        user: str | None,
    ) -> None:
        self._daemon = daemon
        self._storage = storage
        self._leasing = leasing
        self._page = page
        self._vms = vms
        self.capabilities = capabilities
        self._netlink = netlink
        self.goodputs = goodputs
        self._user = user
        self._looks: Looks[tuple[FileIdentity, ...]] = Looks(FILES_WITHIN_S)

    async def networks(self) -> AsyncIterator[HostNetwork]:
        """:meth:`network`, again after each change. Raises :class:`NetworkError`."""
        async for _ in changes():
            yield await self.network()

    async def network(self) -> HostNetwork:
        """Our NICs, and which networks may carry moves."""
        nics = await inventory(self._netlink)
        page = self._page.now
        return HostNetwork(
            nics=nics,
            mptcp=mptcp.is_on(),
            allowed=page.migration_networks,
            encrypt=page.encrypt,
            lockable_mib=lockable_mib(),
            carried=self.goodputs.known,
            caps_mbit_per_s=page.network_bandwidth_mbit_per_s,
        )

    @property
    def listen(self) -> tuple[str, ...]:
        """Where the daemon is called, as its settings say."""
        return self._daemon.listen

    def certificate_until(self) -> float | None:
        """The end of our certificate, seconds since the epoch; null if there is none."""
        return valid_until(Path(self._daemon.certificates) / "host.pem")

    async def switches(self) -> tuple[str, ...]:
        """Names of our virtual switches."""
        return await switches(self._netlink)

    def memory_available_mib(self) -> int:
        """What a further VM may have."""
        return available_mib(self._page.now.reserved_memory_mib, self._vms.committed_mib())

    async def vm_facts(self, hosted: HostedVm) -> VmFacts:
        """What the source says about a VM that is to move."""
        settings = self._page.now
        running = hosted.machine is not None and hosted.state in (VmState.RUNNING, VmState.PAUSED)
        return VmFacts(
            running=running,
            accelerator=hosted.accelerator or "tcg",
            qemu=self.capabilities.version,
            files=await self._files(hosted.config),
            live_migration=settings.live_migration,
            encrypt=settings.encrypt,
            post_copy=settings.convergence.post_copy,
            network=await self.network(),
            capped=settings.bandwidth_mbit_per_s > 0,
            leases=await self._leases(hosted) if running else (),
            cpu_features=self.capabilities.features_seen(hosted.config.cpu, hosted.accelerator or "tcg"),
            certificate_until=self.certificate_until(),
        )

    async def destination_facts(
        self,
        vm: VmConfig,
        accelerator: Accelerator,
        network: HostNetwork,
        addresses: tuple[str, ...],
        trial_port: int,
    ) -> DestinationFacts:
        """What the destination says about a VM that is to come."""
        ours, files, locations = await asyncio.gather(self.switches(), self._files(vm), self._storage.locations())
        cpu_known, cpu_missing = self.capabilities.supports(vm.cpu, accelerator)
        return DestinationFacts(
            host=self._daemon.name,
            qemu=self.capabilities.version,
            live_migration=self._page.now.live_migration,
            accelerators=self.capabilities.accelerators,
            machine_known=self.capabilities.knows_machine(vm.machine),
            cpu_known=cpu_known,
            cpu_missing=cpu_missing,
            switches_missing=tuple(sorted({nic.switch for nic in vm.nics} - set(ours))),
            memory_available_mib=self.memory_available_mib(),
            name_taken=self._vms.is_taken(vm.name),
            uuid_taken=any(hosted.config.uuid == vm.uuid for hosted in self._vms.all()),
            files=files,
            firmware_available=Path(self._daemon.firmware_code).exists(),
            post_copy_possible=self.capabilities.post_copy,
            addresses=addresses,
            trial_port=trial_port,
            trial_answers=True,
            time=time.time(),
            relay=RELAY_VERSION,
            network=network,
            locations=locations,
            cpu_features=self.capabilities.features_seen(vm.cpu, accelerator),
            certificate_until=self.certificate_until(),
        )

    async def _leases(self, hosted: HostedVm) -> tuple[LeaseConflict, ...]:
        try:
            return await self._leasing.conflicts(hosted.config, hosted.migration or "")
        except StorageError:
            return ()  # a disk that cannot be looked at is not visible, which another finding says

    async def _files(self, vm: VmConfig) -> tuple[FileIdentity, ...]:
        """Raises :class:`StorageError` if they cannot be looked at in time."""
        boot = vm.boot.paths() if vm.boot else ()
        places = self._storage.places
        shared = places.shared()

        def look() -> tuple[FileIdentity, ...]:
            seen = [(path, "") for path in vm.host_files()] + _below(vm)
            found = [
                identify(path, shared, digest=path in boot, user=self._user, own=places.own, below=above)
                for path, above in seen
            ]
            return tuple(identity for identity in found if identity is not None)

        found = await self._looks.look((vm.disks, vm.boot), look) if vm.host_files() else ()
        if found is None:
            raise StorageError(
                f"host '{self._daemon.name}' cannot look at the files of VM '{vm.name}'",
                why="a file system they are on, or would be on, does not answer",
                todo="check that its server is up, and 'limosa storage list' there",
                vm=vm.name,
                host=self._daemon.name,
            )
        return found


def _below(vm: VmConfig) -> list[tuple[str, str]]:
    """Each file below a disk, with the path of that disk. What cannot be read is told elsewhere: it is not visible."""
    found = []
    for disk in vm.disks:
        with contextlib.suppress(StorageError):
            found += [(path, disk.path) for path, _ in chains.below(disk.path, disk.format)]
    return found
