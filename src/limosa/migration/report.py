"""What others see of a move: one frozen :class:`Migration`, replaced at each change and published."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import msgspec

from limosa.migration.progress import Bar
from limosa.model.migration import Fault, Migration, Outcome, Phase


class Report:
    """Times the phases and publishes each new view of a move.

    Durations are taken from the monotonic clock. Waiting in line is a phase but not part of the total.
    """

    def __init__(self, first: Migration, publish: Callable[[Migration], None]) -> None:
        self.now = first
        self.bar = Bar()
        #: what is to be known besides what the move waits for
        self.aside = ""
        self._publish = publish
        self._since = time.monotonic()

    def wait_in_line(self, place: int, what: str) -> None:
        """Say for what it waits, and where in line, from 1."""
        self.enter(Phase.WAITING, place=place, note=f"waits for {what}")

    def line(self, what: str, *, then: Phase | None = None) -> Callable[[int], None]:
        """Shows the place in a line for ``what``, from 1; with 0 the wait is over, and ``then`` is entered."""

        def tell(place: int) -> None:
            if place > 0:
                self.wait_in_line(place, what)
            elif then is not None:
                self.enter(then)

        return tell

    def enter(self, phase: Phase, *, place: int | None = None, note: str = "", silently: bool = False) -> None:
        """End the phase before, at this moment, and begin the next.

        ``silently``: let watchers hear of it with the next change. While the guest stands still the processors have
        better things to do than to wake everybody who watches.
        """
        phases = self.now.phases if phase is self.now.phase else self._timed()
        self.bar = self.bar.entered(phase)
        progress = msgspec.structs.replace(self.now.progress, percent=round(self.bar.percent, 1), note=note)
        self.now = msgspec.structs.replace(self.now, phase=phase, phases=phases, progress=progress, place=place)
        if not silently:
            self._publish(self.now)

    def note(self, words: str) -> None:
        """Say in words what the move waits for."""
        if words != self.now.progress.note:
            self.change(progress=msgspec.structs.replace(self.now.progress, note=words))

    def mention(self, words: str) -> None:
        """Say something besides what the move waits for, until it is taken back with an empty string."""
        before, self.aside = self.aside, words
        if words or self.now.progress.note == before:
            self.note(words)

    def end(self, outcome: Outcome, fault: Fault | None = None) -> None:
        """Publish the outcome. A move that stays unresolved may end again, otherwise."""
        phases = self._timed() if self.now.total_s is None else self.now.phases
        progress = self.now.progress
        if outcome is Outcome.COMPLETED:
            progress = msgspec.structs.replace(progress, percent=100.0, remaining_bytes=0, remaining_s=0.0, note="")
        total = round(sum(seconds for phase, seconds in phases.items() if phase != Phase.WAITING), 6)
        self.change(outcome=outcome, fault=fault, phases=phases, total_s=total, progress=progress, place=None)

    def _timed(self) -> dict[str, float]:
        """What all phases have taken up to now, in whole microseconds."""
        now = time.monotonic()
        spent = self.now.phases.get(self.now.phase, 0.0) + now - self._since
        self._since = now
        return {**self.now.phases, self.now.phase: round(spent, 6)}

    def change(self, **changes: Any) -> None:
        """Replace fields and publish."""
        self.now = msgspec.structs.replace(self.now, **changes)
        self._publish(self.now)
