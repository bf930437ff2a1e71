"""Packing an initramfs: a newc cpio archive, and the kernel modules in the order in which they can be loaded.

Both are small formats that never change, so there is no need for ``cpio``, ``kmod`` or ``depmod`` on the machine that
builds: the archive is described in the kernel's ``Documentation/driver-api/early-userspace/buffer-format.rst``, and
each module names what it depends on in its ``.modinfo`` section.
"""

from __future__ import annotations

import lzma
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

_DEPENDS = re.compile(rb"\0depends=([^\0]*)\0")


class Archive:
    """A cpio archive under construction; all entries belong to root and bear no time, so equal input packs equally."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._entries = 0

    def folder(self, path: str) -> None:
        """Add a folder. Parents come first; the kernel does not make them."""
        self._add(path, stat.S_IFDIR | 0o755, b"")

    def file(self, path: str, content: bytes, *, executable: bool = False) -> None:
        """Add a file."""
        self._add(path, stat.S_IFREG | (0o755 if executable else 0o644), content)

    def link(self, path: str, target: str) -> None:
        """Add a symbolic link."""
        self._add(path, stat.S_IFLNK | 0o777, target.encode())

    def finish(self) -> bytes:
        """The whole archive."""
        self._add("TRAILER!!!", 0, b"")
        return bytes(self._data)

    def _add(self, path: str, mode: int, content: bytes) -> None:
        name = path.encode() + b"\0"
        self._entries += 1
        #         inode          mode uid gid links mtime size          devmajor .. rdevminor  namesize  checksum
        fields = (self._entries, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name), 0)
        self._data += b"070701" + b"".join(b"%08x" % field for field in fields) + name
        self._align()
        self._data += content
        self._align()

    def _align(self) -> None:
        self._data += bytes(-len(self._data) % 4)


def modules_with_dependencies(tree: Path, wanted: Iterable[str]) -> dict[str, bytes]:
    """Contents of the ``wanted`` modules below ``tree`` and of all they need, uncompressed, in loading order.

    What is not there is left out: it is built into the kernel, or this kernel does not know it.
    """
    files = {_module_name(path): path for path in sorted(tree.rglob("*.ko*"))}
    loaded: dict[str, bytes] = {}
    for name in wanted:
        _load(name.replace("-", "_"), files, loaded)
    return loaded


def _load(name: str, files: Mapping[str, Path], loaded: dict[str, bytes]) -> None:
    if name in loaded or name not in files:
        return
    content = _read_module(files[name])
    for dependency in _dependencies(content):
        _load(dependency, files, loaded)
    loaded[name] = content


def _dependencies(module: bytes) -> Sequence[str]:
    match = _DEPENDS.search(module)
    return [name.decode().replace("-", "_") for name in match[1].split(b",") if name] if match else []


def _read_module(path: Path) -> bytes:
    content = path.read_bytes()
    return lzma.decompress(content) if path.suffix == ".xz" else content


def _module_name(path: Path) -> str:
    return path.name.split(".", 1)[0].replace("-", "_")
