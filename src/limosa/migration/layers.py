"""Files below disks that the destination does not have: sent before it builds anything, by the source's daemon.

Nobody writes them, so they need no mirror and no switchover. What the destination asks for may be less than was
planned, because another move has brought a part meanwhile.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from limosa.errors import InvalidInput
from limosa.migration import disks, progress
from limosa.model.migration import Phase
from limosa.model.storage import LayerPlan
from limosa.security.tls import stream_context
from limosa.transport.layers import Sender
from limosa.transport.shares import Kind
from limosa.wire.peer import LayersAwaited

if TYPE_CHECKING:
    from limosa.migration.source import SourceMove

LOOK_EVERY_S = 0.2
#: When the connection broke, the destination usually says why; for so long that is waited for.
SAYS_WHY_WITHIN_S = 2.0

T = TypeVar("T")


async def send(move: SourceMove, awaited: LayersAwaited) -> None:
    """Send what the destination awaits. Raises :class:`StorageError` and :class:`NetworkError`."""
    assert move.examined is not None
    plans = _chosen(move.examined.layers, awaited)
    move.report.enter(Phase.STORAGE)
    await move.home.sending()
    channel = await move.first(move.home.connect_layers(move.examined.route, awaited))
    try:
        credentials = move.disk_credentials
        context = stream_context(credentials, server=False) if credentials is not None else None
        sender = Sender(channel.stream, context, move.home.bandwidth(Kind.STORAGE))
        sending = asyncio.ensure_future(sender.send([plan.origin for plan in plans]))
        try:
            paths = move.figures.paths_of(move.examined, channel)
            while not sending.done():
                _show(move, sender, plans)
                move.report.change(route=await paths.look())
                await asyncio.wait({sending}, timeout=LOOK_EVERY_S)
                sender.bytes_per_s = move.home.bandwidth(Kind.STORAGE)
        finally:
            sending.cancel()
            await asyncio.wait({sending})
        sending.result()
        _show(move, sender, plans)
        move.figures.layers_went(channel, sender.sent_bytes)
        move.report.change(route=await paths.look())
        move.report.note("the destination verifies the backing files")
    finally:
        channel.close()


async def sent_beside(sending: Coroutine[Any, Any, None], answer: Coroutine[Any, Any, T]) -> T:
    """The answer of a destination to which files are sent meanwhile. If they cannot be, what it says of that counts
    more than what was seen here."""
    first, last = asyncio.ensure_future(sending), asyncio.ensure_future(answer)
    try:
        await asyncio.wait({first, last}, return_when=asyncio.FIRST_COMPLETED)
        if first.done() and first.exception() is not None:
            await asyncio.wait({last}, timeout=SAYS_WHY_WITHIN_S)
            if not last.done():
                first.result()
        return await last
    finally:
        first.cancel()
        last.cancel()
        await asyncio.wait({first, last})
        _look_at(first)
        _look_at(last)


def _look_at(task: asyncio.Future[Any]) -> None:
    """Whatever it raised besides is not of interest."""
    if not task.cancelled():
        task.exception()


def _chosen(plans: tuple[LayerPlan, ...], awaited: LayersAwaited) -> list[LayerPlan]:
    if any(at >= len(plans) for at in awaited.wanted):
        raise InvalidInput("the destination asks for files that were not planned")
    return [plans[at] for at in awaited.wanted]


def _show(move: SourceMove, sender: Sender, plans: list[LayerPlan]) -> None:
    total = sum(plan.expected_bytes for plan in plans)
    total += sum(plan.expected_bytes for plan in disks.copies(move.report.now.disks))
    bar, shown = progress.of_layers(
        move.report.bar, move.report.now.progress, sender.sent_bytes, total, time.monotonic()
    )
    move.report.bar = bar
    move.report.change(progress=shown)
