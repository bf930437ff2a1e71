"""A property as a test: quick and the same each time by default, long and random in the second test command.

``fuzz`` makes a test of a function; ``extents`` is for a test that needs fixtures and applies its extent itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

_QUICK = settings(deadline=None, derandomize=True, max_examples=50, suppress_health_check=list(HealthCheck))
_LONG = settings(deadline=None, database=None, max_examples=1500, suppress_health_check=list(HealthCheck))

extents = pytest.mark.parametrize(
    "extent", [pytest.param(_QUICK, id="quick"), pytest.param(_LONG, id="long", marks=pytest.mark.long)]
)


def fuzz(*strategies: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a test of a function that must hold for everything the strategies give."""

    def decorate(check: Callable[..., None]) -> Callable[..., None]:
        @extents
        def test(extent: settings) -> None:
            extent(given(*strategies)(check))()

        test.__name__, test.__doc__ = check.__name__, check.__doc__
        return test

    return decorate
