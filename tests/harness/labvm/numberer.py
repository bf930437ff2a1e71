"""A guest that is a boot sector: it numbers its disk, and says each number when its disk has acknowledged it.

It needs no kernel, so it runs at once also where a QEMU is emulated inside an emulated VM. Eighteen times a second it
takes the next number, fills a sector with it and writes that into a ring; then it says the number on its console. So
what the console says is on the disk, whichever disk that is by now.
"""

from __future__ import annotations

import hashlib
import random
import struct
import subprocess
from pathlib import Path

SECTOR = 512
RING_AT, RING = 2048, 64
#: Not a whole number of megabytes, let alone of extents.
SIZE = 24 * 1024 * 1024 + 3 * SECTOR
_AT = 0x7C00
_PACKET, _LBA, _NUMBER, _DRIVE = (_AT + offset for offset in (0x6C, 0x74, 0x7C, 0x80))


def disk() -> bytes:
    """What its disk has before it runs: its code, holes, data up to the last byte."""
    data = bytearray(SIZE)
    data[:SECTOR] = boot_sector()
    chance = random.Random(1)
    for start, count in ((2 << 20, 5 << 20), (15 << 20, 3 << 20), (SIZE - 5000, 5000)):
        data[start : start + count] = chance.randbytes(count)
    return bytes(data)


def write_image(path: Path) -> None:
    """The disk as a qcow2 image."""
    raw = path.with_suffix(".raw")
    raw.write_bytes(disk())
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(path)], check=True)
    raw.unlink()


def boot_sector() -> bytes:
    """The program."""
    code = bytes.fromhex(
        "31c0 8ed8 8ec0 8ed0 bc007c fc fb"  # all segments 0, a stack below the code
        f"8816 {_word(_DRIVE)}"  # the BIOS says in DL what we were booted from
        "f4"  # again: wait for the clock
        f"66ff06 {_word(_NUMBER)} 66a1 {_word(_NUMBER)}"  # the next number
        "bf0080 b98000 66f3ab"  # a sector of it at 8000
        f"6683e0 {RING - 1:02x} 6605 {struct.pack('<I', RING_AT).hex()} 66a3 {_word(_LBA)}"  # its place in the ring
        f"be {_word(_PACKET)} 8a16 {_word(_DRIVE)} b80043 cd13 7223"  # write; failed?
        f"668b1e {_word(_NUMBER)} b90800"  # eight digits:
        "66c1c304 88d8 240f 0430 3c39 7602 0427"  # digit: from the left, 0-9 and a-f
        "baf803 ee e2ea"  # to the serial port
        "b00a ee ebae"  # end the line; again
        "baf803 b021 ee f4 ebfd"  # failed: say '!' and stop
    )
    assert len(code) == _PACKET - _AT
    packet = struct.pack("<BBHHHQ", 16, 0, 1, 0x8000, 0, 0)
    return (code + packet).ljust(SECTOR - 2, b"\0") + b"\x55\xaa"


def _word(address: int) -> str:
    return struct.pack("<H", address).hex()


def digest() -> str:
    """SHA-256 of all of its disk but the ring, hex."""
    data, start, end = disk(), RING_AT * SECTOR, (RING_AT + RING) * SECTOR
    return hashlib.sha256(data[:start] + data[end:]).hexdigest()
