"""What a new VM is made of: what was left open is chosen, what was said is kept."""

from __future__ import annotations

import asyncio
import json

import msgspec
import pytest
from test_preflight import VM

from limosa.host.launching import Launcher
from limosa.model.vm import Disk
from limosa.wire.api import NewDisk


@pytest.mark.parametrize(
    "disk",
    [
        Disk(name="vdb", path="/dev/vg0/web1.raw", format="raw", size_bytes=1536),
        Disk(name="vda", path="/srv/web1.raw", format="raw", thick=True),
        Disk(name="vda", path="/srv/cd.qcow2", format="qcow2", read_only=True),
    ],
)
def test_a_vm_that_was_shown_can_be_created_again(disk: Disk) -> None:
    asked = msgspec.convert(msgspec.to_builtins(disk), NewDisk)
    assert asyncio.run(object.__new__(Launcher)._pin_disk(asked, disk.name)) == disk


def test_a_new_image_has_one_size() -> None:
    with pytest.raises(msgspec.ValidationError, match="size_mib is for a new image"):
        msgspec.convert({"path": "/srv/a.raw", "size_mib": 1, "size_bytes": 512}, NewDisk)


def test_hosts_that_know_no_thick_disks_understand_the_others() -> None:
    assert "thick" not in json.loads(msgspec.json.encode(VM))["disks"][0]
