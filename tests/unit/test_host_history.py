"""Which moves of long ago are forgotten, and which never."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path

import msgspec
import pytest

from harness.landings import first_view, header
from limosa.errors import NotFound
from limosa.host import history
from limosa.host.history import DAY_S, KEPT_S, forget_old
from limosa.host.views import Views
from limosa.migration.journal import Journal
from limosa.migration.ownership import DestinationStep, SourceStep
from limosa.model.migration import Outcome, Phase, Side

NOW = 1e9
OLD = NOW - KEPT_S - 1


def journal(folder: Path, migration: str, *steps: str, at: float = OLD, side: Side = Side.SOURCE) -> Path:
    one = Journal.begin(folder, msgspec.structs.replace(header(side), migration=migration))
    for step in steps:
        one.record(SourceStep(step) if side is Side.SOURCE else DestinationStep(step), at)
    one.close()
    os.utime(one.path, (at, at))
    return one.path


def view(folder: Path, views: Views, migration: str, at: float = OLD) -> Path:
    ended = msgspec.structs.replace(
        first_view(), id=migration, phase=Phase.TEAR_DOWN, outcome=Outcome.COMPLETED, accepted_at=at
    )
    views.publish(ended)
    path = folder / f"{migration}.view.json"
    os.utime(path, (at, at))
    return path


@pytest.fixture
def views(tmp_path: Path) -> Views:
    return Views("here", tmp_path)


@pytest.fixture(autouse=True)
def acquaintance(tmp_path: Path) -> Path:
    """A journal by which the two hosts know each other."""
    return journal(tmp_path, "acquainted00", "preparing", "undone", at=OLD + 0.5)


def test_what_ended_long_ago_is_forgotten(tmp_path: Path, views: Views) -> None:
    for migration, last in (("m10000000000", "finished"), ("m20000000000", "undone")):
        journal(tmp_path, migration, "preparing", last)
        view(tmp_path, views, migration)
    journal(tmp_path, "m30000000000", "reserved", "gone", side=Side.DESTINATION)
    view(tmp_path, views, "ofdisks00000")
    assert sorted(forget_old(tmp_path, NOW)) == ["m10000000000", "m20000000000", "ofdisks00000"]
    assert [path.name for path in tmp_path.iterdir()] == ["acquainted00.source.jsonl"]


def test_what_is_new_stays_and_what_something_rests_on(tmp_path: Path, views: Views) -> None:
    kept = [
        journal(tmp_path, "new000000000", "preparing", "finished", at=NOW - DAY_S),
        view(tmp_path, views, "new000000000", at=NOW - DAY_S),
        journal(tmp_path, "waiting00000"),
        journal(tmp_path, "goingon00000", "preparing", "migrating"),
        journal(tmp_path, "undoing00000", "preparing", "undoing"),
        journal(tmp_path, "landing00000", "reserved", side=Side.DESTINATION),
        journal(tmp_path, "landed000000", "reserved", "continuing", "owned", side=Side.DESTINATION),
    ]
    kept.append(view(tmp_path, views, "undoing00000"))
    word = Journal.load(journal(tmp_path, "givenaway000", "preparing"))
    word.record(SourceStep.CONFIRMED, OLD, stay=True)
    word.record(SourceStep.FINISHED, OLD)
    word.close()
    os.utime(word.path, (OLD, OLD))
    kept.append(word.path)
    damaged = tmp_path / "damaged.source.jsonl"
    damaged.write_bytes(b"{")
    os.utime(damaged, (OLD, OLD))
    assert forget_old(tmp_path, NOW) == []
    assert {*tmp_path.iterdir()} == {*kept, damaged, tmp_path / "acquainted00.source.jsonl"}


def test_one_journal_is_left_of_hosts_that_met(tmp_path: Path, acquaintance: Path) -> None:
    journal(tmp_path, "m10000000000", "preparing", "finished")
    forget_old(tmp_path, NOW)
    assert [*tmp_path.iterdir()] == [acquaintance]


def test_no_more_than_so_many_are_kept(tmp_path: Path, views: Views, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "MOST", 3)
    for number in range(6):
        journal(tmp_path, f"m{number}0000000000", "finished", at=NOW - number)
        view(tmp_path, views, f"m{number}0000000000", at=NOW - number)
    assert forget_old(tmp_path, NOW) == [
        "m40000000000",
        "m50000000000",
    ]  # m3 is the one by which they know each other now
    assert len([*tmp_path.glob("m*.jsonl")]) == 4


def test_nothing_is_left_in_memory_either(tmp_path: Path, views: Views) -> None:
    async def scenario() -> None:
        journal(tmp_path, "m10000000000", "finished", at=0)
        view(tmp_path, views, "m10000000000", at=0)
        assert [one.id async for one in views.watch("m10000000000")] == ["m10000000000"]
        assert not views._watchers
        keeping = asyncio.ensure_future(history.keep_bounded(tmp_path, views))
        while views.list():  # noqa: ASYNC110 - it tells nobody when it is done
            await asyncio.sleep(0.001)
        keeping.cancel()
        with pytest.raises(NotFound):
            views.show("m10000000000")

    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_what_is_kept_of_a_move_stays_whole_on_a_full_disk(
    tmp_path: Path, views: Views, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = view(tmp_path, views, "m10000000000")
    before = sorted(tmp_path.iterdir()), path.read_bytes()

    def writes_half(file: Path, data: bytes) -> int:
        file.open("wb").write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", writes_half)
    views.publish(views.show("m10000000000"))
    assert (sorted(tmp_path.iterdir()), path.read_bytes()) == before
