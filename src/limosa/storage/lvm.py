"""LVM by its own program: reports in JSON (lvmreport(7)), one volume made, one removed.

Names are checked before they become arguments, and arguments are never a shell's. Volumes that Limosa makes bear a tag:
who has it is known as ours to whoever looks, also after a restart, and may be given to QEMU's user.

The calls block, so they are made in threads.
"""

from __future__ import annotations

import os
import re
import stat
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from limosa.errors import StorageError
from limosa.model import reading
from limosa.model.base import Model

PROGRAM = "/usr/sbin/lvm"
#: What ``lvs`` shows of the volumes made here.
TAG = "limosa"
#: A descriptor of the daemon's that a child inherits on purpose is none of LVM's concern.
_ENVIRONMENT = {"LC_ALL": "C", "LVM_SUPPRESS_FD_WARNINGS": "1"}
_SHAPE = ("--reportformat", "json", "--units", "b", "--nosuffix", "--config", 'report/time_format="%s"')
_SECTOR = 512
_DEVICES = Path("/sys/dev/block")
_MAPPED = re.compile(r"((?:[^-]|--)+)-((?:[^-]|--)+)")
_VOLUME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_+.-]{0,126}")
T = TypeVar("T", bound=Model)


class Group(Model, frozen=True, forbid_unknown_fields=False):
    """A volume group with one of its devices."""

    vg_size: int
    vg_free: int
    vg_extent_size: int
    #: ``writeable`` or ``read-only``
    vg_permissions: str
    #: not empty if devices of it are missing
    vg_partial: str
    pv_name: str


class Volume(Model, frozen=True, forbid_unknown_fields=False):
    """A logical volume, or a pool of such."""

    lv_name: str
    lv_size: int
    #: when it was made, in seconds since the epoch
    lv_time: int = 0
    #: of a thin volume or pool, how much of it is taken; else empty
    data_percent: str = ""
    #: with commas between; ``thin,pool`` for a thin pool
    lv_layout: str = ""
    #: with commas between; ``public`` alone for one that is on its own: no snapshot, nor the origin of one
    lv_role: str = ""
    lv_tags: str = ""
    #: of a thin pool, ``zero`` if what it gives holds nothing of before
    zero: str = ""
    #: its device while it is active, else -1
    lv_kernel_major: int = -1
    lv_kernel_minor: int = -1
    #: ``open`` if anybody has its device open, whoever it is
    lv_device_open: str = ""

    @property
    def tags(self) -> tuple[str, ...]:
        """What it bears."""
        return tuple(self.lv_tags.split(","))

    @property
    def takes_along(self) -> str:
        """Which volumes LVM removes along with it, in words; empty if none. Thin snapshots of a thin volume stay. The
        roles are those of ``lv_layout_and_role`` (lib/metadata/lv_manip.c)."""
        roles = self.lv_role.split(",")
        if "thickorigin" in roles:
            return "LVM would remove its snapshots, too"
        has_others = "extthinorigin" in roles or "private" in roles
        return "LVM would remove the volumes above or in it, too" if has_others else ""

    @property
    def is_active(self) -> bool:
        """Whether it has a device now."""
        return self.lv_kernel_major >= 0

    @property
    def taken_bytes(self) -> int:
        """What it takes of its group, or pool."""
        return round(self.lv_size * float(self.data_percent) / 100) if self.data_percent else self.lv_size


def group(name: str) -> tuple[Group, ...]:
    """A volume group, once for each of its devices. Raises :class:`StorageError`."""
    return _report("vgs", "vg", Group, name)


def volumes(group_name: str) -> tuple[Volume, ...]:
    """All of the group but what is LVM's own. Raises :class:`StorageError`."""
    return _report("lvs", "lv", Volume, group_name)


def find(group_name: str, name: str) -> Volume | None:
    """A volume of the group, None if it has none of that name. Raises :class:`StorageError`."""
    found = _report("lvs", "lv", Volume, "--select", f'lv_name="{_checked(name)}"', group_name)
    return found[0] if found else None


