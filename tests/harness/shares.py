"""A folder as if it lay on a server that may stop to answer, and event loops that are kept from images, which all may
lie on one."""

from __future__ import annotations

import asyncio
import builtins
import functools
import io
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest

#: So long a dead server keeps a test waiting that should not have waited for it.
WAITS_S = 20.0
_CALLS: dict[ModuleType, tuple[str, ...]] = {
    os: (
        *("access", "chmod", "chown", "link", "listdir", "lstat", "mkdir", "open", "readlink", "remove", "rename"),
        *("replace", "rmdir", "scandir", "stat", "statvfs", "truncate", "unlink"),
    ),
    io: ("open",),
    builtins: ("open",),
}
_IMAGES = (".raw", ".qcow2", ".img")


def watch(patch: Callable[[ModuleType, str, Any], None], reached: Callable[[Path, str], None]) -> None:
    """Have ``reached`` told of each path before something is done there by name, and what."""

    def watched(call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def tell(path: Any = ".", *more: Any, **named: Any) -> Any:
            if isinstance(path, str | os.PathLike):
                reached(Path(path), f"{call.__name__} {path}")
            return call(path, *more, **named)

        return tell

    for module, names in _CALLS.items():
        for name in names:
            patch(module, name, watched(getattr(module, name)))


def keep_images_out_of_event_loops() -> None:
    """From now on it is a fault to work with an image, or with what lies beside it, in the thread of an event loop:
    with its share dead, all would wait."""

    def reached(path: Path, what: str) -> None:
        if path.suffix in _IMAGES or ".limosa-" in path.name:
            _refuse_in_a_loop(what)

    watch(setattr, reached)


def _refuse_in_a_loop(what: str) -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise AssertionError(f"in the event loop: {what}")


class Share:
    """Whoever works in the folder while the server is dead waits for it. In an event loop nobody may, dead or not."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        #: counts who has begun to wait
        self.waiting = threading.Semaphore(0)
        self._answers = threading.Event()
        self._answers.set()
        watch(monkeypatch.setattr, self._reached)

    def die(self) -> None:
        """Answer nobody any more."""
        self._answers.clear()

    def answer(self) -> None:
        """Answer again."""
        self._answers.set()

    def _reached(self, path: Path, what: str) -> None:
        if not path.is_relative_to(self.folder):
            return
        _refuse_in_a_loop(what)
        if not self._answers.is_set():
            self.waiting.release()
            assert self._answers.wait(WAITS_S), f"waited for, and had to be given up: {what}"
