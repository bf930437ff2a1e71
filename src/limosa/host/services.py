"""The parts of a running host daemon, put together."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from limosa.background import Background
from limosa.errors import LimosaError, StateError
from limosa.host.disk_moves import DiskMoves
from limosa.host.files import Files
from limosa.host.goodput import Goodputs
from limosa.host.incoming import Incoming
from limosa.host.inspection import Inspector
from limosa.host.launching import Launcher, qemu_user
from limosa.host.leasing import Leasing
from limosa.host.leftovers import Leftovers
from limosa.host.multichannel import Multichannel
from limosa.host.neighbours import Neighbours
from limosa.host.outgoing import Outgoing
from limosa.host.page import Page
from limosa.host.parts import Parts
from limosa.host.process_records import ProcessRecords
from limosa.host.relays import Relays
from limosa.host.restarting import Restarting
from limosa.host.storage import Storage, places
from limosa.host.views import Views
from limosa.host.vms import Vms
from limosa.migration.journal import Journal
from limosa.migration.ownership import DestinationStep, SourceStep
from limosa.model.migration import Side
from limosa.network.mptcp import PathManager
from limosa.network.netlink import Netlink
from limosa.qemu.capabilities import probe
from limosa.settings.daemon import DaemonSettings

_log = logging.getLogger(__name__)
T = TypeVar("T")
#: A daemon that starts waits so long for migrations to be brought to their ends, which shares may keep from it.
RECOVERED_WITHIN_S = 5.0


@dataclass(frozen=True)
class Services:
    """Everything the API speaks for."""

    parts: Parts
    cpus: int
    outgoing: Outgoing
    incoming: Incoming
    disk_moves: DiskMoves
    restarting: Restarting
    views: Views
    neighbours: Neighbours
    leftovers: Leftovers
    #: what an earlier daemon left, and is being brought to its end
    recovering: Background = field(default_factory=Background)


async def assemble(daemon: DaemonSettings, files: Files) -> Services:
    """Make the parts, and take up the VMs that run. Raises :class:`LimosaError` if the host cannot work."""
    page = Page(files.settings)
    netlink = Netlink()
    user = qemu_user(daemon.qemu_user)
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    capabilities = await probe(Path(daemon.qemu), files.state / "qemu.json", user)
    leasing = Leasing(daemon.name, boot, files.machine(), lambda path: places(page, files).is_said_to_be_shared(path))
    records = ProcessRecords(files, boot)
    launcher = Launcher(daemon, page, files, capabilities, netlink, user, leasing, records)
    vms = Vms(daemon.name, files, launcher)
    restarting = Restarting(vms, leasing, records)
    for fault in await vms.load():
        _log.error("%s", fault)
    storage = Storage(page, files, user, daemon.name)
    views = Views(daemon.name, files.migrations)
    goodputs = Goodputs(files.goodput)
    inspector = Inspector(daemon, page, vms, capabilities, netlink, storage, leasing, goodputs, user)
    multichannel = Multichannel(PathManager(), files.run)
    await multichannel.endpoints.clean()
    relays = Relays(multichannel, page, user)
    neighbours = Neighbours(daemon.name, page, Path(daemon.certificates), files.migrations)
    parts = Parts(
        name=daemon.name,
        boot=boot,
        files=files,
        page=page,
        vms=vms,
        storage=storage,
        leasing=leasing,
        inspector=inspector,
        multichannel=multichannel,
        relays=relays,
        neighbours=neighbours,
    )
    return Services(
        parts=parts,
        cpus=len(os.sched_getaffinity(0)),
        outgoing=Outgoing(parts, Path(daemon.certificates), views),
        incoming=Incoming(parts),
        disk_moves=DiskMoves(parts, views, launcher),
        restarting=restarting,
        views=views,
        neighbours=neighbours,
        leftovers=Leftovers(parts),
    )


async def recover(services: Services) -> None:
    """Bring every migration that an earlier daemon left to its end, or begin to: one that waits for a share which does
    not answer keeps its VM, and nothing else."""
    until = time.monotonic() + RECOVERED_WITHIN_S

    async def begin(what: str, work: Coroutine[Any, Any, None]) -> None:
        task = services.recovering.spawn(_watched(services, what, work))
        await asyncio.wait({task}, timeout=max(0.0, until - time.monotonic()))

    await asyncio.to_thread(_remove_half_written, services.parts.files.migrations)
    await begin("moves of disks", services.disk_moves.recover())
    journals: list[Journal] = []
    for path in sorted(services.parts.files.migrations.glob("*.jsonl")):
        try:
            journals.append(await asyncio.to_thread(_load, path))
        except LimosaError as error:
            _log.error("%s", error)
            services.parts.vms.doubt = str(error)
    for journal in sorted(journals, key=lambda journal: journal.header.accepted_at):
        what = f"migration {journal.header.migration}"
        if journal.header.side is Side.SOURCE:
            await _watched(services, what, services.outgoing.recover(journal))
        else:
            # Each is known before the first request is answered.
            landing = await _watched(services, what, services.incoming.take_up(journal))
            if landing is not None:
                await begin(what, services.incoming.bring_to_end(landing))
    await asyncio.to_thread(services.views.recall_others)
    await services.restarting.give_back_leases()
    services.restarting.restart_died()
    # A QEMU that was silent may not use the disks its vm.toml names until that move has been brought to an end.
    having_disks_moved = services.disk_moves.not_ended()
    if having_disks_moved is not None:
        services.restarting.ask_again(but=having_disks_moved)


async def _watched(services: Services, what: str, work: Coroutine[Any, Any, T]) -> T | None:
    """Do it. A fault in one must not keep the host's other VMs without a daemon."""
    try:
        return await work
    except Exception as error:  # noqa: BLE001 - whatever it is
        _log.exception("%s could not be taken up", what)
        services.parts.vms.doubt = f"{what} could not be taken up: {error!r}"
        return None


def _remove_half_written(folder: Path) -> None:
    """Files that an earlier daemon had not given their names yet, which say nothing. They would pass for a move that
    goes on."""
    for pattern in (*(f"*.{side}.new" for side in Side), ".*.json.new"):
        for path in folder.glob(pattern):
            try:
                path.unlink()
            except OSError as error:
                _log.error("%s stays: %s", path, error)


def _load(path: Path) -> Journal:
    """A journal that says what it can mean. Raises :class:`StateError`."""
    journal = Journal.load(path)
    header = journal.header
    steps: set[str] = {*(SourceStep if header.side is Side.SOURCE else DestinationStep)}
    unknown = {record.step for record in journal.records} - steps
    if unknown or path.name != f"{header.migration}.{header.side}.jsonl":
        raise StateError(
            f"the journal {path} is damaged",
            why=f"there is no step '{min(unknown)}'" if unknown else f"it is of migration {header.migration}",
            todo="see docs/recovery.md; the VM is left as it is",
            vm=header.vm.name,
        )
    return journal
