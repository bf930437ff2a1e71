"""A copy begins: a mirror job starts, and no write of the guest is missed.

From 8.2 on QEMU's job keeps no account of writes until it has looked what the disk has allocated: what is written
behind that look, where nothing was allocated, is never copied (``mirror_dirty_init`` and ``bdrv_mirror_top_do_write``,
block/mirror.c; mended later by "mirror: Fix missed dirty bitmap writes during startup"). So bitmaps of the disk and of
the copy are there before the job, and say whether anything was written too early. If so the job begins anew, with the
guest stopped.

As everywhere nothing is remembered but in QEMU. The bitmap ``copy-DISK`` of a node watches what is written to it;
``stopped-DISK`` is there as long as the guest is stopped for this, so that whoever comes later, another daemon too,
lets it run again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from limosa.errors import QemuError, StorageError
from limosa.qemu.protocol import CopyState, CopyStatistics
from limosa.qemu.session import together

#: A job that begins comes nearer to keeping account of writes within so long: it may make 32 GiB zero at a time, which
#: slow storage needs for. Looks at it come this far apart at last.
BEGUN_WITHIN_S = 1800.0
BEGIN_LOOK_S = 0.02
#: How often a copy is begun anew with the guest stopped, and for how long that stands still at most each time.
STOPPED_TRIES, STOPPED_AT_MOST_S = 2, 1.0
#: Of the bitmap that watches the disk: 128 KiB of memory for each TiB.
_PIECE_BYTES = 1024 * 1024


class Beginning:
    """That of the copy of one disk, whose job is ``copy-DISK``.

    ``execute`` gives QEMU a command. ``look`` says how the job stands, and raises :class:`StorageError` if it has
    failed; ``give_up`` ends and forgets it.
    """

    def __init__(
        self,
        disk: str,
        execute: Callable[..., Coroutine[Any, Any, Any]],
        look: Callable[[], Awaitable[CopyStatistics]],
        give_up: Callable[[], Awaitable[None]],
    ) -> None:
        self._disk = disk
        self._execute = execute
        self._look = look
        self._give_up = give_up

    async def run(self, job: dict[str, Any], source: dict[str, Any]) -> None:
        """Start a job (``blockdev-mirror``) that misses no write to ``source`` (``BlockDeviceInfo`` in
        qapi/block-core.json). Raises :class:`StorageError` if there is no way to, and :class:`QemuError`; the guest may
        be stopped then, until :meth:`let_run`, and the job and bitmaps be left, until :meth:`forget`.

        A raw disk counts as allocated everywhere, and so nothing of it is missed.
        """
        if source["drv"] == "raw":
            await self._execute("blockdev-mirror", job)
            return
        for stopped in (False, *[True] * STOPPED_TRIES):
            if stopped:
                await self._give_up()
                await self._stop(job["device"])
            misses_nothing, filled = await self._begins(job, source["image"]["virtual-size"])
            await self.let_run(job["device"])
            if misses_nothing:
                return
            if filled and not source["backing_file_depth"]:
                # All that was not copied is zero by now, and need not be made so again. What was copied the guest may
                # have discarded since: then it may find anything there.
                job = job | {"sync": "top"}
        raise StorageError(
            f"disk {self._disk} could not be copied",
            why="the guest writes to it all the time, and QEMU can miss what is written while it begins",
            todo="try again when the VM is quieter",
        )

    async def let_run(self, node: str) -> None:
        """Let the guest go on if it was stopped for this. ``node``: the disk's."""
        stopped = self._stopped(node)
        if stopped["name"] in await self._bitmaps(node):
            if (await self._execute("query-status"))["status"] == "paused":
                await self._execute("cont")
            await self._execute("block-dirty-bitmap-remove", stopped)

    async def forget(self, node: str) -> None:
        """Watch no more what is written to the disk, if that is done. The copy is closed anyway."""
        watch = self._watch(node)
        if watch["name"] in await self._bitmaps(node):
            await self._execute("block-dirty-bitmap-remove", watch)

    async def _begins(self, job: dict[str, Any], size_bytes: int) -> tuple[bool, bool]:
        """Start a job, and wait until it keeps account of writes. Returns whether surely nothing was written before,
        and whether the job has written all of the target.

        Before it looks what is allocated, a job that copies all makes the target zero, which may take minutes. What is
        written then does no harm, and is forgotten as long as the target is surely being made zero: the job writes to
        it, as it does for nothing else before it keeps account, and has not come to its end. One that is zero is not
        made so from 10.1 on. Nor is one that QEMU cannot make zero by discarding: all of the disk is to be copied then,
        whatever is allocated.
        """
        source, target = self._watch(job["device"]), self._watch(job["target"])
        await together(
            # Its pieces are the job's own, which are never written in part (bdrv_get_default_bitmap_granularity,
            # block/dirty-bitmap.c).
            self._execute("block-dirty-bitmap-add", target),
            self._execute("block-dirty-bitmap-add", source | {"granularity": _PIECE_BYTES}),
            self._execute("blockdev-mirror", job),
        )
        is_sure, zeroed = True, 0
        began = since = time.monotonic()
        pause = BEGIN_LOOK_S / 16
        while is_sure:
            before, zeroed = zeroed, await self._written(target)
            if await self._keeps_account():
                break
            since = time.monotonic() if zeroed > before else since
            if 0 < zeroed < size_bytes and await self._written(source) > 0:
                await self._execute("block-dirty-bitmap-clear", source)
                is_sure = await self._written(target) < size_bytes
            if time.monotonic() - began > STOPPED_AT_MOST_S:
                await self.let_run(job["device"])
            if time.monotonic() - since > BEGUN_WITHIN_S:
                why = f"QEMU came no nearer to beginning in {BEGUN_WITHIN_S:.0f} s"
                raise StorageError(f"disk {self._disk} could not be copied", why=why)
            await asyncio.sleep(pause)
            pause = min(BEGIN_LOOK_S, 2 * pause)
        is_sure = is_sure and await self._written(source) == 0
        filled = await self._written(target) >= size_bytes
        for watch in (source, target):
            await self._execute("block-dirty-bitmap-remove", watch)
        return is_sure, filled

    async def _keeps_account(self) -> bool:
        """Whether the job does so of writes by now: not before it says how much there is to copy (``mirror_run``,
        block/mirror.c)."""
        copy = await self._look()
        return copy.total_bytes > 0 or copy.state is not CopyState.COPYING

    async def _stop(self, node: str) -> None:
        """Stop the guest, if it runs."""
        if (await self._execute("query-status"))["status"] == "running":
            await self._execute("block-dirty-bitmap-add", self._stopped(node) | {"granularity": _PIECE_BYTES})
            await self._execute("stop")

    async def _written(self, watch: dict[str, Any]) -> int:
        """Bytes that were written since a bitmap was made or cleared, in whole pieces."""
        count = (await self._bitmaps(watch["node"])).get(watch["name"])
        if count is None:
            raise QemuError(f"node {watch['node']} is not watched any more")
        return count

    async def _bitmaps(self, node: str) -> dict[str, int]:
        """The bytes in each bitmap of a node that has a name."""
        for one in await self._execute("query-named-block-nodes", {"flat": True}):
            if one["node-name"] == node:
                return {bitmap["name"]: bitmap["count"] for bitmap in one.get("dirty-bitmaps", ()) if "name" in bitmap}
        raise QemuError(f"this QEMU has no node {node}")

    def _watch(self, node: str) -> dict[str, Any]:
        """The bitmap of a node that says what is written to it."""
        return {"node": node, "name": f"copy-{self._disk}"}

    def _stopped(self, node: str) -> dict[str, Any]:
        """The bitmap of a node that says that its guest is stopped."""
        return {"node": node, "name": f"stopped-{self._disk}"}
