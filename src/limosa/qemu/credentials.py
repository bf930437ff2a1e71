"""Files in which QEMU is handed TLS credentials: there only while it reads them.

QEMU's ``tls-creds-x509`` object reads a folder of PEM files with fixed names when it is made and never again, so they
are removed as soon as the object stands. The folder belongs to us, QEMU can only look into it; the files are readable
by QEMU's user alone.

``dh-params.pem`` is the group ``ffdhe2048`` of RFC 7919. TLS 1.3 does not need it, but without the file QEMU's server
side makes parameters of its own each time, which takes 150 ms and more of every move's build-up.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from limosa.errors import QemuError
from limosa.wire.peer import StreamCredentials

Endpoint = Literal["server", "client"]

_FFDHE2048 = """\
-----BEGIN DH PARAMETERS-----
MIIBCAKCAQEA//////////+t+FRYortKmq/cViAnPTzx2LnFg84tNpWp4TZBFGQz
+8yTnc4kmz75fS/jY2MMddj2gbICrsRhetPfHtXV/WVhJDP1H18GbtCFY2VVPe0a
87VXE15/V8k1mE8McODmi3fipona8+/och3xWKE2rec1MKzKT0g6eXq8CrGCsyT7
YdEIqUuyyOP7uWrat2DX9GgdT0Kj3jlN9K5W7edjcrsZCwenyO4KbXCeAvzhzffi
7MA0BM0oNC9hkXL+nOmFg/+OTxIy7vKBg8P+OxtMb61zO7X8vC7CIAXFjvGDfRaD
ssbzSibBsu/6iGtCOGEoXJf//////////wIBAg==
-----END DH PARAMETERS-----
"""


@contextmanager
def written(
    folder: Path, credentials: StreamCredentials, endpoint: Endpoint, owner: tuple[int, int] | None
) -> Iterator[None]:
    """The credentials as files in a new ``folder``, which is gone afterwards. ``owner`` is QEMU's uid and gid.

    Raises :class:`QemuError`; nothing is left then either.
    """
    shutil.rmtree(folder, ignore_errors=True)
    try:
        try:
            folder.mkdir(mode=0o700)
            for name, text in _files(credentials, endpoint).items():
                _write(folder / name, text, owner)
            if owner is not None:
                os.chown(folder, 0, owner[1])
                folder.chmod(0o710)
        except OSError as error:
            raise QemuError(f"cannot write TLS credentials for QEMU into {folder}", why=error.strerror or "") from error
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _files(credentials: StreamCredentials, endpoint: Endpoint) -> dict[str, str]:
    return {
        "ca-cert.pem": credentials.authority,
        f"{endpoint}-cert.pem": credentials.certificate,
        f"{endpoint}-key.pem": credentials.key,
        "dh-params.pem": _FFDHE2048,
    }


def _write(path: Path, text: str, owner: tuple[int, int] | None) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w") as stream:
        stream.write(text)
        if owner is not None:
            os.fchown(stream.fileno(), *owner)
