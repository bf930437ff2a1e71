"""Do two hosts mean the same file by a path?

A move over shared storage copies no disk, so a wrong *yes* would run the guest on another disk, and a wrong *no* would
refuse a move that works. :func:`identify` gathers what there is to know on one host, :func:`same_file` judges.
"""

from __future__ import annotations

import functools
import hashlib
import os
import stat
import time
from pathlib import Path, PurePosixPath

from limosa.errors import StorageError
from limosa.model.facts import FileIdentity
from limosa.storage import access, leases, mounts
from limosa.storage.locations import innermost

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
#: Kernels and initrds; a digest of something larger would delay the move for longer than it is worth.
_DIGEST_MAX_BYTES = 1024 * 1024 * 1024


def same_file(one: FileIdentity, other: FileIdentity) -> bool:
    """Whether both are the same file, or copies alike bit by bit where both carry a digest.

    The strongest rule that applies decides:

    0. *A host's own folder* is nobody else's, also where others see it because they are hosts of one machine.
    1. *One kernel* (the boot id is random and new at each start; hosts are namespaces of it): same file system and
       inode are the same file.
    2. *A share*, mounted from the same server and path by both, or the file has one name on that server, because one
       of them mounted a folder further down: where inode numbers are the server's, they decide.
    3. *The same contents*: for files that are only read at start, such as kernels, a copy is as good.
    4. *A shared location* that administrators of both hosts gave the same name, with the same path below it. Their
       word, not a proof; therefore not against rule 1: on one kernel two inodes of local storage are two files. And
       what the hosts see must bear it out (:func:`_bears_out`), by something that stays as it is while the file is
       written: never by the size or times of an image.
    """
    if one.private or other.private:
        return False
    if one.machine == other.machine and (one.device, one.inode) == (other.device, other.inode):
        return True
    numbered = mounts.inodes_are_the_servers(one.share) and mounts.inodes_are_the_servers(other.share)
    if numbered and (one.share == other.share or (one.on_server != "" and one.on_server == other.on_server)):
        return one.inode == other.inode
    if one.digest and other.digest:
        return one.digest == other.digest
    if one.machine == other.machine and not (one.share and other.share):
        return False
    named = (one.location, one.location_path)
    return one.location != "" and named == (other.location, other.location_path) and _bears_out(one, other)


def _bears_out(one: FileIdentity, other: FileIdentity) -> bool:
    """Whether what both hosts see agrees with the word that it is one file.

    Inodes decide where neither host makes them up. Else a lease does: the other host can only have read it on the same
    storage. Without one the word is all there is; but file systems of two kinds are two, since the share may not be
    mounted on one of the hosts, and its place holds something else.
    """
    protocols = {mounts.protocol(one.share), mounts.protocol(other.share)}
    alike = len(protocols) == 1
    # A server of NFS gives the inodes of its own file system.
    if protocols <= {"", "nfs"} or (alike and mounts.inodes_are_the_servers(one.share)):
        if one.device_bytes or other.device_bytes:
            return one.device_bytes == other.device_bytes
        return one.inode == other.inode
    if one.holder or other.holder:
        return one.holder == other.holder
    return alike


def identify(
    path: str, locations: dict[str, str], *, digest: bool, user: str | None = None, own: str = "", below: str = ""
) -> FileIdentity | None:
    """What is to know about the file on this host, or None if it is not there, or it or its lease cannot be read.

    ``locations`` are the paths of the host's shared ones by name; ``digest`` asks for one over the contents;
    ``writable`` is as ``user`` (None: we ourselves) finds it; ``own`` is the folder that is this host's alone,
    ``below`` the disk the file lies below.
    """
    try:
        # Opening first makes a network file system ask its server, so that what it says is not old.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        status = os.fstat(descriptor)
        device_bytes = os.lseek(descriptor, 0, os.SEEK_END) if stat.S_ISBLK(status.st_mode) else 0
        contents = _digest(path, *version(status)) if digest and _is_small_file(status) else ""
        mount = mounts.find(status.st_dev)
        location, location_path = innermost(path, locations)
        holder = _holder(path, mount) if location else ""
        named = mounts.name_on_server(path) if mount.share else ""
    except (OSError, StorageError):
        return None
    finally:
        os.close(descriptor)
    return FileIdentity(
        path=path,
        machine=_BOOT_ID.read_text().strip(),
        device=status.st_dev,
        inode=status.st_ino,
        device_bytes=device_bytes,
        holder=holder,
        share=mount.share,
        on_server=f"{mount.share.partition(' ')[0]} {named}" if named else "",
        location=location,
        location_path=location_path,
        digest=contents,
        writable=access.may(Path(path), user, write=True),
        below=below,
        private=own != "" and PurePosixPath(path).is_relative_to(own) and not mount.share,
    )


def _holder(path: str, mount: mounts.Mount) -> str:
    """Who holds the lease on an image: host, run of its kernel, and VM, which stay the same while the VM runs there.

    It is not looked for on NFS: there inodes tell, and a client that has looked into a folder may for a while not see
    what others change in it, such as a promise. Raises ``StorageError``.
    """
    if mounts.protocol(mount.share) == "nfs":
        return ""
    lease = leases.read(path)
    return f"{lease.host} {lease.boot} {lease.vm}" if lease.host else ""


def _is_small_file(status: os.stat_result) -> bool:
    return stat.S_ISREG(status.st_mode) and status.st_size <= _DIGEST_MAX_BYTES


@functools.lru_cache(maxsize=64)
def _digest(path: str, *_version: int) -> str:
    """SHA-256 of the file, worked out once for each version of it."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def version(status: os.stat_result) -> tuple[int, ...]:
    """What is otherwise as soon as the file is another, or has other contents. A block device does not tell when it was
    written, so what it has is never what it had."""
    looked_at = time.monotonic_ns() if stat.S_ISBLK(status.st_mode) else 0
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns, looked_at
