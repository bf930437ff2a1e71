"""Work in threads: what hangs there keeps nobody else waiting."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
import test_host_storage
from test_preflight import VM

from limosa.background import apart, in_full
from limosa.host.launching import Launcher
from limosa.host.leasing import Leasing
from limosa.host.storage import Storage
from limosa.model.vm import Disk
from limosa.storage import access, mounts

storage = test_host_storage.storage
#: more than asyncio has threads for all
MANY = 40
USING = msgspec.structs.replace(VM, disks=(Disk(name="vda", path="/dead/web1.raw", format="raw"),))


class Share:
    """One that does not answer."""

    def __init__(self) -> None:
        #: counts who waits for it
        self.waiting = threading.Semaphore(0)
        self.answers = threading.Event()

    def look(self, *_: object) -> Any:
        self.waiting.release()
        self.answers.wait()
        raise FileNotFoundError


@pytest.fixture
def dead(monkeypatch: pytest.MonkeyPatch) -> Share:
    share = Share()
    monkeypatch.setattr(mounts, "of", share.look)
    monkeypatch.setattr(access, "status_of", share.look)
    monkeypatch.setattr(Storage, "_facts", share.look)
    return share


def give_back(_: Storage) -> Awaitable[object]:
    return Leasing("host1", "boot", "machine", lambda _: False).give_back(USING)


def conflicts(_: Storage) -> Awaitable[object]:
    return Leasing("host1", "boot", "machine", lambda _: False).conflicts(USING, "")


def claim_images(storage: Storage) -> Awaitable[object]:
    launcher = SimpleNamespace(_page=storage._page, _files=storage._files)
    return Launcher.claim_images(cast(Any, launcher), USING)


def facts(storage: Storage) -> Awaitable[object]:
    return storage.facts(USING.disks)


@pytest.mark.parametrize("touches", [give_back, conflicts, claim_images, facts])
def test_vms_on_a_share_that_is_dead_keep_no_thread_from_others(
    storage: Storage, dead: Share, tmp_path: Path, touches: Callable[[Storage], Awaitable[object]]
) -> None:
    async def scenario() -> None:
        hanging = [asyncio.ensure_future(touches(storage)) for _ in range(MANY)]
        try:
            async with asyncio.timeout(30):
                for _ in range(MANY):
                    await apart(dead.waiting.acquire)
                await in_full((tmp_path / "journal").write_bytes, b"record")
                await asyncio.to_thread(lambda: None)
            assert not any(one.done() for one in hanging)
        finally:
            dead.answers.set()
            await asyncio.wait(hanging)
        for one in hanging:
            one.exception()

    asyncio.run(scenario())


def test_who_is_cancelled_waits_for_the_end_of_it() -> None:
    begun, goes_on = threading.Event(), threading.Event()
    done: list[bool] = []

    def work() -> None:
        begun.set()
        goes_on.wait()
        done.append(True)

    async def scenario() -> None:
        working = asyncio.ensure_future(in_full(work))
        await apart(begun.wait)
        working.cancel()
        await asyncio.sleep(0)
        assert not working.done()
        goes_on.set()
        with pytest.raises(asyncio.CancelledError):
            await working
        assert done == [True]

    asyncio.run(scenario())


def test_what_fails_there_fails_here() -> None:
    async def scenario() -> None:
        with pytest.raises(ZeroDivisionError):
            await in_full(divmod, 1, 0)
        assert await in_full(divmod, 7, 2) == (3, 1)

    asyncio.run(scenario())
