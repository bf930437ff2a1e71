"""The lab's guest image: a Debian cloud kernel and an initramfs of busybox, built once and kept.

The kernel comes from Debian's own archive with ``apt-get download`` and is unpacked, not installed. The initramfs has
busybox, the virtio modules and ``guest/init``; it boots in a few seconds also where QEMU emulates the processor. The
guest serves HTTP on port 80 (``/``: a page with its name, uptime and a counter; ``/ok``: two bytes from memory), echoes
on TCP port 7, answers pings, and has a shell on the serial console, where it says ``LIMOSA READY`` when the network
serves, ``LIMOSA FILLED`` when its memory is loaded, ``LIMOSA REWRITES`` when it begins to rewrite that, ``LIMOSA
WRITES`` when it begins to load its disk, and ``LIMOSA LOST`` when a file on it is not what it was. The power button
turns it off.

An image lies in a folder named after the recipe's digest and appears there in one step, so that two builders do no harm
and a new release of Limosa builds its own::

    /var/cache/limosa/guest/lock
    /var/cache/limosa/guest/DIGEST/kernel, initrd      0644 in folders 0755: QEMU runs unprivileged
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import ipaddress
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from limosa.errors import InvalidInput, NotFound, StateError
from limosa.lab.initramfs import Archive, modules_with_dependencies
from limosa.model.base import is_name

CACHE = Path("/var/cache/limosa/guest")
KERNEL_PACKAGE = "linux-image-cloud-amd64"
BUSYBOX = Path("/bin/busybox")
MODULES = ("virtio_pci", "virtio_net", "virtio_blk", "virtio_scsi", "virtio_rng", "virtio_balloon", "button", "evdev")
#: Loaded only by a guest that keeps files.
FILE_SYSTEM = ("ext4",)
FOLDERS = ("bin", "dev", "etc", "etc/acpi", "etc/acpi/PWRF", "modules", "proc", "run", "sys", "www", "www/cgi-bin")
GUEST_FILES = {
    "init": "init",
    "www/ok": "ok",
    "www/cgi-bin/index.cgi": "index.cgi",
    "etc/acpi/PWRF/00000080": "power-button",
}


@dataclass(frozen=True)
class GuestImage:
    """What a VM needs to boot directly; both files are readable by everybody."""

    kernel: Path
    initrd: Path


def command_line(
    *,
    name: str = "guest",
    address: str = "",
    gateway: str = "",
    fill_mib: int = 0,
    random_mib: int = 0,
    rewrite_mib_per_s: int = 0,
    disk: str = "",
    write_mib_per_s: int = 0,
    files: str = "",
) -> str:
    """The kernel command line of a guest.

    ``address`` (``10.77.0.101/24``) is given to its network card. ``fill_mib`` of its memory are filled, of which
    ``random_mib`` cannot be compressed and the rest can; of the random part ``rewrite_mib_per_s`` are overwritten
    evenly, with other content each time. On ``disk`` (``vda``) a number is written ten times a second, each durable
    before the next, into the first 2048 blocks of 4 KiB in turn; the 64 MiB that follow are overwritten evenly with
    ``write_mib_per_s`` of random bytes, past the guest's cache. On ``files``, another one with an ext4 file system, it
    keeps the last 64 files of those it writes one after another, each durable before the next, named by its number and
    SHA-256 (``7.e3b0...``); it reads them again from the disk, and goes on after them when it starts. Its page says the
    last number. Raises :class:`InvalidInput`.
    """
    _check(is_name(name), "name", name)
    _check(disk == "" or re.fullmatch(r"[a-z]{2,8}", disk) is not None, "disk", disk)
    _check(files == "" or (re.fullmatch(r"[a-z]{2,8}", files) is not None and disk == ""), "files", files)
    _check(0 <= random_mib <= fill_mib, "random_mib", f"{random_mib} of {fill_mib}")
    # A step is one twentieth of a second's writing and must fit both the random part and the pool it copies from.
    _check(0 <= rewrite_mib_per_s <= min(200, 20 * random_mib), "rewrite_mib_per_s", str(rewrite_mib_per_s))
    # A step is one tenth of a second's writing and must fit the pool it copies from.
    _check(0 <= write_mib_per_s <= (100 if disk else 0), "write_mib_per_s", str(write_mib_per_s))
    try:
        words = {
            "name": name,
            "ip": address and str(ipaddress.ip_interface(address)),
            "gw": gateway and str(ipaddress.ip_address(gateway)),
            "fill_mib": fill_mib,
            "random_mib": random_mib,
            "rewrite_mib_s": rewrite_mib_per_s,
            "disk": disk,
            "write_mib_s": write_mib_per_s,
            "files": files,
        }
    except ValueError as fault:
        raise InvalidInput("the guest's address is not valid", why=str(fault)) from fault
    kernel = ["console=ttyS0", "quiet", "mitigations=off", "random.trust_cpu=on", "no_timer_check", "panic=-1"]
    return " ".join(kernel + [f"limosa.{word}={value}" for word, value in words.items() if value])


def guest_image(cache: Path = CACHE) -> GuestImage:
    """The image, built if it is missing (some ten seconds with a download of 30 MB).

    Safe when several processes call it. Raises :class:`NotFound` (kernel package or busybox) and :class:`StateError`;
    nothing half-made is left.
    """
    folder = cache / recipe_digest()
    image = GuestImage(kernel=folder / "kernel", initrd=folder / "initrd")
    if not folder.exists():
        with locked(cache):
            if not folder.exists():
                _build(folder)
    return image


@functools.cache
def recipe_digest() -> str:
    """What an image of this Limosa on this machine is made from, as 16 hexadecimal digits."""
    if not BUSYBOX.exists():
        raise NotFound(f"there is no {BUSYBOX}", todo="install Debian's package busybox-static")
    digest = hashlib.sha256()
    for part in (
        BUSYBOX.read_bytes(),
        *(_guest_file(name) for name in GUEST_FILES.values()),
        *map(str.encode, (*MODULES, "", *FILE_SYSTEM)),
    ):
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:16]


def _build(folder: Path) -> None:
    """Make ``folder``, all at once."""
    with tempfile.TemporaryDirectory(prefix=".new-", dir=folder.parent) as scratch:
        tree = unpacked_kernel(KERNEL_PACKAGE, Path(scratch))
        new = Path(scratch) / "image"
        new.mkdir()
        shutil.copyfile(_only(tree.glob("boot/vmlinuz-*")), new / "kernel")
        (new / "initrd").write_bytes(pack_initramfs(tree))
        for path in new.iterdir():
            path.chmod(0o644)
        new.chmod(0o755)
        new.rename(folder)


def unpacked_kernel(package: str, scratch: Path) -> Path:
    """The files of Debian's current kernel of that kind, below ``scratch``."""
    # The meta package has nothing but a dependency on the current kernel's package.
    record = _run(["apt-cache", "show", "--no-all-versions", package], scratch)
    match = re.search(r"^Depends: (linux-image-[a-z0-9.+-]+)", record, re.MULTILINE)
    if match is None:
        raise NotFound(f"Debian's package {package} is not known", todo="run 'apt-get update' as root")
    _run(["apt-get", "download", "-o", "APT::Sandbox::User=root", match[1]], scratch)
    _run(["dpkg-deb", "-x", str(_only(scratch.glob("linux-image-*.deb"))), "tree"], scratch)
    return scratch / "tree"


