"""Until when a host's certificate is valid, and what is said of one that is so no more, or not for long."""

from __future__ import annotations

import datetime
import ssl
from collections.abc import Iterator

from limosa.errors import HostNotTrusted
from limosa.model.finding import Finding

#: So long before it expires a certificate is warned of.
WARN_DAYS = 30
_EXPIRED = 10  # X509_V_ERR_CERT_HAS_EXPIRED


def findings(host: str, until: float | None, now: float) -> Iterator[Finding]:
    """A warning if the host's certificate has expired or soon will; seconds since the epoch, ``until`` null if there is
    none."""
    days = (until - now) / 86400 if until is not None else WARN_DAYS
    if until is None or days >= WARN_DAYS:
        return
    when = f"has expired on {date(until)}" if days < 0 else f"expires on {date(until)}"
    yield Finding.warning("certificate-expires", f"the certificate of host '{host}' {when}", renew(host))


def date(at: float) -> str:
    """``2027-01-31``, in UTC."""
    return f"{datetime.datetime.fromtimestamp(at, datetime.UTC):%Y-%m-%d}"


def is_expired(fault: OSError) -> bool:
    """Whether a handshake failed because the other end's certificate has expired."""
    return isinstance(fault, ssl.SSLCertVerificationError) and fault.verify_code == _EXPIRED


def not_trusted(host: str, address: str) -> HostNotTrusted:
    """The error for people that stands for such a handshake."""
    return HostNotTrusted(
        f"the certificate of host '{host}' at {address} has expired",
        why="no other host and no remote command trusts it; its VMs go on",
        todo=renew(host),
        host=host,
    )


def renew(host: str) -> str:
    """What to do."""
    return (
        f"issue it again, with all its addresses ('limosa ca issue {host} --address ...'), and copy the files to "
        "/etc/limosa/pki there; its daemon takes them without a restart, and VMs go on"
    )
