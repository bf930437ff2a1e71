"""docs/errors.md and the code say the same."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

from limosa.errors import every_error
from limosa.migration import disks, preflight
from limosa.security import expiry
from limosa.transport import advise

PAGE = Path(__file__).parents[2] / "docs" / "errors.md"
ROW = re.compile(r"^\| `([a-z-]+)` \| (\d+) \| (\d+) \| (.+) \| (.+) \|$", re.MULTILINE)


def test_every_error_has_its_row_and_no_row_is_left_over() -> None:
    rows = {(code, int(leaves), int(status)) for code, leaves, status, _, _ in ROW.findall(PAGE.read_text())}
    assert rows == {(error.code, error.exit_code, error.http_status) for error in every_error()}


def test_codes_are_unique() -> None:
    codes = [error.code for error in every_error()]
    assert len(codes) == len(set(codes))


def test_every_finding_has_its_row_and_no_row_is_left_over() -> None:
    trees = [ast.parse(inspect.getsource(module)) for module in (disks, preflight, advise, expiry)]
    calls = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]
    made = {
        (call.args[0].value, call.func.attr)
        for call in calls
        if isinstance(call.func, ast.Attribute) and ast.unparse(call.func) in ("Finding.error", "Finding.warning")
        if isinstance(call.args[0], ast.Constant)
    }
    assert set(re.findall(r"^\| `([a-z0-9-]+)` \| (error|warning) \|", PAGE.read_text(), re.MULTILINE)) == made
    assert len(made) > 20
