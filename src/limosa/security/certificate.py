"""What Limosa's certificates look like, whoever signs them.

All keys are ECDSA P-256: small, quick to make, and known to every TLS library QEMU is built with. Authorities may
sign leaves only (path length 0); leaves may not sign. Key usage is critical and names key encipherment besides digital
signature although ECDSA never enciphers a key, because QEMU up to 10.1 refuses certificates without it
(``qcrypto_tls_creds_check_cert_key_usage`` in ``crypto/tlscredsx509.c``).
"""

from __future__ import annotations

import datetime
import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

#: What a leaf may be used for.
SERVER = ExtendedKeyUsageOID.SERVER_AUTH
CLIENT = ExtendedKeyUsageOID.CLIENT_AUTH

#: The alphabet of host names, and the underscore that people use all the same.
_DNS_NAME = re.compile(r"\A[A-Za-z0-9_][A-Za-z0-9_.-]{0,252}\Z")

Key = ec.EllipticCurvePrivateKey


@dataclass(frozen=True)
class Validity:
    """From when until when. ``lasting`` dates the beginning back, because the clocks of hosts differ."""

    begin: datetime.datetime
    end: datetime.datetime

    @classmethod
    def lasting(cls, length: datetime.timedelta, *, back: datetime.timedelta) -> Validity:
        """From ``back`` ago until ``length`` from now."""
        now = datetime.datetime.now(datetime.UTC)
        return cls(now - back, now + length)


@dataclass(frozen=True)
class Authority:
    """A certificate that may sign, and its key."""

    certificate: x509.Certificate
    key: Key

    @classmethod
    def make(cls, name: str, validity: Validity) -> Authority:
        """A new self-signed authority."""
        key = make_key()
        subject = _subject(name)
        builder = _builder(subject, subject, key.public_key(), validity)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        builder = builder.add_extension(_key_usage(signs_certificates=True), critical=True)
        return cls(builder.sign(key, hashes.SHA256()), key)

    def issue(
        self,
        name: str,
        key: ec.EllipticCurvePublicKey,
        validity: Validity,
        *,
        alternative_names: Sequence[x509.GeneralName],
        uses: Sequence[x509.ObjectIdentifier],
    ) -> x509.Certificate:
        """A leaf certificate; it never outlives the authority."""
        end = min(validity.end, self.certificate.not_valid_after_utc)
        builder = _builder(_subject(name), self.certificate.subject, key, Validity(validity.begin, end))
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(_key_usage(signs_certificates=False), critical=True)
        builder = builder.add_extension(x509.ExtendedKeyUsage(uses), critical=False)
        if alternative_names:
            builder = builder.add_extension(x509.SubjectAlternativeName(alternative_names), critical=False)
        signer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        builder = builder.add_extension(signer, critical=False)
        return builder.sign(self.key, hashes.SHA256())


def make_key() -> Key:
    """A new private key."""
    return ec.generate_private_key(ec.SECP256R1())


def certificate_pem(certificate: x509.Certificate) -> bytes:
    """PEM of a certificate."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def key_pem(key: Key) -> bytes:
    """PEM of a private key (PKCS #8, not encrypted: file modes guard it)."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def host_or_address(text: str) -> x509.GeneralName:
    """The subject alternative name for a DNS name or IP address. Raises ``ValueError`` if it is neither."""
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        if _DNS_NAME.match(text) is None:
            raise ValueError("neither an IP address nor a DNS name") from None
        return x509.DNSName(text)


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, validity: Validity
) -> x509.CertificateBuilder:
    builder = x509.CertificateBuilder(
        issuer_name=issuer,
        subject_name=subject,
        public_key=key,
        serial_number=x509.random_serial_number(),
        not_valid_before=validity.begin.replace(tzinfo=None),
        not_valid_after=validity.end.replace(tzinfo=None),
    )
    return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_encipherment=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
