"""Locations of lab hosts, and a guest whose disk lies there."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from harness.disks import number
from harness.guests import LanClient, address_of, linux, wait_until_it_serves
from harness.hosts import wait_until
from harness.labs import LabHost
from harness.steering import change
from limosa.wire import api

MIB = 1024 * 1024
#: The guest numbers the first 8 MiB; behind it lies what makes a copy take its time.
SIZE_MIB, NUMBERED_MIB = 64, 8


def add_location(host: LabHost, name: str) -> Path:
    """A new location of that name, below the host's folder."""
    folder = host.folder / name
    folder.mkdir(mode=0o711)
    folder.chmod(0o711)
    change(host, {f"locations.{name}": {"path": str(folder)}})
    return folder


def images(host: LabHost) -> list[Path]:
    """Every image below the host's folder."""
    return sorted(path for kind in ("qcow2", "raw") for path in host.folder.rglob(f"*.{kind}"))


def numbering(host: LabHost, disks: int = 1) -> LanClient:
    """Start a guest ``web`` that numbers its first disk, whose raw images lie where only ``host`` sees them."""
    paths = [host.state / "images" / f"web{number}.raw" for number in range(disks)]
    for path in paths:
        path.write_bytes(bytes(NUMBERED_MIB * MIB) + os.urandom((SIZE_MIB - NUMBERED_MIB) * MIB))
    new = tuple(api.NewDisk(path=str(path)) for path in paths)
    host.create(msgspec.structs.replace(linux("web", load={"disk": "vda"}), disks=new))
    client = LanClient(host.lab, address_of(1))
    wait_until_it_serves(client)
    wait_until(lambda: number(client) > 3, "the guest numbers its disk")
    return client
