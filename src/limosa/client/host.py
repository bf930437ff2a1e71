"""The client of a host daemon, typed by the table of endpoints.

::

    with HostClient(UnixRoute("/run/limosa/api.sock")) as client:
        vm = client.call(START_VM, vm="web1")
        for migration in client.stream(WATCH_MIGRATION, migration="abc"):
            ...

Errors of the daemon arrive as the same :mod:`limosa.errors` the daemon raised. A connection is kept for the next
request; one that lay idle for a while is replaced, because the server may just be closing it and then nobody could
tell whether a request took effect.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from urllib.parse import quote

import msgspec

from limosa.client.http import Connection
from limosa.client.route import Route, UnixRoute
from limosa.errors import HostUnreachable, InvalidInput, LimosaError, from_fault
from limosa.model import reading
from limosa.model.migration import Fault
from limosa.wire.api import Empty
from limosa.wire.encoding import encode
from limosa.wire.endpoints import Endpoint, Reply, Request

#: Longest wait for an ordinary reply. Starting a VM or checking a move takes a second or two.
REPLY_TIMEOUT_S = 120.0
_IDLE_S = 2.0


class HostClient:
    """Talks to one daemon, one request at a time; not for several threads. Use one client a thread."""

    def __init__(self, route: Route | str, *, timeout_s: float = REPLY_TIMEOUT_S) -> None:
        """``route`` may be the path of a Unix socket. Nothing is connected yet."""
        self.route: Route = UnixRoute(route) if isinstance(route, str) else route
        self._timeout_s = timeout_s
        self._connection: Connection | None = None
        self._used_at = 0.0

    def __enter__(self) -> HostClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection, if any. The client can be used again."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def call(self, endpoint: Endpoint[Request, Reply], request: Request | None = None, **path_parameters: str) -> Reply:
        """Ask and wait for the reply.

        Raises what the daemon raised, or :class:`HostUnreachable`, after which it is not known whether the request
        took effect unless the message says that no connection was made.
        """
        body = self._body(endpoint, request)
        try:
            connection = self._send(endpoint, path_parameters, body, self._timeout_s)
            reply = connection.head()
            data = connection.rest(reply)
        except OSError as fault:
            self.close()
            raise self.route.explain(fault) from fault
        self._used_at = time.monotonic()
        if reply.status // 100 != 2:
            raise error_of(reply.status, data)
        return self._decode(data, endpoint.reply)

    def stream(
        self, endpoint: Endpoint[Request, Reply], request: Request | None = None, **path_parameters: str
    ) -> Iterator[Reply]:
        """Ask and give each object of the reply as soon as it is there. Waits without limit for the next one.

        Raises as :meth:`call` does. A stream that is not read to its end takes the connection with it.
        """
        body = self._body(endpoint, request)
        connection: Connection | None = None
        try:
            connection = self._send(endpoint, path_parameters, body, None)
            reply = connection.head()
            if reply.status // 100 != 2:
                raise error_of(reply.status, connection.rest(reply))
            for line in connection.lines(reply):
                yield self._decode(line, endpoint.reply)
            self._used_at = time.monotonic()
        except OSError as fault:
            raise self.route.explain(fault) from fault
        finally:
            if connection is None or not connection.reusable:
                self.close()

    def _body(self, endpoint: Endpoint[Request, Reply], request: Request | None) -> bytes | None:
        if endpoint.request is Empty:
            return None
        if request is None:
            raise TypeError(f"{endpoint.method} {endpoint.path} needs a {endpoint.request.__name__}")
        try:
            return encode(request)
        except UnicodeEncodeError as fault:
            # A command line may hold any bytes; Python keeps those that are no UTF-8 as lone surrogates.
            raise InvalidInput("what was given is not valid", why="it is not UTF-8") from fault

    def _send(
        self,
        endpoint: Endpoint[Request, Reply],
        parameters: dict[str, str],
        body: bytes | None,
        timeout_s: float | None,
    ) -> Connection:
        path = fill_path(endpoint.path, parameters)
        connection = self._connection
        if connection is None or not connection.reusable or time.monotonic() - self._used_at > _IDLE_S:
            self.close()
            self._connection = connection = Connection(self.route.connect(), self.route.authority)
        connection.send(endpoint.method, path, body, timeout_s=timeout_s)
        return connection

    def _decode(self, data: bytes, cls: type[Reply]) -> Reply:
        if issubclass(cls, Empty) and not data:
            return cls()
        try:
            return reading.decode(data, cls)
        except msgspec.DecodeError as fault:
            raise HostUnreachable(
                "the host gave an answer that this command does not understand",
                why=str(fault),
                todo="use the release of Limosa that the host uses, or the one after it",
            ) from fault


def error_of(status: int, data: bytes) -> LimosaError:
    """The error that a refusing reply stands for."""
    try:
        return from_fault(reading.decode(data, Fault))
    except msgspec.DecodeError:
        return LimosaError(
            f"the host refused the request with status {status}",
            why=data[:200].decode("utf-8", "replace"),
            todo="use the release of Limosa that the host uses, or the one after it",
        )


def fill_path(path: str, parameters: dict[str, str]) -> str:
    """The path of an endpoint with its parameters put in, quoted so that none reaches beyond its place."""
    for name, value in parameters.items():
        if value in ("", ".", ".."):
            raise InvalidInput(f"'{value}' is not a valid name", why="it would mean another path")
        try:
            path = path.replace("{" + name + "}", quote(value, safe=""))
        except UnicodeEncodeError as fault:
            raise InvalidInput("the name is not valid", why=str(fault)) from fault
    if "{" in path:
        raise TypeError(f"{path} lacks a parameter")
    return path
