"""libvirt from Debian, run beside the system's own: unpacked, not installed, with everything it writes in a place of
its own.

Installing Debian's daemon packages would enable and start half a dozen services that stay. So only the client
(``virsh`` and the libraries) is installed, by ``scripts/setup --benchmark``; the daemon's packages of the same version
are downloaded from the same archive and unpacked into a cache, and ``libvirtd.sh`` runs the daemon in a mount namespace
in which all folders it writes to are empty and its own.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from benchmarks.ground import HOSTS, Ground, run

CACHE = Path("/var/cache/limosa/libvirt")
PACKAGES = ("libvirt-daemon", "libvirt-daemon-driver-qemu")
SCRIPT = Path(__file__).with_name("libvirtd.sh")
READY_WITHIN_S = 60.0
#: Where a daemon sees its images: under the same path on all hosts, and on each they are others.
IMAGES = "/var/lib/libvirt/images"


def version(package: str = "libvirt-clients") -> str:
    """The version of a Debian package that is installed."""
    return run(["dpkg-query", "-W", "-f", "${Version}", package])[0]


def unpacked() -> Path:
    """The folder with the daemon of that version, unpacked if it is missing."""
    folder = CACHE / re.sub(r"[^A-Za-z0-9.+~-]", "_", version())
    if not folder.exists():
        CACHE.mkdir(mode=0o755, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".new-", dir=CACHE) as scratch:
            tree = Path(scratch) / "tree"
            _unpack(Path(scratch), tree)
            tree.chmod(0o755)
            tree.rename(folder)
    return folder


def _unpack(scratch: Path, tree: Path) -> None:
    packages = [f"{name}={version()}" for name in PACKAGES]
    subprocess.run(
        ["apt-get", "download", "-o", "APT::Sandbox::User=root", *packages],
        cwd=scratch,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    for package in scratch.glob("*.deb"):
        run(["dpkg-deb", "-x", str(package), str(tree)])


class Daemon:
    """A libvirt daemon on a host of the lab. It ends with the lab."""

    def __init__(self, ground: Ground, host: str, group: str) -> None:
        folder = ground.folder / f"libvirt-{host}"
        #: the folder it sees as :data:`IMAGES`
        self.images = folder / "images"
        self.images.mkdir(parents=True)
        names = [f"{ground.lab.address(name)} {name}" for name in HOSTS]
        (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *names, ""]))
        number = HOSTS.index(host) + 1
        command = ["unshare", "--mount", "--uts", "--propagation", "private"]
        command += [shutil.which("bash") or "bash", str(SCRIPT), str(unpacked()), str(folder), host]
        command += [
            ground.lab.address(host),
            ground.migration_address(host),
            f"{number:08}-0000-4000-8000-{number:012}",
        ]
        self.log = folder / "log"
        # Every program in between replaces itself by the next one, so this is the daemon's own process.
        self._process = ground.spawn(host, group, command, self.log)
        self._wait()

    def command(self, *words: str) -> list[str]:
        """A ``virsh`` command on this host, as its administrator would run it there."""
        return ["nsenter", "--target", str(self._process.pid), "--mount", "--net", "--uts", "virsh", *words]

    def _wait(self) -> None:
        deadline = time.monotonic() + READY_WITHIN_S
        while True:
            try:
                run(self.command("version"))
                return
            except RuntimeError as error:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"libvirtd does not serve: {self.log.read_text()}") from error
                time.sleep(0.2)
