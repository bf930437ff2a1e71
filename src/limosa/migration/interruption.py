"""Work that a person, a dying QEMU or a lost session may interrupt."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from limosa.errors import MigrationFailed
from limosa.qemu.protocol import MachineProtocol
from limosa.qemu.session import DYING_S

T = TypeVar("T")


async def unless(
    gone: asyncio.Event,
    others: Collection[asyncio.Future[None]],
    interrupted: Callable[[], None],
    work: Coroutine[Any, Any, T],
) -> T:
    """Do ``work`` unless QEMU is ``gone``, or one of ``others`` done, before: ``interrupted`` then raises why.

    Work that was interrupted, or whose caller was cancelled, has ended when this does.
    """
    task = asyncio.ensure_future(work)
    ended = asyncio.ensure_future(gone.wait())
    try:
        await asyncio.wait({task, ended, *others}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            interrupted()
        return await task
    finally:
        ended.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait({task})


def restarted(vm: str, host: str) -> MigrationFailed:
    """What ended a move that a new daemon found under way and has undone."""
    return MigrationFailed("the host daemon was restarted during the move", todo="move it again", vm=vm, host=host)


async def is_gone(machine: MachineProtocol) -> bool:
    """Whether a QEMU that did not answer has ended: its session breaks a moment before that is known."""
    with suppress(TimeoutError):
        async with asyncio.timeout(DYING_S):
            await machine.gone.wait()
    return machine.gone.is_set()
