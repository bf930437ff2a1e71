"""Throw-away TLS credentials for one migration stream.

The source makes an authority, signs one certificate for each end, and forgets the authority's key. Each QEMU then
accepts exactly the other one: nothing else was ever signed by that authority. No QEMU holds a key of its host, so a
guest that breaks out of its QEMU cannot speak as the host. The destination's half travels to it inside the mutual TLS
session of the two daemons.

Making both takes about a millisecond once ``cryptography`` is imported; a daemon imports this module when it starts.
"""

from __future__ import annotations

import datetime

from cryptography import x509

from limosa.security.certificate import CLIENT, SERVER, Authority, Validity, certificate_pem, key_pem, make_key
from limosa.security.tls import SERVER_NAME
from limosa.wire.peer import StreamCredentials

_BACK = datetime.timedelta(days=1)
_LENGTH = datetime.timedelta(days=7)


def make_credentials() -> tuple[StreamCredentials, StreamCredentials]:
    """Credentials of the server (the destination's QEMU) and the client (the source's), valid a day back to a week on.

    The generous dates are for hosts whose clocks differ and for moves that take days; what guards the stream is that
    nobody else holds a certificate of this authority.
    """
    validity = Validity.lasting(_LENGTH, back=_BACK)
    authority = Authority.make("Limosa migration", validity)
    server = _leaf(authority, validity, SERVER_NAME, SERVER)
    client = _leaf(authority, validity, "limosa-migration-source", CLIENT)
    return server, client


def _leaf(authority: Authority, validity: Validity, name: str, use: x509.ObjectIdentifier) -> StreamCredentials:
    key = make_key()
    certificate = authority.issue(name, key.public_key(), validity, alternative_names=[x509.DNSName(name)], uses=[use])
    return StreamCredentials(
        authority=certificate_pem(authority.certificate).decode(),
        certificate=certificate_pem(certificate).decode(),
        key=key_pem(key).decode(),
    )
