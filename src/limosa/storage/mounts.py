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
_CIFS = frozenset({"cifs", "smb3"})
#: Shared ones whose locks, as QEMU takes them, are known to keep other hosts out. The kernel keeps locks on one host
#: for FUSE that has none, such as sshfs, for 9P unless it is told otherwise, and for OCFS2 with its own cluster stack.
_LOCKS_REACH = frozenset({"nfs", "nfs4", "ceph", "fuse.ceph", "fuse.glusterfs", "lustre", "gfs2"})
#: How Lustre and GFS2 say that locks are kept on this host.
_FLOCKED_HERE = frozenset({"localflock", "localflocks"})
#: How NFS says that the locks QEMU takes are kept on this host (nfs(5); ``nolock`` is shown so, too).
_LOCKED_HERE = frozenset({"local_lock=all", "local_lock=posix"})
_OCTAL = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True)
class Mount:
    """A mount. ``source`` is what was mounted: a server's export, or a local device; ``options`` are the file system's
    own."""

    kind: str
    source: str
    options: frozenset[str] = frozenset()

    @property
    def share(self) -> str:
        """What was mounted, for file systems that other hosts may use at the same time; empty for local ones.

        FUSE may be anything, so it counts. CIFS that numbers inodes itself is another kind.
        """
        shared = self.kind in _SHARED or self.kind == "9p" or self.kind.startswith("fuse")
        own_numbers = self.kind in _CIFS and "serverino" not in self.options
        return f"{self.kind}{'-noserverino' if own_numbers else ''} {self.source}" if shared else ""

    @property
    def has_no_locks(self) -> bool:
        """Whether file locks do not keep other hosts out, and QEMU is to take none.

        FUSE that says no more of itself than what it mounted is SMB if that is ``//SERVER/SHARE`` or ``smbnetfs``.
        """
        smb = self.source == "smbnetfs" or self.source.startswith("//")
        if self.kind.startswith("nfs"):
            return bool(self.options & _LOCKED_HERE)
        return self.kind in _WITHOUT_LOCKS or (self.kind.startswith("fuse") and smb)

    @property
    def locks_may_end_here(self) -> bool:
        """Whether other hosts may use the file system, and it is not known that file locks keep them out."""
        known = self.kind in _LOCKS_REACH and not self.options & _FLOCKED_HERE
        return self.has_no_locks or (self.share != "" and not known)

    @property
    def locks_are_mandatory(self) -> bool:
        """Whether what is locked cannot be written, not even by who has locked it for reading, as QEMU does."""
        return self.kind in _CIFS and "nobrl" not in self.options


def inodes_are_the_servers(share: str) -> bool:
    """Whether inode numbers on a share are the same on all hosts that mounted it."""
    return share.partition(" ")[0] in _SHARED


def protocol(share: str) -> str:
    """The kind of a share, the same for all versions of one protocol; empty for local storage."""
    kind = share.partition(" ")[0]
    return {"nfs4": "nfs", "smb3": "cifs"}.get(kind, kind)


UNKNOWN = Mount("", "")


def find(device: int) -> Mount:
    """The mount of the file system ``device`` (``st_dev``); :data:`UNKNOWN` if the kernel lists none (btrfs)."""
    wanted = f"{os.major(device)}:{os.minor(device)}"
    return next((mount for number, mount in _table() if number == wanted), UNKNOWN)


def of(path: str) -> Mount:
    """The mount a file is on. Raises ``OSError``."""
    return find(os.stat(path).st_dev)


def points() -> frozenset[str]:
    """Folders at which something is mounted."""
    return frozenset(point for _, _, point, _ in _lines())


def device_at(path: str) -> str:
    """The number of the file system a path without links leads to, by its name alone: no file system is asked."""
    over = [(len(point), at, number) for at, (number, _, point, _) in enumerate(_lines()) if _is_below(path, point)]
    return max(over)[2] if over else ""


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
        fields, (kind, source, options, *_) = head.split(), [*tail.split(" "), "", "", ""]
        mount = Mount(kind, _plain(source), frozenset(options.split(",")))
        found.append((fields[2], _plain(fields[3]), _plain(fields[4]), mount))
    return found


def _plain(field: str) -> str:
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), field)
