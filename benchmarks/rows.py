"""Rows of an outcome: what Limosa did held against what something else did in the same run. Pure.

A figure is the median over the rounds, with the smallest and the largest beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Generic, TypeVar

from limosa.model.base import Model

T_contra = TypeVar("T_contra", contravariant=True)


class Row(Model, frozen=True):
    """A comparison. ``target`` is what was to be reached, ``met`` whether it was; null if it is for information."""

    what: str
    limosa: float
    baseline: str
    baseline_value: float
    unit: str
    ratio: float
    target: str | None
    met: bool | None
    rounds: int
    #: smallest and largest figure of Limosa and of the baseline
    spread: dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Figure(Generic[T_contra]):
    """Something that was measured each time."""

    name: str
    unit: str
    of: Callable[[T_contra], float]

    def all_of(self, measured: Sequence[T_contra]) -> list[float]:
        """That of each measurement."""
        return [self.of(one) for one in measured]

    def median_of(self, measured: Sequence[T_contra]) -> float:
        """The one that counts."""
        return median(self.all_of(measured))


def row(
    what: str,
    unit: str,
    ours: Sequence[float],
    baseline: str,
    theirs: Sequence[float],
    target: str | None = None,
    met: bool | None = None,
) -> Row:
    """A comparison of what was measured in all rounds."""
    value, other = median(ours), median(theirs)
    return Row(
        what=what,
        limosa=round(value, 3),
        baseline=baseline,
        baseline_value=round(other, 3),
        unit=unit,
        ratio=round(value / other, 4) if other else 0.0,
        target=target,
        met=met,
        rounds=len(ours),
        spread={"limosa": _ends(ours), "baseline": _ends(theirs)},
    )


def _ends(values: Sequence[float]) -> tuple[float, float]:
    return round(min(values), 3), round(max(values), 3)
