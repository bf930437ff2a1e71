"""The settings page of this host: kept in a file, changed as a whole or not at all, read by everybody at each use."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec

from limosa.background import in_full, to_its_end
from limosa.errors import InvalidInput, StateError
from limosa.settings import toml
from limosa.settings.host import HostSettings


class Page:
    """Holds the settings in force as ``now``."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._asked: list[Callable[[HostSettings], Awaitable[None]]] = []
        self._changed: list[Callable[[], None]] = []
        #: held while the page is changed: each change is to what the one before has left
        self._changing = asyncio.Lock()
        self.now = toml.read(path, HostSettings, error=StateError) if path.exists() else HostSettings()

    def before_change(self, callback: Callable[[HostSettings], Awaitable[None]]) -> None:
        """Have ``callback`` asked about each change; to refuse it, it raises."""
        self._asked.append(callback)

    def on_change(self, callback: Callable[[], None]) -> None:
        """Have ``callback`` called after each change."""
        self._changed.append(callback)

    async def change(self, values: dict[str, Any]) -> HostSettings:
        """Set fields (dots reach into tables), null for the default; durable on return.

        Raises :class:`InvalidInput`, and what :meth:`before_change` does; then nothing was changed.
        """
        return await to_its_end(self._change(values))

    async def _change(self, values: dict[str, Any]) -> HostSettings:
        async with self._changing:
            settings = self._with(values)
            for ask in self._asked:
                await ask(settings)
            await in_full(toml.write, self._path, settings)
            self.now = settings
            for callback in self._changed:
                callback()
            return settings

    def _with(self, values: dict[str, Any]) -> HostSettings:
        raw = msgspec.to_builtins(self.now)
        for path, value in values.items():
            _set(raw, path, value)
        return toml.convert(
            raw, HostSettings, where="the new settings page", todo="'limosa host settings' says what each may be"
        )


def _set(raw: dict[str, Any], path: str, value: Any) -> None:
    # Tables lie one deep, and what follows the first dot may have dots itself: a host's name, for one.
    outer, dot, last = path.partition(".")
    table = raw.get(outer) if dot else raw
    last = last if dot else outer
    if not isinstance(table, dict):
        raise InvalidInput(f"there is no setting '{path}'", todo="'limosa host settings' lists them")
    if value is None:
        table.pop(last, None)
    else:
        table[last] = value
