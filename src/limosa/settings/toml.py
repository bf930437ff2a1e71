"""TOML files to and from validated structs; the only place that does it, so every file fails in the same words."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from limosa.errors import InvalidInput, LimosaError, StateError
from limosa.model import reading
from limosa.model.base import Model

T = TypeVar("T", bound=Model)

MAX_FILE_BYTES = 4 * 1024 * 1024


def decode(text: str, cls: type[T], *, where: str, error: type[LimosaError] = InvalidInput) -> T:
    """The struct that ``text`` describes. Raises ``error`` naming ``where`` and the place of the fault."""
    import tomllib  # noqa: PLC0415 - most commands read no file; loading the parser would take as long as many a call

    try:
        raw = tomllib.loads(text)
    except (ValueError, RecursionError) as fault:  # TOMLDecodeError is a ValueError; a number too long is another
        raise error(f"{where} is not valid TOML", why=str(fault), todo="fix the file") from fault
    return convert(raw, cls, where=where, error=error)


def convert(
    raw: Any,
    cls: type[T],
    *,
    where: str,
    todo: str = "fix the field that is named",
    error: type[LimosaError] = InvalidInput,
) -> T:
    """The struct that plain data describes. Raises ``error`` naming ``where`` and the field."""
    try:
        return reading.convert(raw, cls)
    except msgspec.ValidationError as fault:
        raise error(f"{where} is not valid", why=_with_field_first(_in_words(str(fault), cls)), todo=todo) from fault


def _in_words(fault: str, cls: type[Model]) -> str:
    """msgspec's words, with what a pattern means, as the type says it, instead of the pattern."""
    before, found, rest = fault.partition("Expected `str` matching regex ")
    if not found:
        return fault
    for pattern, meaning in _patterns(msgspec.json.schema(cls)):
        if rest.startswith(repr(pattern)):
            return f"{before}what is wanted is {meaning}{rest.removeprefix(repr(pattern))}"
    return fault


def _patterns(schema: object) -> Iterator[tuple[str, str]]:
    """Every pattern in a JSON schema that has a description, with that."""
    if isinstance(schema, dict):
        if isinstance(schema.get("pattern"), str) and "description" in schema:
            yield schema["pattern"], schema["description"]
        schema = list(schema.values())
    if isinstance(schema, list):
        for part in schema:
            yield from _patterns(part)


def _with_field_first(fault: str) -> str:
    """msgspec's words about a field, with the field's name as a user knows it."""
    what, at, path = fault.rpartition(" - at `$")
    return f"{path.rstrip('`').lstrip('.')}: {what}" if at else fault


def read(path: Path, cls: type[T], *, error: type[LimosaError] = InvalidInput) -> T:
    """The struct in a TOML file. Raises ``error`` (unreadable, not UTF-8, too large, not valid)."""
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_FILE_BYTES + 1)
        text = data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as fault:
        raise error(f"cannot read {path}", why=why_unreadable(fault)) from fault
    if len(data) > MAX_FILE_BYTES:
        raise error(f"{path} is too large", why=f"more than {MAX_FILE_BYTES} bytes")
    return decode(text, cls, where=str(path), error=error)


def why_unreadable(fault: OSError | UnicodeDecodeError) -> str:
    """Why a file could not be read as text, without its name."""
    return (fault.strerror if isinstance(fault, OSError) else None) or str(fault)


def encode(value: Model) -> str:
    """TOML text of a struct, without the fields that are null."""
    # Writing TOML is not on the way of any command that only talks to a daemon; loading the writer would be.
    import tomli_w  # noqa: PLC0415

    return tomli_w.dumps(_without_none(msgspec.to_builtins(value)))


def write(path: Path, value: Model) -> None:
    """Write a struct so that after a crash the file is either the old or the new one, whole, and on the disk.

    Raises :class:`StateError`; it is the old one then, unless the change was made and could not be made durable.
    """
    write_atomically(path, encode(value).encode())


def write_atomically(path: Path, data: bytes, *, durable: bool = True, mode: int = 0o600) -> None:
    """Replace ``path`` by ``data``. Raises :class:`StateError` as :func:`write`.

    What need not outlive the machine need not be ``durable``, which takes milliseconds.
    """
    temporary = path.with_name(f".{path.name}.new")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            if durable:
                stream.flush()
                os.fsync(stream.fileno())
        temporary.replace(path)
        if durable:
            sync_folder(path.parent)
    except OSError as fault:
        temporary.unlink(missing_ok=True)
        raise StateError(
            f"cannot write {path}", why=fault.strerror or str(fault), todo="free space or repair the file system"
        ) from fault


def sync_folder(folder: Path) -> None:
    """Make names created in or removed from ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_without_none(item) for item in value]
    return value
