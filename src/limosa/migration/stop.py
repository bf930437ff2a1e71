"""Ending a stream that is under way, and knowing how it ended."""

from __future__ import annotations

import asyncio

from limosa.errors import QemuError
from limosa.qemu.protocol import PRE_COPY, Event, MachineProtocol, MigrationState

#: How long QEMU may take to end a stream that was cancelled. It usually takes milliseconds; with RDMA over a cable that
#: was cut 19 s (measured).
CANCEL_WITHIN_S = 30.0

_NOT_ENDED = PRE_COPY | {MigrationState.CANCELLING}


async def stop_stream(machine: MachineProtocol) -> None:
    """Cancel a migration that is under way, and wait until QEMU says how it ended. Raises :class:`QemuError`."""
    ended = asyncio.Event()

    def on_event(event: Event) -> None:
        if event.name == "MIGRATION" and MigrationState(event.data["status"]) not in _NOT_ENDED:
            ended.set()

    unsubscribe = machine.on_event(on_event)
    try:
        async with asyncio.timeout(CANCEL_WITHIN_S):
            if (await machine.migration()).state in _NOT_ENDED:
                await machine.cancel_migration()
                await ended.wait()
    except TimeoutError:
        raise QemuError("QEMU does not end a migration that was cancelled", todo="see the VM's qemu.log") from None
    finally:
        unsubscribe()
