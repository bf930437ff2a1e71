"""What preflight found, one at a time."""

from __future__ import annotations

from enum import StrEnum

from limosa.model.base import Model


class Severity(StrEnum):
    """``ERROR`` refuses the move, ``WARNING`` lets it go on."""

    ERROR = "error"
    WARNING = "warning"


class Finding(Model, forbid_unknown_fields=False, frozen=True):
    """One fact that stands against a move: a stable code, what was found, and what to do about it."""

    code: str
    severity: Severity
    what: str
    todo: str

    @classmethod
    def error(cls, code: str, what: str, todo: str) -> Finding:
        """One that refuses the move."""
        return cls(code=code, severity=Severity.ERROR, what=what, todo=todo)

    @classmethod
    def warning(cls, code: str, what: str, todo: str) -> Finding:
        """One that lets the move go on."""
        return cls(code=code, severity=Severity.WARNING, what=what, todo=todo)
