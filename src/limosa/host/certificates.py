"""The certificate with which a daemon listens: renewed while it runs, and no hindrance when it has expired.

The files are looked at when somebody calls, so that nobody has to tell the daemon of a renewal, and what is renewed
serves from the next connection on. If it cannot serve, the log says so, once, and what was there before serves on.
Whoever calls is shown also a certificate that has expired, and refuses it; the Unix socket and the VMs do not need one.
What the daemon shows when it calls others is read for each call (``tls.client_context``).
"""

from __future__ import annotations

import logging
import ssl
from pathlib import Path

from limosa.errors import LimosaError
from limosa.security import tls

_log = logging.getLogger(__name__)
_Stamp = tuple[tuple[int, int, int], ...]


class Certificates:
    """``ca.pem``, ``host.pem`` and ``host.key`` of a host in ``pki``.

    Raises :class:`StateError` if they cannot serve. One that is out of date does; the log tells of it.
    """

    def __init__(self, pki: Path, host: str) -> None:
        self._pki = pki
        self._host = host
        self._seen = self._stamp()
        self._newest = self._load()
        #: for a listener; connections get what is newest
        self.context = self._newest
        self.context.sni_callback = self._show_newest

    def _load(self) -> ssl.SSLContext:
        context = tls.server_context(self._pki)
        certificate = self._pki / "host.pem"
        tls.check_holder(certificate, self._host)
        try:
            tls.check_dates(certificate)
        except LimosaError as error:
            _log.error("other hosts and remote commands will refuse this host: %s (to do: %s)", error, error.todo)
        return context

    def _show_newest(self, connection: ssl.SSLObject, _: str | None, __: ssl.SSLContext) -> None:
        # OpenSSL calls this in each handshake, also if the caller names no host (final_server_name in
        # ssl/statem/extensions.c).
        self._look()
        connection.context = self._newest

    def _look(self) -> None:
        stamp = self._stamp()
        if stamp == self._seen:
            return
        self._seen = stamp
        try:
            self._newest = self._load()
        except (LimosaError, OSError) as error:
            _log.error("the certificate in %s stays as it was before it was changed: %s", self._pki, error)
        else:
            _log.info("the certificate in %s was renewed", self._pki)

    def _stamp(self) -> _Stamp:
        return tuple(_stamp_of(self._pki / name) for name in ("ca.pem", "host.pem", "host.key"))


def _stamp_of(path: Path) -> tuple[int, int, int]:
    """What changes with a file; zeroes if there is none."""
    try:
        found = path.stat()
    except OSError:
        return 0, 0, 0
    return found.st_ino, found.st_size, found.st_mtime_ns
