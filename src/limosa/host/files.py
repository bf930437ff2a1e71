"""Where a host keeps its things.

::

    <state_dir>/settings.toml              the settings page
                vms/NAME/vm.toml           a VM that belongs to this host
                         process.json      its QEMU, while one runs
                         console.log  seed.iso  nvram.fd  qemu.log  qemu-disks.log
                migrations/ID.SIDE.jsonl   journals, and beside them ID.view.json: those that ended, or wait
                goodput.json               how fast networks were
                machine-id                 what tells this machine from others, if /etc/machine-id does not
                images/                    disk images: the location every host has
                lock                       held by the daemon as long as it lives
    <run_dir>/api.sock                     the API for people on the host
              vm/ID/                       sockets and stream credentials of a VM's QEMU

A folder below ``vms`` without ``vm.toml`` belongs to a VM that is landing, or was given up.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from limosa.errors import Conflict, StateError
from limosa.model import reading
from limosa.model.vm import VmConfig
from limosa.settings import toml

_MACHINE_ID = Path("/etc/machine-id")


@dataclass(frozen=True)
class Files:
    """The folders of one host."""

    state: Path
    run: Path

    @property
    def settings(self) -> Path:
        """The settings page."""
        return self.state / "settings.toml"

    @property
    def vms(self) -> Path:
        """One folder a VM."""
        return self.state / "vms"

    @property
    def migrations(self) -> Path:
        """Journals."""
        return self.state / "migrations"

    @property
    def goodput(self) -> Path:
        """How fast networks were."""
        return self.state / "goodput.json"

    @property
    def images(self) -> Path:
        """Disk images, of the location that every host has."""
        return self.state / "images"

    @property
    def own(self) -> tuple[Path, ...]:
        """What is the daemon's alone: all but images, of which QEMU's user may have some."""
        alone = (self.settings, self.goodput, self._machine_id, self._lock)
        return (*alone, self.vms, self.migrations, self.run)

    @property
    def _machine_id(self) -> Path:
        return self.state / "machine-id"

    @property
    def _lock(self) -> Path:
        return self.state / "lock"

    @property
    def socket(self) -> Path:
        """The API's Unix socket."""
        return self.run / "api.sock"

    def vm(self, name: str) -> Path:
        """The folder of a VM."""
        return self.vms / name

    def process_record(self, name: str) -> Path:
        """What tells of the QEMU of a VM, while one runs (:mod:`limosa.host.process_records`)."""
        return self.vm(name) / "process.json"

    def sockets(self, config: VmConfig) -> Path:
        """The folder of a VM's sockets; short, because a Unix socket's path is.

        A QEMU that was started when half of its UUID named the folder keeps that for its life.
        """
        folder = self.run / "vm" / config.uuid.replace("-", "")
        half = folder.with_name(folder.name[:16])
        return half if half.exists() and self._is_used_by(config, half) else folder

    def _is_used_by(self, config: VmConfig, sockets: Path) -> bool:
        """Whether the QEMU in the VM's record was started with that folder. Another VM's UUID may begin alike."""
        try:
            pid = reading.decode(self.process_record(config.name).read_bytes(), dict)["pid"]
            return os.fsencode(f"{sockets}/") in Path(f"/proc/{pid}/cmdline").read_bytes()
        except (OSError, ValueError, TypeError, LookupError):
            return False

    def make(self) -> None:
        """Create the folders, for the daemon's eyes only (QEMU's user may pass through). Raises :class:`StateError`."""
        try:
            for folder in (self.state, self.run, self.run / "vm", self.vms, self.images):
                passable(folder)
            self.migrations.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise StateError(f"cannot make {error.filename}", why=error.strerror or str(error)) from error

    def claim(self) -> None:
        """Make this process the one daemon of the state folder until it ends, however it ends.

        Raises :class:`Conflict` if there is another: two daemons would command the same QEMUs.
        """
        path = self._lock
        try:
            # Never closed by us: the lock is the descriptor's, and the kernel closes that.
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise Conflict(
                f"another daemon uses {self.state}", todo="stop it first, or give this one a state_dir of its own"
            ) from error
        except OSError as error:
            raise StateError(f"cannot lock {path}", why=error.strerror or str(error)) from error

    def machine(self) -> str:
        """What tells this machine from others, by machine-id(5), or by a number in the state folder where that is
        missing. Others may read it, so it is worked out from that number, and is not it. Raises :class:`StateError`."""
        own = self._machine_id
        try:
            known = next((path.read_text() for path in (_MACHINE_ID, own) if path.exists() and path.stat().st_size), "")
            if not known:
                known = secrets.token_hex(16)
                toml.write_atomically(own, known.encode())
        except (OSError, UnicodeDecodeError) as error:
            name = error.filename if isinstance(error, OSError) else f"{_MACHINE_ID} or {own}"
            raise StateError(f"cannot read {name}", why=toml.why_unreadable(error)) from error
        return hashlib.sha256(f"limosa {known.strip()}".encode()).hexdigest()[:32]


def passable(folder: Path) -> None:
    """Make a folder that QEMU's user may pass through but not list. Raises ``OSError``."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o711)  # the daemon's umask would take the bits away
