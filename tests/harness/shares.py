"""A folder as if it lay on a server that may stop to answer, for tests of what then waits and what does not."""

from __future__ import annotations

import asyncio
import builtins
import functools
import io
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

#: So long a dead server keeps a test waiting that should not have waited for it.
WAITS_S = 20.0
_CALLS: dict[ModuleType, tuple[str, ...]] = {
    os: (
        *("access", "chown", "listdir", "lstat", "mkdir", "open", "readlink", "remove", "rename", "replace", "rmdir"),
        *("scandir", "stat", "statvfs", "unlink"),
    ),
    io: ("open",),
    builtins: ("open",),
}


class Share:
    """Whoever works in the folder while the server is dead waits for it. In the thread of an event loop, where all
    would wait, nobody may work there at all, dead or not."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        #: counts who has begun to wait
        self.waiting = threading.Semaphore(0)
        #: what was done in an event loop
        self.in_a_loop: list[str] = []
        self._answers = threading.Event()
        self._answers.set()
        for module, names in _CALLS.items():
            for name in names:
                monkeypatch.setattr(module, name, self._watched(getattr(module, name)))

    def die(self) -> None:
        """Answer nobody any more."""
        self._answers.clear()

    def answer(self) -> None:
        """Answer again."""
        self._answers.set()

    def _watched(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def watched(path: Any = ".", *more: Any, **named: Any) -> Any:
            if isinstance(path, str | os.PathLike) and Path(path).is_relative_to(self.folder):
                self._reached(f"{call.__name__} {path}")
            return call(path, *more, **named)

        return watched

    def _reached(self, what: str) -> None:
        with suppress(RuntimeError):
            asyncio.get_running_loop()
            self.in_a_loop.append(what)
            raise AssertionError(f"in the event loop: {what}")
        if not self._answers.is_set():
            self.waiting.release()
            assert self._answers.wait(WAITS_S), f"waited for, and had to be given up: {what}"
