"""The lease on an image: which host may write it, where the storage's own locks do not tell.

A lease is a row of states with rising numbers (epochs), kept in a folder beside the image::

    .web.qcow2.limosa-lease/00000007/lease.json

The highest number counts. A host that wants to change the lease writes the next state into a folder of its own and
renames that to the next number. Of all who want one number exactly one gets it, since a folder is never renamed over
one that has something in it: that is so for a local file system, and over SMB for each server and each client. Neither
``O_EXCL`` nor a rename over a file is as good: a client in user space makes two requests of each, and a rename in SMB
goes by an open file, so that two hosts may both have renamed "the old state".

Then the winner looks once more. If there is a higher number it was too slow: the states it had read of are gone, and
its number was free because of that. Only states below one's own are ever removed.

:class:`Rule` is what may follow upon what; pure. A state no rule allows to change stays until a person says that its
host is dead: that a host is silent does not mean that its QEMU does not write.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from limosa.errors import ImageLeased, StateError, StorageError
from limosa.model import reading
from limosa.model.base import Model
from limosa.settings.toml import write_atomically
from limosa.storage import mounts

_FILE = "lease.json"
_ATTEMPTS = 20


class Lease(Model, frozen=True, forbid_unknown_fields=False):
    """One state. Without a ``host`` it is nobody's."""

    epoch: int = 0
    host: str = ""
    #: the run of the host's kernel in which it was taken; a QEMU of an earlier one is dead
    boot: str = ""
    #: the machine whose kernel that is, since two hosts may have one name; empty in leases of before it was written
    machine: str = ""
    #: UUID of the VM
    vm: str = ""
    #: the host that may make it its own, and the migration by which
    promised_to: str = ""
    migration: str = ""


FREE = Lease()


@dataclass(frozen=True)
class Rule:
    """What ``host`` may make of a lease for ``vm``. Each returns the next state, or the same if nothing is to change,
    and raises :class:`ImageLeased` if it may not."""

    image: str
    host: str
    boot: str
    vm: str
    machine: str = ""

    def take(self, now: Lease) -> Lease:
        """To start a QEMU, while none of this VM runs here."""
        if now.host == "":
            return self._own(now)
        if not self._is_this_hosts(now) or now.promised_to:
            raise self._refusal(now)
        if now.boot != self.boot:
            return self._own(now)  # all QEMUs of before are dead
        if now.vm != self.vm:
            raise self._refusal(now)
        return now

    def give_back(self, now: Lease) -> Lease:
        """When the VM's QEMU has ended. What is another's, or promised, stays as it is."""
        if not self._is_this_hosts(now) or now.vm != self.vm or now.promised_to:
            return now
        return Lease(epoch=now.epoch + 1)

    def promise(self, now: Lease, destination: str, migration: str) -> Lease:
        """Before a move: ``destination`` may make it its own. Until it does, it is still ours."""
        if not self._is_ours(now) or (now.promised_to and now.migration != migration):
            raise self._refusal(now)
        return self._next(now, promised_to=destination, migration=migration)

    def claim(self, now: Lease, migration: str) -> Lease:
        """At the destination, on the source's word or a person's: before the guest goes on."""
        if self._is_ours(now) and now.migration == migration and not now.promised_to:
            return now
        if (now.vm, now.promised_to, now.migration) != (self.vm, self.host, migration):
            raise self._refusal(now)
        return self._next(now, host=self.host, boot=self.boot, machine=self.machine, promised_to="")

    def hand_back(self, now: Lease, source: str, migration: str) -> Lease:
        """At a destination that has destroyed what it had, if it had claimed it; the guest never ran there."""
        claimed = self._is_this_hosts(now) and (now.vm, now.migration, now.promised_to) == (self.vm, migration, "")
        return self._next(now, host=source, boot="", machine="", migration="") if claimed else now

    def reclaim(self, now: Lease, migration: str) -> Lease:
        """At the source, when the rules of ownership say that the guest is the source's. What the destination has
        claimed it must have handed back, whatever anybody says."""
        if self._is_ours(now) and not now.promised_to:
            return now
        if now.host and not self._is_promised_by_us(now, migration):
            raise self._refusal(now)
        return self._own(now)

    def withdraw(self, now: Lease, migration: str) -> Lease:
        """As :meth:`reclaim`, where the guest has died: it is nobody's then."""
        return Lease(epoch=now.epoch + 1) if self._is_promised_by_us(now, migration) else now

    def _is_promised_by_us(self, now: Lease, migration: str) -> bool:
        """Or is ours without a promise."""
        return self._is_this_hosts(now) and now.vm == self.vm and now.migration in ("", migration)

    def _is_this_hosts(self, now: Lease) -> bool:
        """Also if it is of an earlier run of its kernel."""
        return now.host == self.host and now.machine in ("", self.machine)

    def _is_ours(self, now: Lease) -> bool:
        return (now.host, now.boot, now.vm) == (self.host, self.boot, self.vm)

    def _own(self, now: Lease) -> Lease:
        return Lease(epoch=now.epoch + 1, host=self.host, boot=self.boot, machine=self.machine, vm=self.vm)

    def _next(self, now: Lease, **changes: str) -> Lease:
        following = msgspec.structs.replace(now, **changes)
        return now if following == now else msgspec.structs.replace(following, epoch=now.epoch + 1)

    def _refusal(self, now: Lease) -> ImageLeased:
        return refusal(self.image, now, self.host, twin=now.host == self.host and not self._is_this_hosts(now))


