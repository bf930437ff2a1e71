"""Real Debian guests: Debian's base system with systemd and some services, booted from memory.

The system is what ``debootstrap`` makes of Debian's archive, packed into an initramfs for the kernel of the lab's guest
image. So there is no disk that would have to move along, and all VMs are of one image: what they have in memory is
Debian's programs and libraries, each VM at places of its own. Built once and kept, as the lab's image is.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import zstandard

from benchmarks.guest import DEBIAN, Guest
from limosa.lab.image import KERNEL_PACKAGE, MODULES, GuestImage, locked, unpacked_kernel
from limosa.lab.initramfs import Archive, modules_with_dependencies

CACHE = Path("/var/cache/limosa/debian")
RELEASE = "bookworm"
PACKAGES = ("systemd-sysv", "kmod", "udev", "dbus", "openssh-server", "iproute2", "cron", "rsyslog", "python3-minimal")
#: Not wanted in memory: what only the package manager and readers use.
LEFT_OUT = ("boot", "dev", "proc", "sys", "run", "tmp", "var/cache", "var/lib/apt", "usr/share/doc", "usr/share/man")
FOLDERS = ("dev", "proc", "sys", "run", "tmp", "var/cache", "modules")
#: The system may fill more than half of the memory; and pages that the packed system has left are empty ones, not some
#: that any compressor would be good at.
WORDS = "rootfstype=ramfs init_on_free=1"

INIT = """\
#!/bin/sh
# What an initramfs usually does for a system on a disk; the system is here already.
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
while read -r module; do insmod "/modules/$module"; done </modules/order
chmod 600 /etc/ssh/ssh_host_*_key # the archive knows no such rights
for word in $(cat /proc/cmdline); do
    case $word in
        limosa.name=*) echo "${word#*=}" >/etc/hostname ;;
        limosa.ip=*) ip link set eth0 up && ip address add "${word#*=}" dev eth0 ;;
    esac
done
exec /sbin/init
"""

READY = """\
[Unit]
Description=Say that everything runs
After=multi-user.target
[Service]
Type=oneshot
ExecStart=/bin/sh -c 'echo LIMOSA FILLED >/dev/console'
[Install]
WantedBy=multi-user.target
"""


def debian_guest(name: str, number: int) -> Guest:
    """A guest with the image."""
    return Guest(name, number, load=DEBIAN, image=debian_image(), words=WORDS)


def debian_image(cache: Path = CACHE) -> GuestImage:
    """The image, built if it is missing (two minutes, with a download of 100 MB). Raises if that fails."""
    recipe = "\n".join((RELEASE, *PACKAGES, *LEFT_OUT, *MODULES, INIT, READY))
    folder = cache / hashlib.sha256(recipe.encode()).hexdigest()[:16]
    if not folder.exists():
        with locked(cache):
            if not folder.exists():
                _build(folder)
    return GuestImage(kernel=folder / "kernel", initrd=folder / "initrd")


def _build(folder: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=".new-", dir=folder.parent) as scratch:
        tree = unpacked_kernel(KERNEL_PACKAGE, Path(scratch))
        root, new = Path(scratch) / "root", Path(scratch) / "image"
        new.mkdir()
        (kernel,) = tree.glob("boot/vmlinuz-*")
        shutil.copyfile(kernel, new / "kernel")
        _install(root)
        (new / "initrd").write_bytes(_pack(root, modules_with_dependencies(tree, MODULES)))
        for path in new.iterdir():
            path.chmod(0o644)
        new.chmod(0o755)
        new.rename(folder)


def _install(root: Path) -> None:
    """Debian in a folder. Whatever is mounted and started for that ends with it."""
    apart = ("unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child")
    command = [*apart, "debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", RELEASE, str(root)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "LC_ALL": "C"})
    unit = root / "etc/systemd/system/limosa-ready.service"
    unit.write_text(READY)
    (unit.parent / "multi-user.target.wants" / unit.name).symlink_to(f"/{unit.relative_to(root)}")
    (root / "init").write_text(INIT)
    (root / "init").chmod(0o755)


def _pack(root: Path, modules: dict[str, bytes]) -> bytes:
    """The initramfs. Everything belongs to root."""
    archive = Archive()
    for top, folders, files in os.walk(root):
        at = Path(top).relative_to(root)
        links = [name for name in folders if (Path(top) / name).is_symlink()]
        folders[:] = sorted(name for name in folders if name not in links and str(at / name) not in LEFT_OUT)
        for name in folders:
            archive.folder(str(at / name))
        for name in sorted([*links, *files]):
            _add(archive, Path(top) / name, str(at / name))
    for name in FOLDERS:
        archive.folder(name)
    for name, content in modules.items():
        archive.file(f"modules/{name}.ko", content)
    archive.file("modules/order", "".join(f"{name}.ko\n" for name in modules).encode())
    return zstandard.ZstdCompressor(threads=-1).compress(archive.finish())


def _add(archive: Archive, path: Path, name: str) -> None:
    if path.is_symlink():
        archive.link(name, str(path.readlink()))
    elif path.is_file():
        archive.file(name, path.read_bytes(), executable=os.access(path, os.X_OK) and bool(path.stat().st_mode & 0o100))
