"""What is found before a move: disks whose images would be deleted while others need them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from test_disks import FACT
from test_preflight import HERE, THERE, VM

from limosa.migration import examination
from limosa.migration.examination import Examined, Question, examine
from limosa.model.facts import VmFacts
from limosa.model.route import Route
from limosa.model.storage import BackingFile, DiskFacts, Location
from limosa.model.vm import Disk


class DisksHere:
    """One disk, which another VM needs too."""

    async def facts(self, disks: Iterable[Disk]) -> tuple[DiskFacts, ...]:
        return tuple(msgspec.structs.replace(FACT, name=disk.name, needed="VM 'other' uses it") for disk in disks)

    async def digest(self, backing: BackingFile) -> BackingFile:
        raise AssertionError("nothing lies below it")


def examined(monkeypatch: pytest.MonkeyPatch, wishes: dict[str, str], *, keep: bool) -> Examined:
    there = msgspec.structs.replace(THERE, locations=(Location(name="fast", path="/srv/fast"),))

    async def inspect(*_: Any) -> Any:
        return there, 0.0

    async def facts() -> VmFacts:
        return HERE

    async def route(*_: Any) -> Any:
        return Route("tcp"), frozenset()

    monkeypatch.setattr(examination, "_open_route", route)
    question = Question(VM, "host1", "tcg", "tcp", wishes, "flatten", "abcdefabcdef", keep=keep)
    peer = cast(Any, SimpleNamespace(inspect=inspect))
    return asyncio.run(examine(peer, question, facts(), DisksHere()))


@pytest.mark.parametrize(
    ("wishes", "keep", "refused"), [({"vda": "fast"}, False, True), ({"vda": "fast"}, True, False), ({}, False, False)]
)
def test_an_image_others_need_is_left_only_if_it_is_kept(
    monkeypatch: pytest.MonkeyPatch, wishes: dict[str, str], keep: bool, refused: bool
) -> None:
    codes = {finding.code for finding in examined(monkeypatch, wishes, keep=keep).findings}
    assert ("image-needed" in codes) is refused
