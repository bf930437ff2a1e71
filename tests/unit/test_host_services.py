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
from limosa.background import Background
from limosa.errors import StateError
from limosa.host import services as host_services
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
        incoming=SimpleNamespace(take_up=AsyncMock(return_value=None), bring_to_end=AsyncMock()),
        views=Views("here", folder),
        recovering=Background(),
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


class TestWhatWaitsForAShareThatDoesNotAnswer:
    """It is gone on with beside all else."""

    @pytest.fixture(autouse=True)
    def _impatient(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(host_services, "RECOVERED_WITHIN_S", 0.05)

    def landing(self, folder: Path, migration: str) -> None:
        its = msgspec.structs.replace(header(Side.DESTINATION), migration=migration)
        Journal.begin(folder, its).close()

    def test_a_daemon_comes_while_moves_of_disks_wait(self, tmp_path: Path) -> None:
        async def scenario() -> None:
            host, answers = services(tmp_path), asyncio.Event()
            host.disk_moves.recover.side_effect = answers.wait
            await recover(host)
            host.restarting.give_back_leases.assert_awaited_once()
            answers.set()
            await host.recovering.idle()

        asyncio.run(scenario())

    def test_of_landings_each_is_known_and_none_waits_for_another(self, tmp_path: Path) -> None:
        async def scenario() -> None:
            host, answers, finished = services(tmp_path), asyncio.Event(), []
            for migration in ("abcdefabcdef", "bcdefabcdefa"):
                self.landing(tmp_path, migration)
            host.incoming.take_up.side_effect = lambda journal: journal.header.migration

            async def finish(landing: str) -> None:
                if landing == "abcdefabcdef":
                    await answers.wait()
                finished.append(landing)

            host.incoming.bring_to_end.side_effect = finish
            await recover(host)
            assert host.incoming.take_up.await_count == 2
            assert finished == ["bcdefabcdefa"]
            answers.set()
            await host.recovering.idle()
            assert finished == ["bcdefabcdefa", "abcdefabcdef"]
            assert host.parts.vms.doubt == ""

        asyncio.run(scenario())

    def test_one_that_fails_later_is_a_doubt_then(self, tmp_path: Path) -> None:
        async def scenario() -> None:
            host, answers = services(tmp_path), asyncio.Event()
            self.landing(tmp_path, "abcdefabcdef")
            host.incoming.take_up.return_value = "landing"

            async def finish(_: str) -> None:
                await answers.wait()
                raise StateError("the journal cannot be written")

            host.incoming.bring_to_end.side_effect = finish
            await recover(host)
            assert host.parts.vms.doubt == ""
            answers.set()
            await host.recovering.idle()
            assert "migration abcdefabcdef could not be taken up" in host.parts.vms.doubt

        asyncio.run(scenario())
