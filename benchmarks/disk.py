"""The disk of the guests whose storage moves: 8 GiB, of which 2 GiB are used, one half random and one half like logs.

Random and compressible pieces take turns, as in a file system, so that a stream of it is neither first one and then the
other. What the guest writes (64 MiB, see ``lab.image.command_line``) lies in what is used, so the disk does not grow.
"""

from __future__ import annotations

import os
import random
import shutil
import string
from pathlib import Path

from benchmarks.ground import run
from limosa.model.units import MIB

SIZE_MIB, USED_MIB, PIECE_MIB = 8192, 2048, 8
#: What an overlay has of its own: more than the guest writes, and in the same place.
OVERLAY_MIB = 256

_WORDS = ("accepted", "closed", "connection", "queue", "request", "session", "timeout", "worker")
_ALPHABET = (string.ascii_letters + string.digits).encode()
_LEVELS = ("DEBUG", "INFO", "WARNING")


def make(folder: Path) -> Path:
    """A new qcow2 image."""
    raw, image = folder / "disk.raw", folder / "disk.qcow2"
    size = PIECE_MIB * MIB
    text = text_like(size)
    with raw.open("wb") as file:
        for piece in range(USED_MIB // PIECE_MIB):
            file.write(enciphered(text, piece) if piece % 2 else os.urandom(size))
        file.truncate(SIZE_MIB * MIB)
    run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(image)])
    raw.unlink()
    return image


def make_overlay(image: Path, base: Path) -> None:
    """An image above ``base``, with random contents of its own."""
    create(image, base)
    own = image.with_name(f"{image.name}.own")
    own.write_bytes(os.urandom(OVERLAY_MIB * MIB))
    run(["qemu-io", "-f", "qcow2", "-c", f"write -q -s {own} 0 {OVERLAY_MIB}M", str(image)])
    own.unlink()


def create(image: Path, base: Path | None = None) -> None:
    """An empty image."""
    below = ["-b", str(base), "-F", "qcow2"] if base is not None else []
    run(["qemu-img", "create", "-q", "-f", "qcow2", *below, str(image), f"{SIZE_MIB}M"])


def copy(image: Path, to: Path) -> None:
    """The same image again."""
    shutil.copyfile(image, to)


def allocated(image: Path) -> int:
    """Bytes it takes on its storage."""
    return image.stat().st_blocks * 512


def text_like(size: int) -> bytes:
    """So many bytes of a log, the same each time."""
    chance = random.Random(1)
    text = bytearray()
    number = 1_700_000_000
    while len(text) < size:
        number += 1
        words = " ".join(chance.choices(_WORDS, k=5))
        text += f"{number} {chance.choice(_LEVELS)} {words} {chance.getrandbits(32):08x}\n".encode()
    return bytes(text[:size])


def enciphered(text: bytes, key: int) -> bytes:
    """The text in another alphabet, which compresses as well, but is no repetition a compressor could find."""
    chance = random.Random(key)
    return text.translate(bytes.maketrans(_ALPHABET, bytes(chance.sample(_ALPHABET, len(_ALPHABET)))))
