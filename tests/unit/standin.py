"""A small stand-in for the host daemon: the table of endpoints over a Unix socket, answered by functions of a test.

It shares nothing with the real server but the table, so that client and server are not wrong in the same way.
"""

from __future__ import annotations

import re
import socketserver
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, Self

import msgspec

from limosa.errors import LimosaError, NotFound
from limosa.model.base import Model
from limosa.wire.api import Empty
from limosa.wire.endpoints import ENDPOINTS, Endpoint

#: Gets the request and the path's parameters; gives the reply, or an iterator of replies for a stream.
Answer = Callable[..., Any]
Answers = dict[Endpoint[Any, Any], Answer]


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: StandIn

    def address_string(self) -> str:
        return "unix"

    def log_message(self, *_: object) -> None:
        pass

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            endpoint, parameters = self.server.find(self.command, self.path)
            self.server.seen.append((endpoint, parameters, body))
            request = Empty() if endpoint.request is Empty else msgspec.json.decode(body, type=endpoint.request)
            reply = self.server.answers[endpoint](request, **parameters)
        except LimosaError as error:
            self.reply(error.http_status, msgspec.json.encode(error.fault()))
            return
        if isinstance(reply, bytes):
            self.wfile.write(reply)
            self.close_connection = True
        elif isinstance(reply, Iterator):
            self.stream(reply)
        else:
            self.reply(200, msgspec.json.encode(reply))

    do_GET = do_POST = do_PATCH = do_DELETE = answer  # noqa: N815 - the names http.server looks for

    def reply(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def stream(self, replies: Iterator[Model]) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            for reply in replies:
                line = msgspec.json.encode(reply) + b"\n"
                self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
        except ConnectionAbortedError:
            self.close_connection = True
            return
        self.wfile.write(b"0\r\n\r\n")


class StandIn(socketserver.ThreadingUnixStreamServer):
    """The server. ``seen`` lists the requests; ``connections`` counts how often somebody connected.

    An answer may be bytes, which are sent as they are before the connection ends, and a stream may raise
    ``ConnectionAbortedError`` to end in the middle.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, path: Path, answers: Answers) -> None:
        super().__init__(str(path), Handler)
        self.path = str(path)
        self.answers = answers
        self.seen: list[tuple[Endpoint[Any, Any], dict[str, str], bytes]] = []
        self.connections = 0

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections += 1
        super().process_request(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def find(self, method: str, path: str) -> tuple[Endpoint[Any, Any], dict[str, str]]:
        """The endpoint a request line means."""
        for endpoint in ENDPOINTS:
            pattern = re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", endpoint.path)
            match = re.fullmatch(pattern, path)
            if match and endpoint.method == method and endpoint in self.answers:
                return endpoint, match.groupdict()
        raise NotFound(f"there is no {method} {path}")
