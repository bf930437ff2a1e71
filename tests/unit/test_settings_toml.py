"""TOML files: what is written is what is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from limosa.errors import InvalidInput
from limosa.settings import toml
from limosa.settings.host import HostSettings
from limosa.wire.api import NewDisk, NewNic, NewVm


def test_what_is_wrong_is_named_as_a_user_knows_it() -> None:
    with pytest.raises(InvalidInput) as caught:
        toml.convert({"convergence": {"patience_s": 0}}, HostSettings, where="the page", todo="see the page")
    assert (caught.value.what, caught.value.todo) == ("the page is not valid", "see the page")
    assert caught.value.why == "convergence.patience_s: Expected `float` >= 1.0"
    with pytest.raises(InvalidInput) as caught:
        toml.convert([], HostSettings, where="the page")
    assert caught.value.why == "Expected `object`, got `array`"


def test_a_pattern_is_said_in_words() -> None:
    for raw, why in (
        ({"name": "we b", "memory_mib": 64}, "name: what is wanted is letters, digits, '_', '.', '-'; at most 63;"),
        ({"name": "web1", "memory_mib": 64, "nics": [{"switch": "a/b"}]}, "nics[0].switch: what is wanted is a Linux"),
    ):
        with pytest.raises(InvalidInput) as caught:
            toml.convert(raw, NewVm, where="the VM")
        assert caught.value.why.startswith(why)


def test_a_file_that_is_not_there_is_named_once(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput) as caught:
        toml.read(tmp_path / "host.toml", HostSettings)
    assert str(caught.value) == f"cannot read {tmp_path}/host.toml: No such file or directory"


def test_nothing_is_written_for_what_is_null_also_inside_lists() -> None:
    vm = NewVm(name="web1", memory_mib=64, nics=(NewNic(switch="lan"),), disks=(NewDisk(path="/srv/web1.raw"),))
    text = toml.encode(vm)
    assert "mac" not in text
    assert toml.decode(text, NewVm, where="the text") == vm