def release(now: Lease, image: str, dead: str) -> Lease:
    """On a person's word that host ``dead`` does not run a VM on the image any more."""
    if now.host != dead:
        if now.host:
            raise refusal(image, now, "")
        raise ImageLeased(
            f"no host holds the lease on {image}",
            todo="check the path; if it is right, start a VM on the image as it is",
        )
    return Lease(epoch=now.epoch + 1)


def refusal(image: str, now: Lease, host: str, *, twin: bool = False) -> ImageLeased:
    """Why ``host`` may not have it, in words. ``twin``: who has it is another machine of that name."""
    if now.host == "":
        return ImageLeased(
            f"no host holds the lease on {image}",
            why="the source of a move must hold it",
            todo="check that both hosts have the same share mounted, and restart the VM at the source",
        )
    promise = f", which promised it to host '{now.promised_to}'" if now.promised_to else ""
    holder = f"another machine named '{now.host}'" if twin else f"host '{now.host}'"
    held = f"{holder} holds the lease on it for VM {now.vm}{promise}"
    todo = f"stop that VM; only if '{now.host}' is certainly dead: limosa storage release {image} --from {now.host}"
    return ImageLeased(f"{image} may not be written here", why=held, todo=todo, host=host)


def is_needed(image: str, *, begun: bool = False, served: bool = False) -> bool:
    """Whether the locks of the image's file system do not reach other hosts, or somebody has made a lease already.

    One that is ``begun`` to be written now needs one also where it is not known that locks reach others: on shares of
    such a kind, and on this host's own file systems that are ``served`` to others, for that may be by SMB, which does
    not pass locks on as QEMU means them. A file that is not there needs none. Raises :class:`StorageError` if that
    cannot be told.
    """
    try:
        mount, is_file = mounts.of(image), os.path.isfile(image)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise StorageError(f"cannot look at {image}", why=error.strerror or str(error)) from error
    in_doubt = is_file and (mount.locks_may_end_here if mount.share else served)
    return mount.has_no_locks or (begun and in_doubt) or folder_of(image).is_dir()


def folder_of(image: str) -> Path:
    """Where the lease on an image is kept; by the image's real name, whichever way it is named."""
    real = Path(os.path.realpath(image))
    return real.with_name(f".{real.name}.limosa-lease")


