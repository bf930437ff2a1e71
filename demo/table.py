"""The table at the end: one column for each move."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich import box
from rich.table import Table

from demo.outcome import PHASES, Seen
from limosa.model.units import format_bytes, format_seconds

_Cell = Callable[[Seen], str]


#: From here on a request took so long because TCP had to send its first packet again.
_SENT_AGAIN_MS = 900


def summary(moves: Sequence[Seen]) -> Table:
    """What each move took, what it moved, and what the client saw of it."""
    drawn = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    drawn.add_column("")
    for one in moves:
        drawn.add_column(f"{one.move.last.source} → {one.move.last.destination}", justify="right", min_width=16)
    for title, cell, style in _rows():
        drawn.add_row(title, *(cell(one) for one in moves), style=style)
    return drawn


def notes(moves: Sequence[Seen], accelerator: str, load: float, processors: int) -> list[str]:
    """What a reader of the table should know of its figures; ``load`` is the machine's before the demo began."""
    found = []
    if load > processors:
        found.append(
            f"This machine was busy before the demo began (load {load:.1f} on {processors} processors): "
            "expect better figures on a quiet one."
        )
    if accelerator == "tcg":
        found.append(
            "QEMU emulates the processor here: after the switchover the guest's code is translated anew, which makes "
            "the client's gap longer than the blackout. With hardware virtualisation it is not."
        )
    if any(one.slowest_request_ms > _SENT_AGAIN_MS for one in moves):
        found.append("A request whose first packet meets the blackout is sent again by TCP after one second.")
    return found


def _rows() -> list[tuple[str, _Cell, str]]:
    return [
        ("total time", lambda one: _seconds(one.move.last.total_s), "bold"),
        *((f"  {phase.value}", _phase(phase.value), "dim") for phase in PHASES),
        ("blackout, by QEMU's events", lambda one: _milliseconds(one.move.last.blackout_ms), "bold"),
        ("longest gap the client saw", lambda one: _milliseconds(one.longest_gap_ms), "bold"),
        ("slowest HTTP request", lambda one: _milliseconds(one.slowest_request_ms), ""),
        ("failed requests", lambda one: f"{len(one.failures)} of {one.requests + len(one.failures)}", "bold"),
        ("sent", lambda one: format_bytes(one.move.last.progress.transferred_bytes), ""),
    ]


def _phase(name: str) -> _Cell:
    return lambda one: _seconds(one.move.last.phases.get(name))


def _milliseconds(value: float | None) -> str:
    return _seconds(None if value is None else value / 1000)


def _seconds(value: float | None) -> str:
    return "-" if value is None else format_seconds(value)
