"""The picture: the client's latency and the memory's rates over time, with phases and switchovers marked, as SVG.

Two panels share the axis of time. Latency is drawn on a logarithmic scale, since an undisturbed answer and one that met
the blackout lie powers of ten apart. Pure: values in, text out. The colours (Okabe and Ito's) can be told apart by
people who do not see all of them, and the ground is white whatever the page around it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from demo import svg
from demo.client import Answer, Observed
from demo.outcome import PHASES, Seen
from demo.svg import FAINT, Point, Scale
from demo.watch import Sighting
from limosa.model.migration import Phase
from limosa.model.units import MIB, format_seconds

TITLE = "A running VM moves to another host and back while a client keeps asking"
WIDTH, HEIGHT = 1120, 712
LEFT, RIGHT = 84, 1096
#: Top and bottom of the panels.
LATENCY, RATES = (150, 410), (472, 652)
#: Rates are drawn over at least this long.
LOOK_APART_S = 0.3

REQUEST, MESSAGE, SENT, DIRTIED, SWITCHOVER = "#0072b2", "#56b4e9", "#009e73", "#e69f00", "#d55e00"
GROUNDS = {
    Phase.BUILD_UP: "#e4e7eb",
    Phase.COPY: "#e3f3ec",
    Phase.SYNCHRONISE: "#fcedc5",
    Phase.SWITCHOVER: SWITCHOVER,
    Phase.TEAR_DOWN: "#e4e7eb",
}


@dataclass(frozen=True)
class Rate:
    """Bytes per second between two looks."""

    begin: float
    end: float
    sent: float
    #: None while QEMU does not know it, which is in its first pass over memory
    dirtied: float | None


def draw(subject: str, moves: Sequence[Seen], observed: Observed, link_bytes_per_s: float) -> str:
    """The picture of a demo. ``subject`` says in a line what was moved on what. The client must have seen an answer."""
    answers = [*observed.messages, *observed.requests]
    begin, end = min(one.asked_at for one in answers), max(one.answered_at for one in answers)
    time = Scale(begin, end, LEFT, RIGHT)
    rates = [rates_of(one.move.sightings) for one in moves]
    return svg.document(
        WIDTH,
        HEIGHT,
        [
            *_heading(subject, observed),
            *(mark for one in moves for mark in _phases(one, time)),
            *_seconds(time),
            *_latency(observed, time),
            *_rates(rates, time, link_bytes_per_s / MIB),
            *(mark for one in moves for mark in _switchover(one, time)),
        ],
    )


def rates_of(sightings: Sequence[Sighting]) -> list[Rate]:
    """What was sent between each two looks at QEMU, and how fast the guest dirtied its memory."""
    return [
        Rate(
            begin=before.at,
            end=after.at,
            sent=(_sent(after) - _sent(before)) / (after.at - before.at),
            dirtied=after.move.progress.dirty_rate_bytes_per_s or None,
        )
        for before, after in pairwise(_apart(_looks(sightings)))
    ]


def _looks(sightings: Sequence[Sighting]) -> Iterator[Sighting]:
    """Looks at QEMU while memory is copied. Other changes are told with the figures of the look before."""
    sent = -1
    for one in sightings:
        if one.move.phase in (Phase.COPY, Phase.SYNCHRONISE) and _sent(one) > sent:
            sent = _sent(one)
            yield one


def _apart(looks: Iterable[Sighting]) -> Iterator[Sighting]:
    """Leave out looks close upon another: their rate would be that of the news' arrival."""
    at = -math.inf
    for one in looks:
        if one.at - at >= LOOK_APART_S:
            at = one.at
            yield one


def spans(sightings: Sequence[Sighting]) -> list[tuple[Phase, float, float]]:
    """Each phase of work with its beginning and end.

    The source times phases itself, so they are put together backwards from the moment at which the move was seen to
    end; a phase of milliseconds may have come and gone between two sightings.
    """
    last = sightings[-1]
    found, end = [], last.at
    for phase in reversed(PHASES):
        begin = end - last.move.phases.get(phase.value, 0.0)
        found.append((phase, begin, end))
        end = begin
    return found[::-1]


def _sent(sighting: Sighting) -> int:
    return sighting.move.progress.transferred_bytes


def _heading(subject: str, observed: Observed) -> Iterator[str]:
    failed = len(observed.failures)
    saw = f"{len(observed.requests)} HTTP requests answered and {len(observed.messages)} messages on one TCP connection"
    yield svg.text((24, 36), TITLE, size=20, bold=True)
    yield svg.text((24, 60), subject, fill=FAINT)
    yield svg.text((24, 80), f"{saw}; {failed} failed", fill=SWITCHOVER if failed else FAINT)


