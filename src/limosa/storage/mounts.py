"""Which mount a file is on, from ``/proc/self/mountinfo`` (proc(5))."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

#: File systems that several hosts use at once and whose inode numbers are the server's, so alike on all of them.
_SHARED = frozenset({"nfs", "nfs4", "cifs", "smb3", "ceph", "fuse.ceph", "fuse.glusterfs", "lustre", "gfs2", "ocfs2"})
#: File systems whose locks do not keep other hosts out as QEMU means them: CIFS makes mandatory ones of them, which get
#: in the way of a move, or with ``nobrl`` sends none.
_WITHOUT_LOCKS = frozenset({"cifs", "smb3", "fuse.smbnetfs"})
_OCTAL = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True)
class Mount:
    """A mount. ``source`` is what was mounted: a server's export, or a local device."""

    kind: str
    source: str

    @property
    def share(self) -> str:
        """What was mounted, for file systems that other hosts may use at the same time; empty for local ones.

        FUSE may be anything, so it counts.
        """
        shared = self.kind in _SHARED or self.kind == "9p" or self.kind.startswith("fuse")
        return f"{self.kind} {self.source}" if shared else ""

    @property
    def has_no_locks(self) -> bool:
        """Whether file locks do not keep other hosts out.

        FUSE that says no more of itself than what it mounted is SMB if that is ``//SERVER/SHARE`` or ``smbnetfs``.
        """
        smb = self.source == "smbnetfs" or self.source.startswith("//")
        return self.kind in _WITHOUT_LOCKS or (self.kind.startswith("fuse") and smb)


def inodes_are_the_servers(share: str) -> bool:
    """Whether inode numbers on a share are the same on all hosts that mounted it."""
    return share.partition(" ")[0] in _SHARED


UNKNOWN = Mount("", "")


def find(device: int) -> Mount:
    """The mount of the file system ``device`` (``st_dev``); :data:`UNKNOWN` if the kernel lists none (btrfs)."""
    wanted = f"{os.major(device)}:{os.minor(device)}"
    return next((mount for number, mount in _table() if number == wanted), UNKNOWN)


def of(path: str) -> Mount:
    """The mount a file is on. Raises ``OSError``."""
    return find(os.stat(path).st_dev)


def name_on_server(path: str) -> str:
    """What a file or folder on a share is called wherever the share is mounted, such as ``nas:/export/vms/web.qcow2``.

    Empty for what lies on no share, and where what was mounted does not name a server. Raises ``OSError``.
    """
    real = os.path.realpath(path)
    device = os.stat(real).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    over = [entry for entry in _shares() if entry.number == number and _is_below(real, entry.point)]
    if not over:
        return ""
    nearest = max(over, key=lambda entry: len(entry.point))
    return _joined(nearest.name, os.path.relpath(real, nearest.point))


def paths_of(name: str) -> list[str]:
    """Where this host's mounts show what has that name on its server; whether it is there was not asked."""
    shown = [entry for entry in _shares() if _is_below(name, entry.name)]
    return [_joined(entry.point, os.path.relpath(name, entry.name)) for entry in shown]


@dataclass(frozen=True)
class _Share:
    """A mount of a share at ``point``. ``name`` is what the server calls the folder that is shown there."""

    number: str
    point: str
    name: str


def _shares() -> list[_Share]:
    found = []
    for number, root, point, mount in _lines():
        if mount.share and (mount.source.startswith("//") or ":" in mount.source):
            found.append(_Share(number, point, _joined(mount.source, root.strip("/") or ".")))
    return found


def _joined(folder: str, below: str) -> str:
    return folder if below == "." else f"{folder.rstrip('/')}/{below}"


def _is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(f"{folder.rstrip('/')}/")


def _table() -> list[tuple[str, Mount]]:
    """Device number and mount of each."""
    return [(number, mount) for number, _, _, mount in _lines()]


def _lines() -> list[tuple[str, str, str, Mount]]:
    """Device number, root, mount point and mount of each line.

    ``36 35 98:0 /root /point rw,noatime master:1 - ext3 /dev/sda1 rw``
    """
    found = []
    for line in Path("/proc/self/mountinfo").read_text("utf-8", "surrogateescape").splitlines():
        head, _, tail = line.partition(" - ")
        fields, (kind, source, *_) = head.split(), [*tail.split(" "), "", ""]
        found.append((fields[2], _plain(fields[3]), _plain(fields[4]), Mount(kind, _plain(source))))
    return found


def _plain(field: str) -> str:
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), field)
