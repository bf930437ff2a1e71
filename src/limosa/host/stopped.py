"""What stands in for the QEMU of a VM that does not run, while its disks are copied.

A QEMU that runs keeps others off its images by locks and leases, and copies them. For a VM without one a QEMU without a
guest copies, the daemon holds QEMU's lock against writing and the VM's leases, and what no lock tells is looked at: who
else on this host needs an image that is to be deleted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec

from limosa.errors import Conflict
from limosa.host.claims import Claims, Known
from limosa.host.launching import Launcher
from limosa.host.parts import Parts
from limosa.host.vms import HostedVm
from limosa.model.vm import Disk, VmConfig
from limosa.qemu.copier import Copier
from limosa.storage import mounts, openers


class StoppedDisks:
    """For all VMs of this host."""

    def __init__(self, parts: Parts, launcher: Launcher) -> None:
        self._host = parts.name
        self._vms = parts.vms
        self._places = parts.storage
        self._migrations = parts.files.migrations
        self._leasing = parts.leasing
        self._launcher = launcher

    async def check_nobody_else(self, hosted: HostedVm, moved: Iterable[Disk]) -> None:
        """Raise :class:`Conflict` if another needs one of these images of the VM, which are to be deleted."""
        claims = await self._claims(hosted)
        for disk in moved:
            if who := claims.besides(Path(disk.path)):
                raise Conflict(
                    f"disk {disk.name} of VM '{hosted.config.name}' is not used by this VM alone",
                    why=f"{disk.path}: {who}",
                    todo="keep the image with --keep, or end the other use first",
                    vm=hosted.config.name,
                    host=self._host,
                )

    async def who_else(self, hosted: HostedVm, image: str) -> str:
        """Who but the VM needs an image, in words; empty if nobody."""
        return (await self._claims(hosted)).besides(Path(image))

    async def start(self, config: VmConfig, disks: Iterable[Disk]) -> Copier:
        """Take the leases of these disks and start a QEMU that has them open.

        Raises :class:`limosa.errors.ImageLeased`, ``StorageError`` and ``QemuError``. The leases may be held then; who
        undoes the move gives them back.
        """
        copied = msgspec.structs.replace(config, disks=tuple(disks))
        await self._launcher.claim_images(copied)
        await self._leasing.take(copied)
        return await self._launcher.launch_copier(copied)

    async def end(self, config: VmConfig) -> None:
        """End what :meth:`start` has started, also before a restart of the daemon. May be repeated."""
        await self._launcher.end_copier(config)

    async def give_back(self, config: VmConfig, images: Iterable[str] = ()) -> None:
        """Give back the leases of the VM's disks and of these images."""
        await self._leasing.give_back(config, [*(disk.path for disk in config.disks), *images])

    async def _claims(self, hosted: HostedVm) -> Claims:
        """Those of all but this VM."""
        known = Known.of(self._vms)
        others = Known([config for config in known.configs if config.name != hosted.config.name], known.damaged)
        await self._places.check_answer()
        return await asyncio.to_thread(Claims.look, self._migrations, others, self._places.places)


@contextmanager
def unwritten(disks: Iterable[Disk]) -> Iterator[None]:
    """Keep every QEMU from writing these disks meanwhile. Raises :class:`limosa.errors.StorageError` if one does."""
    with ExitStack() as held:
        for disk in disks:
            if not mounts.of(disk.path).has_no_locks:  # else it is the lease that keeps others from writing
                held.enter_context(openers.unwritten(disk.path))
        yield
