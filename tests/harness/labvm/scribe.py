"""A guest that writes on its disk without an operating system, for lab VMs, in which Linux would take minutes to boot.

It is a boot sector. It counts; each number goes into one of 16 sectors in turn, three a second, by the firmware's own
driver. Before it overwrites a sector it reads it, and what it finds must be the number it wrote there last. When it is
started it goes on after the largest number on the disk. On its console it says each number as four letters (``A`` is 0,
``P`` is 15), or ``!`` for ever when a number was not what it had to be, or the disk failed.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

SIZE_BYTES = 8 * 1024 * 1024
LOST, SECTORS = "!", 16
_DIGITS = str.maketrans("ABCDEFGHIJKLMNOP", "0123456789abcdef")
_CODE = bytes.fromhex(
    "31c08ed88ec08ed0bc007c"  # all segments 0, the stack below the code
    "8816a47cfb"  # keep the number of the boot disk; interrupts on
    "6631ed31db"  # ebp = the number, bx = the sector
    "b442e85a00"  # scan: read the sector
    "66392e00807605668b2e0080"  # ebp = the larger one
    "4383fb1072e9"  # the next of 16
    "b90600f4e2fd"  # next: wait for six ticks of the clock
    "664589eb83e30f"  # the next number, and its sector
    "b442e83600"  # read that
    "6689e86683e81073036631c0"  # eax = what was written there last, 0 in the first turn
    "66390600807537"  # lost, if it is another
    "66892e0080b443e81900"  # write the number
    "baf803b9040089ebc1c30488d8240f0441eee2f4b00aee"  # say it on the serial port
    "ebb8"  # and so on
    "be947c8d7f08897c088a16a47cb000cd137201c3"  # disk: int 13h with the packet below, for sector 8 + bx
    "baf803b021eef4ebf7"  # lost: '!', wait, again
    "8d7400"  # fills up to the packet
    "10000100008000000000000000000000"  # the packet: one sector, at 0000:8000
)


def write_image(path: Path, owner: tuple[int, int]) -> None:
    """Make a qcow2 image the guest boots from, of that user and group."""
    raw = path.with_suffix(".boot")
    raw.write_bytes(_CODE.ljust(510, b"\0") + b"\x55\xaa")
    with raw.open("r+b") as stream:
        stream.truncate(SIZE_BYTES)
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(path)], check=True)
    raw.unlink()
    os.chown(path, *owner)


def number(said: str) -> int | None:
    """The last number in what the guest has said."""
    numbers = re.findall(r"^[A-P]{4}$", said.rpartition("\n")[0], re.MULTILINE)
    return int(numbers[-1].translate(_DIGITS), 16) if numbers else None
