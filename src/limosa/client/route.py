"""How a host's API is reached, and how it is found.

::

    --host NAME        NAME in hosts.toml            mutual TLS, as operator or viewer
                       a lab's host of that name     its Unix socket (the command line asks the lab; inside a lab's
                                                     host that lab goes before others)
                       otherwise, by DNS             mutual TLS
    (nothing)          $LIMOSA_SOCKET                that Unix socket (set inside a lab's host)
                       $LIMOSA_HOST                  as --host
                       otherwise                     /run/limosa/api.sock, this machine's own daemon

``hosts.toml`` and the certificate lie in ``~/.config/limosa`` or ``/etc/limosa``; a host that has no other shows its
own, with which it commands itself alone. ``ssl`` is loaded only when TLS is spoken, since most commands talk to a Unix
socket; ``dataclasses``, which takes a tenth of a command's start, is not.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from limosa.errors import HostNotTrusted, HostUnreachable, LimosaError, NotPermitted, StateError
from limosa.model.base import Model, Name
from limosa.settings import toml
from limosa.settings.address import PeerAddress, split_address
from limosa.settings.daemon import DEFAULT_PORT, DEFAULT_SOCKET

if TYPE_CHECKING:
    from ssl import SSLContext

CONNECT_TIMEOUT_S = 10.0


class Route(Protocol):
    """A way to a host's API."""

    @property
    def authority(self) -> str:
        """The value of HTTP's ``Host`` header."""

    def connect(self) -> socket.socket:
        """An open, authenticated stream. Raises ``OSError``; :meth:`explain` makes sense of it."""

    def dial(self) -> tuple[socket.socket, SSLContext | None]:
        """An open stream on which nothing has been said yet, and what has to secure it. Raises as :meth:`connect` does.

        For an event loop, which does TLS in its own way.
        """

    def explain(self, fault: OSError) -> LimosaError:
        """The error for people that stands for a failure to connect, or of a connection made."""


class UnixRoute(Model, frozen=True):
    """A daemon on this machine."""

    path: str
    authority: str = "localhost"
    #: the command that starts the daemon
    start: str = "systemctl start limosa-host"

    def connect(self) -> socket.socket:
        """An open stream to the daemon."""
        stream = socket.socket(socket.AF_UNIX)
        try:
            stream.settimeout(CONNECT_TIMEOUT_S)
            stream.connect(self.path)
        except BaseException:
            stream.close()
            raise
        return stream

    def dial(self) -> tuple[socket.socket, None]:
        """The same: the kernel tells who calls."""
        return self.connect(), None

    def explain(self, fault: OSError) -> LimosaError:
        """No socket, nobody behind it, no permission, or a connection that broke."""
        if fault.errno in (errno.EACCES, errno.EPERM):
            return NotPermitted(
                f"this user may not use the socket {self.path}",
                why="the host's socket is for root and the daemon's own user",
                todo="use sudo, or name the host with --host and use a certificate made by 'limosa ca issue'",
            )
        if fault.errno in (errno.ENOENT, errno.ECONNREFUSED):
            return HostUnreachable(
                f"no host daemon answers at {self.path}",
                why="there is no such socket" if fault.errno == errno.ENOENT else "it does not run",
                todo=f"start it with '{self.start}', or name another host with --host",
            )
        return _broken(f"the daemon at {self.path}", fault)


