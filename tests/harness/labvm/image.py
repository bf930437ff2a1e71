"""What a lab VM boots: Debian's kernel and an initramfs with the modules, built once and kept.

Nothing is installed for it: the kernel's package is unpacked, and the modules are loaded in order by the initramfs, so
that a VM needs neither ``modprobe`` nor the kernel's own tree of modules.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from limosa.lab.image import BUSYBOX, locked, unpacked_kernel
from limosa.lab.initramfs import Archive, modules_with_dependencies

CACHE = Path("/var/cache/limosa/labvm")
KERNEL_PACKAGE = "linux-image-amd64"
#: The first ones are for the VM itself, the others for what is tested in it.
MODULES = (
    "virtio_pci", "virtio_net", "virtio_console", "9p", "9pnet_virtio", "overlay",
    "loop", "crc32c_generic", "dm_mod", "dm_snapshot", "dm_thin_pool",
    "sch_tbf", "bridge", "8021q", "tun", "bonding", "crc32_generic",
    "team", "team_mode_loadbalance", "team_mode_activebackup",
    "rdma_rxe", "rdma_ucm",
    "cifs", "cmac", "ccm", "gcm", "ctr", "ghash_generic", "sha512_generic", "nfsv4",
)  # fmt: skip
#: Without it loading ``bonding`` makes a bond that nobody asked for.
OPTIONS = {"bonding": "max_bonds=0"}
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Image:
    """What QEMU boots directly."""

    kernel: Path
    initrd: Path


def image() -> Image:
    """The image, built if it is missing: half a minute with a download of 70 MB."""
    folder = CACHE / _digest()
    if not folder.exists():
        with locked(CACHE):
            if not folder.exists():
                _build(folder)
    return Image(folder / "kernel", folder / "initrd")


def _digest() -> str:
    parts = (BUSYBOX.read_bytes(), (HERE / "init").read_bytes(), repr((HERE, MODULES, OPTIONS)).encode())
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:16]


def _build(folder: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=".new-", dir=CACHE) as scratch:
        tree = unpacked_kernel(KERNEL_PACKAGE, Path(scratch))
        new = Path(scratch) / "image"
        new.mkdir()
        (kernel,) = tree.glob("boot/vmlinuz-*")
        shutil.copyfile(kernel, new / "kernel")
        (new / "initrd").write_bytes(_initramfs(tree))
        new.rename(folder)


def _initramfs(tree: Path) -> bytes:
    modules = modules_with_dependencies(tree, MODULES)
    missing = set(MODULES) - set(modules)
    # What the kernel has built in needs no module; what only a module can be has to be there.
    assert not missing & {"bonding", "rdma_rxe", "cifs", "nfsv4", "9p", "overlay"}, missing
    archive = Archive()
    for path in ("bin", "modules"):
        archive.folder(path)
    archive.file("bin/busybox", BUSYBOX.read_bytes(), executable=True)
    archive.file("init", (HERE / "init").read_bytes(), executable=True)
    archive.file("agent", f"{HERE / 'agent.py'}".encode())
    for name, content in modules.items():
        archive.file(f"modules/{name}.ko", content)
    order = [f"{name}.ko {OPTIONS.get(name, '')}".strip() for name in modules]
    archive.file("modules/order", "\n".join(order).encode() + b"\n")
    return archive.finish()