def pack_initramfs(tree: Path) -> bytes:
    """The initramfs for the kernel whose package was unpacked into ``tree``."""
    modules = modules_with_dependencies(tree, MODULES)
    later = {
        name: module for name, module in modules_with_dependencies(tree, FILE_SYSTEM).items() if name not in modules
    }
    archive = Archive()
    for folder in FOLDERS:
        archive.folder(folder)
    archive.file("bin/busybox", BUSYBOX.read_bytes(), executable=True)
    archive.link("bin/sh", "busybox")
    for path, name in GUEST_FILES.items():
        archive.file(path, _guest_file(name), executable=path != "www/ok")
    for order, of_it in (("order", modules), ("file-system", later)):
        for name, content in of_it.items():
            archive.file(f"modules/{name}.ko", content)
        archive.file(f"modules/{order}", "".join(f"{name}.ko\n" for name in of_it).encode())
    return archive.finish()


def _guest_file(name: str) -> bytes:
    return files("limosa.lab").joinpath("guest", name).read_bytes()


def _run(command: Sequence[str], folder: Path) -> str:
    """Output of a Debian tool. Raises :class:`StateError` with the last line it said."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=_plain_environment())
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise StateError(
            f"'{command[0]}' failed while building the lab's guest image",
            why=said[-1],
            todo="check that the machine reaches its Debian mirror and that 'apt-get update' works",
        )
    return done.stdout


def _plain_environment() -> dict[str, str]:
    return {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}


def _only(found: Iterator[Path]) -> Path:
    paths = list(found)
    if len(paths) != 1:
        raise StateError(
            "Debian's kernel package is not built as expected", why=f"{len(paths)} files where one was due"
        )
    return paths[0]


@contextmanager
def locked(cache: Path) -> Iterator[None]:
    """Be the only builder in a cache, which is made if it is missing."""
    try:
        cache.mkdir(mode=0o755, parents=True, exist_ok=True)
        lock = (cache / "lock").open("w")
    except OSError as fault:
        raise StateError(f"cannot write to {cache}", why=fault.strerror or str(fault), todo="run it as root") from fault
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _check(valid: bool, what: str, value: str) -> None:
    if not valid:
        raise InvalidInput(f"{what} of the guest is not valid", why=f"'{value[:80]}' is out of range")
