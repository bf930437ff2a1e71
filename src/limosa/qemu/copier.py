"""A QEMU without a guest, which copies the disks of a VM that does not run.

It is the program that VMs run on, without a machine (``-machine none``), as their user and in their sandbox, so that
what copies a disk is the same whether its guest runs or not: block jobs, formats, holes, caps, flushes. It opens the
disks read-only. It lives as long as one move; a daemon that comes again knows it by its run folder, which is that of
the VM, and ends it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from limosa.qemu import folder, process
from limosa.qemu.arguments import image_nodes, without_guest
from limosa.qemu.disks import Disks
from limosa.qemu.process import QemuProcess
from limosa.qemu.protocol import ImageFile
from limosa.qemu.session import started


class Copier(Disks):
    """One such QEMU. Made by :meth:`launch`; ended by :meth:`quit`."""

    @classmethod
    async def launch(
        cls, program: Path, disks: Mapping[str, ImageFile], run_dir: Path, log: Path, user: str | None
    ) -> Copier:
        """Start one that has these images open as disks, by name. ``run_dir`` is made (its parent must exist).

        Raises :class:`limosa.errors.QemuError` with QEMU's own words; nothing runs and no socket is left then.
        """
        await cls.end_leftover(run_dir)
        async with started(run_dir, log, user, partial(_spawn, program, run_dir, log, user)) as (qemu, monitor):
            made = cls(qemu, monitor, run_dir)
            for name, image in disks.items():
                await made._open(name, image)
            return made

    @staticmethod
    async def end_leftover(run_dir: Path) -> None:
        """End the one that uses ``run_dir``, if there is one. Raises :class:`limosa.errors.QemuError` if the kernel
        cannot end it."""
        # The search goes through all processes of the host, and every start of a VM comes here.
        if (run_dir / folder.QMP).exists() and await process.end(without_guest(run_dir, 0)[1]):
            folder.remove(run_dir)

    @staticmethod
    def uses(run_dir: Path) -> bool:
        """Whether there is one that uses ``run_dir``."""
        return (run_dir / folder.QMP).exists() and process.find(without_guest(run_dir, 0)[1]) is not None

    async def disk_node(self, disk: str) -> str:
        """The node that is the disk: no device has it, so none can change it for another."""
        return disk

    async def slow_writes(self, disk: str, bytes_per_s: int) -> None:
        """Nobody writes: there is no guest."""

    async def _mirror(self, disk: str, job: dict[str, Any]) -> None:
        """Nobody writes while it begins, either."""
        await self._execute("blockdev-mirror", job)

    async def _open(self, name: str, image: ImageFile) -> None:
        nodes = image_nodes(
            name,
            image.format,
            image.path,
            driver="host_device" if image.device else "file",
            read_only=True,
            direct=image.direct,
            locks=image.locks,
            size_bytes=image.size_bytes,
        )
        for node in nodes:
            await self._execute("blockdev-add", node)


async def _spawn(program: Path, run_dir: Path, log: Path, user: str | None) -> QemuProcess:
    with folder.listen(run_dir / folder.QMP) as qmp:
        command = [str(program), *without_guest(run_dir, qmp.fileno())]
        return await process.spawn(command, pass_fds=(qmp.fileno(),), log=log, user=user, kvm=False)
