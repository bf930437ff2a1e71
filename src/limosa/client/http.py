"""One HTTP/1.1 connection over a socket that is already open: a request, then its whole reply or its lines.

The parser is httptools (llhttp), which the daemon's server uses too; ``http.client`` would cost every command 20 ms
more for its e-mail parser. A reply is bounded in size, and one that ends early is a :class:`ConnectionError`, never a
shorter reply.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator

from httptools import HttpParserError, HttpResponseParser

from limosa import __version__

MAX_BODY_BYTES = 64 * 1024 * 1024
MAX_LINE_BYTES = 4 * 1024 * 1024
MAX_HEADERS = 100
_CHUNK = 64 * 1024


class Reply:
    """What arrived of one reply so far. The methods named ``on_...`` are called by the parser."""

    def __init__(self) -> None:
        self.parser = HttpResponseParser(self)
        self.headers_complete = False
        self.complete = False
        self.keeps_alive = False
        self.body = bytearray()
        self._headers = 0

    @property
    def status(self) -> int:
        """The status code, once the headers are complete."""
        return int(self.parser.get_status_code())

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers += 1
        if self._headers > MAX_HEADERS:
            raise ConnectionError("the reply has too many headers")

    def on_headers_complete(self) -> None:
        self.headers_complete = True

    def on_body(self, body: bytes) -> None:
        self.body += body
        if len(self.body) > MAX_BODY_BYTES:
            raise ConnectionError(f"the reply is larger than {MAX_BODY_BYTES} bytes")

    def on_message_complete(self) -> None:
        self.complete = True
        self.keeps_alive = bool(self.parser.should_keep_alive())


class Connection:
    """Sends requests one after another. All methods raise ``OSError`` if the connection breaks or talks no HTTP."""

    def __init__(self, stream: socket.socket, authority: str) -> None:
        self._stream = stream
        self._authority = authority
        self.reusable = True

    def send(self, method: str, path: str, body: bytes | None, *, timeout_s: float | None) -> None:
        """Send a request with a JSON body, or with none. ``timeout_s`` is for each wait until the reply has ended."""
        self.reusable = False
        self._stream.settimeout(timeout_s)
        lines = [
            f"{method} {path} HTTP/1.1",
            f"Host: {self._authority}",
            f"User-Agent: limosa/{__version__}",
            "Accept: application/json",
        ]
        if body is not None:
            lines.append("Content-Type: application/json")
        if body is not None or method != "GET":
            lines.append(f"Content-Length: {len(body or b'')}")
        try:
            self._stream.sendall("\r\n".join([*lines, "", ""]).encode("ascii") + (body or b""))
        except TimeoutError:
            raise
        except OSError:
            # Who closes early may have said why (a TLS alert, a reply); reading tells, or fails in its turn.
            return

    def head(self) -> Reply:
        """Wait for the status and headers of the reply."""
        reply = Reply()
        while not reply.headers_complete:
            self._receive(reply)
        return reply

    def rest(self, reply: Reply) -> bytes:
        """Wait for the whole body."""
        while not reply.complete:
            self._receive(reply)
        return bytes(reply.body)

    def lines(self, reply: Reply) -> Iterator[bytes]:
        """The lines of the body, each as soon as it is there, without its end; ends with the body."""
        while True:
            *lines, rest = reply.body.split(b"\n")
            reply.body[:] = rest
            yield from (bytes(line) for line in lines if line)
            if reply.complete:
                break
            if len(rest) > MAX_LINE_BYTES:
                raise ConnectionError(f"a line of the reply is longer than {MAX_LINE_BYTES} bytes")
            self._receive(reply)
        if rest:
            yield bytes(rest)

    def close(self) -> None:
        """Close the connection; whatever was under way on it is given up."""
        self.reusable = False
        self._stream.close()

    def _receive(self, reply: Reply) -> None:
        data = self._stream.recv(_CHUNK)
        if not data:
            raise ConnectionError("the connection was closed before the reply had ended")
        try:
            reply.parser.feed_data(data)
        except HttpParserError as fault:
            cause = fault.__context__
            raise cause if isinstance(cause, ConnectionError) else ConnectionError(f"no HTTP reply: {fault}") from fault
        if reply.complete:
            self.reusable = reply.keeps_alive
