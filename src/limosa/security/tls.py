"""The only place that makes SSL contexts: TLS 1.3, both sides show a certificate, one authority is trusted.

A caller gives the host's name, or the IP address it calls, as ``server_hostname``; OpenSSL then accepts only a
certificate that was issued for it and may serve. Who the caller is, the server reads with ``identity``.

:func:`stream_context` is for the throw-away credentials of one stream (``stream``), which are never files.
"""

from __future__ import annotations

import datetime
import os
import shlex
import ssl
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from limosa.errors import LimosaError, NotPermitted, StateError
from limosa.security.identity import Identity
from limosa.wire.endpoints import Role
from limosa.wire.peer import StreamCredentials

if TYPE_CHECKING:
    from cryptography import x509

Kind = Literal["host", "client"]
#: The name in a stream's server certificate: what the source is told to expect (QEMU's ``tls-hostname``).
SERVER_NAME = "limosa-migration"
_REFUSED = "it ended the connection when it had seen the certificate"


class CertificateRefused(ConnectionError):
    """A server ended the connection when it had seen our certificate, without a word."""


class ClientSocket(ssl.SSLSocket):
    """Tells a server that refused our certificate from one that went away later.

    In TLS 1.3 a client has done its part before the server looks at its certificate (RFC 8446, section 2), so that a
    refusal comes with the first read; and an event loop's server ends the connection without sending OpenSSL's alert.
    One that accepted us has sent session tickets before anything else, as OpenSSL's servers do.
    """

    def recv(self, buflen: int = 1024, flags: int = 0) -> bytes:
        """Raises also :class:`CertificateRefused`."""
        try:
            data = super().recv(buflen, flags)
        except ConnectionError as fault:
            if self._accepted():
                raise
            raise CertificateRefused(_REFUSED) from fault
        if not data and not self._accepted():
            raise CertificateRefused(_REFUSED)
        return data

    def _accepted(self) -> bool:
        return self.session is not None and self.session.has_ticket


def server_context(pki: Path) -> ssl.SSLContext:
    """For the daemon's listener, from ``ca.pem``, ``host.pem`` and ``host.key`` in ``pki``.

    Raises :class:`StateError` if a file is missing, unreadable or damaged, or the key not private. The dates are not
    looked at, since who calls does that; see :func:`check_dates`.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    _load(context, pki, "host")
    return context


def client_context(pki: Path, kind: Kind) -> ssl.SSLContext:
    """For calling a daemon, as a host (``host.pem``) or as a person (``client.pem``).

    Raises :class:`StateError` if a file is missing, unreadable or damaged, or the key not private. The dates are not
    looked at, since the other side does that and parsing them would cost every command a tenth of a second; see
    :func:`check_dates`.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.sslsocket_class = ClientSocket
    _load(context, pki, kind)
    return context


def stream_context(credentials: StreamCredentials, *, server: bool) -> ssl.SSLContext:
    """For one end of a stream of our own: only the other end of the same pair is accepted.

    The server sends no session tickets: a stream that is used one way never reads them. Raises :class:`StateError`.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    if server:
        context.num_tickets = 0
    # OpenSSL takes a certificate and its key from files only. This one is memory, and gone with its descriptor.
    with os.fdopen(os.memfd_create("limosa-stream"), "w") as pair:
        pair.write(credentials.certificate + credentials.key)
        pair.flush()
        try:
            context.load_verify_locations(cadata=credentials.authority)
            context.load_cert_chain(f"/proc/self/fd/{pair.fileno()}", password=lambda: "")
        except (ssl.SSLError, OSError, ValueError) as fault:
            raise _damaged("the credentials of a stream are no certificate and its key", fault) from fault
    return context


def check_dates(certificate: Path) -> None:
    """Raise :class:`StateError` if a certificate of ours has expired or is not valid yet."""
    loaded = _loaded(certificate)
    now = datetime.datetime.now(datetime.UTC)
    if now > loaded.not_valid_after_utc:
        raise StateError(
            f"the certificate {certificate} has expired",
            why=f"it was valid until {loaded.not_valid_after_utc:%Y-%m-%d %H:%M} UTC",
            todo="issue it again with 'limosa ca issue' and put it there; a daemon takes it without a restart",
        )
    if now < loaded.not_valid_before_utc:
        raise StateError(
            f"the certificate {certificate} is not valid yet",
            why=f"it is valid from {loaded.not_valid_before_utc:%Y-%m-%d %H:%M} UTC",
            todo="set this machine's clock",
        )


def valid_until(certificate: Path) -> float | None:
    """The end of a certificate of ours, seconds since the epoch; null if there is none that can be read."""
    try:
        return _loaded(certificate).not_valid_after_utc.timestamp() if certificate.exists() else None
    except (StateError, OSError):
        return None


def check_holder(certificate: Path, host: str) -> None:
    """Raise :class:`StateError` if the certificate is not that of the host of this name: no other would believe it."""
    from limosa.security.ca import identity_of  # noqa: PLC0415 - as in _loaded

    try:
        holder = identity_of(_loaded(certificate))
        why = "" if holder == Identity(host, Role.HOST) else f"it is of {holder.role.name.lower()} '{holder.name}'"
    except NotPermitted as error:
        why = error.why
    if why:
        raise StateError(
            f"the certificate {certificate} is not of host '{host}'",
            why=why,
            todo=f"write its name into host.toml, or have one made with 'limosa ca issue {host}'",
        )


def _loaded(certificate: Path) -> x509.Certificate:
    # Loading cryptography takes longer than most commands do; it is needed by daemons and to explain a failure.
    from cryptography import x509  # noqa: PLC0415

    try:
        return x509.load_pem_x509_certificate(certificate.read_bytes())
    except (OSError, ValueError) as fault:
        raise StateError(f"cannot read the certificate {certificate}", why=str(fault)) from fault


def _load(context: ssl.SSLContext, pki: Path, kind: Kind) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    authority, certificate, key = pki / "ca.pem", pki / f"{kind}.pem", pki / f"{kind}.key"
    for path in (authority, certificate, key):
        _check_readable(path)
    _check_private(key)
    try:
        context.load_verify_locations(cafile=authority)
    except (ssl.SSLError, OSError) as fault:
        raise _damaged(f"{authority} is not a certificate", fault) from fault
    try:
        # The password callback keeps OpenSSL from asking for one on the terminal if the key is encrypted.
        context.load_cert_chain(certificate, key, password=lambda: "")
    except (ssl.SSLError, OSError) as fault:
        raise _damaged(f"{certificate} and {key} are no certificate and its key", fault) from fault


def _check_readable(path: Path) -> None:
    try:
        path.open("rb").close()
    except OSError as fault:
        raise StateError(
            f"cannot read {path}",
            why=fault.strerror or str(fault),
            todo="put the files made by 'limosa ca issue' there",
        ) from fault


def _check_private(key: Path) -> None:
    mode = stat.S_IMODE(key.stat().st_mode)
    if mode & 0o077:
        raise StateError(
            f"the private key {key} is not private",
            why=f"its mode {mode:04o} gives other users access",
            todo=f"chmod 600 {shlex.quote(str(key))}, or issue a new key if others may have read it",
        )


def _damaged(what: str, fault: OSError | ValueError) -> LimosaError:
    return StateError(what, why=str(fault), todo="issue it again with 'limosa ca issue'")
