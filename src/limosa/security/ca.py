"""The certificate authority a person runs: files in a folder, no server.

::

    FOLDER/ca.pem            the authority's certificate        0644
    FOLDER/ca.key            its key; keep it off the hosts     0600
    FOLDER/issued/...        a copy of each certificate signed, for ``limosa ca list``

    OUT/ca.pem, host.pem, host.key        what a host needs (``/etc/limosa/pki``)
    OUT/ca.pem, client.pem, client.key    what a person or program needs (``~/.config/limosa``)

Names and roles stand in one URI in the certificate: ``urn:limosa:host:NAME``, ``urn:limosa:operator:NAME`` or
``urn:limosa:viewer:NAME``; ``identity`` reads it back. Issuing again for the same name renews: the key stays and the
new certificate replaces the old one in one step, so a daemon may load the pair at any moment. For a new key remove the
folder first. Nothing is ever overwritten that belongs to another name.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509

from limosa.errors import Conflict, InvalidInput, StateError
from limosa.model.base import is_name
from limosa.security.certificate import (
    CLIENT,
    SERVER,
    Authority,
    Key,
    Validity,
    certificate_pem,
    host_or_address,
    key_pem,
    make_key,
)
from limosa.security.files import load_certificate, load_key, private_folder, write_private, write_public
from limosa.security.identity import Identity, from_uris
from limosa.wire.endpoints import Role

#: Certificates begin this long ago, so that a host whose clock is behind accepts them.
BACK = datetime.timedelta(hours=1)
LEAF_LIFE = datetime.timedelta(days=730)
AUTHORITY_LIFE = datetime.timedelta(days=3652)


def create_authority(folder: Path, name: str = "Limosa CA") -> None:
    """Make a new authority in ``folder`` (created with mode 0700).

    Raises :class:`Conflict` if one is there already, which is then untouched, :class:`InvalidInput` and
    :class:`StateError`.
    """
    if not 1 <= len(name) <= 64 or not name.isprintable():
        raise InvalidInput("the authority's name is not valid", why="1 to 64 printable characters are allowed")
    private_folder(folder)
    for path in (folder / "ca.pem", folder / "ca.key"):
        if path.exists():
            raise Conflict(
                f"there is a certificate authority in {folder} already",
                why=f"{path.name} exists",
                todo="use it, or name another folder with --folder",
            )
    authority = Authority.make(name, Validity.lasting(AUTHORITY_LIFE, back=BACK))
    write_private(folder / "ca.key", key_pem(authority.key))
    write_public(folder / "ca.pem", certificate_pem(authority.certificate))


def issue_host(
    folder: Path, name: str, addresses: Sequence[str], out: Path, *, life: datetime.timedelta = LEAF_LIFE
) -> None:
    """Sign a host's certificate: it answers as ``name`` and at ``addresses`` (IP addresses or DNS names).

    Writes ``out/{ca.pem,host.pem,host.key}``. Raises :class:`InvalidInput`, :class:`NotFound` (no authority),
    :class:`Conflict` (``out`` belongs to another name) and :class:`StateError`.
    """
    _check_name(name)
    names = [_alternative_name(text) for text in dict.fromkeys([name, *addresses])]
    _issue(folder, Identity(name, Role.HOST), names, out, life)


def issue_person(folder: Path, name: str, role: Role, out: Path, *, life: datetime.timedelta = LEAF_LIFE) -> None:
    """Sign the certificate of a person or program with role ``VIEWER`` or ``OPERATOR``.

    Writes ``out/{ca.pem,client.pem,client.key}``. Raises as :func:`issue_host` does.
    """
    _check_name(name)
    if role is Role.HOST:
        raise InvalidInput("a person cannot have the role of a host", todo="choose operator or viewer")
    _issue(folder, Identity(name, role), [], out, life)


def issued(folder: Path) -> list[x509.Certificate]:
    """The newest certificate signed for each name, by role and name."""
    load_certificate(folder / "ca.pem")
    return [load_certificate(path) for path in sorted((folder / "issued").glob("*/*.pem"))]


def _issue(
    folder: Path, identity: Identity, names: list[x509.GeneralName], out: Path, life: datetime.timedelta
) -> None:
    authority = _load_authority(folder)
    kind = "host" if identity.role is Role.HOST else "client"
    private_folder(out)
    key = _key_to_use(out / f"{kind}.pem", out / f"{kind}.key", identity)
    certificate = authority.issue(
        identity.name,
        key.public_key(),
        Validity.lasting(life, back=BACK),
        alternative_names=[x509.UniformResourceIdentifier(identity.uri), *names],
        uses=[SERVER, CLIENT] if kind == "host" else [CLIENT],
    )
    pem = certificate_pem(certificate)
    write_public(out / "ca.pem", certificate_pem(authority.certificate))
    write_public(out / f"{kind}.pem", pem)
    record = folder / "issued" / identity.role.name.lower()
    private_folder(record)
    write_public(record / f"{identity.name}.pem", pem)


def _key_to_use(certificate: Path, key: Path, identity: Identity) -> Key:
    """The key that lies there from an earlier certificate of the same identity, or a new one, written there."""
    if certificate.exists():
        holder = identity_of(load_certificate(certificate))
        if holder != identity:
            raise Conflict(
                f"{certificate} belongs to {holder.role.name.lower()} '{holder.name}'",
                why=f"it would be overwritten by a certificate for {identity.role.name.lower()} '{identity.name}'",
                todo="choose another folder with --out",
            )
    if key.exists():
        return load_key(key)
    new = make_key()
    write_private(key, key_pem(new))
    return new


def identity_of(certificate: x509.Certificate) -> Identity:
    """Whom a certificate names. Raises :class:`NotPermitted` if it is none of Limosa's."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return from_uris(())
    return from_uris(names.get_values_for_type(x509.UniformResourceIdentifier))


def _check_name(name: str) -> None:
    if not is_name(name):
        raise InvalidInput(
            f"'{name[:80]}' is not a valid name",
            why="use at most 63 letters, digits, '_', '.' and '-', with a letter or digit first",
        )


def _alternative_name(text: str) -> x509.GeneralName:
    try:
        return host_or_address(text)
    except ValueError as fault:
        raise InvalidInput(
            f"'{text[:80]}' is not the address of a host",
            why=str(fault),
            todo="write an IP address or a DNS name, without port",
        ) from fault


def _load_authority(folder: Path) -> Authority:
    authority = Authority(load_certificate(folder / "ca.pem"), load_key(folder / "ca.key"))
    if authority.certificate.public_key() != authority.key.public_key():
        raise StateError(f"the authority in {folder} is damaged", why="ca.key is not the key of ca.pem")
    if authority.certificate.not_valid_after_utc < datetime.datetime.now(datetime.UTC):
        raise StateError(
            f"the authority in {folder} has expired",
            why=f"it was valid until {authority.certificate.not_valid_after_utc:%Y-%m-%d}",
            todo="make a new one with 'limosa ca init' in another folder and issue all certificates anew",
        )
    return authority
