"""A process that has no descriptor left, so that the kernel gives its doors no caller."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from limosa.transport import lobby

_AGAIN_AFTER_S = 0.0123


@asynccontextmanager
async def none_left(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """Inside there is none for a new caller. Ends when a door that somebody has come to meanwhile was refused that
    caller, and is about to try again."""
    refused, sleep = asyncio.Event(), asyncio.sleep

    async def before_the_next_try(delay: float) -> None:
        if delay == _AGAIN_AFTER_S:
            refused.set()
        await sleep(delay)

    monkeypatch.setattr(lobby, "_AGAIN_AFTER_S", _AGAIN_AFTER_S)
    monkeypatch.setattr(asyncio, "sleep", before_the_next_try)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
    try:
        yield
        await refused.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
