"""Ending a stream that is under way, and knowing how it ended."""

from __future__ import annotations

import asyncio

from limosa.errors import QemuError
from limosa.qemu.protocol import Event, MachineProtocol, MigrationState

#: How long QEMU may take to end a stream that was cancelled. It usually takes milliseconds; with RDMA over a cable that
#: was cut 19 s (measured).
CANCEL_WITHIN_S = 30.0

_UNDER_WAY = (MigrationState.SETUP, MigrationState.ACTIVE, MigrationState.PRE_SWITCHOVER, MigrationState.DEVICE)


async def stop_stream(machine: MachineProtocol) -> None:
    """Cancel a migration that is under way, and wait until QEMU says how it ended. Raises :class:`QemuError`."""
    ended = asyncio.Event()

    def on_event(event: Event) -> None:
        if event.name == "MIGRATION" and MigrationState(event.data["status"]) not in (
            *_UNDER_WAY,
            MigrationState.CANCELLING,
        ):
            ended.set()

    unsubscribe = machine.on_event(on_event)
    try:
        async with asyncio.timeout(CANCEL_WITHIN_S):
            state = (await machine.migration()).state
            if state in _UNDER_WAY or state is MigrationState.CANCELLING:
                await machine.cancel_migration()
                await ended.wait()
    except TimeoutError:
        raise QemuError("QEMU does not end a migration that was cancelled", todo="see the VM's qemu.log") from None
    finally:
        unsubscribe()
