"""The host's end of a VM's console."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

from limosa.host.console import relay


class Person:
    """A WebSocket at which nobody types."""

    def __init__(self) -> None:
        self.seen = b""
        self.reason: str | None = None

    async def receive_bytes(self) -> bytes:
        return await asyncio.Future()

    async def send_bytes(self, data: bytes) -> None:
        self.seen += data

    async def close(self, code: int = 1000, reason: str | None = None) -> None:
        self.reason = reason


def test_whoever_sits_at_it_is_told_why_it_ends_with_its_qemu(tmp_path: Path) -> None:
    async def said(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"login: ")
        writer.close()

    async def scenario() -> Person:
        person, path = Person(), tmp_path / "console"
        async with asyncio.timeout(20), await asyncio.start_unix_server(said, path):
            await relay(cast(Any, person), path)
        return person

    person = asyncio.run(scenario())
    assert (person.seen, person.reason) == (b"login: ", "the VM was stopped, or has moved to another host")
