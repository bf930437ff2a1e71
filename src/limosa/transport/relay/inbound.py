"""The destination's daemon and a session from another host: its door, its relay, and the VMs that come by it.

The source's daemon names the session. The first landing that names one has its relay started and its door opened, and
the relay knows a VM's channel before the source hears that it may connect, so no frame of a channel can come too early.
A session that is not open yet is kept for a while after its last landing, as the source may just be opening it, and
others of its VMs then come by it. An open one ends when the source ends it or is gone. Until then the door of a striped
one is open for further connections.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterable
from typing import Protocol

from limosa.errors import InvalidInput, RelayFailed
from limosa.transport import tcp
from limosa.transport.channel import Doorway
from limosa.transport.relay.client import Relay
from limosa.transport.relay.control import CARRIERS
from limosa.transport.relay.doorway import LastingDoorway
from limosa.transport.relay.session import HANDSHAKE_WITHIN_S
from limosa.wire.peer import RelayPlace

#: So often an open session's relay is asked whether it still works. The source asks its own for figures anyway.
ASK_EVERY_S = 2.0
#: After its last landing a session that is not open is kept for as long as it may take the source to open it.
OPENED_WITHIN_S = tcp.CONNECT_WITHIN_S + HANDSHAKE_WITHIN_S


class CarrierDoorway(Doorway, Protocol):
    """A door through which several connections of the source may come."""

    async def accept_several(self, count: int) -> list[socket.socket]:
        """Wait for so many connections of the source, in any order. The sockets are the caller's."""


class Inbound:
    """A session, with the door at which its carriers are awaited. ``window_log``: the most this host allows."""

    def __init__(self, relay: Relay, door: CarrierDoorway | LastingDoorway, place: RelayPlace, window_log: int) -> None:
        self.relay = relay
        self.door = door
        # A door that is closed does not know these any more.
        self.address, self.port, self.token = door.address, door.port, door.token
        self._landings = 0
        self._linger: asyncio.TimerHandle | None = None
        self._ending = False
        self._letting_in: asyncio.Task[None] | None = None
        self._asking: asyncio.Task[None] | None = None
        self.opened = asyncio.ensure_future(self._open(place, window_log))
        self.opened.add_done_callback(lambda done: done.cancelled() or done.exception())  # it may have no listener
        self.ended = asyncio.ensure_future(self._until_ended())

    @property
    def is_over(self) -> bool:
        """Whether it has ended, or is about to."""
        return self._ending or self.relay.ended.is_set()

    async def doorway(self, place: RelayPlace) -> RelayDoorway:
        """Another landing. Raises :class:`RelayFailed`."""
        self._landings += 1
        if self._linger is not None:
            self._linger.cancel()
        try:
            return RelayDoorway(self, await self.relay.open_channel(place.channel))
        except BaseException:
            self.leave()
            raise

    async def carry(self, place: RelayPlace, stream: socket.socket) -> None:
        """Have a further stream of a landing that has its door come into ``stream``. Raises :class:`RelayFailed`."""
        await self.relay.carry(place.channel, stream)

    def leave(self) -> None:
        """A landing has ended, or its stream has."""
        self._landings -= 1
        if self._landings == 0 and not self.opened.done():
            self._linger = asyncio.get_running_loop().call_later(OPENED_WITHIN_S, self.end_if_unused)

    def end_if_unused(self) -> None:
        """End a session that is not open and in which nobody lands."""
        if self._landings == 0 and not self.opened.done():
            self._ending = True
            self.opened.cancel()

    async def _open(self, place: RelayPlace, window_log: int) -> None:
        try:
            log = min(window_log, place.window_log)
            if isinstance(self.door, LastingDoorway):
                await self.relay.await_lanes(credentials=place.credentials, window_log=log)
                self._letting_in = asyncio.ensure_future(self._let_in(self.door))
                await self.relay.opened()
            else:
                await self._connect(self.door, place, log)
        except BaseException:
            self._ending = True
            await asyncio.shield(self.relay.end())
            raise
        self._asking = asyncio.ensure_future(self._keep_asking())

    async def _connect(self, door: CarrierDoorway, place: RelayPlace, window_log: int) -> None:
        connections = await door.accept_several(CARRIERS)
        try:
            await self.relay.open_receiver(connections, credentials=place.credentials, window_log=window_log)
        finally:
            # The relay has its own, so that they end with it.
            for one in connections:
                one.close()

    async def _let_in(self, door: LastingDoorway) -> None:
        """Give the relay each connection that comes, until it has ended."""
        while not self.relay.ended.is_set():
            # It has enough of them, or is too busy to listen: the source tries again.
            with await door.caller() as connection, contextlib.suppress(InvalidInput, RelayFailed):
                await self.relay.add_connection(connection)

    async def _keep_asking(self) -> None:
        """Have a relay noticed, and ended, that stands still: its VMs would wait for it."""
        with contextlib.suppress(RelayFailed):
            while True:
                await self.relay.statistics()
                await asyncio.sleep(ASK_EVERY_S)

    async def _until_ended(self) -> None:
        await self.relay.ended.wait()
        self.opened.cancel()
        for task in (self._letting_in, self._asking):
            if task is not None:
                task.cancel()
        self.door.close()


class RelayDoorway:
    """One VM's door: a :class:`limosa.transport.channel.Doorway`. ``connection`` leads to the relay."""

    def __init__(self, session: Inbound, connection: socket.socket) -> None:
        self.address, self.port, self.token = session.address, session.port, session.token
        self._session = session
        self._connection: socket.socket | None = connection
        self._open = True

    async def accept(self) -> socket.socket:
        """See :class:`limosa.transport.channel.Doorway`. Raises :class:`RelayFailed`."""
        await asyncio.wait({self._session.opened})
        if self._session.opened.cancelled() or self._session.opened.exception() is not None:
            raise RelayFailed("the relay could not be reached by the source's", why=self._session.relay.why())
        assert self._connection is not None
        connection, self._connection = self._connection, None
        return connection

    def announce(self, addresses: Iterable[str]) -> None:
        """See :class:`limosa.transport.channel.Doorway`."""
        self._session.door.announce(addresses)

    def close(self) -> None:
        """See :class:`limosa.transport.channel.Doorway`."""
        if self._connection is not None:
            self._connection.close()
        if self._open:
            self._open = False
            self._session.leave()
