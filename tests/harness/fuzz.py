"""A property as a test: quick and the same each time by default, long and random in the second test command."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

_QUICK = settings(deadline=None, derandomize=True, max_examples=50, suppress_health_check=list(HealthCheck))
_LONG = settings(deadline=None, database=None, max_examples=1500, suppress_health_check=list(HealthCheck))


def fuzz(*strategies: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a test of a function that must hold for everything the strategies give."""

    def decorate(check: Callable[..., None]) -> Callable[..., None]:
        quick, long = (kind(given(*strategies)(check)) for kind in (_QUICK, _LONG))

        @pytest.mark.parametrize(
            "holds", [pytest.param(quick, id="quick"), pytest.param(long, id="long", marks=pytest.mark.long)]
        )
        def test(holds: Callable[[], None]) -> None:
            holds()

        test.__name__, test.__doc__ = check.__name__, check.__doc__
        return test

    return decorate
