"""TOML files: what is written is what is read."""

from __future__ import annotations

from limosa.settings import toml
from limosa.wire.api import NewDisk, NewNic, NewVm


def test_nothing_is_written_for_what_is_null_also_inside_lists() -> None:
    vm = NewVm(name="web1", memory_mib=64, nics=(NewNic(switch="lan"),), disks=(NewDisk(path="/srv/web1.raw"),))
    text = toml.encode(vm)
    assert "mac" not in text
    assert toml.decode(text, NewVm, where="the text") == vm
