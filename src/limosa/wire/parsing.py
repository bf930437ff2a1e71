"""Reading JSON that somebody else wrote: whatever the bytes are, the outcome is a valid value or one error.

``msgspec`` itself raises three kinds: its own for what is not JSON or not of the type, ``UnicodeDecodeError`` for what
is not UTF-8, ``RecursionError`` for what is nested too deeply. Each place that forgot one of them would be a hole.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from limosa.errors import InvalidInput

T = TypeVar("T")


def parse(data: bytes | str, decoder: msgspec.json.Decoder[T], what: str) -> T:
    """The value in ``data``. Raises :class:`InvalidInput` saying that ``what`` is not valid, and why."""
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidInput(f"{what} is not valid", why=str(error)) from error
