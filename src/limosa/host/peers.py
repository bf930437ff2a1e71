"""The source's end of a session with another host: a :class:`limosa.migration.peer.Peer` over one WebSocket.

The session is opened with mutual TLS before anything is asked. A host is called by the name in its certificate; TLS
refuses another. Pings every second notice a dead network within four seconds; the kernel notices within five that they
are not acknowledged.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, TypeVar

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidHandshake, WebSocketException

from limosa.errors import HostNotTrusted, HostUnreachable, InvalidInput, from_fault
from limosa.migration import layers
from limosa.migration.peer import SendLayers
from limosa.model import reading
from limosa.model.base import MigrationId
from limosa.model.facts import DestinationFacts
from limosa.model.storage import BackingFile
from limosa.model.vm import Accelerator, VmConfig
from limosa.security import expiry
from limosa.security.identity import from_peer_certificate
from limosa.settings.address import split_address
from limosa.settings.daemon import DEFAULT_PORT
from limosa.wire import peer as say
from limosa.wire import versions
from limosa.wire.encoding import encode
from limosa.wire.endpoints import PEER_PATH, Role
from limosa.wire.parsing import parse

CONNECT_WITHIN_S = 3.0
#: Longest wait for facts: storage that has to be woken up may take a while.
INSPECT_WITHIN_S = 30.0
PING_EVERY_S = 1.0
PONG_WITHIN_S = 3.0
#: What was sent and is not acknowledged after this long ends the connection, whatever the program is busy with
#: (TCP_USER_TIMEOUT, tcp(7)).
UNACKNOWLEDGED_MS = 5000
MAX_MESSAGE_BYTES = 16 * 1024 * 1024

Answer = TypeVar("Answer")
_decoder = reading.decoder(say.FromDestination)


class RemotePeer:
    """A session with a destination. Made by :func:`dial`."""

    def __init__(self, connection: ClientConnection, host: str) -> None:
        self.host = host
        #: of the protocol, agreed on by :meth:`hello`
        self.version = versions.OLDEST
        self._connection = connection
        loop = asyncio.get_running_loop()
        self.lost: asyncio.Future[None] = loop.create_future()
        self._adopted: asyncio.Future[None] = loop.create_future()
        self._answers: asyncio.Queue[Any] = asyncio.Queue()
        self._offered: say.Offered | None = None
        self._has_offered = asyncio.Event()
        self._reader = asyncio.ensure_future(self._read())

    async def inspect(self, vm: VmConfig, accelerator: Accelerator) -> tuple[DestinationFacts, float]:
        """See :class:`limosa.migration.peer.Peer`."""
        asked = time.time()
        try:
            async with asyncio.timeout(INSPECT_WITHIN_S):
                answer = await self._ask(say.Inspect(vm=vm, accelerator=accelerator), say.Facts)
        except TimeoutError as error:
            raise self._lose(f"it told no facts within {INSPECT_WITHIN_S:.0f} s") from error
        return answer.facts, answer.facts.time - (asked + time.time()) / 2

    async def find_files(self, files: Sequence[BackingFile]) -> tuple[BackingFile | None, ...]:
        """See :class:`limosa.migration.peer.Peer`."""
        return (await self._ask(say.FindFiles(files=tuple(files)), say.FoundFiles)).files

    async def prepare(
        self, request: say.Prepare, in_line: Callable[[int], None], send_layers: SendLayers
    ) -> say.Prepared:
        """See :class:`limosa.migration.peer.Peer`."""
        await self._send(request)
        while True:
            answer = await self._answer((say.InLine, say.LayersAwaited, say.Prepared))
            if isinstance(answer, say.LayersAwaited):
                answer = await layers.sent_beside(send_layers(answer), self._answer((say.Prepared,)))
            if isinstance(answer, say.Prepared):
                return answer
            in_line(answer.place)

    async def announce(self, addresses: Sequence[str]) -> None:
        """See :class:`limosa.migration.peer.Peer`."""
        await self._send(say.Announce(addresses=tuple(addresses)))

    async def disks_whole(self) -> None:
        """See :class:`limosa.migration.peer.Peer`."""
        await self._send(say.DisksWhole())

    async def offers(self) -> AsyncIterator[say.Offered]:
        """See :class:`limosa.migration.peer.Peer`."""
        seen = None
        while True:
            while self._offered is seen or self._offered is None:
                await self._has_offered.wait()
                self._has_offered.clear()
            seen = self._offered
            yield seen

    async def take_over(self) -> say.Running:
        """See :class:`limosa.migration.peer.Peer`."""
        return await self._ask(say.TakeOver(), say.Running)

    async def adopted(self) -> None:
        """See :class:`limosa.migration.peer.Peer`."""
        await asyncio.wait({self._adopted, self.lost}, return_when=asyncio.FIRST_COMPLETED)
        if not self._adopted.done():
            self.lost.result()

    async def await_rest(self) -> say.RestAwaited:
        """See :class:`limosa.migration.peer.Peer`."""
        return await self._ask(say.AwaitRest(), say.RestAwaited)

    async def abort(self, reason: str) -> None:
        """See :class:`limosa.migration.peer.Peer`."""
        await self._ask(say.Abort(reason=reason), say.Gone)

    async def attach(self, migration: MigrationId) -> say.Standing:
        """See :class:`limosa.migration.peer.Peer`."""
        return await self._ask(say.Attach(migration=migration), say.Standing)

    async def close(self) -> None:
        """See :class:`limosa.migration.peer.Peer`."""
        self._reader.cancel()
        self._lose("the session was closed")
        self._connection.transport.abort()

    async def hello(self, own_name: str) -> None:
        """Agree on a version and on who is who. Raises :class:`HostUnreachable` or :class:`HostNotTrusted`."""
        hello = say.Hello(host=own_name, oldest=versions.OLDEST, newest=versions.NEWEST)
        welcome = await self._ask(hello, say.Welcome)
        identity = from_peer_certificate(self._connection.transport.get_extra_info("peercert") or {})
        if identity.role is not Role.HOST or identity.name != welcome.host:
            raise HostNotTrusted(
                f"'{self.host}' answered as host '{welcome.host}' with a certificate of '{identity.name}'",
                todo="issue it a host certificate of its own name with 'limosa ca issue'",
                host=self.host,
            )
        self.host = welcome.host
        self.version = versions.agree((versions.OLDEST, versions.NEWEST), (welcome.version,) * 2, host=self.host)

    async def _ask(self, message: say.Message, answer: type[Answer]) -> Answer:
        await self._send(message)
        received: Answer = await self._answer((answer,))
        return received

    async def _send(self, message: say.Message) -> None:
        if self.lost.done():
            self.lost.result()
        try:
            await self._connection.send(encode(message))
        except WebSocketException as error:
            raise self._lose(str(error)) from error

    async def _answer(self, expected: tuple[type[Any], ...]) -> Any:
        getter = asyncio.ensure_future(self._answers.get())
        try:
            await asyncio.wait({getter, self.lost}, return_when=asyncio.FIRST_COMPLETED)
            if not getter.done():
                self.lost.result()
            answer = await getter
        except asyncio.CancelledError:
            # Its answer would be taken for that to the next question; and the destination, which may have the move wait
            # in line for long, is to see at once that nobody waits any more.
            self._lose("a question was given up")
            raise
        finally:
            getter.cancel()
        if isinstance(answer, say.Failed):
            raise from_fault(answer.fault)
        if not isinstance(answer, expected):
            raise self._lose(f"it answered {type(answer).__name__}, which was not asked for")
        return answer

    async def _read(self) -> None:
        try:
            async for data in self._connection:
                self._take(parse(data, _decoder, "its answer"))
            self._lose("it closed the session")
        except (WebSocketException, InvalidInput, OSError) as error:
            self._lose(str(error))

    def _take(self, message: say.FromDestination) -> None:
        match message:
            case say.Adopted():
                if not self._adopted.done():
                    self._adopted.set_result(None)
            case say.Offered():
                self._offered = message
                self._has_offered.set()
            case say.Lost(fault=fault):
                if not self.lost.done():
                    self.lost.set_exception(from_fault(fault))
                    self.lost.exception()  # it may have no listener
            case _:
                self._answers.put_nowait(message)

    def _lose(self, why: str) -> HostUnreachable:
        error = self.broken(why)
        if not self.lost.done():
            self.lost.set_exception(error)
            self.lost.exception()  # it may have no listener
        return error

    def broken(self, why: str) -> HostUnreachable:
        """The error that stands for the end of this session."""
        return HostUnreachable(
            f"the session with host '{self.host}' broke",
            why=why,
            todo=f"check that 'limosa host serve' runs on '{self.host}', and the network between",
            host=self.host,
        )


def _why_unreachable(error: Exception) -> str:
    """In words, where the library has only numbers for it."""
    if isinstance(error, socket.gaierror):
        return f"its name cannot be looked up ({error.strerror})"
    # asyncio puts a sentence of its own, with the address, in the place of the system's.
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return str(error) or "no answer in time"


async def dial(destination: str, address: str, own_name: str, context: ssl.SSLContext) -> RemotePeer:
    """Open a session. ``address`` is ``HOST`` or ``HOST:PORT``; the certificate must be that of ``destination``.

    Raises :class:`HostUnreachable` (nobody there), :class:`HostNotTrusted` (TLS said no).
    """
    host, port = split_address(address)
    try:
        connection = await connect(
            f"wss://{f'[{host}]' if ':' in host else host}:{port or DEFAULT_PORT}{PEER_PATH}",
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
            why=_why_unreachable(error),
            todo="check that 'limosa host serve' runs there, its address in the setting 'peers', and firewalls",
            host=destination,
        ) from error
    connection.transport.get_extra_info("socket").setsockopt(
        socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNACKNOWLEDGED_MS
    )
    remote = RemotePeer(connection, destination)
    try:
        async with asyncio.timeout(CONNECT_WITHIN_S):
            await remote.hello(own_name)
    except BaseException as error:
        await remote.close()
        if isinstance(error, TimeoutError):
            raise remote.broken(f"it said nothing within {CONNECT_WITHIN_S:.0f} s") from error
        raise
    return remote
