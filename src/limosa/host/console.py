"""A VM's serial console over a WebSocket. QEMU takes one visitor at a time; the next waits."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

from starlette.websockets import WebSocket, WebSocketDisconnect

CHUNK_BYTES = 64 * 1024


async def relay(socket: WebSocket, console: Path) -> None:
    """Carry bytes both ways until either end leaves."""
    try:
        reader, writer = await asyncio.open_unix_connection(console)
    except OSError as error:
        await socket.close(code=4404, reason=f"no console: {error.strerror}")
        return
    to_person = asyncio.ensure_future(_to_person(reader, socket))
    tasks = {asyncio.ensure_future(_to_guest(socket, writer)), to_person}
    reason = ""
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if to_person.done():
            reason = "the VM was stopped, or has moved to another host"
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        writer.close()
        with contextlib.suppress(RuntimeError, WebSocketDisconnect):
            await socket.close(reason=reason)


async def _to_guest(socket: WebSocket, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(WebSocketDisconnect, KeyError, OSError):
        while True:
            writer.write(await socket.receive_bytes())
            await writer.drain()


async def _to_person(reader: asyncio.StreamReader, socket: WebSocket) -> None:
    with contextlib.suppress(WebSocketDisconnect, RuntimeError, OSError):
        while data := await reader.read(CHUNK_BYTES):
            await socket.send_bytes(data)
