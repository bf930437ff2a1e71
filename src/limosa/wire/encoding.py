"""Writing what another host or daemon reads, which may be of an older release.

A field that has its default is not said. So who does not know the field understands all that does not need it, and
refuses the rest in words (``forbid_unknown_fields``) instead of doing half of what was asked.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import msgspec
from msgspec import structs

from limosa.model.base import Model


def encode(value: Model) -> bytes:
    """The JSON of a request or a message, without what has its default. Reading it gives an equal value."""
    return msgspec.json.encode(_sparse(value))


def _sparse(value: Any) -> Any:
    match value:
        case msgspec.Struct():
            said = dict(_tag(type(value)))
            for name, encoded, default in _fields(type(value)):
                one = getattr(value, name)
                if one != default:
                    said[encoded] = _sparse(one)
            return said
        case tuple() | list():
            return [_sparse(one) for one in value]
        case dict():
            return {key: _sparse(one) for key, one in value.items()}
    return value


@cache
def _tag(cls: type[msgspec.Struct]) -> tuple[tuple[str, Any], ...]:
    config = cls.__struct_config__
    return () if config.tag_field is None else ((config.tag_field, config.tag),)


@cache
def _fields(cls: type[msgspec.Struct]) -> tuple[tuple[str, str, Any], ...]:
    """Of each field its name, its name in JSON and its default, which nothing equals if there is none."""
    return tuple((field.name, field.encode_name, _default(field)) for field in structs.fields(cls))


def _default(field: structs.FieldInfo) -> Any:
    return field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
