"""The source's end of a session with another host: a :class:`limosa.migration.peer.Peer` over one WebSocket.

While memory and disks are copied nothing is asked, and the session does not depend on one network: when its connection
dies, another is opened, at whichever address of the destination answers, and the session goes on over that. From the
next question on it ends with its connection, for nobody would know what was heard of it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, TypeVar

from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed, WebSocketException
from websockets.frames import CloseCode

from limosa.errors import DestinationLost, HostNotTrusted, HostUnreachable, InvalidInput, LimosaError, from_fault
from limosa.host.calling import Call, Caller, ask, broken, decoder, why_broken
from limosa.migration import layers
from limosa.migration.peer import SendLayers
from limosa.model.base import MigrationId
from limosa.model.facts import DestinationFacts
from limosa.model.network import HostNetwork
from limosa.model.storage import BackingFile
from limosa.model.vm import Accelerator, VmConfig
from limosa.network.addresses import own_addresses, shareable
from limosa.wire import peer as say
from limosa.wire.encoding import encode
from limosa.wire.parsing import parse

#: Longest wait for facts: storage that has to be woken up may take a while.
INSPECT_WITHIN_S = 30.0
#: A session that broke is opened again within this time, or has ended. The destination waits longer
#: (:data:`limosa.host.session.ATTACHED_WITHIN_S`).
AGAIN_WITHIN_S = 5.0
#: From a call that failed to the next. While a NIC of ours has no link they fail at once.
AGAIN_EVERY_S = 0.2

_log = logging.getLogger(__name__)
Answer = TypeVar("Answer")


class RemotePeer:
    """A session with a destination. Made by :func:`dial`."""

    def __init__(self, call: Call, caller: Caller, tell: Callable[[str], None]) -> None:
        self.host = call.host
        #: of the protocol
        self.version = call.version
        self._caller = caller
        self._tell = tell
        self._connection = call.connection
        #: set unless another connection is awaited
        self._is_whole = asyncio.Event()
        self._is_whole.set()
        #: the move with which the session goes on if its connection dies, None: it ends then
        self._copying: MigrationId | None = None
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
        self._learn(answer.facts.network, answer.facts.addresses)
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
                self._copying = request.migration
                return answer
            in_line(answer.place)

    async def announce(self, addresses: Sequence[str]) -> None:
        """See :class:`limosa.migration.peer.Peer`."""
        await self._mention(say.Announce(addresses=tuple(addresses)))

    async def disks_whole(self) -> None:
        """See :class:`limosa.migration.peer.Peer`."""
        await self._mention(say.DisksWhole())

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

    async def _ask(self, message: say.Message, answer: type[Answer]) -> Answer:
        await self._send(message)
        received: Answer = await self._answer((answer,))
        return received

    async def _send(self, message: say.Message) -> None:
        """Say what is answered, or acted on once: from here on the session ends with its connection."""
        connection = await self._whole()
        self._copying = None
        try:
            await connection.send(encode(message))
        except WebSocketException as error:
            raise self._lose(why_broken(error)) from error

    async def _mention(self, message: say.Message) -> None:
        """Say what has no answer and may be said twice: again if the connection dies over it and there is another."""
        while True:
            connection = await self._whole()
            try:
                await connection.send(encode(message))
            except WebSocketException as error:
                if self._copying is None:
                    raise self._lose(why_broken(error)) from error
                if connection is self._connection and not self.lost.done():
                    self._is_whole.clear()  # the reader has yet to hear of it, and sets it in the end
            else:
                return

    async def _whole(self) -> ClientConnection:
        """The connection, when there is one. Raises why the session has ended."""
        await self._is_whole.wait()
        if self.lost.done():
            self.lost.result()
        return self._connection

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
        while True:
            why, is_cut = "it closed the session", False
            try:
                async for data in self._connection:
                    self._take(parse(data, decoder, "its answer"))
            except (WebSocketException, InvalidInput, OSError) as error:
                why, is_cut = why_broken(error), _is_cut(error)
            if not is_cut or self._copying is None or self.lost.done():
                break
            try:
                self._connection = await self._another(self._copying)
            except (LimosaError, OSError) as error:
                _log.warning(
                    "the session with host %s broke (%s) and could not be opened again: %s", self.host, why, error
                )
                if isinstance(error, HostNotTrusted):
                    self._end(error)  # which people can mend
                break
            self._is_whole.set()
        self._lose(why)

    async def _another(self, migration: MigrationId) -> ClientConnection:
        """A connection with which the session goes on. Raises if the destination cannot be reached, or does not await
        the guest any more."""
        self._is_whole.clear()
        self._connection.transport.abort()
        self._tell(f"the session with host '{self.host}' broke; connecting again")
        failed = broken(self.host, f"no answer within {AGAIN_WITHIN_S:.0f} s")
        try:
            async with asyncio.timeout(AGAIN_WITHIN_S):
                while True:
                    try:
                        return await self._attached(migration)
                    except HostNotTrusted:
                        raise
                    except HostUnreachable as error:  # for now: a link may come back as it went
                        failed = error
                    await asyncio.sleep(AGAIN_EVERY_S)
        except TimeoutError as error:
            raise failed from error
        finally:
            self._tell("")

    async def _attached(self, migration: MigrationId) -> ClientConnection:
        """One call. Raises :class:`HostUnreachable` if there was no answer, anything else if that was a no."""
        call = await self._caller.call()
        try:
            attach = say.Attach(migration=migration, goes_on=True)
            standing = await ask(call.connection, self.host, attach, say.Standing)
            if standing.state not in (say.DestinationState.INCOMING, say.DestinationState.LOADED):
                raise DestinationLost(f"what host '{self.host}' had of the VM is {standing.state} by now")
        except BaseException:
            call.connection.transport.abort()
            raise
        return call.connection

    def _take(self, message: say.FromDestination) -> None:
        match message:
            case say.Adopted():
                if not self._adopted.done():
                    self._adopted.set_result(None)
            case say.Offered():
                self._learn(message.network, message.addresses)
                self._offered = message
                self._has_offered.set()
            case say.Lost(fault=fault):
                if not self.lost.done():
                    self.lost.set_exception(from_fault(fault))
                    self.lost.exception()  # it may have no listener
            case _:
                self._answers.put_nowait(message)

    def _learn(self, network: HostNetwork, addresses: Sequence[str]) -> None:
        """Where else the destination may be called: those that carry moves, then all others."""
        self._caller.learn(tuple(dict.fromkeys((*addresses, *shareable(own_addresses(network.nics))))))

    def _lose(self, why: str) -> HostUnreachable:
        return self._end(broken(self.host, why))

    def _end(self, error: HostUnreachable) -> HostUnreachable:
        if not self.lost.done():
            self.lost.set_exception(error)
            self.lost.exception()  # it may have no listener
        self._is_whole.set()
        return error


def _is_cut(error: Exception) -> bool:
    """Whether a connection ended without a word from the other host that it ends. That it heard nothing of us for too
    long, which it says when the network or this daemon moves again, is none."""
    if isinstance(error, ConnectionClosed):
        return error.rcvd is None or error.rcvd.code == CloseCode.INTERNAL_ERROR
    return isinstance(error, OSError)


async def dial(caller: Caller, tell: Callable[[str], None]) -> RemotePeer:
    """Open a session. ``tell`` gets what is to be known of it as long as that lasts, then an empty string.

    Raises as :meth:`limosa.host.calling.Caller.call`.
    """
    return RemotePeer(await caller.call(), caller, tell)
