"""The cloud-init seed: a small ISO image labelled ``cidata`` (cloud-init's NoCloud data source).

The same contents always give the same bytes, so that a seed can be compared and made again: the dates an ISO image is
full of are all set to one. File names have their lower case and hyphens from the Joliet tree.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator

import pycdlib

from limosa.model.vm import CloudInit

_SECTOR = 2048
_FIRST_DESCRIPTOR = 16
#: Within a volume descriptor: four dates of 17 bytes, and the root folder's record.
_VOLUME_DATES, _VOLUME_DATES_END, _ROOT_RECORD = 813, 881, 156
#: Within a folder's record: where it lies, its date.
_EXTENT, _DATE = 2, 18
_EPOCH = bytes((80, 1, 1, 0, 0, 0, 0))  # 1980-01-01 00:00:00 UTC
_VOLUME_EPOCH = b"1980010100000000\0"
_NO_DATE = b"0000000000000000\0"


def make(cloud_init: CloudInit, *, instance: str, host_name: str) -> bytes:
    """The image. ``instance`` and ``host_name`` make up the meta data where the VM has none of its own."""
    meta_data = cloud_init.meta_data or f"instance-id: {instance}\nlocal-hostname: {host_name}\n"
    files = {"user-data": cloud_init.user_data, "meta-data": meta_data, "network-config": cloud_init.network_config}
    iso = pycdlib.PyCdlib()
    iso.new(interchange_level=3, joliet=3, vol_ident="cidata")
    for name, text in files.items():
        if text:
            data = text.encode()
            iso.add_fp(io.BytesIO(data), len(data), f"/{name.upper().replace('-', '_')}.;1", joliet_path=f"/{name}")
    output = io.BytesIO()
    iso.write_fp(output)
    iso.close()
    return _dated(bytearray(output.getvalue()))


def _dated(image: bytearray) -> bytes:
    """The image with all its dates the same (ECMA-119, 8.4 and 9.1; one sector holds either folder)."""
    for descriptor in _descriptors(image):
        image[descriptor + _VOLUME_DATES : descriptor + _VOLUME_DATES_END] = _VOLUME_EPOCH * 2 + _NO_DATE * 2
        root = descriptor + _ROOT_RECORD
        (folder,) = struct.unpack_from("<I", image, root + _EXTENT)
        for record in (root, *_records(image, folder * _SECTOR)):
            image[record + _DATE : record + _DATE + len(_EPOCH)] = _EPOCH
    return bytes(image)


def _descriptors(image: bytearray) -> Iterator[int]:
    """Where the primary (1) and the Joliet (2) volume descriptor lie; 255 ends the list."""
    place = _FIRST_DESCRIPTOR * _SECTOR
    while image[place] != 255:
        if image[place] in (1, 2):
            yield place
        place += _SECTOR


def _records(image: bytearray, place: int) -> Iterator[int]:
    """Where the records of the folder at ``place`` lie; a length of zero ends them."""
    while image[place] != 0:
        yield place
        place += image[place]
