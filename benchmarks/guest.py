"""The guest that is moved: the same kernel, memory, load and devices whichever system moves it."""

from __future__ import annotations

from dataclasses import dataclass

from limosa.lab.image import command_line, guest_image
from limosa.lab.plan import FIRST_GUEST_ADDRESS

FILLED = b"LIMOSA FILLED"
BOOT_WITHIN_S = 180.0

_NETWORK, _FIRST = FIRST_GUEST_ADDRESS.rsplit(".", 1)


@dataclass(frozen=True)
class Load:
    """What a guest does with its memory."""

    memory_mib: int
    fill_mib: int
    random_mib: int
    rewrite_mib_per_s: int


#: One third of what is filled cannot be compressed, and is what is rewritten.
BUSY = Load(memory_mib=1024, fill_mib=600, random_mib=200, rewrite_mib_per_s=20)
IDLE = Load(memory_mib=512, fill_mib=128, random_mib=43, rewrite_mib_per_s=0)


@dataclass(frozen=True)
class Guest:
    """A guest of the lab, on its LAN. ``number`` (from 0) sets it apart from the others."""

    name: str
    number: int
    load: Load = BUSY
    #: QEMU's versioned machine type and CPU in Limosa's words; Limosa chooses them, the others follow
    machine: str = ""
    cpu: str = ""

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
        return str(guest_image().kernel)

    @property
    def initrd(self) -> str:
        """The initramfs's file."""
        return str(guest_image().initrd)

    @property
    def command_line(self) -> str:
        """The kernel's command line, which says what the guest does."""
        return command_line(
            name=self.name,
            address=f"{self.address}/24",
            fill_mib=self.load.fill_mib,
            random_mib=self.load.random_mib,
            rewrite_mib_per_s=self.load.rewrite_mib_per_s,
        )
