"""Every error a user can meet, in one place.

::

    LimosaError
    ├── InvalidInput          what was asked makes no sense              exit 2   HTTP 400
    ├── NotPermitted          who asks may not                           exit 3   HTTP 403
    ├── NotFound              no such VM, migration, lab                 exit 4   HTTP 404
    ├── Conflict              exists already, or in the wrong state      exit 5   HTTP 409
    ├── PreflightRefused      findings block the move                   exit 6   HTTP 412
    ├── HostUnreachable       network, TLS or a daemon that is down      exit 7   HTTP 503
    │   └── HostNotTrusted    TLS said no, or it is another host
    ├── MigrationFailed       the VM stays where it was                  exit 8   HTTP 500
    │   ├── NotConverging     the guest writes faster than can be sent
    │   ├── DestinationLost   the other side died or cannot be reached
    │   ├── RelayFailed       the process that carries and compresses died
    │   └── Cancelled         a person stopped it                        exit 9
    ├── OwnerUnknown          paused at the source, maybe not there      exit 10  HTTP 409
    ├── QemuError             QEMU did not start, died or refused        exit 11  HTTP 500
    │   ├── QemuGone          its process ended
    │   └── OutcomeUnknown    a command was sent, no answer came
    ├── StorageError          image missing, unreadable, disk full       exit 12  HTTP 500
    │   └── ImageLeased       another host may write it                           HTTP 409
    ├── NetworkError          switch, tap, address                       exit 13  HTTP 500
    └── StateError            a file of our own cannot be read           exit 14  HTTP 500

Each says what happened (``what``), why (``why``) and what to do (``todo``), to which VM and host, with a ``code``
that stays the same over releases. ``docs/errors.md`` lists the codes; a test holds the two together.
"""

from __future__ import annotations

from typing import ClassVar

from limosa.model.finding import Finding
from limosa.model.migration import Fault


class LimosaError(Exception):
    """Base of all errors that are shown to users. Raise a subclass."""

    code: ClassVar[str] = "internal"
    exit_code: ClassVar[int] = 1
    http_status: ClassVar[int] = 500

    def __init__(self, what: str, *, why: str = "", todo: str = "", vm: str = "", host: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.why = why
        self.todo = todo
        self.vm = vm
        self.host = host
        self.findings: tuple[Finding, ...] = ()

    def __str__(self) -> str:
        return f"{self.what}: {self.why}" if self.why else self.what

    def fault(self) -> Fault:
        """This error as a value for wires and journals."""
        return Fault(
            code=self.code,
            what=self.what,
            why=self.why,
            todo=self.todo,
            vm=self.vm,
            host=self.host,
            findings=self.findings,
        )


class InvalidInput(LimosaError):
    """Names, sizes, addresses, unknown fields, corrupt TOML. Nothing was changed."""

    code = "invalid-input"
    exit_code = 2
    http_status = 400


class NotPermitted(LimosaError):
    """The certificate's role does not allow it."""

    code = "not-permitted"
    exit_code = 3
    http_status = 403


class NotFound(LimosaError):
    """No such thing on this host."""

    code = "not-found"
    exit_code = 4
    http_status = 404


class Conflict(LimosaError):
    """The thing exists already or is in a state that does not allow it. Nothing was changed."""

    code = "conflict"
    exit_code = 5
    http_status = 409


class PreflightRefused(LimosaError):
    """The move was refused before anything was touched; ``findings`` has all reasons at once."""

    code = "preflight-refused"
    exit_code = 6
    http_status = 412

    def __init__(self, findings: tuple[Finding, ...], *, vm: str, host: str) -> None:
        super().__init__(
            f"VM '{vm}' cannot move to host '{host}'",
            why="; ".join(f"{finding.what} [{finding.code}]" for finding in findings),
            todo="fix what the findings name, or choose another host; 'limosa check' repeats the check",
            vm=vm,
            host=host,
        )
        self.findings = findings


class HostUnreachable(LimosaError):
    """No connection to a daemon, or it broke. Whether the last request took effect is not known."""

    code = "host-unreachable"
    exit_code = 7
    http_status = 503


class HostNotTrusted(HostUnreachable):
    """A TLS handshake failed, or another host answered than the one that was called."""

    code = "host-not-trusted"


class MigrationFailed(LimosaError):
    """A move ended early. The VM is where it was, as it was; the destination keeps nothing."""

    code = "migration-failed"
    exit_code = 8


class NotConverging(MigrationFailed):
    """The guest writes memory faster than the network and the policy allow to send it."""

    code = "not-converging"


class DestinationLost(MigrationFailed):
    """The destination died or became unreachable before it owned the VM."""

    code = "destination-lost"


class RelayFailed(MigrationFailed):
    """The relay process that carries and compresses guest memory did not start, or ended."""

    code = "relay-failed"


class Cancelled(MigrationFailed):
    """A person or program cancelled the move."""

    code = "cancelled"
    exit_code = 9


class OwnerUnknown(LimosaError):
    """The source cannot know whether the destination has taken the VM over. It is paused at the source and may be
    running at the destination."""

    code = "owner-unknown"
    exit_code = 10
    http_status = 409


class QemuError(LimosaError):
    """QEMU did not start or refused a command."""

    code = "qemu-error"
    exit_code = 11


class QemuGone(QemuError):
    """QEMU's process ended."""

    code = "qemu-gone"


class OutcomeUnknown(QemuError):
    """A command was sent to QEMU and no answer came, or a move that was cancelled has not ended in time: nobody can
    tell whether it took effect. Ask its state."""

    code = "outcome-unknown"


class StorageError(LimosaError):
    """An image or file is missing, unreadable, in use, or the disk is full."""

    code = "storage-error"
    exit_code = 12


class ImageLeased(StorageError):
    """By the lease beside the image another host may write it, or this one may not. Nothing was changed."""

    code = "image-leased"
    http_status = 409


class NetworkError(LimosaError):
    """A switch, tap or address is missing or was refused by the kernel."""

    code = "network-error"
    exit_code = 13


class StateError(LimosaError):
    """A file of Limosa's own is damaged. It is left as it is, for a person to look at."""

    code = "state-error"
    exit_code = 14


def every_error() -> tuple[type[LimosaError], ...]:
    """All error classes, base first."""
    found: list[type[LimosaError]] = [LimosaError]
    for cls in found:
        found.extend(cls.__subclasses__())
    return tuple(found)


def from_fault(fault: Fault) -> LimosaError:
    """The error a fault stands for; a code of a newer Limosa becomes a plain :class:`LimosaError`."""
    cls = next((cls for cls in every_error() if cls.code == fault.code), LimosaError)
    error = cls.__new__(cls)
    LimosaError.__init__(error, fault.what, why=fault.why, todo=fault.todo, vm=fault.vm, host=fault.host)
    error.findings = fault.findings
    return error
