"""What is seen of moves while they run, and the table at their end.

On a terminal a bar for each VM, drawn with rich, which is loaded only then; elsewhere a plain line at each change of
phase and whenever the daemon has a new word on why a move does not converge. Percent never goes back, whatever order
events arrive in. Of more moves than the terminal is high those are drawn that do something, and the others counted.
"""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

import msgspec

from limosa.cli.follow import Event
from limosa.cli.output import clean, say_table, table_width
from limosa.model.migration import Migration, Outcome, Phase
from limosa.model.units import format_bytes, format_rate, format_seconds

if TYPE_CHECKING:
    from rich.console import RenderableType


#: An amount or a rate, which may be another at each look.
_AMOUNT = re.compile(r"[\d.]+ [KMGT]?i?B(/s)?")


class Display(Protocol):
    """Shows moves until the block ends."""

    def __enter__(self) -> Display: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def show(self, migration: Migration) -> None:
        """A move as it now stands."""

    def show_event(self, name: str, event: Event) -> None:
        """A move as it now stands, or the error that ended it."""


def display_for(names: Sequence[str]) -> Display:
    """The display that suits standard output."""
    return LiveDisplay(names) if sys.stdout.isatty() else PlainDisplay()


class PlainDisplay:
    """Lines, written at once."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[str, str]] = {}

    def __enter__(self) -> PlainDisplay:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def show(self, migration: Migration) -> None:
        """A line if phase, outcome or note have changed; figures and the place in line alone make no other."""
        now = (stage(msgspec.structs.replace(migration, place=None)), _AMOUNT.sub("", migration.progress.note))
        before = self._seen.get(migration.vm)
        self._seen[migration.vm] = now
        if now != before:
            print(clean(f"{migration.vm}: {in_words(migration)}"), flush=True)

    def show_event(self, name: str, event: Event) -> None:
        """As :meth:`show`; an error is reported when all has ended."""
        if isinstance(event, Migration):
            self.show(event)
        else:
            print(clean(f"{name}: refused, {event.code}"), flush=True)


class LiveDisplay:
    """A bar for each VM, ten times a second."""

    def __init__(self, names: Sequence[str]) -> None:
        from rich.console import Console  # noqa: PLC0415 - takes longer to load than a short command takes
        from rich.live import Live  # noqa: PLC0415

        self._moves: dict[str, Event | None] = dict.fromkeys(names)
        self._percent: dict[str, float] = dict.fromkeys(names, 0.0)
        self._console = Console()
        self._live = Live(console=self._console, get_renderable=self._draw, refresh_per_second=10, transient=True)

    def __enter__(self) -> LiveDisplay:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def show(self, migration: Migration) -> None:
        """Take over the move's new state; it is drawn at the next tick."""
        self.show_event(migration.vm, migration)

    def show_event(self, name: str, event: Event) -> None:
        """As :meth:`show`."""
        self._moves[name] = event
        if isinstance(event, Migration):
            self._percent[name] = max(self._percent.get(name, 0.0), event.progress.percent)

    def _draw(self) -> RenderableType:
        from rich.console import Group  # noqa: PLC0415 - as above

        console = self._console
        moves = dict(self._moves)
        ranked = sorted(moves.items(), key=lambda move: _rank(move[1]))
        room, lines = console.height, dict[str, int]()
        blocks: dict[str, RenderableType] = {}
        for name, event in ranked:
            block = self._block(name, event, console.width)
            room -= (height := len(console.render_lines(block, pad=False)))
            if room < 0:
                room += height
                break
            blocks[name], lines[name] = block, height
        if len(blocks) == len(moves):
            return Group(*(blocks[name] for name in moves))
        while blocks and room < 1:  # for the line that counts the others
            room += lines[blocks.popitem()[0]]
        left = Counter(_stage(event).partition(",")[0] for _, event in ranked[len(blocks) :])
        more = ", ".join(f"{count} {stage}" for stage, count in left.items())
        return Group(*blocks.values(), f"and {left.total()} more: {more}")

    def _block(self, name: str, event: Event | None, width: int) -> RenderableType:
        """A VM's line, and below it what does not fit there: its columns stay where they are while figures change."""
        from rich.console import Group  # noqa: PLC0415 - as above
        from rich.padding import Padding  # noqa: PLC0415
        from rich.progress_bar import ProgressBar  # noqa: PLC0415
        from rich.table import Table  # noqa: PLC0415
        from rich.text import Text  # noqa: PLC0415

        names = min(max(map(len, self._moves)), _NAME_WIDTH)
        grid = Table.grid(padding=(0, 2))
        for column in (names, _STAGE_WIDTH, _BAR_WIDTH, 5):
            grid.add_column(width=column, no_wrap=True, overflow="ellipsis")
        grid.add_column(no_wrap=True)
        percent = self._percent[name]
        bar = ProgressBar(total=100, completed=percent, width=_BAR_WIDTH)
        figures = Text(_figures(event), style="dim")
        beside = width >= names + _STAGE_WIDTH + _BAR_WIDTH + 5 + 4 * 2 + _FIGURES_WIDTH
        grid.add_row(clean(name), _stage(event), bar, f"{percent:3.0f} %", figures if beside else "")
        below = [figures] if figures and not beside else []
        if isinstance(event, Migration) and event.progress.note and not event.place:
            below.append(Text(clean(event.progress.note), style="yellow"))
        return Group(grid, *(Padding(text, (0, 0, 0, 2)) for text in below))


