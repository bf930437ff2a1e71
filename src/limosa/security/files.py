"""Keys and certificates as files: private folders, whole and durable writes, loading with errors people understand."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from limosa.errors import NotFound, StateError
from limosa.security.certificate import Key
from limosa.settings.toml import write_atomically


def private_folder(folder: Path) -> None:
    """Create ``folder`` with mode 0700; one that is there already must be ours, and nobody else's to write to.

    Raises :class:`StateError`. In a folder others write to, a key could be swapped or a link be laid under it.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as fault:
        raise StateError(f"cannot create the folder {folder}", why=fault.strerror or str(fault)) from fault
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o022:
        raise StateError(
            f"{folder} is not a safe place for keys",
            why="other users may write to it",
            todo="choose another folder, or make yourself its owner and set its mode to 0700",
        )


def write_private(path: Path, data: bytes) -> None:
    """Write a key: mode 0600, whole or not at all. Raises :class:`StateError`, the old file untouched."""
    write_atomically(path, data)


def write_public(path: Path, data: bytes) -> None:
    """Write a certificate: mode 0644, whole or not at all. Raises :class:`StateError`, the old file untouched."""
    write_atomically(path, data)
    path.chmod(0o644)


def load_certificate(path: Path) -> x509.Certificate:
    """Raises :class:`NotFound` or :class:`StateError`."""
    try:
        return x509.load_pem_x509_certificate(_read(path))
    except ValueError as fault:
        raise StateError(f"{path} is not a certificate", why=str(fault)) from fault


def load_key(path: Path) -> Key:
    """Raises :class:`NotFound` or :class:`StateError`."""
    try:
        key = serialization.load_pem_private_key(_read(path), None)
    except (ValueError, TypeError) as fault:
        raise StateError(f"{path} is not a private key", why=str(fault)) from fault
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise StateError(f"{path} is not one of Limosa's keys", why="it is not an elliptic-curve key")
    return key


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as fault:
        raise NotFound(
            f"there is no {path}",
            why="no certificate authority was made there",
            todo="make one with 'limosa ca init', or name its folder with --folder",
        ) from fault
    except OSError as fault:
        raise StateError(f"cannot read {path}", why=fault.strerror or str(fault)) from fault
