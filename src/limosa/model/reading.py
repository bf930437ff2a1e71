"""Reading JSON into structs, in any thread.

msgspec learns what a struct is made of when it first reads one. Another thread that comes upon the struct meanwhile
finds it half learned, and the process dies of that (msgspec 0.19 to 0.21: ``StructInfo`` is in its place before it is
filled). So types are learned one after another, here; what is known may be used by all threads at once.

It also raises three kinds of errors: its own for what is not JSON or not of the type, ``UnicodeError`` for what is not
UTF-8, ``RecursionError`` for what is nested too deeply. Each place that forgot one of them would be a hole.
"""

from __future__ import annotations

import threading
from typing import Any, TypeVar, overload

import msgspec

T = TypeVar("T")

_learning = threading.Lock()
_known: dict[object, msgspec.json.Decoder[Any]] = {}


@overload
def decoder(kind: type[T]) -> msgspec.json.Decoder[T]: ...
@overload
def decoder(kind: object) -> msgspec.json.Decoder[Any]: ...
def decoder(kind: object) -> msgspec.json.Decoder[Any]:
    """The decoder of a type, or a union of types."""
    found = _known.get(kind)
    if found is None:
        with _learning:
            found = _known[kind] = msgspec.json.Decoder(kind)
    return found


@overload
def decode(data: bytes | str, kind: type[T]) -> T: ...
@overload
def decode(data: bytes | str, kind: object) -> Any: ...
def decode(data: bytes | str, kind: object) -> Any:
    """A value from its JSON. Raises ``msgspec.DecodeError``, whatever the data is."""
    return decode_by(decoder(kind), data)


def decode_by(chosen: msgspec.json.Decoder[T], data: bytes | str) -> T:
    """The same, by a decoder that is at hand."""
    try:
        return chosen.decode(data)
    except (UnicodeError, RecursionError) as error:
        raise msgspec.DecodeError(str(error)) from error


def convert(value: object, kind: type[T], *, strict: bool = True) -> T:
    """A value from plain Python values. Raises ``msgspec.ValidationError``."""
    decoder(kind)
    return msgspec.convert(value, kind, strict=strict)  # noqa: TID251 - here alone
