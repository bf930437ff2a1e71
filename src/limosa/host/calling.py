"""Calling another host: a connection to its daemon, at whichever of its addresses answers.

The connection is opened with mutual TLS before anything is asked. A host is called by the name in its certificate; TLS
refuses another, so it may be called at any address that it tells. Pings every second notice a dead network within four
seconds; the kernel notices within five that they are not acknowledged.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, WebSocketException
from websockets.frames import CloseCode

from limosa.background import then
from limosa.errors import HostNotTrusted, HostUnreachable, InvalidInput, StateError, from_fault
from limosa.model import reading
from limosa.security import expiry, tls
from limosa.security.identity import from_peer_certificate
from limosa.settings.address import split_address
from limosa.settings.daemon import DEFAULT_PORT
from limosa.wire import peer as say
from limosa.wire import versions
from limosa.wire.encoding import encode
from limosa.wire.endpoints import PEER_PATH, Role
from limosa.wire.parsing import parse

CONNECT_WITHIN_S = 3.0
#: After this long without an answer at one address the next is called, too.
HEAD_START_S = 0.2
#: So many addresses of a host are called besides the configured one, at most.
MOST_OTHERS = 8
PING_EVERY_S = 1.0
PONG_WITHIN_S = 3.0
#: What was sent and is not acknowledged after this long ends the connection, whatever the program is busy with
#: (TCP_USER_TIMEOUT, tcp(7)).
UNACKNOWLEDGED_MS = 5000
MAX_MESSAGE_BYTES = 16 * 1024 * 1024
#: The reason with which the library closes a connection whose pings are not answered.
KEEPALIVE = "keepalive ping timeout"

Answer = TypeVar("Answer")
decoder = reading.decoder(say.FromDestination)


@dataclass(frozen=True)
class Call:
    """A connection on which both sides have said who they are, and nothing else yet."""

    connection: ClientConnection
    #: by its certificate
    host: str
    #: of the protocol
    version: int


class Caller:
    """Opens connections with one destination: to its configured address, or, where that does not answer, to one that it
    has told.

    ``address`` gives the configured one, ``HOST`` or ``HOST:PORT``, as it is then. Our certificate is in ``pki``, and
    read for each call.
    """

    def __init__(self, destination: str, address: Callable[[], str], own_name: str, pki: Path) -> None:
        self.destination = destination
        self._address = address
        self._own_name = own_name
        self._pki = pki
        self._told: tuple[str, ...] = ()

    def learn(self, addresses: Sequence[str]) -> None:
        """The destination says that it has these, best first."""
        self._told = tuple(addresses)

    async def call(self) -> Call:
        """A new connection. Raises :class:`HostUnreachable` (nobody there) and :class:`HostNotTrusted` (TLS said no),
        both as the configured address has it; the latter also if our own certificate is out of date."""
        configured, context = self._address(), tls.client_context(self._pki, "host")
        host, port = split_address(configured)
        others = [at(one, port) for one in self._told if one != host][:MOST_OTHERS]
        addresses = enumerate((configured, *others))
        try:
            return await _first([self._call(address, number * HEAD_START_S, context) for number, address in addresses])
        except HostUnreachable as error:
            self._check_own(error)
            raise

    def _check_own(self, error: HostUnreachable) -> None:
        """Raise if it is our certificate: who is called ends the connection without a word that could be told from
        others."""
        try:
            tls.check_dates(self._pki / "host.pem")
        except StateError as ours:
            raise HostNotTrusted(
                f"host '{self.destination}' cannot be called", why=str(ours), todo=ours.todo, host=self.destination
            ) from error

    async def _call(self, address: str, after_s: float, context: ssl.SSLContext) -> Call:
        await asyncio.sleep(after_s)
        connection = await _connect(self.destination, address, context)
        try:
            async with asyncio.timeout(CONNECT_WITHIN_S):
                return await _greet(connection, self.destination, self._own_name)
        except BaseException as error:
            connection.transport.abort()
            if isinstance(error, TimeoutError):
                raise broken(self.destination, f"it said nothing within {CONNECT_WITHIN_S:.0f} s") from error
            raise


def at(address: str, port: int | None) -> str:
    """``HOST:PORT`` of an address, as it is written in settings; without a port, the one daemons have by default."""
    return f"{f'[{address}]' if ':' in address else address}:{port or DEFAULT_PORT}"


async def ask(connection: ClientConnection, host: str, message: say.Message, answer: type[Answer]) -> Answer:
    """Ask over a connection that nobody else reads. Raises what the destination raised, and
    :class:`HostUnreachable`."""
    try:
        await connection.send(encode(message))
        heard = parse(await connection.recv(), decoder, "its answer")
    except (WebSocketException, InvalidInput, OSError) as error:
        raise broken(host, why_broken(error)) from error
    if isinstance(heard, say.Failed):
        raise from_fault(heard.fault)
    if not isinstance(heard, answer):
        raise broken(host, f"it answered {type(heard).__name__}, which was not asked for")
    return heard


def broken(host: str, why: str) -> HostUnreachable:
    """The error that stands for the end of a session."""
    return HostUnreachable(
        f"the session with host '{host}' broke",
        why=why,
        todo=f"check that 'limosa host serve' runs on '{host}', and the network between",
        host=host,
    )


async def _first(calls: Sequence[Coroutine[None, None, Call]]) -> Call:
    """What the first to succeed gives; the others are ended. If none does, raises what the first of them raised."""
    tries = [asyncio.ensure_future(one) for one in calls]
    taken: asyncio.Task[Call] | None = None
    try:
        pending = set(tries)
        while pending and taken is None:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            taken = next((one for one in tries if one in done and one.exception() is None), None)
        return (taken or tries[0]).result()
    finally:
        for one in tries:
            if one is not taken:
                one.cancel()
                then(one, lambda made: made.connection.transport.abort())


async def _connect(destination: str, address: str, context: ssl.SSLContext) -> ClientConnection:
    host, port = split_address(address)
    try:
        connection = await connect(
            f"wss://{at(host, port)}{PEER_PATH}",
            ssl=context,
            server_hostname=split_address(destination)[0],
            open_timeout=CONNECT_WITHIN_S,
            ping_interval=PING_EVERY_S,
            ping_timeout=PONG_WITHIN_S,
            close_timeout=1,
            compression=None,
            max_size=MAX_MESSAGE_BYTES,
            proxy=None,
        )
    except ssl.SSLError as error:
        if expiry.is_expired(error):
            raise expiry.not_trusted(destination, address) from error
        raise HostNotTrusted(
            f"no TLS session with host '{destination}' at {address}",
            why=error.verify_message if isinstance(error, ssl.SSLCertVerificationError) else error.reason or str(error),
            todo="both certificates must come from the same authority and be valid now: see 'limosa ca'",
            host=destination,
        ) from error
    except (OSError, TimeoutError, InvalidHandshake, WebSocketException) as error:
        raise HostUnreachable(
            f"host '{destination}' cannot be reached at {address}",
            why=why_unreachable(error),
            todo="check that 'limosa host serve' runs there, its address in the setting 'peers', and firewalls",
            host=destination,
        ) from error
    connection.transport.get_extra_info("socket").setsockopt(
        socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNACKNOWLEDGED_MS
    )
    return connection


async def _greet(connection: ClientConnection, destination: str, own_name: str) -> Call:
    """Agree on a version and on who is who. Raises :class:`HostUnreachable` or :class:`HostNotTrusted`."""
    hello = say.Hello(host=own_name, oldest=versions.OLDEST, newest=versions.NEWEST)
    welcome = await ask(connection, destination, hello, say.Welcome)
    identity = from_peer_certificate(connection.transport.get_extra_info("peercert") or {})
    if identity.role is not Role.HOST or identity.name != welcome.host:
        raise HostNotTrusted(
            f"'{destination}' answered as host '{welcome.host}' with a certificate of '{identity.name}'",
            todo="issue it a host certificate of its own name with 'limosa ca issue'",
            host=destination,
        )
    version = versions.agree((versions.OLDEST, versions.NEWEST), (welcome.version,) * 2, host=welcome.host)
    return Call(connection, welcome.host, version)


def why_unreachable(error: Exception) -> str:
    """In words, where the library has only numbers for it."""
    if isinstance(error, socket.gaierror):
        return f"its name cannot be looked up ({error.strerror})"
    # asyncio puts a sentence of its own, with the address, in the place of the system's.
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return str(error) or "no answer in time"


def why_broken(error: Exception) -> str:
    """What ended a connection that was open, in words that are not those of the library or the protocol."""
    if not isinstance(error, ConnectionClosed):
        return why_unreachable(error)
    for close, silent in ((error.rcvd, "it did not hear from this host"), (error.sent, "it does not answer any more")):
        if close is not None and close.code == CloseCode.INTERNAL_ERROR and close.reason == KEEPALIVE:
            return silent
    if error.rcvd is not None:
        return error.rcvd.reason or "it closed the session"
    if error.sent is not None:
        return f"what it said is not valid: {error.sent.reason or error.sent.code}"
    return "the connection was cut"
