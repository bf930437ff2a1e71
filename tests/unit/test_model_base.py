"""What the types shared by all structs let through."""

from __future__ import annotations

import msgspec
import pytest

from limosa.model.base import AbsolutePath


@pytest.mark.parametrize("path", ["/", "/a b/c", "/\N{NO-BREAK SPACE}", "/é/日本"])
def test_paths(path: str) -> None:
    assert msgspec.convert(path, AbsolutePath) == path


@pytest.mark.parametrize("character", ["\0", "\n", "\x1b", "\x1f", "\x7f", "\x80", "\x85", "\x9b", "\x9f"])
def test_control_characters_are_in_no_path(character: str) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(f"/a{character}b", AbsolutePath)
