"""Fakes that are proven against the real thing by shared contract tests."""
