"""What a move was about to do, written before it does it.

One append-only file of JSON lines for each migration and side; the first line says what the move is, each further line
a step. A daemon that was killed reads it to know where it stood. Two kinds of durability are told apart:

- *written*: the line is in the kernel's page cache. It survives the death of the daemon but not of the machine. Enough
  on the way between STOP and RESUME, because with the machine its QEMU dies too.
- *durable*: the line is on the disk. Everything else.

A crash can cut the last line; such a line never took effect, because acts follow their line. Damage anywhere else
is a :class:`StateError`, and the file is left for a person.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any

import msgspec

from limosa.errors import StateError
from limosa.migration.ownership import DestinationStep, SourceStep
from limosa.model import reading
from limosa.model.base import MigrationId, Model, Name
from limosa.model.migration import Fault, Side
from limosa.model.storage import BackingFile
from limosa.model.vm import Accelerator, VmConfig
from limosa.settings.toml import sync_folder

_ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789"


def new_identity() -> str:
    """The identity of a new move."""
    return "".join(secrets.choice(_ALPHABET) for _ in range(12))


class Header(Model, frozen=True, forbid_unknown_fields=False):
    """What the move is."""

    migration: MigrationId
    side: Side
    vm: VmConfig
    accelerator: Accelerator
    source: Name
    destination: Name
    #: how the source reaches the destination; empty in the destination's journal
    address: str
    accepted_at: float
    #: /proc/sys/kernel/random/boot_id when the journal began
    boot: str
    #: the request, as asked; kept for moves that wait in line over a restart
    options: dict[str, Any] = {}
    #: whether the guest ran (was not paused) when the move was accepted
    was_running: bool = True
    #: destination: paths of images this move makes here, which are nobody's until the VM is this host's
    images: tuple[str, ...] = ()
    #: destination: files below them that this move may bring; they stay where anything else lies above them
    layers: tuple[BackingFile, ...] = ()


class Record(Model, frozen=True, forbid_unknown_fields=False):
    """One step."""

    step: str
    at: float
    fault: Fault | None = None
    resumed_at: float | None = None
    #: source, with PREPARING: paths of images the VM leaves behind
    left: tuple[str, ...] = ()
    #: source, with CONFIRMED: they stay, because only a person said that the destination has the VM
    stay: bool = False


class Journal:
    """An open journal. Not safe for several writers; each move has its own."""

    def __init__(self, path: Path, header: Header, records: list[Record]) -> None:
        self.path = path
        self.header = header
        self.records = records
        self._descriptor: int | None = None

    @classmethod
    def begin(cls, folder: Path, header: Header) -> Journal:
        """Create the journal of a new migration, durably. Raises :class:`StateError`; nothing is left then.

        It gets its name when its first line is on the disk, so a journal has one or is none.
        """
        journal = cls(folder / f"{header.migration}.{header.side}.jsonl", header, [])
        nameless = journal.path.with_suffix(".new")
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC
            journal._descriptor = os.open(nameless, flags, 0o600)
            journal._write(msgspec.json.encode(header), durable=True)
            os.link(nameless, journal.path)
            nameless.unlink()
            sync_folder(folder)
        except OSError as error:
            journal.close()
            nameless.unlink(missing_ok=True)
            raise StateError(
                f"cannot write the journal {journal.path}",
                why=error.strerror or str(error),
                todo="free space or repair the file system of the state folder",
                vm=header.vm.name,
            ) from error
        return journal

    @classmethod
    def load(cls, path: Path) -> Journal:
        """Read a journal that nobody writes, and mend its end. Raises :class:`StateError` if anything but its last
        line is damaged."""
        data, header, records = _read(path)
        whole = data.rfind(b"\n") + 1
        if len(data) != whole:
            os.truncate(path, whole)
        return cls(path, header, records)

    @classmethod
    def look(cls, path: Path) -> Journal:
        """Read a journal that its move may be writing at the moment; nothing is changed. Raises :class:`StateError` if
        it is damaged."""
        _, header, records = _read(path)
        return cls(path, header, records)

    @property
    def step(self) -> str | None:
        """The last step, or None if only the header is there."""
        return self.records[-1].step if self.records else None

    @property
    def rests_on_a_word(self) -> bool:
        """Whether it was a person who said that the destination has the VM: what it has of it may be all there is."""
        return any(record.stay for record in self.records)

    def record(self, step: SourceStep | DestinationStep, at: float, *, durable: bool = True, **evidence: Any) -> None:
        """Append a step. On return it is durable, or at least written (see the module's text).

        Raises :class:`StateError` (disk full); the step then must not be taken.
        """
        record = Record(step=step, at=at, **evidence)
        try:
            if self._descriptor is None:
                self._descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
            self._write(msgspec.json.encode(record), durable=durable)
        except OSError as error:
            raise StateError(
                f"cannot write the journal {self.path}", why=error.strerror or str(error), vm=self.header.vm.name
            ) from error
        self.records.append(record)

    def _write(self, line: bytes, *, durable: bool) -> None:
        assert self._descriptor is not None
        before = os.fstat(self._descriptor).st_size
        data = line + b"\n"
        written = os.write(self._descriptor, data)
        if written != len(data):
            os.ftruncate(self._descriptor, before)
            raise OSError(28, "No space left on device")
        if durable:
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Let go of the file. The journal can still be read, and opens again by itself when written."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _read(path: Path) -> tuple[bytes, Header, list[Record]]:
    """All bytes of a journal, and what they say."""
    try:
        data = path.read_bytes()
        # Acts follow their line, so a last line without its newline stands for nothing that was done.
        complete = data.split(b"\n")[:-1]
        header = reading.decode(complete[0], Header)
        return data, header, [reading.decode(line, Record) for line in complete[1:]]
    except (OSError, IndexError, msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise StateError(
            f"the journal {path} is damaged",
            why=str(error),
            todo="see docs/recovery.md; the VM is left as it is",
        ) from error