def read(image: str) -> Lease:
    """The lease on an image as it is now. Raises :class:`StorageError`."""
    folder = folder_of(image)
    for _ in range(_ATTEMPTS):
        try:
            epochs = _epochs(folder)
            if not epochs:
                return FREE
            data = (folder / _number(epochs[-1]) / _FILE).read_bytes()
            return msgspec.structs.replace(reading.decode(data, Lease), epoch=epochs[-1])
        except (FileNotFoundError, NotADirectoryError):
            _list_anew(folder)  # it was followed by another and removed while we looked, or before
        except (OSError, msgspec.MsgspecError) as error:
            raise _unreadable(folder, str(error)) from error
    raise _unreadable(folder, "it has no contents")


def change(image: str, rule: Callable[[Lease], Lease]) -> Lease:
    """Apply a rule. Returns the state that counts then. Raises what the rule does, and :class:`StorageError`."""
    for _ in range(_ATTEMPTS):
        now = read(image)
        following = rule(now)
        if following == now:
            return now
        with Change(image, following) as prepared:
            if prepared.make():
                return following
    raise StorageError(
        f"the lease on {image} keeps changing", todo="find out which hosts are trying to start a VM on it"
    )


def forget(image: str) -> None:
    """Remove the lease on an image that is no more. Never fails."""
    shutil.rmtree(folder_of(image), ignore_errors=True)


class Change:
    """A change that is prepared, so that :meth:`make` costs a rename and a look. :meth:`close` it afterwards."""

    def __init__(self, image: str, following: Lease) -> None:
        """Raises :class:`StorageError`."""
        self.following = following
        self._folder = folder_of(image)
        self._left: list[int] = []
        self._own = self._folder / f"new-{secrets.token_hex(8)}"
        try:
            # Whoever may read images may read who writes them; only the daemon writes here.
            self._folder.mkdir(mode=0o755, exist_ok=True)
            self._own.mkdir(mode=0o755)
            # Before its folder gets a number, and counts: a power cut may not leave a state that says nothing.
            write_atomically(self._own / _FILE, msgspec.json.encode(following), mode=0o644)
        except (OSError, StateError) as error:
            self.close()
            raise _unwritable(self._folder, error) from error

    def make(self) -> bool:
        """Whether it was made: another may have been faster, then nothing was changed. Raises :class:`StorageError`."""
        epoch = self.following.epoch
        number = self._folder / _number(epoch)
        try:
            self._own.rename(number)
        except OSError as error:
            if number.exists() or not self._own.exists():
                return False
            raise _unwritable(self._folder, error) from error
        try:
            epochs = _epochs(self._folder)
        except OSError as error:
            raise _unwritable(self._folder, error) from error
        made = epochs[-1] == epoch
        self._left = [earlier for earlier in epochs if earlier < epoch] if made else [epoch]
        return made

    def close(self) -> None:
        """Remove what was prepared and not made, and the states before what was."""
        for epoch in self._left:
            shutil.rmtree(self._folder / _number(epoch), ignore_errors=True)
        shutil.rmtree(self._own, ignore_errors=True)

    def __enter__(self) -> Change:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _epochs(folder: Path) -> list[int]:
    with suppress(FileNotFoundError):
        return sorted(int(name) for name in os.listdir(folder) if name.isdecimal())
    return []


def _list_anew(folder: Path) -> None:
    """Have a client that remembers what a folder holds, as sshfs does for 20 s, ask its server: by changing that."""
    own = folder / f"new-{secrets.token_hex(8)}"
    with suppress(OSError):
        own.mkdir(mode=0o755)
        own.rmdir()


def _number(epoch: int) -> str:
    return f"{epoch:08d}"


def _unreadable(folder: Path, why: str) -> StorageError:
    return StorageError(f"cannot read the lease {folder}", why=why, todo="see docs/recovery.md")


def _unwritable(folder: Path, error: OSError | StateError) -> StorageError:
    why = error.why if isinstance(error, StateError) else error.strerror or str(error)
    return StorageError(
        f"cannot write the lease {folder}", why=why, todo="give the daemon write access to the image's folder"
    )
