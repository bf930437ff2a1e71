"""Reading JSON that somebody else wrote: whatever the bytes are, the outcome is a valid value or one error."""

from __future__ import annotations

from typing import TypeVar

import msgspec

from limosa.errors import InvalidInput
from limosa.model import reading

T = TypeVar("T")


def parse(data: bytes | str, decoder: msgspec.json.Decoder[T], what: str) -> T:
    """The value in ``data``. Raises :class:`InvalidInput` saying that ``what`` is not valid, and why."""
    try:
        return reading.decode_by(decoder, data)
    except msgspec.DecodeError as error:
        raise InvalidInput(f"{what} is not valid", why=str(error)) from error
