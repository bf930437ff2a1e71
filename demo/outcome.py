"""What the client saw of each move, and the JSON object; pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from demo.client import MESSAGE_EVERY_S, Answer, Failure, Observed
from demo.watch import WatchedMove
from limosa.model.migration import Phase

#: Phases of work, in their order.
PHASES = (Phase.BUILD_UP, Phase.COPY, Phase.SYNCHRONISE, Phase.SWITCHOVER, Phase.TEAR_DOWN)


@dataclass(frozen=True)
class Seen:
    """A move and what the client saw from its beginning until the next one began, or the client left.

    ``longest_gap_ms`` is the longest silence on the lasting connection, less the time between two messages.
    """

    move: WatchedMove
    longest_gap_ms: float
    slowest_request_ms: float
    requests: int
    failures: tuple[Failure, ...]


def seen(moves: Sequence[WatchedMove], observed: Observed) -> list[Seen]:
    """Share out what the client saw. What it saw before the first move belongs to none."""
    ends = [*(move.began_at for move in moves[1:]), float("inf")]
    return [_seen(move, observed, end) for move, end in zip(moves, ends, strict=False)]


def as_json(qemu: str, moves: Sequence[Seen]) -> dict[str, Any]:
    """The object of ``--json``. Durations of phases in seconds."""
    return {"qemu": qemu, "moves": [_move_as_json(one) for one in moves]}


def _seen(move: WatchedMove, observed: Observed, end: float) -> Seen:
    begin = move.began_at
    asked = [request for request in observed.requests if begin <= request.asked_at < end]
    return Seen(
        move=move,
        longest_gap_ms=round(1000 * longest_silence_s(observed.messages, begin, end), 1),
        slowest_request_ms=round(1000 * max((request.latency_s for request in asked), default=0.0), 1),
        requests=len(asked),
        failures=tuple(failure for failure in observed.failures if begin <= failure.asked_at < end),
    )


def longest_silence_s(answers: Sequence[Answer], begin: float, end: float) -> float:
    """Longest time between two answers, of those that were broken between ``begin`` and ``end``, less the period."""
    moments = [answer.answered_at for answer in answers]
    silences = (after - before for before, after in pairwise(moments) if begin <= after < end)
    return max(0.0, max(silences, default=0.0) - MESSAGE_EVERY_S)


def _move_as_json(one: Seen) -> dict[str, Any]:
    migration = one.move.last
    return {
        "vm": migration.vm,
        "source": migration.source,
        "destination": migration.destination,
        "transport": migration.transport,
        "total_s": _rounded(migration.total_s),
        "phases": {phase.value: _rounded(migration.phases.get(phase.value, 0.0)) for phase in PHASES},
        "blackout_ms": migration.blackout_ms,
        "client_gap_ms": one.longest_gap_ms,
        "client_errors": len(one.failures),
        "bytes": migration.progress.transferred_bytes,
    }


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)