#: Columns of the live display. The longest name is cut; stages and figures seldom get longer than this.
_NAME_WIDTH = 24
_STAGE_WIDTH = 17
_BAR_WIDTH = 24
_FIGURES_WIDTH = 76


def _rank(event: Event | None) -> int:
    """Which moves are drawn first: those that do something, that went wrong, that wait, that were completed."""
    if event is None:
        return 2
    if not isinstance(event, Migration):
        return 1
    if event.outcome is Outcome.UNDER_WAY:
        return 2 if event.place else 0
    return 3 if event.outcome is Outcome.COMPLETED else 1


def _stage(event: Event | None) -> str:
    if event is None:
        return "requested"
    return stage(event) if isinstance(event, Migration) else event.code


def stage(migration: Migration) -> str:
    """How a move ended, or else its phase, with its place in line."""
    if migration.outcome is not Outcome.UNDER_WAY:
        return migration.outcome.value
    place = f", place {migration.place}" if migration.place else ""
    return migration.phase.value + place


def _figures(event: Event | None) -> str:
    """Rate, dirty rate, pass and remaining time, as far as they are known."""
    if not isinstance(event, Migration) or event.outcome is not Outcome.UNDER_WAY:
        return ""
    if event.phase not in (Phase.STORAGE, Phase.COPY, Phase.SYNCHRONISE):
        return ""
    progress = event.progress
    parts = []
    if progress.rate_bytes_per_s:
        parts.append(format_rate(progress.rate_bytes_per_s))
    if progress.dirty_rate_bytes_per_s:
        parts.append(f"dirty {format_rate(progress.dirty_rate_bytes_per_s)}")
    if progress.iteration:
        parts.append(f"pass {progress.iteration}")
    if progress.throttle_percent:
        parts.append(f"guest slowed {progress.throttle_percent} %")
    if progress.remaining_s is not None:
        # It is a guess; what is below a second says only that the end is near.
        parts.append("under 1 s left" if progress.remaining_s < 1 else f"{format_seconds(progress.remaining_s)} left")
    return ", ".join(parts)


def in_words(migration: Migration) -> str:
    """One line on a move."""
    if migration.outcome is not Outcome.UNDER_WAY:
        return migration.outcome.value
    parts = [stage(migration)]
    if migration.progress.transferred_bytes:
        parts.append(f"{migration.progress.percent:.0f} %")
    parts += [part for part in (_figures(migration), migration.progress.note) if part]
    return ", ".join(parts)


#: Phases that have a column also where no move had them.
_ALWAYS = (Phase.BUILD_UP, Phase.COPY, Phase.SYNCHRONISE, Phase.SWITCHOVER, Phase.TEAR_DOWN)


def say_summary(migrations: Iterable[Migration]) -> None:
    """A table of moves: total, phases, blackout, bytes; sentences on a terminal too narrow for it. Nothing if none."""
    moves = list(migrations)
    phases = [phase for phase in Phase if phase in _ALWAYS or _had(moves, phase)]
    names = (phase.value.upper() for phase in phases)
    head = ("VM", "SOURCE", "DESTINATION", "OUTCOME", "TOTAL", *names, "BLACKOUT", "SENT")
    rows = [
        (
            one.vm,
            one.source,
            one.destination,
            one.outcome.value,
            _duration(one.total_s),
            *(_duration(one.phases.get(phase.value)) for phase in phases),
            _duration(None if one.blackout_ms is None else one.blackout_ms / 1000),
            format_bytes(one.progress.transferred_bytes),
        )
        for one in moves
    ]
    columns = _terminal_columns()
    if rows and columns and table_width(head, *rows) > columns:
        _say_sentences(head, rows, columns)
    elif rows:
        say_table(head, rows)


def _had(moves: Iterable[Migration], phase: Phase) -> bool:
    return phase is not Phase.WAITING and any(phase.value in move.phases for move in moves)


def _say_sentences(head: Sequence[str], rows: Iterable[Sequence[str]], columns: int) -> None:
    import textwrap  # noqa: PLC0415 - seldom needed

    for vm, source, destination, outcome, *figures in rows:
        named = ", ".join(f"{name.lower()} {figure}" for name, figure in zip(head[4:], figures, strict=True))
        sentence = clean(f"{vm}: {outcome}, {source} to {destination}; {named}")
        print(textwrap.fill(sentence, columns, subsequent_indent="  ", break_on_hyphens=False))


def _terminal_columns() -> int | None:
    """How wide the terminal is that standard output is, if it is one; some do not know it and say 0."""
    return os.get_terminal_size(sys.stdout.fileno()).columns if sys.stdout.isatty() else None


def _duration(seconds: float | None) -> str:
    return "-" if seconds is None else format_seconds(seconds)