def _phases(one: Seen, time: Scale) -> Iterator[str]:
    last, phases = one.move.last, spans(one.move.sightings)
    middle = (time(phases[0][1]) + time(phases[-1][2])) / 2
    title = f"{last.source} → {last.destination}: {format_seconds(last.total_s or 0)}, client's longest gap "
    title += f"{one.longest_gap_ms:.0f} ms"
    yield svg.text((middle, LATENCY[0] - 8), title, anchor="middle", bold=True)
    for phase, begin, end in phases:
        for top, bottom in (LATENCY, RATES):
            # A phase of milliseconds is to be seen too.
            width = max(2.0, time(end) - time(begin))
            yield svg.rectangle(time(begin), top, width, bottom - top, GROUNDS[phase])


def _latency(observed: Observed, time: Scale) -> Iterator[str]:
    slowest = max(1000 * one.latency_s for one in (*observed.messages, *observed.requests))
    scale = Scale(0.1, max(1000.0, 1.3 * slowest), LATENCY[1], LATENCY[0], logarithmic=True)
    for value in (0.1, 1, 10, 100, 1000, 10000):
        if value <= scale.high:
            yield from _grid_line(scale(value), f"{value:g} ms" if value < 1000 else f"{value // 1000} s")
    yield svg.text((24, 112), "The client waits for an answer", bold=True)
    meanings = ((MESSAGE, "message on the connection that is kept"), (REQUEST, "HTTP request on a new one"))
    yield svg.legend((RIGHT, 112), meanings)
    for answers, colour, diameter in ((observed.messages, MESSAGE, 2.5), (observed.requests, REQUEST, 5)):
        yield svg.dots([_point(answer, time, scale) for answer in answers], colour, diameter)


def _point(answer: Answer, time: Scale, scale: Scale) -> Point:
    return time(answer.asked_at), scale(1000 * answer.latency_s)


def _rates(moves: Sequence[Sequence[Rate]], time: Scale, link: float) -> Iterator[str]:
    """``link`` is the network's speed in MiB/s, 0 if it has no limit."""
    highest = max([1, link, *(max(rate.sent, rate.dirtied or 0) / MIB for rates in moves for rate in rates)])
    scale = Scale(0, 1.12 * highest, RATES[1], RATES[0])
    step = next(step for step in (1, 5, 10, 25, 50, 100, 250, 500, 1000, 5000, 10**9) if highest / step <= 5)
    for value in range(0, int(scale.high) + 1, step):
        yield from _grid_line(scale(value), f"{value} MiB/s")
    yield svg.text((24, 452), "Guest memory travels", bold=True)
    meanings = ((SENT, "sent"), (DIRTIED, "dirtied by the guest meanwhile"))
    yield svg.legend((RIGHT, 452), meanings)
    for rates in moves:
        sent = _steps([(rate.begin, rate.end, rate.sent) for rate in rates], time, scale)
        dirtied = _steps([(one.begin, one.end, one.dirtied) for one in rates if one.dirtied is not None], time, scale)
        yield from (svg.area(sent, RATES[1], SENT), svg.curve(sent, SENT), svg.curve(dirtied, DIRTIED))
    if link:
        yield svg.line((LEFT, scale(link)), (RIGHT, scale(link)), FAINT, dashes="5 4")
        yield svg.text((LEFT + 6, scale(link) - 5), "speed of the network", fill=FAINT, size=12)


def _steps(rates: Sequence[tuple[float, float, float]], time: Scale, scale: Scale) -> list[Point]:
    return [(time(at), scale(value / MIB)) for begin, end, value in rates for at in (begin, end)]


def _switchover(one: Seen, time: Scale) -> Iterator[str]:
    x = next(time(begin) for phase, begin, _ in spans(one.move.sightings) if phase is Phase.SWITCHOVER)
    yield svg.text((x - 8, LATENCY[0] + 18), "switchover", fill=SWITCHOVER, anchor="end", bold=True)
    if one.move.last.blackout_ms is not None:
        blackout = f"blackout {one.move.last.blackout_ms:.0f} ms"
        yield svg.text((x - 8, LATENCY[0] + 34), blackout, fill=SWITCHOVER, anchor="end")


def _seconds(time: Scale) -> Iterator[str]:
    span = time.high - time.low
    step = next(step for step in (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 10**9) if span / step <= 12)
    for second in range(0, int(span) + 1, step):
        x = time(time.low + second)
        for bottom in (LATENCY[1], RATES[1]):
            yield svg.line((x, bottom), (x, bottom + 5), FAINT)
        yield svg.text((x, RATES[1] + 20), f"{second}", anchor="middle", fill=FAINT, size=12)
    yield svg.text((LEFT, RATES[1] + 42), "seconds", fill=FAINT, size=12)
    yield svg.legend((RIGHT, RATES[1] + 42), [(GROUNDS[phase], phase.value) for phase in PHASES])


def _grid_line(y: float, label: str) -> Iterator[str]:
    yield svg.line((LEFT, y), (RIGHT, y))
    yield svg.text((LEFT - 8, y + 4), label, anchor="end", fill=FAINT, size=12)
