"""What the demo makes of what was seen: shares of the moves, the JSON object, the picture, the table."""

from __future__ import annotations

import io
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from demo.client import MESSAGE_EVERY_S, Answer, Failure, Observed
from demo.outcome import Seen, as_json, longest_silence_s, seen
from demo.picture import draw, rates_of, spans
from demo.svg import Scale
from demo.table import notes, summary
from demo.watch import Sighting, WatchedMove
from limosa.model.migration import Migration, Outcome, Phase, Progress, Side

PHASES = {"waiting": 0.001, "build-up": 0.5, "copy": 3.0, "synchronise": 0.4, "switchover": 0.04, "tear-down": 0.06}


def sighting(at: float, phase: Phase, sent: int = 0, dirty: float = 0.0, **changes: Any) -> Sighting:
    progress = Progress(transferred_bytes=sent, dirty_rate_bytes_per_s=dirty)
    values: dict[str, Any] = {
        "id": "a" * 12,
        "vm": "web1",
        "source": "host1",
        "destination": "host2",
        "side": Side.SOURCE,
        "transport": "tcp",
        "phase": phase,
        "outcome": Outcome.UNDER_WAY,
        "progress": progress,
        "accepted_at": 1.0,
    }
    return Sighting(at, Migration(**(values | changes)))


def moved(begin: float) -> WatchedMove:
    """A move of four seconds that copied 100 bytes a second; nobody saw its switchover."""
    end = sighting(
        begin + 4.0,
        Phase.TEAR_DOWN,
        350,
        outcome=Outcome.COMPLETED,
        phases=PHASES,
        total_s=4.0,
        blackout_ms=37.5,
    )
    sightings = (
        sighting(begin, Phase.BUILD_UP),
        sighting(begin + 0.5, Phase.COPY),
        sighting(begin + 1.5, Phase.COPY, 100),
        sighting(begin + 1.6, Phase.COPY, 160),
        sighting(begin + 2.9, Phase.SYNCHRONISE, 160),
        sighting(begin + 3.5, Phase.SYNCHRONISE, 300, 7.0),
        end,
    )
    return WatchedMove(begin, begin + 4.1, sightings)


def observed() -> Observed:
    """Messages every 10 ms for 20 s, but none from 6 to 6.25; a request a second, a failure at 15."""
    moments = [number / 100 for number in range(2000)]
    messages = [Answer(at - 0.001, at) for at in moments if not 6 < at < 6.25]
    requests = [Answer(float(at), at + (0.3 if at == 6 else 0.01)) for at in range(20)]
    return Observed(requests, messages, [Failure(15.0, "refused")])


@pytest.fixture
def both() -> list[Seen]:
    return seen([moved(2.0), moved(10.0)], observed())


def test_each_move_has_what_was_seen_until_the_next_began(both: list[Seen]) -> None:
    first, second = both
    assert first.longest_gap_ms == pytest.approx(250 - 1000 * MESSAGE_EVERY_S)
    assert second.longest_gap_ms == pytest.approx(10 - 1000 * MESSAGE_EVERY_S)
    assert (first.slowest_request_ms, second.slowest_request_ms) == (300, 10)
    assert (first.requests, second.requests) == (8, 10)
    assert ([len(one.failures) for one in both]) == [0, 1]


def test_there_may_be_no_move_at_all() -> None:
    assert seen([], observed()) == []


def test_a_silence_counts_where_it_was_broken() -> None:
    answers = [Answer(at, at) for at in (0.0, 1.0, 3.0, 3.5)]
    assert longest_silence_s(answers, 2.0, 4.0) == pytest.approx(2.0 - MESSAGE_EVERY_S)
    assert longest_silence_s(answers, 3.2, 4.0) == pytest.approx(0.5 - MESSAGE_EVERY_S)
    assert longest_silence_s(answers, 5.0, 9.0) == 0


def test_the_json_object_has_what_programs_read(both: list[Seen]) -> None:
    found = as_json("10.0.2", both)
    assert found.keys() == {"qemu", "moves"}
    assert found["moves"][1] == {
        "vm": "web1",
        "source": "host1",
        "destination": "host2",
        "transport": "tcp",
        "total_s": 4.0,
        "phases": {"build-up": 0.5, "copy": 3.0, "synchronise": 0.4, "switchover": 0.04, "tear-down": 0.06},
        "blackout_ms": 37.5,
        "client_gap_ms": 5.0,
        "client_errors": 1,
        "bytes": 350,
    }


def test_rates_lie_between_looks_and_a_dirty_rate_not_known_is_not_zero() -> None:
    first, second = rates_of(moved(2.0).sightings)
    assert (first.begin, first.end, first.sent, first.dirtied) == (2.5, 3.5, 100, None)
    assert (second.begin, second.end, second.sent, second.dirtied) == (3.5, 5.5, 100, 7.0)


def test_phases_are_put_together_from_their_durations() -> None:
    found = spans(moved(2.0).sightings)
    assert [phase.value for phase, _, _ in found] == list(PHASES)[1:]
    assert found[3][1:] == pytest.approx((5.9, 5.94))
    assert found[0][1] == pytest.approx(2.0)


def test_the_picture_is_xml_and_tells_both_moves(both: list[Seen]) -> None:
    picture = draw("a <subject>", both, observed(), 1e9 / 8)
    words = [text for element in ElementTree.fromstring(picture).iter() for text in element.itertext()]
    assert "a <subject>" in words
    assert words.count("blackout 38 ms") >= 2
    assert any(word.startswith("host1 → host2: 4.0 s") for word in words)


@pytest.mark.parametrize(
    ("value", "pixel"), [(0.01, 100.0), (0.1, 100.0), (1, 75.0), (10, 50.0), (1000, 0.0), (9e9, 0.0)]
)
def test_a_logarithmic_scale_keeps_to_its_edges(value: float, pixel: float) -> None:
    assert Scale(0.1, 1000, 100, 0, logarithmic=True)(value) == pixel


def test_the_table_has_a_column_for_each_move_and_what_counts(both: list[Seen]) -> None:
    shown = io.StringIO()
    screen = Console(file=shown, width=100)
    screen.print(summary(both))
    said = shown.getvalue()
    for words in ("37.5 ms", "245.0 ms", "0 of 8", "1 of 11", "350 B", "switchover", "400.0 ms"):
        assert words in said


def test_figures_that_need_words_get_them(both: list[Seen]) -> None:
    assert notes(both, "kvm", 1.9, 2) == []
    assert len(notes(both, "tcg", 1.9, 2)) == 1
    assert len(notes(both, "kvm", 2.1, 2)) == 1
    slow = Seen(move=both[0].move, longest_gap_ms=1, slowest_request_ms=1020, requests=1, failures=())
    assert len(notes([slow], "kvm", 1.9, 2)) == 1