def create(group_name: str, pool: str, name: str, size_bytes: int, tags: Sequence[str] = ()) -> None:
    """Make a volume of at least that size, durably; in a thin pool if one is named. What it holds is not defined where
    it is not thin. It bears ``tags`` and :data:`TAG` from the beginning. Raises :class:`StorageError`; there is none
    then."""
    marked = [word for tag in (TAG, *tags) for word in ("--addtag", tag)]
    sizes = ["--type", "thin", "--thinpool", pool, "--virtualsize"] if pool else ["--type", "linear", "--size"]
    # A file system or the like that lay there is no reason to ask: its space was free.
    whole = -(-size_bytes // _SECTOR) * _SECTOR  # it refuses other sizes
    _run("lvcreate", "--yes", *marked, "--name", _checked(name), *sizes, f"{whole}b", group_name)


def retag(group_name: str, name: str, old: str, new: str = "") -> None:
    """Take a tag from a volume, durably, and give it a new one instead if one is named: at once, and only if it has the
    old one. Raises :class:`StorageError`."""
    added = ["--addtag", new] if new else []
    having = f'lv_name="{_checked(name)}" && lv_tags={{"{old}"}}'
    _run("lvchange", "--deltag", old, *added, "--select", having, group_name)


def remove(group_name: str, name: str) -> None:
    """Remove a volume, if there is one, and nothing else: not one that others depend on (lvremove(8)). Raises
    :class:`StorageError`; it is still there then."""
    volume = find(group_name, name)
    if volume is None:
        return
    if volume.takes_along:
        todo = "remove those first, or keep the volume"
        raise StorageError(f"/dev/{group_name}/{name} is not removed", why=volume.takes_along, todo=todo)
    _run("lvremove", "--yes", f"{group_name}/{name}")


def is_ours(path: Path, device: int) -> bool:
    """Whether ``/dev/GROUP/VOLUME`` is a volume that Limosa made, and ``device`` (``st_rdev``) is it. Raises
    :class:`StorageError` if that cannot be told."""
    if path.parent.parent != Path("/dev") or not all(_VOLUME.fullmatch(part) for part in path.parts[2:]):
        return False
    volume = find(path.parent.name, path.name)
    if volume is None or TAG not in volume.tags:
        return False
    return (volume.lv_kernel_major, volume.lv_kernel_minor) == (os.major(device), os.minor(device))


def path_of(device: str) -> str:
    """``/dev/GROUP/VOLUME`` of a volume, whichever of its nodes and links is named; empty if it is none that is active.

    The kernel knows it by both names with a hyphen between, and theirs doubled.
    """
    try:
        status = os.stat(device)
        mapped = _DEVICES / f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}" / "dm"
        if not stat.S_ISBLK(status.st_mode) or not (mapped / "uuid").read_text().startswith("LVM-"):
            return ""
        names = _MAPPED.fullmatch((mapped / "name").read_text().rstrip("\n"))
    except OSError:
        return ""
    return "/dev/" + "/".join(name.replace("--", "-") for name in names.groups()) if names else ""


def _checked(name: str) -> str:
    if not _VOLUME.fullmatch(name):
        raise StorageError(f"'{name}' cannot be the name of a logical volume", todo="use letters, digits and _ + . -")
    return name


def _report(command: str, kind: str, cls: type[T], *arguments: str) -> tuple[T, ...]:
    fields = ",".join(cls.__struct_fields__)
    output = _run(command, *_SHAPE, "--options", fields, *arguments)
    try:
        (report,) = reading.decode(output, dict)["report"]
        return tuple(reading.convert(row, cls, strict=False) for row in report[kind])
    except (msgspec.MsgspecError, KeyError, ValueError, TypeError) as error:
        raise StorageError(f"lvm {command} gives an unexpected answer", why=str(error)) from error


def _run(command: str, *arguments: str) -> bytes:
    try:
        done = subprocess.run(
            [PROGRAM, command, *arguments], stdin=subprocess.DEVNULL, capture_output=True, env=_ENVIRONMENT, check=False
        )
    except OSError as error:
        raise StorageError(f"cannot run {PROGRAM}", why=error.strerror or str(error), todo="install lvm2") from error
    if done.returncode != 0:
        words = done.stderr.decode("utf-8", "replace").split("\n")
        why = "; ".join(line.strip().rstrip(".") for line in words if line.strip())
        raise StorageError(f"lvm {command} failed for {arguments[-1]}", why=why)
    return done.stdout
