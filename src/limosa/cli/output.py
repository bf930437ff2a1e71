"""How commands print: plain aligned tables, JSON lines, and text from elsewhere made safe for a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from limosa.errors import LimosaError
from limosa.model.finding import Finding


def clean(text: object) -> str:
    """Text on one line without control characters, which could move a terminal's cursor or change its state."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in str(text))


def say(text: str) -> None:
    """One line on standard output."""
    print(clean(text))


def warn(text: str) -> None:
    """One line on standard error."""
    print(clean(text), file=sys.stderr)


def say_json(value: Any) -> None:
    """One JSON object on a line of standard output, written at once, since programs wait for it."""
    sys.stdout.write(msgspec.json.encode(value).decode() + "\n")
    sys.stdout.flush()


def say_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """An aligned table; only the head if there are no rows."""
    lines = [list(head), *([clean(cell) for cell in row] for row in rows)]
    widths = _widths(lines)
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def table_width(head: Sequence[str], *rows: Sequence[object]) -> int:
    """How many characters wide :func:`say_table` would be."""
    return sum(_widths([head, *([clean(cell) for cell in row] for row in rows)])) + 2 * (len(head) - 1)


def _widths(lines: Sequence[Sequence[str]]) -> list[int]:
    return [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]


def say_findings(findings: Iterable[Finding], *, to_stderr: bool = False) -> None:
    """What preflight found, two lines each: what, and what to do."""
    tell = warn if to_stderr else say
    for finding in findings:
        tell(f"  {finding.severity.value}: {finding.what} [{finding.code}]")
        tell(f"      to do: {finding.todo}")


def on_each(names: Iterable[str], act: Callable[[str], None], *, as_json: bool) -> int:
    """Act on each, also after one failed; the exit code is that of the first failure, else 0."""
    code = 0
    for name in names:
        try:
            act(name)
        except LimosaError as error:
            reported = report(error, as_json=as_json) or 1
            code = code or reported
    return code


def report(error: LimosaError, *, as_json: bool = False) -> int:
    """Print an error and return the exit code it stands for.

    Three short lines on standard error: what and why, with the VM concerned; what to do; the code. As JSON also one
    object on standard output: ``{"error": {...}}``.
    """
    if as_json:
        say_json({"error": error.fault()})
    text = error.what if error.findings else str(error)
    subject = f"VM '{error.vm}': " if error.vm and f"'{error.vm}'" not in text else ""
    warn(f"limosa: {subject}{text}")
    say_findings(error.findings, to_stderr=True)
    if error.todo:
        warn(f"  to do: {error.todo}")
    warn(f"  code: {error.code}")
    return error.exit_code
