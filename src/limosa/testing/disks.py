"""The disks of a pretended QEMU: copies that stand as a test says, exports that are open or not."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
from collections.abc import Iterable
from contextlib import suppress

from limosa.errors import QemuError, QemuGone, StorageError
from limosa.qemu.protocol import CopyState, CopyStatistics
from limosa.wire.peer import StreamCredentials

_SIZE = 1024 * 1024


class FakeDisks:
    """The part of :class:`limosa.qemu.protocol.MachineProtocol` that is about disks. A copy is ready at once."""

    gone: asyncio.Event

    def __init__(self) -> None:
        self.copying: dict[str, CopyStatistics] = {}
        self.exported: set[str] = set()
        #: what the guest may write a second, by disk
        self.slowed: dict[str, int] = {}
        #: disks in the order in which their copies were hurried
        self.hurried: list[str] = []
        self._disks_trusted = False

    async def trust_disks(self, credentials: StreamCredentials) -> None:
        """See the protocol."""
        await self._answer()
        self._disks_trusted = True

    async def copy_to_host(
        self, disk: str, tag: str, stream: socket.socket, bytes_per_s: int, *, whole: bool, encrypt: bool
    ) -> None:
        """See the protocol."""
        await self._answer()
        if disk in self.copying:
            raise QemuError("QEMU refused blockdev-mirror", why=f"Job ID 'copy-{disk}' already in use")
        if encrypt and not self._disks_trusted:
            raise QemuError("QEMU refused blockdev-add", why="No TLS credentials with id 'disks-tls'")
        self.copying[disk] = CopyStatistics(CopyState.READY, _SIZE, _SIZE)

    async def copies(self) -> dict[str, CopyStatistics]:
        """See the protocol."""
        await self._answer()
        return dict(self.copying)

    async def cap_copy(self, disk: str, bytes_per_s: int) -> None:
        """See the protocol."""
        await self._answer()

    async def hurry_copy(self, disk: str) -> None:
        """See the protocol."""
        with suppress(QemuError):
            await self._answer()
            self.hurried.append(disk)

    async def slow_writes(self, disk: str, bytes_per_s: int) -> None:
        """See the protocol."""
        await self._answer()
        self.slowed[disk] = bytes_per_s

    async def end_copy(self, disk: str) -> None:
        """See the protocol."""
        await self._answer()
        copy = self.copying.pop(disk, None)
        if copy is None:
            raise QemuError("QEMU refused block-job-cancel", why=f"Block job 'copy-{disk}' not found")
        if copy.error:
            raise StorageError(f"disk {disk} could not be copied", why=copy.error)

    async def drop_copy(self, disk: str, tag: str) -> None:
        """See the protocol."""
        await self._answer()
        self.copying.pop(disk, None)
        self.slowed.pop(disk, None)

    async def export_disks(
        self, disks: Iterable[str], listener: socket.socket, credentials: StreamCredentials | None
    ) -> None:
        """See the protocol."""
        await self._answer()
        self.exported |= set(disks)

    async def end_exports(self) -> None:
        """See the protocol."""
        await self._answer()
        self.exported.clear()

    # --- what only a fake can do ---

    def copy_is(self, disk: str, state: CopyState, remaining: int = 0, error: str = "") -> None:
        """Say how a copy stands from now on."""
        self.copying[disk] = dataclasses.replace(
            self.copying[disk], state=state, copied_bytes=_SIZE - remaining, error=error
        )

    async def _answer(self) -> None:
        raise QemuGone("QEMU has ended")
