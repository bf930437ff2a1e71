"""How fast a network really was, and what the host remembers of it."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from limosa.host import goodput
from limosa.host.goodput import Goodputs
from limosa.model.network import Carried
from limosa.transport.channel import Used, by_path
from limosa.transport.goodput import Goodput


def used(sent_mb: float, busy_s: float, here: str = "10.0.0.1") -> Used:
    return Used(here, "10.0.0.2", round(sent_mb * 1e6), busy_s=busy_s)


def measured(*looks: tuple[float, Used]) -> list[int]:
    seen = Goodput()
    for at, look in looks:
        seen.saw(at, [look])
    return [one.mbit_per_s for one in seen.best()]


def test_the_best_second_counts() -> None:
    assert measured((10.0, used(0, 0)), (11.0, used(100, 1)), (12.0, used(215, 2)), (13.0, used(300, 3))) == [920]


def test_a_second_that_waited_for_the_sender_says_nothing() -> None:
    assert measured((0.0, used(0, 0)), (1.0, used(3, 0.2)), (2.0, used(6, 0.4))) == []


def test_less_than_a_second_says_nothing() -> None:
    assert measured((0.0, used(0, 0)), (0.5, used(50, 0.5)), (0.9, used(90, 0.9))) == []


def test_a_second_in_which_the_cable_was_out_says_nothing() -> None:
    out = replace(used(2, 0.7), overdue=True)
    assert measured((0.0, used(0, 0)), (0.7, out), (1.1, used(2, 1.1))) == []
    assert measured((0.0, used(0, 0)), (0.7, out), (1.1, used(2, 1.1)), (1.7, used(102, 1.7))) == [800]


def test_a_connection_that_has_ended_says_nothing() -> None:
    assert measured((0.0, used(0, 0)), (1.1, replace(used(2, 1.1), alive=False))) == []


def test_each_path_is_measured_by_itself() -> None:
    seen = Goodput()
    for at in (0.0, 1.0, 2.0):
        seen.saw(at, [used(10 * at, at), used(50 * at, at, here="10.1.0.1")])
    assert seen.best() == (
        Carried(here="10.0.0.1", there="10.0.0.2", mbit_per_s=80),
        Carried(here="10.1.0.1", there="10.0.0.2", mbit_per_s=400),
    )


def test_the_last_figure_of_a_path_is_remembered_over_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "goodput.json"
    first, other = Carried(here="a", there="b", mbit_per_s=90), Carried(here="a", there="c", mbit_per_s=900)
    Goodputs(path).learn([first, other])
    mended = Carried(here="a", there="b", mbit_per_s=940)
    Goodputs(path).learn([mended])
    assert Goodputs(path).known == (other, mended)


def test_a_figure_is_old_after_a_day_over_a_restart_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1_800_000_000.0
    monkeypatch.setattr(time, "time", lambda: now)
    path = tmp_path / "goodput.json"
    known = Goodputs(path)
    known.learn([Carried(here="a", there="b", mbit_per_s=9)])
    now += goodput.FRESH_S
    known.learn([Carried(here="a", there="c", mbit_per_s=9)])
    assert [one.old for one in known.known] == [False, False]
    now += 1
    assert [one.old for one in known.known] == [one.old for one in Goodputs(path).known] == [True, False]
    known.learn([Carried(here="a", there="b", mbit_per_s=900)])
    assert [(one.there, one.old) for one in known.known] == [("c", False), ("b", False)]


def test_a_file_that_cannot_be_read_is_nothing_measured(tmp_path: Path) -> None:
    path = tmp_path / "goodput.json"
    path.write_bytes(b'[{"here": 1')
    assert Goodputs(path).known == ()


def test_a_file_that_cannot_be_written_costs_nothing_else(tmp_path: Path) -> None:
    known = Goodputs(tmp_path / "missing" / "goodput.json")
    known.learn([Carried(here="a", there="b", mbit_per_s=90)])
    assert len(known.known) == 1


def test_what_is_remembered_is_bounded(tmp_path: Path) -> None:
    known = Goodputs(tmp_path / "goodput.json")
    known.learn(Carried(here="a", there=str(number), mbit_per_s=1) for number in range(goodput.MOST + 3))
    assert (len(known.known), known.known[0].there) == (goodput.MOST, "3")


def test_of_a_connection_that_has_ended_nothing_is_overdue() -> None:
    ended = replace(used(2, 0.7), alive=False, connections=0, overdue=True)
    (path,) = by_path([ended, used(5, 0.2)])
    assert (path.sent_bytes, path.alive, path.connections, path.overdue) == (7_000_000, True, 1, False)
    assert by_path([used(1, 0.1), replace(used(1, 0.1), overdue=True)])[0].overdue
