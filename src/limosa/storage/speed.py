"""How fast a location is, as far as the kernel tells: a class, no figure."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from limosa.storage.mounts import Mount

_MEMORY = frozenset({"tmpfs", "ramfs"})
_DEVICES = Path("/sys/dev/block")


def of_mount(device: int, mount: Mount) -> str:
    """The class of a file system: ``network``, ``memory``, ``ssd`` or ``disk``; empty if it is not known."""
    if mount.share:
        return "network"
    return "memory" if mount.kind in _MEMORY else _of_device(device)


def of_devices(paths: Iterable[str]) -> str:
    """The class of what lies on several block devices: that of the slowest."""
    classes = set()
    for path in paths:
        with suppress(OSError):  # it is missing
            classes.add(_of_device(os.stat(path).st_rdev))
    return next((known for known in ("disk", "ssd") if known in classes), "")


def _of_device(device: int) -> str:
    block = _DEVICES / f"{os.major(device)}:{os.minor(device)}"
    for queue in (block / "queue", block.resolve().parent / "queue"):  # a partition's is its disk's
        try:
            return "disk" if (queue / "rotational").read_text().strip() == "1" else "ssd"
        except OSError:
            continue
    return ""
