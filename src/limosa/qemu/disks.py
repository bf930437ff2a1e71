"""Disks of a running QEMU that are copied elsewhere, and disks that a waiting QEMU lets be written from elsewhere.

A copy is a mirror job with the identity ``copy-DISK``. It first copies everything, then keeps up with what the guest
writes ("ready"). It ends in one of three ways: the copy takes the disk's place (``settle_copy`` and ``pivot``), it is
left to whoever has it (``end_copy``), or it is given up (``drop_copy``). How it begins is in ``beginning``.

QEMU is asked for everything, nothing is remembered: nodes have names that tell what they are. The image a VM was
started with is the node ``vda`` above ``vda-file``; a copy is ``vda.TAG`` above ``vda.TAG-file``, and after a pivot the
disk's node is that.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from limosa.background import Background
from limosa.errors import OutcomeUnknown, QemuError, QemuGone, StorageError
from limosa.qemu import folder
from limosa.qemu.arguments import image_nodes
from limosa.qemu.beginning import Beginning
from limosa.qemu.monitor import Monitor
from limosa.qemu.process import QemuProcess
from limosa.qemu.protocol import CopyState, CopyStatistics, Event, ImageFile
from limosa.qemu.session import Session, greeted_in_time
from limosa.security.tls import SERVER_NAME
from limosa.wire.peer import StreamCredentials

_TLS_ID = "disks-tls"
_LISTENER_FD = "disks-listener"
#: A job that QEMU was told to end ends when its last request does; a request over a dead network may take long. This is
#: counted anew as long as less and less remains to be copied.
END_WITHIN_S = 60.0
LOOK_EVERY_S = 1.0
#: Strangers at the port must not use up the places of the source's connections.
SPARE_CONNECTIONS = 16

_STATES = {
    "created": CopyState.COPYING,
    "running": CopyState.COPYING,
    "paused": CopyState.COPYING,
    "ready": CopyState.READY,
    "standby": CopyState.READY,
    "waiting": CopyState.SETTLED,
    "pending": CopyState.SETTLED,
    "aborting": CopyState.ENDED,
    "concluded": CopyState.ENDED,
}


class Disks(Session):
    """What a QEMU does with its disks."""

    def __init__(self, qemu: QemuProcess, monitor: Monitor, run_dir: Path) -> None:
        super().__init__(qemu, monitor, run_dir)
        self._background = Background()

    # --- where copies are made from ---

    async def copy_to_file(self, disk: str, tag: str, image: ImageFile, bytes_per_s: int, *, whole: bool) -> None:
        """Begin to copy a disk into an image of this host that exists and is empty. Raises :class:`QemuError`; nothing
        is left open then. ``bytes_per_s``: a cap, 0 for none; ``whole``: with what is below an overlay, else the image
        lies above the same."""
        name = f"{disk}.{tag}"
        nodes = image_nodes(
            name,
            image.format,
            image.path,
            driver="host_device" if image.device else "file",
            direct=image.direct,
            thick=image.thick,
            locks=image.locks,
            size_bytes=image.size_bytes,
            look_for_zeroes=image.look_for_zeroes,
        )
        try:
            for node in nodes:
                await self._execute("blockdev-add", node)
        except QemuError:
            await self._close(name)
            raise
        await self._begin(disk, name, bytes_per_s, whole=whole, pivots=True)

    async def copy_to_host(
        self, disk: str, tag: str, stream: socket.socket, bytes_per_s: int, *, whole: bool, encrypt: bool
    ) -> None:
        """Begin to copy a disk to the export of its name at the other end of ``stream``; QEMU gets a duplicate of that.

        ``whole``: with what is below an overlay; otherwise the other end has that. ``encrypt`` needs
        :meth:`trust_disks`.
        """
        stream.setblocking(True)  # the flag is shared by both descriptors, and QEMU sets it as it needs it
        name = f"disk-{disk}"
        await self._monitor.give_descriptor(name, stream.fileno())
        node = {
            "driver": "nbd",
            "node-name": f"{disk}.{tag}",
            "server": {"type": "fd", "str": name},
            "export": disk,
            **({"tls-creds": _TLS_ID, "tls-hostname": SERVER_NAME} if encrypt else {}),
            "discard": "unmap",
            "detect-zeroes": "unmap",
        }
        try:
            async with greeted_in_time(stream):
                await self._execute("blockdev-add", node)
        except TimeoutError:
            raise StorageError(
                f"disk {disk} could not be copied", why="the destination's QEMU does not answer"
            ) from None
        except QemuError:
            with suppress(QemuError):
                await self._monitor.execute("closefd", {"fdname": name})
            raise
        await self._begin(disk, f"{disk}.{tag}", bytes_per_s, whole=whole, pivots=False)

    async def copies(self) -> dict[str, CopyStatistics]:
        """How all copies stand, by disk."""
        jobs = await self._execute("query-block-jobs")
        return {job["device"].removeprefix("copy-"): _statistics(job) for job in jobs if _is_ours(job)}

    async def cap_copy(self, disk: str, bytes_per_s: int) -> None:
        """Cap what is copied, 0: no cap. Where nothing is, or no longer, there is nothing to cap."""
        if not await self._takes_caps(disk):
            return
        try:
            await self._execute("block-job-set-speed", {"device": f"copy-{disk}", "speed": bytes_per_s})
        except (QemuGone, OutcomeUnknown):
            raise
        except QemuError:
            if await self._takes_caps(disk):  # else it ended between the look and the command
                raise

    async def hurry_copy(self, disk: str) -> None:
        """See :class:`limosa.qemu.protocol.CopyingProtocol`. A copy that has nothing to do sleeps for 100 ms
        (``mirror_run``, block/mirror.c), unless its speed is set (``job_set_speed``, job.c), to which it does not keep
        any more when it is ready."""
        with suppress(QemuError):
            await self._execute("block-job-set-speed", {"device": f"copy-{disk}", "speed": 0})

    async def block_writes(self, disk: str) -> None:
        """From now on a write of the guest is done when it is in the copy too. Raises :class:`QemuError` before 8.2."""
        change = {"id": f"copy-{disk}", "type": "mirror", "copy-mode": "write-blocking"}
        await self._execute("block-job-change", change)

    async def slow_writes(self, disk: str, bytes_per_s: int) -> None:
        """Let the guest write so much a second to a disk, from now on; 0: as much as it can. The end of a copy, by
        :meth:`pivot` or :meth:`drop_copy`, is the end of that."""
        limits = dict.fromkeys(("bps", "bps_rd", "iops", "iops_rd", "iops_wr"), 0)
        device = (await self._device(disk))["qdev"]
        await self._execute("block_set_io_throttle", {"id": device, **limits, "bps_wr": bytes_per_s})

    async def settle_copy(self, disk: str) -> None:
        """Of a copy to a file that is ready: hold the guest's I/O back, make both alike and flush them.

        It stays so until :meth:`pivot` or :meth:`drop_copy`. Raises :class:`StorageError` if the copy failed.
        """
        await self._tell(disk, "block-job-complete")
        await self._reaches(disk, {CopyState.SETTLED})

    async def pivot(self, disk: str) -> None:
        """Put a settled copy in the disk's place, and close the image it had. May be repeated."""
        copy = (await self.copies()).get(disk)
        if copy is not None and copy.state is CopyState.SETTLED:
            await self._execute("job-finalize", {"id": f"copy-{disk}"})
            await self._reaches(disk, {CopyState.ENDED})
        await self._dismiss(disk)
        await self.slow_writes(disk, 0)
        now = await self.disk_node(disk)
        for node in await self._execute("query-named-block-nodes", {"flat": True}):
            name = str(node["node-name"])
            if name != now and (name == disk or name.startswith(f"{disk}.")) and not name.endswith("-file"):
                await self._close(name)

    async def end_copy(self, disk: str) -> None:
        """Of a copy to a host that is ready: make it whole and flush it, then end it. It stays open for
        :meth:`drop_copy`. Raises :class:`StorageError` if the copy failed."""
        ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        unsubscribe = self.on_event(lambda event: _settle(ended, event) if _is_end_of(event, disk) else None)
        try:
            # Without force, a job that is ready ends as completed, but for the pivot (qapi/block-core.json).
            await self._tell(disk, "block-job-cancel")
            # The guest stands still: QEMU's event says all there is to know, and is there before any answer.
            await asyncio.wait({ended}, timeout=LOOK_EVERY_S)
        finally:
            unsubscribe()
        if not ended.done():
            await self._reaches(disk, {CopyState.ENDED})
        elif ended.result():
            raise StorageError(f"disk {disk} could not be copied", why=ended.result())
        # The guest stands still, and need not wait for the answer to this; it is said before anything that follows.
        self._background.spawn(self._dismiss(disk))
        await asyncio.sleep(0)

    async def drop_copy(self, disk: str, tag: str) -> None:
        """Give a copy up, if there is one, and close it. The disk is as it was. May be repeated, in every state.

        Raises :class:`StorageError` if QEMU does not end it, and so may still write to it."""
        await self._drop(disk, f"{disk}.{tag}")

    async def disk_node(self, disk: str) -> str:
        """The node that is the disk now."""
        return str((await self._device(disk))["inserted"]["node-name"])

    async def trust_disks(self, credentials: StreamCredentials) -> None:
        """Take the credentials with which copies go to a host."""
        await self._hold_credentials(_TLS_ID, folder.DISKS, credentials, "client")

    # --- where copies are made to ---

    async def export_disks(
        self, disks: Iterable[str], listener: socket.socket, credentials: StreamCredentials | None
    ) -> None:
        """Let whoever has the other half of ``credentials`` write these disks, at ``listener``, of which QEMU gets a
        duplicate. Without credentials that must be one that nobody else can call. The guest must not have run here."""
        if credentials is not None:
            await self._hold_credentials(_TLS_ID, folder.DISKS, credentials, "server")
        await self._monitor.give_descriptor(_LISTENER_FD, listener.fileno())
        names = list(disks)
        address = {"type": "fd", "data": {"str": _LISTENER_FD}}
        server = {"addr": address, "max-connections": len(names) + SPARE_CONNECTIONS}
        if credentials is not None:
            server["tls-creds"] = _TLS_ID
        await self._execute("nbd-server-start", server)
        for disk in names:
            export = {"type": "nbd", "id": f"export-{disk}", "node-name": disk, "name": disk, "writable": True}
            await self._execute("block-export-add", export)

    async def end_exports(self) -> None:
        """Let nobody write these disks any more. May be repeated."""
        with suppress(QemuError):  # there is no server (any more)
            await self._execute("nbd-server-stop")

    # --- inside ---

    async def _device(self, disk: str) -> dict[str, Any]:
        """The guest's device (``BlockInfo`` in qapi/block-core.json)."""
        for block in await self._execute("query-block"):
            if block.get("qdev", "").startswith(f"/machine/peripheral/{disk}-device/") and "inserted" in block:
                return dict(block)
        raise QemuError(f"this QEMU has no disk {disk}")

    async def _begin(self, disk: str, target: str, bytes_per_s: int, *, whole: bool, pivots: bool) -> None:
        if disk in await self.copies():
            await self._close(target)
            raise QemuError(f"disk {disk} is being copied already")
        job = {
            "job-id": f"copy-{disk}",
            "device": await self.disk_node(disk),
            "target": target,
            "sync": "full" if whole else "top",
            "on-source-error": "report",
            "on-target-error": "report",
            "auto-finalize": not pivots,
            "auto-dismiss": False,
            "speed": bytes_per_s,
        }
        try:
            await self._mirror(disk, job)
        except (QemuError, StorageError):
            await self._drop(disk, target)
            raise

    async def _mirror(self, disk: str, job: dict[str, Any]) -> None:
        """Start a job that misses no write of the guest."""
        await self._beginning(disk).run(job, (await self._device(disk))["inserted"])

    def _beginning(self, disk: str) -> Beginning:
        return Beginning(disk, self._execute, lambda: self._stands(disk), lambda: self._give_up(disk))

    async def _drop(self, disk: str, target: str) -> None:
        # Before anything else: a QEMU that waits for the other end may answer nothing until it has hung up.
        await self._hang_up(target)
        node = await self.disk_node(disk)
        beginning = self._beginning(disk)
        await beginning.let_run(node)
        await self.slow_writes(disk, 0)
        if disk in await self.copies():
            await self._give_up(disk)
        await beginning.forget(node)
        await self._close(target)

    async def _give_up(self, disk: str) -> None:
        """Cancel a job, wait for its end and forget it. Raises :class:`StorageError` if it goes on."""
        with suppress(QemuError):  # it may be over by now
            await self._execute("job-cancel", {"id": f"copy-{disk}"})
        with suppress(StorageError):  # it failed, which is an end, too; or goes on
            await self._reaches(disk, {CopyState.ENDED})
        copy = (await self.copies()).get(disk)
        if copy is not None and copy.state is not CopyState.ENDED:
            why = f"QEMU was told to, and has waited for its storage for {END_WITHIN_S:.0f} s"
            raise StorageError(f"the copy of disk {disk} does not end", why=why)
        await self._dismiss(disk)

    async def _takes_caps(self, disk: str) -> bool:
        """Whether a disk is being copied, so that a cap means something."""
        copy = (await self.copies()).get(disk)
        return copy is not None and copy.state in (CopyState.COPYING, CopyState.READY)

    async def _tell(self, disk: str, command: str) -> None:
        """Give a job a command. Raises :class:`StorageError` if the job has failed by now."""
        try:
            await self._execute(command, {"device": f"copy-{disk}"})
        except (QemuGone, OutcomeUnknown):
            raise
        except QemuError:
            copy = (await self.copies()).get(disk)
            if copy is None or not copy.error:
                raise
            raise StorageError(f"disk {disk} could not be copied", why=copy.error) from None

    async def _stands(self, disk: str) -> CopyStatistics:
        """How a copy stands. Raises :class:`StorageError` if it has failed."""
        copy = (await self.copies()).get(disk)
        if copy is None or copy.error:
            raise StorageError(f"disk {disk} could not be copied", why=copy.error if copy else "it was ended")
        return copy

    async def _reaches(self, disk: str, states: set[CopyState]) -> None:
        """Wait until a copy is in one of the states, as long as it comes nearer to its end. Raises
        :class:`StorageError` if it failed."""
        changed = asyncio.Event()
        unsubscribe = self.on_event(lambda event: changed.set() if _is_of(event, disk) else None)
        deadline, least = time.monotonic() + END_WITHIN_S, None
        try:
            while time.monotonic() < deadline:
                changed.clear()
                copy = await self._stands(disk)
                if copy.state in states:
                    return
                remaining = copy.total_bytes - copy.copied_bytes
                if least is None or remaining < least:
                    deadline, least = time.monotonic() + END_WITHIN_S, remaining
                # A QEMU that has died says nothing: it is asked again.
                with suppress(TimeoutError):
                    await asyncio.wait_for(changed.wait(), LOOK_EVERY_S)
        finally:
            unsubscribe()
        why = f"its copy came no nearer to its end in {END_WITHIN_S:.0f} s"
        raise StorageError(f"disk {disk} could not be copied", why=why)

    async def _dismiss(self, disk: str) -> None:
        with suppress(QemuError):
            await self._execute("job-dismiss", {"id": f"copy-{disk}"})

    async def _hang_up(self, node: str) -> None:
        """End the connection of a copy to a host, if it is one: over a dead network its job would not end before TCP
        gives up, which takes a quarter of an hour."""
        try:
            # Out of band: QEMU's main loop may stand still until just this is done.
            connection = {"type": "block-node", "node-name": node}
            await self._execute("yank", {"instances": [connection]}, out_of_band=True)
        except (QemuGone, OutcomeUnknown):
            raise
        except QemuError:
            return  # it has no connection

    async def _close(self, node: str) -> None:
        """Close an image: its format node and the file below it. What is not open is none."""
        for name in (node, f"{node}-file"):
            try:
                await self._execute("blockdev-del", {"node-name": name})
            except (QemuGone, OutcomeUnknown):
                raise
            except QemuError:
                continue


def _is_of(event: Event, disk: str) -> bool:
    return event.name == "JOB_STATUS_CHANGE" and event.data["id"] == f"copy-{disk}"


def _is_end_of(event: Event, disk: str) -> bool:
    return event.name in ("BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED") and event.data["device"] == f"copy-{disk}"


def _settle(ended: asyncio.Future[str], event: Event) -> None:
    """Make the end of a job known: empty, or why it failed."""
    if not ended.done():
        given_up = "it was ended" if event.name == "BLOCK_JOB_CANCELLED" else ""
        ended.set_result(event.data.get("error", given_up))


def _is_ours(job: dict[str, Any]) -> bool:
    return job["type"] == "mirror" and str(job["device"]).startswith("copy-")


def _statistics(job: dict[str, Any]) -> CopyStatistics:
    return CopyStatistics(
        state=_STATES.get(job["status"], CopyState.COPYING),
        copied_bytes=job["offset"],
        total_bytes=job["len"],
        error=job.get("error", ""),
    )