class TlsRoute(Model, frozen=True):
    """A daemon anywhere, over mutual TLS. Its certificate must be for ``name``, a host's name or an IP address."""

    name: str
    address: str
    port: int
    certificates: Path
    kind: Literal["host", "client"]

    @property
    def authority(self) -> str:
        """The name that was asked for, with the port."""
        return f"[{self.name}]:{self.port}" if ":" in self.name else f"{self.name}:{self.port}"

    def connect(self) -> socket.socket:
        """An open stream to the daemon, which has shown its certificate."""
        plain, context = self.dial()
        try:
            return context.wrap_socket(plain, server_hostname=self.name)
        except BaseException:
            plain.close()
            raise

    def dial(self) -> tuple[socket.socket, SSLContext]:
        """An open stream, on which the certificate that is shown must be for the host in :attr:`authority`."""
        # Loading ssl takes as long as a whole command to a Unix socket does.
        from limosa.security.tls import client_context  # noqa: PLC0415

        context = client_context(self.certificates, self.kind)
        plain = socket.create_connection((self.address, self.port), CONNECT_TIMEOUT_S)
        _notice_dead_peer(plain)
        return plain, context

    def explain(self, fault: OSError) -> LimosaError:
        """An unknown name, nobody there, a handshake that failed on either side, or a connection that broke."""
        import ssl  # noqa: PLC0415 - as in dial

        from limosa.security import expiry  # noqa: PLC0415 - as in dial
        from limosa.security.tls import CertificateRefused  # noqa: PLC0415 - as in dial

        where = f"host '{self.name}' at {self.address} port {self.port}"
        if expiry.is_expired(fault):
            return expiry.not_trusted(self.name, f"{self.address} port {self.port}")
        if isinstance(fault, ssl.SSLCertVerificationError):
            return HostNotTrusted(
                f"{where} is not trusted",
                why=fault.verify_message,
                todo="check that its certificate is of the same authority and names this host and address",
                host=self.name,
            )
        alerted = isinstance(fault, ssl.SSLError) and "ALERT" in (fault.reason or "")
        if alerted or isinstance(fault, CertificateRefused):
            return self._explain_refusal(where, fault)
        if isinstance(fault, socket.gaierror):
            return HostUnreachable(
                f"the host '{self.name}' is not known",
                why=f"'{self.address}' has no address: {fault.strerror}",
                todo="write its address into hosts.toml in ~/.config/limosa or /etc/limosa, under [hosts]",
                host=self.name,
            )
        return _broken(where, fault)

    def _explain_refusal(self, where: str, fault: OSError) -> LimosaError:
        from limosa.security.tls import check_dates  # noqa: PLC0415

        try:
            check_dates(self.certificates / f"{self.kind}.pem")
        except StateError as reason:
            return reason
        return HostNotTrusted(
            f"{where} does not accept your certificate",
            why=str(fault),
            todo=f"use a certificate of the host's own authority in {self.certificates}",
            host=self.name,
        )


class KnownHosts(Model, frozen=True):
    """The file ``hosts.toml``: addresses of hosts by name."""

    hosts: dict[Name, PeerAddress] = {}


def is_known(host: str, folders: tuple[Path, ...]) -> bool:
    """Whether hosts.toml in one of the folders says where a host of that name is. Raises as :func:`find_route`."""
    return host in _known_hosts(folders)


def find_route(host: str, folders: tuple[Path, ...]) -> TlsRoute:
    """The way to a host by name, ``NAME:PORT`` or address; ``folders`` are searched for hosts.toml and certificates.

    Raises :class:`InvalidInput` and :class:`StateError`; no network is used.
    """
    name, port = split_address(host)
    known = _known_hosts(folders).get(name)
    address, known_port = split_address(known) if known else (name, None)
    certificates, kind = _certificates(name, folders)
    return TlsRoute(name, address, port or known_port or DEFAULT_PORT, certificates, kind)


def local_route(environment: Mapping[str, str]) -> UnixRoute:
    """The way to the daemon of this machine, or of the lab's host this process runs in."""
    return UnixRoute(environment.get("LIMOSA_SOCKET") or DEFAULT_SOCKET)


def configuration_folders(environment: Mapping[str, str]) -> tuple[Path, ...]:
    """Where a person's, then the machine's, hosts.toml and certificates may lie."""
    home = environment.get("XDG_CONFIG_HOME") or os.path.join(environment.get("HOME") or "/root", ".config")
    return Path(home, "limosa"), Path("/etc/limosa"), Path("/etc/limosa/pki")


def _known_hosts(folders: tuple[Path, ...]) -> dict[str, str]:
    known: dict[str, str] = {}
    for path in [folder / "hosts.toml" for folder in reversed(folders)]:
        if path.exists():
            known |= toml.read(path, KnownHosts).hosts
    return known


def _certificates(host: str, folders: tuple[Path, ...]) -> tuple[Path, Literal["host", "client"]]:
    kinds: tuple[Literal["client", "host"], ...] = ("client", "host")
    for kind in kinds:
        for folder in folders:
            if os.access(folder / f"{kind}.key", os.R_OK):
                return folder, kind
    raise StateError(
        f"there is no certificate to show to host '{host}', and no lab here has a host of that name",
        why="none of " + ", ".join(map(str, folders)) + " has a client.key that can be read",
        todo=f"have one made with 'limosa ca issue NAME --role operator --out {folders[0]}'; "
        "'limosa lab status' shows labs",
    )


def _notice_dead_peer(stream: socket.socket) -> None:
    """Have the kernel end the connection some 30 s after the host fell silent, while a move is watched for hours."""
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 15)
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _broken(where: str, fault: OSError) -> HostUnreachable:
    if isinstance(fault, TimeoutError):
        return HostUnreachable(
            f"{where} does not answer",
            why="it took too long; whether it did what was asked is not known",
            todo="check that the host is up and that no firewall is in the way; see what was done before you try again",
        )
    nothing_was_sent = isinstance(fault, ConnectionRefusedError)
    return HostUnreachable(
        f"no connection to {where}",
        why=fault.strerror or str(fault),
        todo="check that the daemon runs ('systemctl status limosa-host' on that host)"
        + ("" if nothing_was_sent else "; see what was done before you try again"),
    )
