"""What stands in for the QEMU of a VM that does not run, while its disks are copied.

A QEMU that runs keeps others off its images by locks and leases, and copies them. For a VM without one a QEMU without a
guest copies, and the daemon holds QEMU's lock against writing and the VM's leases.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import msgspec

from limosa.host.launching import Launcher
from limosa.host.parts import Parts
from limosa.model.vm import Disk, VmConfig
from limosa.qemu.copier import Copier
from limosa.storage import mounts, openers


class StoppedDisks:
    """For all VMs of this host."""

    def __init__(self, parts: Parts, launcher: Launcher) -> None:
        self._leasing = parts.leasing
        self._launcher = launcher

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


@contextmanager
def unwritten(disks: Iterable[Disk]) -> Iterator[None]:
    """Keep every QEMU from writing these disks meanwhile. Raises :class:`limosa.errors.StorageError` if one does."""
    with ExitStack() as held:
        for disk in disks:
            if not mounts.of(disk.path).has_no_locks:  # else it is the lease that keeps others from writing
                held.enter_context(openers.unwritten(disk.path))
        yield
