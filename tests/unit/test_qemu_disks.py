"""Waiting for a copy that was told to end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from limosa.errors import QemuError, StorageError
from limosa.qemu import disks
from limosa.qemu.disks import Disks
from limosa.qemu.protocol import CopyState, CopyStatistics, Event


class Copying(Disks):
    """A QEMU whose copy has so much left at each look, half a minute apart, and then is settled."""

    def __init__(self, *remaining: int) -> None:
        super().__init__(cast(Any, SimpleNamespace(owner=lambda: None)), cast(Any, None), Path())
        self._remaining = list(remaining)
        self.now = 0.0

    def on_event(self, callback: Callable[[Event], None]) -> Callable[[], None]:
        return lambda: None

    async def _execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, out_of_band: bool = False
    ) -> Any:
        return {}

    async def copies(self) -> dict[str, CopyStatistics]:
        self.now += disks.END_WITHIN_S / 2
        if not self._remaining:
            return {"vda": CopyStatistics(CopyState.SETTLED, 100, 100)}
        return {"vda": CopyStatistics(CopyState.READY, 100 - self._remaining.pop(0), 100)}


def settle(monkeypatch: pytest.MonkeyPatch, copying: Copying) -> None:
    monkeypatch.setattr(disks, "LOOK_EVERY_S", 0)
    monkeypatch.setattr(disks, "time", SimpleNamespace(monotonic=lambda: copying.now))
    asyncio.run(copying.settle_copy("vda"))


def test_one_that_comes_nearer_to_its_end_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    settle(monkeypatch, Copying(*range(90, 0, -10)))


def test_one_that_does_not_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageError, match="vda") as caught:
        settle(monkeypatch, Copying(90, 80, *[80] * 10))
    assert "no nearer" in caught.value.why


class Telling(Disks):
    """A QEMU with one copy, which takes no command any more, and its nodes."""

    def __init__(self, copy: CopyStatistics) -> None:
        super().__init__(cast(Any, SimpleNamespace(owner=lambda: None)), cast(Any, None), Path())
        self.copy = copy
        self.closed: list[str] = []

    def on_event(self, callback: Callable[[Event], None]) -> Callable[[], None]:
        return lambda: None

    async def copies(self) -> dict[str, CopyStatistics]:
        return {"vda": self.copy}

    async def disk_node(self, disk: str) -> str:
        return disk

    async def slow_writes(self, disk: str, bytes_per_s: int) -> None:
        assert bytes_per_s == 0

    async def _execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, out_of_band: bool = False
    ) -> Any:
        match command:
            case "query-named-block-nodes":
                return [{"node-name": "vda"}]
            case "blockdev-del":
                assert arguments is not None
                self.closed.append(str(arguments["node-name"]))
                return {}
            case "job-dismiss":
                return {}
            case _:
                raise QemuError(f"QEMU refused {command}", why="cannot accept command verb")


def test_one_that_does_not_end_is_not_said_to_be_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disks, "END_WITHIN_S", 0)
    qemu = Telling(CopyStatistics(CopyState.COPYING, 10, 100))
    with pytest.raises(StorageError, match="does not end"):
        asyncio.run(qemu.drop_copy("vda", "tag"))
    assert qemu.closed == []
    qemu.copy = CopyStatistics(CopyState.ENDED, 10, 100, "Operation canceled")
    asyncio.run(qemu.drop_copy("vda", "tag"))
    assert qemu.closed == ["vda.tag", "vda.tag-file"]


@pytest.mark.parametrize("end", [Disks.settle_copy, Disks.end_copy])
def test_one_that_has_failed_says_why_when_it_is_to_end(end: Callable[[Disks, str], Coroutine[Any, Any, None]]) -> None:
    qemu = Telling(CopyStatistics(CopyState.ENDED, 10, 100, "No space left on device"))
    with pytest.raises(StorageError) as caught:
        asyncio.run(end(qemu, "vda"))
    assert caught.value.why == "No space left on device"
    qemu.copy = CopyStatistics(CopyState.COPYING, 10, 100)
    with pytest.raises(QemuError, match="refused"):
        asyncio.run(end(qemu, "vda"))


def test_what_has_failed_has_no_cap() -> None:
    """Whoever looks at it hears why it failed."""
    qemu = Telling(CopyStatistics(CopyState.ENDED, 10, 100, "No space left on device"))
    asyncio.run(qemu.cap_copy("vda", 50))
    qemu.copy = CopyStatistics(CopyState.COPYING, 10, 100)
    with pytest.raises(QemuError, match="refused"):
        asyncio.run(qemu.cap_copy("vda", 50))


def test_what_ends_while_it_is_told_its_cap_has_none() -> None:
    class Ending(Telling):
        async def _execute(self, *arguments: object, **named: object) -> Any:
            self.copy = CopyStatistics(CopyState.ENDED, 10, 100, "Operation canceled")
            raise QemuError("refused: Job in state 'concluded' cannot accept command verb 'set-speed'")

    qemu = Ending(CopyStatistics(CopyState.COPYING, 10, 100))
    asyncio.run(qemu.cap_copy("vda", 50))
    assert qemu.copy.state is CopyState.ENDED
