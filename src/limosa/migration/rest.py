"""A post-copy whose stream breaks: the guest runs at the destination and a part of its memory is here.

Neither QEMU gives up its part (docs/devel/migration/postcopy.rst, "Postcopy recovery"); the guest waits where it needs
a page that has not come. So the stream is made anew as often as it takes, by plain TCP and over whichever address of
the destination can be reached; QEMU encrypts it as before. Only the end of one of the two QEMUs ends it: then the
guest has crashed at the destination, whose it is.
"""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from typing import TYPE_CHECKING

from limosa.errors import LimosaError, MigrationFailed, QemuGone
from limosa.qemu.protocol import RECOVERING, MachineProtocol, MigrationState
from limosa.transport import tcp

if TYPE_CHECKING:
    from limosa.migration.source import SourceMove

TRY_WITHIN_S = 30.0
TRY_EVERY_S = 1.0
LOOK_EVERY_S = 0.05


async def mend(move: SourceMove, machine: MachineProtocol) -> None:
    """Return when the rest flows again. Raises :class:`QemuGone` if one of the QEMUs has ended."""
    there, why = move.header.destination, ""
    while (await machine.migration()).state is MigrationState.POSTCOPY_PAUSED:
        move.report.note(
            f"the stream broke in post-copy: the guest, at the destination, waits for the rest of its memory until "
            f"host '{there}' can be reached{why}"
        )
        try:
            async with asyncio.timeout(TRY_WITHIN_S):
                await _once(move, machine)
        except QemuGone:
            raise
        except (LimosaError, TimeoutError) as error:
            why = f" ({error})" if str(error) else ""
            await asyncio.sleep(TRY_EVERY_S)


async def _once(move: SourceMove, machine: MachineProtocol) -> None:
    peer = await move.dial()
    try:
        await peer.attach(move.header.migration)
        channel = await move.home.connect_rest(await peer.await_rest())
        try:
            tcp.end_in_silence(channel.stream)
            await machine.send_rest(channel.stream)
            await _flows(move, machine)
        except BaseException:
            with suppress(OSError):
                channel.stream.shutdown(socket.SHUT_RDWR)
            raise
        finally:
            channel.close()
    finally:
        await peer.close()  # which awaited the stream until now


async def _flows(move: SourceMove, machine: MachineProtocol) -> None:
    """Return when both QEMUs have found out what is still missing. Raises :class:`MigrationFailed`."""
    while (look := await machine.migration()).state in RECOVERING:  # noqa: ASYNC110 - QEMU sends no event for each
        await asyncio.sleep(LOOK_EVERY_S)
    if look.state is MigrationState.POSTCOPY_PAUSED:
        vm, host = move.header.vm.name, move.header.destination
        raise MigrationFailed(f"VM '{vm}' is incomplete on host '{host}'", why=look.error, vm=vm, host=host)
