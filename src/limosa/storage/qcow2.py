"""The header of a qcow2 image, read without starting a program (QEMU's docs/interop/qcow2.txt).

Only what a move must know before it begins: how large the disk is, what lies below it, whether snapshots or bitmaps
are inside.
And the one thing a copy must have otherwise than its original: the name of what lies below it, which is where it lies
on another host. That name has the rest of the first cluster to itself. All numbers are big-endian.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from limosa.errors import StorageError
from limosa.storage.access import check_kind

MAGIC = b"QFI\xfb"
#: magic, version, backing_file_offset, backing_file_size, cluster_bits, size, crypt_method, l1_size, l1_table_offset,
#: refcount_table_offset, refcount_table_clusters, nb_snapshots, snapshots_offset
_HEAD = struct.Struct(">4s I Q I I Q I I Q Q I I Q")
#: incompatible_features, compatible_features, autoclear_features, refcount_order, header_length; of version 3
_HEAD_3 = struct.Struct(">Q Q Q I I")
_EXTENSION = struct.Struct(">I I")
_BACKING_FORMAT = 0xE2792ACA
_BITMAPS = 0x23852875
_NUMBER = struct.Struct(">I")
_EXTERNAL_DATA = 1 << 2
#: Of the autoclear features: whoever wrote the image last has kept its bitmaps true.
_BITMAPS_ARE_TRUE = 1 << 0
_FIRST_CLUSTER = 64 * 1024
_BACKING_NAME_MAX = 1023
_NAME_LENGTH = struct.Struct(">I")
_NAME_LENGTH_AT = 16
#: The largest cluster there is.
LONGEST_CLUSTER = 2 * 1024 * 1024


@dataclass(frozen=True)
class Header:
    """What the header says. ``backing`` is as written there: it may be relative to the image's folder."""

    virtual_bytes: int
    snapshots: int
    backing: str = ""
    backing_format: str = ""
    external_data: bool = False
    #: dirty bitmaps, as backup programs keep there
    bitmaps: int = 0


def read(path: Path) -> Header:
    """The header of an image, which QEMU may have open. Raises :class:`StorageError` if it is none."""
    try:
        return _parsed(path, _beginning(path))
    except OSError as error:
        raise _unreadable(path, error) from error


def read_if_any(path: Path) -> Header | None:
    """The same of a file of which it is not known what it is; None if it is certain that it is no such image, or that
    it is not there any more. Raises :class:`StorageError` if it may be one."""
    try:
        data = _beginning(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unreadable(path, error) from error
    return _parsed(path, data) if data.startswith(MAGIC) else None


def _beginning(path: Path) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        check_kind(path, os.fstat(descriptor))
        return os.pread(descriptor, _FIRST_CLUSTER, 0)
    finally:
        os.close(descriptor)


def _parsed(path: Path, data: bytes) -> Header:
    try:
        return parse(data)
    except ValueError as fault:
        raise StorageError(f"{path} is not a valid qcow2 image", why=str(fault)) from fault


def _unreadable(path: Path, error: OSError) -> StorageError:
    return StorageError(f"cannot read {path}", why=error.strerror or str(error))


def parse(data: bytes) -> Header:
    """The header at the beginning of ``data``. Raises ``ValueError``."""
    try:
        magic, version, at, length, _, size, *_, snapshots, _ = _HEAD.unpack_from(data)
        if magic != MAGIC or version not in (2, 3):
            raise ValueError("it does not begin like one")
        features, autoclear, header_length = 0, 0, _HEAD.size
        if version == 3:
            features, _, autoclear, _, header_length = _HEAD_3.unpack_from(data, _HEAD.size)
        if length > _BACKING_NAME_MAX or at + length > len(data):
            raise ValueError("the name of its backing file lies outside")
        extensions = dict(_extensions(data, header_length, at or len(data)))
        bitmaps = extensions.get(_BITMAPS, b"") if autoclear & _BITMAPS_ARE_TRUE else b""
        return Header(
            virtual_bytes=size,
            snapshots=snapshots,
            backing=data[at : at + length].decode() if at else "",
            backing_format=extensions.get(_BACKING_FORMAT, b"").decode(),
            external_data=bool(features & _EXTERNAL_DATA),
            bitmaps=_NUMBER.unpack_from(bitmaps)[0] if bitmaps else 0,
        )
    except struct.error as fault:
        raise ValueError("it is cut short") from fault


def below_called(cluster: bytes, name: str) -> bytes:
    """The first cluster of an image that lies above another, which is now called ``name``.

    ``cluster`` may be longer, what follows is as it was. With an empty name two images are alike that differ in nothing
    but what the files below them are called. Raises ``ValueError`` if there is no room for the name, or the image says
    strange things.
    """
    if len(cluster) < _HEAD.size:
        raise ValueError("it is cut short")
    (_, _, at, _, cluster_bits, *_) = _HEAD.unpack_from(cluster)
    end, written = 1 << min(cluster_bits, 63), name.encode()
    if not _HEAD.size <= at <= end <= min(len(cluster), LONGEST_CLUSTER):
        raise ValueError("it says that the name of its backing file lies outside")
    if len(written) > min(_BACKING_NAME_MAX, end - at):
        raise ValueError("there is no room in it for the path of its backing file")
    changed = bytearray(cluster)
    changed[at:end] = written.ljust(end - at, b"\0")
    _NAME_LENGTH.pack_into(changed, _NAME_LENGTH_AT, len(written))
    return bytes(changed)


def _extensions(data: bytes, at: int, end: int) -> Iterator[tuple[int, bytes]]:
    """The extensions of a header, by kind."""
    while at + _EXTENSION.size <= end:
        kind, length = _EXTENSION.unpack_from(data, at)
        at += _EXTENSION.size
        if kind == 0:
            return
        yield kind, data[at : at + length]
        at += (length + 7) // 8 * 8
