"""The floors of a copy on one host: programs that copy an image at rest, which no guest uses.

Like QEMU's own copies they go past the page cache, to an image that exists, is empty, and is known to be.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmarks import disk
from benchmarks.ground import run


def qemu_img(image: Path, to: Path) -> list[str]:
    """``qemu-img convert``, writing in any order."""
    caches = ("-T", "none", "-t", "none")
    return ["qemu-img", "convert", "-W", "-n", "--target-is-zero", *caches, *_formats("-f", "-O"), str(image), str(to)]


def nbdcopy(image: Path, to: Path) -> list[str]:
    """``nbdcopy`` between two ``qemu-nbd``."""
    server = ("qemu-nbd", "--cache=none", *_formats("-f"))
    return [
        *("nbdcopy", "--destination-is-zero", "--flush", "--"),
        *("[", *server, "--read-only", str(image), "]"),
        *("[", *server, str(to), "]"),
    ]


#: By the name of the program.
COPIERS: dict[str, Callable[[Path, Path], list[str]]] = {"qemu-img convert": qemu_img, "nbdcopy": nbdcopy}


def copied(name: str, image: Path) -> float:
    """Have one copy an image, and delete the copy. Returns the wall time."""
    to = image.with_name("copy.qcow2")
    try:
        disk.create(to)
        _, wall_s, _ = run(COPIERS[name](image, to))
        if disk.allocated(to) < disk.allocated(image) / 2:
            raise RuntimeError(f"{name} did not copy all")
    finally:
        to.unlink(missing_ok=True)
    return wall_s


def _formats(*options: str) -> list[str]:
    return [word for option in options for word in (option, "qcow2")]
