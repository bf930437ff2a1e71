"""The destination's end of a session: one WebSocket from a source host.

A reader takes messages as they come, so that the end of the connection is noticed while something long is done; a
worker does what they ask, one after another. When the connection ends, work in progress is cancelled (but never the
hand-over itself) and, unless the source comes back, the destination's script decides what is safe.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time

import msgspec
from starlette.websockets import WebSocket, WebSocketDisconnect

from limosa.background import Background, to_its_end
from limosa.errors import Conflict, InvalidInput, LimosaError, NotPermitted
from limosa.host.faults import internal
from limosa.host.incoming import Incoming
from limosa.migration.destination import Destination
from limosa.model import reading
from limosa.qemu.protocol import MachineProtocol
from limosa.security.identity import Identity
from limosa.transport.tcp import TcpDoorway
from limosa.wire import peer as say
from limosa.wire import versions
from limosa.wire.encoding import encode
from limosa.wire.parsing import parse

_decoder = reading.decoder(say.FromSource)
_log = logging.getLogger(__name__)

#: A source asks one thing after another; more than this unanswered is no conversation.
MAX_UNANSWERED = 16

#: From the end of a session to that of the source's that takes its place: this end may notice a second or two before
#: the other, which then calls for :data:`limosa.host.peers.AGAIN_WITHIN_S`.
ATTACHED_WITHIN_S = 8.0


class Session:
    """Serves one source for as long as its connection lasts."""

    def __init__(self, socket: WebSocket, source: Identity, incoming: Incoming) -> None:
        self._socket = socket
        self._source = source
        self._incoming = incoming
        self._reached_at: str = socket.scope["server"][0]
        #: of the protocol; null until it is agreed on
        self._version: int | None = None
        self._destination: Destination | None = None
        #: why the last question that could not be answered well was not
        self._failed: LimosaError | None = None
        self._messages: asyncio.Queue[say.FromSource] = asyncio.Queue()
        self._background = Background()
        #: the trial listener of the last Inspect, open until the next message
        self._trial = contextlib.AsyncExitStack()

    async def serve(self) -> None:
        """Answer until the connection ends, or something comes that no source says."""
        worker = asyncio.ensure_future(self._work())
        wait_s = 0.0
        try:
            while True:
                self._messages.put_nowait(await self._receive())
        except (WebSocketDisconnect, RuntimeError):
            # Starlette says RuntimeError if it was an answer of ours that found the connection gone.
            wait_s = ATTACHED_WITHIN_S
        except LimosaError as error:
            await self._send(say.Failed(fault=error.fault()))
        finally:
            worker.cancel()
            await asyncio.wait({worker})
            await self._end(wait_s)

    async def _receive(self) -> say.FromSource:
        try:
            data: bytes = await self._socket.receive_bytes()
        except KeyError:
            raise InvalidInput("the message is not valid", why="it is text, not bytes") from None
        if self._messages.qsize() >= MAX_UNANSWERED:
            raise InvalidInput("too many requests at once", why=f"{MAX_UNANSWERED} messages are waiting")
        try:
            message: say.FromSource = parse(data, _decoder, "the message")
        except InvalidInput as error:
            raise InvalidInput(
                f"host '{self._incoming.host}' does not understand the request",
                why=error.why,
                todo=f"if '{self._source.name}' has a newer release of Limosa, upgrade '{self._incoming.host}' too",
                host=self._incoming.host,
            ) from error
        return message

    async def _end(self, wait_s: float) -> None:
        """``wait_s``: how long the source may take to come back."""
        self._background.cancel()
        await self._trial.aclose()
        if self._destination is not None:
            try:
                await self._destination.abandoned(wait_s=wait_s)
            except LimosaError as error:
                # The source, when it asks again, or the next daemon finds it unfinished and brings it to its end.
                _log.error("%s", error)
            self._incoming.settled(self._destination, self._failed)

    async def _work(self) -> None:
        while True:
            message = await self._messages.get()
            await self._trial.aclose()
            try:
                await self._do(message)
            except LimosaError as error:
                await self._fail(error)
            except Exception as error:  # noqa: BLE001 - the source must not wait for an answer that never comes
                await self._fail(self._internal(message, error))

    async def _fail(self, error: LimosaError) -> None:
        self._failed = error
        await self._send(say.Failed(fault=error.fault()))

    def _internal(self, message: say.FromSource, error: Exception) -> LimosaError:
        asked = f"'{type(message).__name__}' of host {self._source.name}"
        return internal(error, asked, host=self._incoming.host)

    async def _do(self, message: say.FromSource) -> None:
        if self._version is None and not isinstance(message, say.Hello):
            raise InvalidInput("the caller has not said who it is and which version it speaks", todo="begin with hello")
        match message:
            case say.Hello(host=host, oldest=oldest, newest=newest):
                await self._send(self._welcome(host, oldest, newest))
            case say.Inspect():
                facts = await self._incoming.inspect(message, self._reached_at, self._trial)
                await self._send(say.Facts(facts=facts))
            case say.FindFiles(files=files):
                await self._send(say.FoundFiles(files=await self._incoming.find_files(files)))
            case say.Prepare():
                await self._prepare(message)
            case say.Announce(addresses=addresses):
                self._current().announce(addresses)
            case say.DisksWhole():
                self._current().disks_whole()
            case say.TakeOver():
                # Not to be torn apart by the end of the connection: the word was given.
                await asyncio.shield(self._take_over())
            case say.AwaitRest():
                await self._await_rest(self._current())
            case say.Abort(reason=reason):
                await self._current().abort(reason)
                self._incoming.settled(self._current(), self._failed)
                await self._send(say.Gone())
            case say.Attach(migration=migration, goes_on=goes_on):
                await self._attach(migration, goes_on=goes_on)

    def _welcome(self, host: str, oldest: int, newest: int) -> say.Welcome:
        if host != self._source.name:
            raise NotPermitted(
                f"this is the certificate of host '{self._source.name}', not of '{host}'",
                todo="set 'name' in the caller's host.toml to the name in its certificate",
                host=host,
            )
        self._version = versions.agree((versions.OLDEST, versions.NEWEST), (oldest, newest), host=host)
        return say.Welcome(host=self._incoming.host, version=self._version)

    async def _prepare(self, request: say.Prepare) -> None:
        self._check_free(request.migration)
        news: asyncio.Queue[say.InLine | say.LayersAwaited] = asyncio.Queue()
        teller = asyncio.ensure_future(self._tell(news))
        try:
            await self._incoming.check_answer(request)
            await to_its_end(self._begin(request))
            prepared = await self._current().prepare(
                request, lambda place: news.put_nowait(say.InLine(place=place)), news.put_nowait
            )
        finally:
            teller.cancel()
        await self._send(prepared)
        self._tell_unasked(self._current())

    async def _begin(self, request: say.Prepare) -> None:
        self._destination = await self._incoming.begin(request, self._source.name, self._reached_at)
        self._destination.attended()

    async def _take_over(self) -> None:
        destination, heard_at = self._current(), time.time()
        running = await destination.take_over()
        if running.resumed_at is not None:
            running = msgspec.structs.replace(running, after_s=running.resumed_at - heard_at)
        await self._send(running)
        await self._adopt(destination)

    async def _adopt(self, destination: Destination) -> None:
        await self._incoming.finish(destination)
        await self._send(say.Adopted())

    async def _attach(self, migration: str, *, goes_on: bool) -> None:
        self._check_free(migration)
        before, self._destination = self._destination, await self._incoming.find(migration, self._source.name)
        if self._destination is None:
            await self._send(say.Standing(state=say.DestinationState.UNKNOWN))
            return
        if self._destination is not before:
            self._destination.attended()
        standing = await self._destination.standing()
        await self._send(standing)
        if standing.state is say.DestinationState.OWNED:
            await asyncio.shield(self._adopt(self._destination))
        elif goes_on:
            self._tell_unasked(self._destination)

    async def _await_rest(self, destination: Destination) -> None:
        machine = self._incoming.machine_of(destination)
        door, addresses = await self._incoming.open_rest(self._reached_at)
        self._background.spawn(self._receive_rest(door, machine))
        await self._send(say.RestAwaited(addresses=addresses, port=door.port, token=door.token))

    async def _receive_rest(self, door: TcpDoorway, machine: MachineProtocol) -> None:
        with contextlib.closing(door):
            stream = await door.accept()
        try:
            await machine.receive_rest(stream)
        except LimosaError as error:
            # The source's stream ends with this one, and it calls again.
            stream.close()
            _log.error("the rest of a guest's memory: %s", error)

    def _check_free(self, migration: str) -> None:
        """One session is the lease of one migration: with a second, the end of the session would not end the first."""
        if self._destination is not None and self._destination.journal.header.migration != migration:
            raise Conflict("this session is about another migration", todo="open one for each")

    def _current(self) -> Destination:
        if self._destination is None:
            raise InvalidInput("no migration was prepared or attached in this session")
        return self._destination

    async def _tell(self, news: asyncio.Queue[say.InLine | say.LayersAwaited]) -> None:
        while True:
            await self._send(await news.get())

    def _tell_unasked(self, destination: Destination) -> None:
        self._background.spawn(self._tell_loss(destination))
        if destination.is_striped:
            self._background.spawn(self._tell_network())

    async def _tell_network(self) -> None:
        try:
            async for offered in self._incoming.offers(self._reached_at):
                await self._send(offered)
        except LimosaError as error:
            _log.error("paths that appear here are not used: %s", error)

    async def _tell_loss(self, destination: Destination) -> None:
        try:
            await asyncio.shield(destination.lost)
        except LimosaError as error:
            await self._send(say.Lost(fault=error.fault()))

    async def _send(self, message: say.FromDestination) -> None:
        # The source may be gone by now; what it was to hear it will ask again.
        with contextlib.suppress(RuntimeError, WebSocketDisconnect):
            await self._socket.send_bytes(encode(message))
