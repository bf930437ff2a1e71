"""What a daemon does with what an earlier one has left, before it answers anybody."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import AsyncMock, Mock

import msgspec
import pytest

from harness.landings import first_view, header
from limosa.host.services import recover
from limosa.host.views import Views
from limosa.migration.journal import Journal
from limosa.migration.ownership import SourceStep
from limosa.model.migration import Outcome, Side


def services(folder: Path) -> Any:
    return SimpleNamespace(
        restarting=SimpleNamespace(give_back_leases=AsyncMock(), restart_died=Mock(), ask_again=Mock()),
        disk_moves=SimpleNamespace(recover=AsyncMock(), not_ended=Mock(return_value=set())),
        outgoing=SimpleNamespace(recover=AsyncMock()),
        incoming=SimpleNamespace(recover=AsyncMock()),
        views=Views("here", folder),
        parts=SimpleNamespace(files=SimpleNamespace(migrations=folder), vms=SimpleNamespace(doubt="")),
    )


@pytest.mark.parametrize("side", Side)
def test_what_was_half_written_when_a_daemon_died_is_removed(
    tmp_path: Path, side: Side, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        """What nobody catches."""

    def killed(*_: object) -> None:
        raise Killed

    monkeypatch.setattr("limosa.migration.journal.os.link", killed)
    with pytest.raises(Killed):
        Journal.begin(tmp_path, header(side))
    for name in (".m1.view.json.new", ".m1.disks.json.new"):
        (tmp_path / name).touch()
    assert len(list(tmp_path.iterdir())) == 3
    asyncio.run(recover(services(tmp_path)))
    assert list(tmp_path.iterdir()) == []


def test_what_is_whole_or_anothers_stays(tmp_path: Path) -> None:
    journal = Journal.begin(tmp_path, msgspec.structs.replace(header(Side.SOURCE), migration="abcdefghijkl"))
    journal.record(SourceStep.PREPARING, 1.0)
    journal.close()
    for name in ("m1.view.json", "m1.disks.json", "a-copy.new", "m1.source.jsonl.damaged"):
        (tmp_path / name).touch()
    before = sorted(tmp_path.iterdir())
    host = services(tmp_path)
    asyncio.run(recover(host))
    assert sorted(tmp_path.iterdir()) == before
    assert host.outgoing.recover.await_count == 1


def test_moves_of_disks_that_ended_are_known_again(tmp_path: Path) -> None:
    ended = msgspec.structs.replace(first_view(), id="m10000000000", outcome=Outcome.COMPLETED)
    views = services(tmp_path).views
    views.publish(ended)
    views.publish(msgspec.structs.replace(ended, id="m20000000000", outcome=Outcome.UNDER_WAY))
    again = services(tmp_path)
    asyncio.run(recover(again))
    assert again.views.list() == [ended]


@pytest.mark.parametrize("moving", [set(), {"web1"}, None])
def test_silent_qemus_are_asked_again_but_those_whose_disks_nobody_knows(
    tmp_path: Path, moving: set[str] | None
) -> None:
    host = services(tmp_path)
    host.disk_moves.not_ended.return_value = moving
    asyncio.run(recover(host))
    ask_again = cast(Mock, host.restarting.ask_again)
    assert [call.kwargs["but"] for call in ask_again.call_args_list] == ([] if moving is None else [moving])
