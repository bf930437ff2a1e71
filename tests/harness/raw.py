"""Talking to a daemon without Limosa's own client: raw HTTP, TLS with any certificate, a peer session of one's own."""

from __future__ import annotations

import asyncio
import http.client
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from harness.background import Background
from harness.hosts import Host
from limosa.errors import every_error
from limosa.migration.ownership import DESTINATION_ENDED
from limosa.model.migration import Fault, Side
from limosa.model.vm import VmState
from limosa.settings.daemon import DEFAULT_PORT
from limosa.wire import endpoints, peer, versions

#: A destination waits half a minute for a stream that does not come.
ANSWER_WITHIN_S = 45.0
KNOWN_CODES = {error.code for error in every_error()} - {"internal"}


def request(host: Host, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
    """One HTTP request over the Unix socket, with anything as its body."""
    connection = http.client.HTTPConnection("localhost", timeout=ANSWER_WITHIN_S)
    connection.sock = unix_socket(host)
    try:
        connection.request(method, path, body)
        reply = connection.getresponse()
        return reply.status, reply.read()
    finally:
        connection.close()


def raw_request(host: Host, data: bytes) -> bytes:
    """Whatever comes back for these bytes, until the daemon closes or has answered."""
    with unix_socket(host) as stream:
        stream.sendall(data)
        stream.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: stream.recv(65536), b""))


def unix_socket(host: Host) -> socket.socket:
    stream = socket.socket(socket.AF_UNIX)
    stream.settimeout(ANSWER_WITHIN_S)
    stream.connect(str(host.run / "api.sock"))
    return stream


def fault_of(data: bytes) -> Fault:
    """The fault that a refusal says; its code is one that is documented and is not a bug."""
    fault = msgspec.json.decode(data, type=Fault)
    assert fault.code in KNOWN_CODES, fault
    assert fault.what
    return fault


def tls_context(pki: Path, kind: str) -> ssl.SSLContext:
    """What a program with the certificate of that kind (``host``, ``client``) would use."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(pki / "ca.pem")
    context.load_cert_chain(pki / f"{kind}.pem", pki / f"{kind}.key")
    return context


def tls_request(host: Host, context: ssl.SSLContext, method: str, path: str) -> tuple[int, bytes]:
    """One HTTP request over TLS. Raises ``OSError``, of which ``ssl.SSLError`` is one, if there is no session."""
    connection = http.client.HTTPSConnection(host.address, DEFAULT_PORT, timeout=ANSWER_WITHIN_S, context=context)
    try:
        connection.request(method, path)
        reply = connection.getresponse()
        return reply.status, reply.read()
    finally:
        connection.close()


class PeerSession:
    """A source host that says whatever it likes."""

    def __init__(self, background: Background, connection: ClientConnection) -> None:
        self._background = background
        self._connection = connection

    def say(self, message: peer.FromSource | dict[str, Any] | bytes | str) -> None:
        """Send a message, or bytes or text that are none."""
        data = message if isinstance(message, bytes | str) else msgspec.json.encode(message)
        self._background.run(self._connection.send(data))

    def hear(self) -> peer.FromDestination:
        """The next message. Raises ``websockets.ConnectionClosed``."""
        data = self._background.run(asyncio.wait_for(self._connection.recv(), ANSWER_WITHIN_S))
        message: peer.FromDestination = msgspec.json.decode(data, type=peer.FromDestination)
        return message

    def ask(self, message: peer.FromSource | dict[str, Any] | bytes | str) -> peer.FromDestination:
        """Send, and the answer."""
        self.say(message)
        return self.hear()

    def refusal(self, message: peer.FromSource | dict[str, Any] | bytes | str) -> str:
        """Send, and the code with which that was refused."""
        answer = self.ask(message)
        assert isinstance(answer, peer.Failed), answer
        assert answer.fault.code in KNOWN_CODES, answer.fault
        return answer.fault.code


@contextmanager
def peer_session(to: Host, pki: Path, name: str) -> Iterator[PeerSession]:
    """A session with ``to`` with the host certificate in ``pki``, greeted as ``name`` unless that is empty."""
    with ungreeted_session(to, tls_context(pki, "host")) as session:
        if name:
            hello = peer.Hello(host=name, oldest=versions.OLDEST, newest=versions.NEWEST)
            assert isinstance(session.ask(hello), peer.Welcome)
        yield session


@contextmanager
def ungreeted_session(to: Host, context: ssl.SSLContext) -> Iterator[PeerSession]:
    """A session with ``to``, with whatever certificate. Raises ``OSError`` and ``websockets.InvalidHandshake``."""
    connecting = connect(
        f"wss://{to.address}:{DEFAULT_PORT}{endpoints.PEER_PATH}",
        ssl=context,
        open_timeout=ANSWER_WITHIN_S,
        close_timeout=2,
        compression=None,
        proxy=None,
    )
    with Background() as background, background.open(connecting) as connection:
        yield PeerSession(background, connection)


@contextmanager
def false_destination(pki: Path, *answers: bytes | str) -> Iterator[str]:
    """A host with the certificate in ``pki`` that gives these answers, one for each message, and then none.

    Gives its address.
    """
    with Background() as background, background.open(_serve_answers(pki, answers)) as server:
        yield f"127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}"


@asynccontextmanager
async def _serve_answers(pki: Path, answers: tuple[bytes | str, ...]) -> AsyncIterator[Server]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pki / "host.pem", pki / "host.key")

    async def answer(connection: ServerConnection) -> None:
        rest = iter(answers)
        with suppress(ConnectionClosed):
            async for _ in connection:
                for data in islice(rest, 1):
                    await connection.send(data)

    async with serve(answer, "127.0.0.1", 0, ssl=context) as server:
        yield server


def nothing_landed(host: Host) -> bool:
    """Whether the host has no VM, QEMU, folder, reservation or unfinished landing."""
    status = host.client.call(endpoints.HOST)
    journals = [path.read_bytes().splitlines() for path in (host.state / "migrations").glob("*.destination.jsonl")]
    # A journal with a header alone is one whose daemon still works on it.
    ended = all(len(lines) > 1 and msgspec.json.decode(lines[-1])["step"] in DESTINATION_ENDED for lines in journals)
    return (
        ended
        and status.incoming == 0
        and not host.qemus()
        and not list((host.state / "vms").iterdir())
        and not list((host.run / "vm").iterdir())
        and not any(vm.state is VmState.INCOMING for vm in host.client.call(endpoints.LIST_VMS).vms)
        and not any(move.side is Side.DESTINATION for move in host.client.call(endpoints.LIST_MIGRATIONS).migrations)
    )
