"""The settings of a host as a page for people, and what people type as values.

Names, help and defaults are read from the types in ``settings.host``, so a new option appears here by itself. A value
is read as the option's type wants it; whether it is allowed the daemon says.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
from msgspec import inspect

from limosa.cli.output import clean, say
from limosa.errors import InvalidInput
from limosa.settings.host import HostSettings

#: what a location that is a volume group begins with
_LVM = "lvm:"
_WORDS = {"on": True, "yes": True, "true": True, "off": False, "no": False, "false": False}


def options() -> dict[str, tuple[inspect.Type, str]]:
    """Every option by its dotted name: its type and its help."""
    info = inspect.type_info(HostSettings)
    assert isinstance(info, inspect.StructType)
    return dict(_options(info, ""))


def _options(info: inspect.StructType, prefix: str) -> Iterator[tuple[str, tuple[inspect.Type, str]]]:
    for field in info.fields:
        kind, text = field.type, ""
        if isinstance(kind, inspect.Metadata):
            text = (kind.extra_json_schema or {}).get("description", "")
            kind = kind.type
        if isinstance(kind, inspect.StructType):
            yield from _options(kind, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, (kind, text)


def parse_changes(pairs: list[tuple[str, str]]) -> dict[str, Any]:
    """New values by name. Raises :class:`InvalidInput` if an option is not known or a value is not of its type."""
    return {key: _parse(key, text) for key, text in pairs}


def parse_resets(keys: list[str]) -> dict[str, None]:
    """The same for options that get their defaults back. Raises :class:`InvalidInput` if one is not known."""
    for key in keys:
        _kind(key)
    return dict.fromkeys(keys)


def _parse(key: str, text: str) -> Any:
    kind = _kind(key)
    return _place(text) if isinstance(kind, inspect.StructType) else _parse_as(kind, key, text)


def _kind(key: str) -> inspect.Type:
    """The type of an option, or of an entry of a table. Raises :class:`InvalidInput`."""
    known = options()
    if key in known:
        return known[key][0]
    table, _, entry = key.partition(".")
    kind = known[table][0] if entry and table in known else None
    if isinstance(kind, inspect.DictType):
        return kind.value_type.type if isinstance(kind.value_type, inspect.Metadata) else kind.value_type
    raise InvalidInput(f"there is no setting '{key[:80]}'", todo="'limosa host settings' lists them")


def _place(text: str) -> dict[str, Any]:
    """A location: ``/srv/fast``, ``/srv/fast,shared`` or ``lvm:GROUP/POOL``; a path with a comma has one more behind it
    where it is not shared."""
    if text.startswith(_LVM):
        return {"lvm": text.removeprefix(_LVM)}
    path, comma, word = text.rpartition(",")
    if not comma:
        return {"path": text}
    if word not in ("", "shared"):
        raise InvalidInput(f"a location has no '{word[:80]}'", why="only 'shared' may follow the last comma")
    return {"path": path, "shared": bool(word)}


def _place_text(place: dict[str, Any]) -> str:
    """What :func:`_place` reads."""
    if "lvm" in place:
        return f"{_LVM}{place['lvm']}"
    path = str(place["path"])
    if place.get("shared"):
        return f"{path},shared"
    return f"{path}," if "," in path else path


def _parse_as(kind: inspect.Type, key: str, text: str) -> Any:
    if isinstance(kind, inspect.DictType):
        raise InvalidInput(f"'{key}' is a table", todo=f"set an entry of it: {key}.NAME=VALUE")
    if isinstance(kind, inspect.VarTupleType):
        return [_parse_as(kind.item_type, key, part) for part in _parts(text)]
    if isinstance(kind, inspect.TupleType):
        parts, count = _parts(text), len(kind.item_types)
        if len(parts) != count:
            raise InvalidInput(f"'{text[:40]}' is no value for {key}", todo=f"write {count} values, a comma between")
        return [_parse_as(item, key, part) for item, part in zip(kind.item_types, parts, strict=True)]
    if isinstance(kind, inspect.Metadata):
        return _parse_as(kind.type, key, text)
    if isinstance(kind, inspect.BoolType):
        return _word(key, text)
    if isinstance(kind, inspect.IntType | inspect.FloatType):
        return _number(key, text, int if isinstance(kind, inspect.IntType) else float)
    return text


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _word(key: str, text: str) -> bool:
    if text.lower() not in _WORDS:
        raise InvalidInput(f"'{text[:40]}' is not a value for {key}", todo="write on or off")
    return _WORDS[text.lower()]


def _number(key: str, text: str, kind: type[int] | type[float]) -> float:
    try:
        return kind(text)
    except ValueError as fault:
        raise InvalidInput(
            f"'{text[:40]}' is not a value for {key}", todo="write a whole number" if kind is int else "write a number"
        ) from fault


def value_text(settings: HostSettings, key: str) -> str:
    """The value of an option or of an entry of a table, written as it can be typed; empty if there is none."""
    # As in the daemon, what follows the first dot may have dots itself: a network, or a host's name.
    outer, dot, entry = key.partition(".")
    value: Any = msgspec.to_builtins(settings).get(outer)
    if dot:
        value = value.get(entry) if isinstance(value, dict) else None
    return _text(value)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else str(value)
    if isinstance(value, dict):
        return _place_text(value) if value else ""
    return "" if value is None else str(value)


def say_page(settings: HostSettings) -> None:
    """Every option with its value, its help and, where it was changed, its default."""
    for key, (kind, text) in options().items():
        if isinstance(kind, inspect.DictType):
            entries = getattr(settings, key)
            for name in entries:
                say(f"{key}.{name} = {value_text(settings, f'{key}.{name}')}")
            if not entries:
                say(f"{key} =")
            say_help(text)
        else:
            now, default = value_text(settings, key), value_text(HostSettings(), key)
            say(f"{key} = {now}".rstrip())
            say_help(text if now == default else f"{text} (default: {default or 'none'})")


def say_help(text: str) -> None:
    """The help of an option, below it."""
    print(f"    {clean(text)}")
