"""What tells a machine from others."""

from __future__ import annotations

from pathlib import Path

import pytest

from limosa.errors import StateError
from limosa.host import files
from limosa.host.files import Files


@pytest.mark.parametrize("contents", [None, "", "8f2ac1\n"])
def test_a_machine_stays_the_same_and_is_another_than_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, contents: str | None
) -> None:
    monkeypatch.setattr(files, "_MACHINE_ID", tmp_path / "etc")
    if contents is not None:
        (tmp_path / "etc").write_text(contents)
    (tmp_path / "state").mkdir()
    made = Files(tmp_path / "state", tmp_path / "run").machine()
    assert made == Files(tmp_path / "state", tmp_path / "run").machine()
    assert "8f2ac1" not in made
    assert (tmp_path / "state" / "machine-id").exists() is (not contents)
    (tmp_path / "etc").write_text("9f2ac1\n")
    assert Files(tmp_path / "state", tmp_path / "run").machine() != made


def test_what_is_no_text_is_named_and_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_MACHINE_ID", tmp_path / "etc")
    own = tmp_path / "machine-id"
    own.write_bytes(b"\xff")
    with pytest.raises(StateError, match=str(own)):
        Files(tmp_path, tmp_path / "run").machine()
    assert own.read_bytes() == b"\xff"
