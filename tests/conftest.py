"""For all tests: how long an example takes says something about the machine, nothing about the code."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("limosa", deadline=None)
settings.load_profile("limosa")
