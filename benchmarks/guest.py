"""The guest that is moved: the same kernel, memory, load and devices whichever system moves it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from limosa.lab.image import GuestImage, command_line, guest_image
from limosa.lab.plan import FIRST_GUEST_ADDRESS

#: Long, because many may boot at once where processors are few.
BOOT_WITHIN_S = 600.0

_NETWORK, _FIRST = FIRST_GUEST_ADDRESS.rsplit(".", 1)


@dataclass(frozen=True)
class Load:
    """What a guest does with its memory, and with its disk if it has one."""

    memory_mib: int
    fill_mib: int
    random_mib: int
    rewrite_mib_per_s: int = 0
    write_mib_per_s: int = 0


#: One third of what is filled cannot be compressed, and is what is rewritten.
BUSY = Load(memory_mib=1024, fill_mib=600, random_mib=200, rewrite_mib_per_s=20)
IDLE = Load(memory_mib=512, fill_mib=128, random_mib=43)
#: So little memory that a move is one of its disk.
WRITING = Load(memory_mib=256, fill_mib=32, random_mib=16, write_mib_per_s=5)
#: Of the image of Debian, which loads itself.
DEBIAN = Load(memory_mib=512, fill_mib=0, random_mib=0)


@dataclass(frozen=True)
class Guest:
    """A guest of the lab, on its LAN. ``number`` (from 0) sets it apart from the others."""

    name: str
    number: int
    load: Load = BUSY
    #: QEMU's versioned machine type and CPU in Limosa's words; Limosa chooses them, the others follow
    machine: str = ""
    cpu: str = ""
    #: what its disk holds at first; each system keeps a copy of its own
    disk: Path | None = None
    #: what it boots; the lab's own image if there is none
    image: GuestImage | None = None
    #: further words for its kernel
    words: str = ""

    @property
    def address(self) -> str:
        """Its address on the LAN."""
        return f"{_NETWORK}.{int(_FIRST) + self.number}"

    @property
    def mac(self) -> str:
        """Its NIC's address."""
        return f"52:54:00:be:ac:{self.number:02x}"

    @property
    def kernel(self) -> str:
        """The kernel's file."""
        return str((self.image or guest_image()).kernel)

    @property
    def initrd(self) -> str:
        """The initramfs's file."""
        return str((self.image or guest_image()).initrd)

    @property
    def loaded(self) -> bytes:
        """What it says on its console when it does what it is to do."""
        return b"LIMOSA WRITES" if self.load.write_mib_per_s else b"LIMOSA FILLED"

    @property
    def command_line(self) -> str:
        """The kernel's command line, which says what the guest does."""
        line = command_line(
            name=self.name,
            address=f"{self.address}/24",
            fill_mib=self.load.fill_mib,
            random_mib=self.load.random_mib,
            rewrite_mib_per_s=self.load.rewrite_mib_per_s,
            disk="vda" if self.disk is not None else "",
            write_mib_per_s=self.load.write_mib_per_s,
        )
        return f"{line} {self.words}".rstrip()
