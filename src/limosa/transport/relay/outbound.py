"""The source's daemon and a session to another host: who takes part, when it is opened, when it ends.

A session is opened by the first move that has come so far, shared by all that follow the same way meanwhile, and kept
for some seconds after the last, so that a row of moves keeps its window. A move takes a :class:`Seat`, whose channel is
open here before anything can come for it, because what the destination's end says first must find it open; it connects
when the destination is prepared. If the relay ends, its moves fail; later ones take another session.

Its connections (``carriers``) are closed as soon as the relay has ended: the other side is to see the end of a session
when it comes.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
import socket
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from limosa.background import Background, then
from limosa.errors import LimosaError, RelayFailed
from limosa.model.route import Compressed
from limosa.security.stream import make_credentials
from limosa.transport.channel import SocketChannel, Used
from limosa.transport.relay.carriers import AddressPair, Carriers, Dial
from limosa.transport.relay.client import DEFAULT_LEVEL, Relay, widen
from limosa.transport.relay.control import ChannelStatistics
from limosa.wire.peer import Prepared, RelayPlace, StreamCredentials

#: Bytes per second that a move may use now over a lane to an address, 0: no cap; None: it sends nothing.
LaneShare = Callable[[str], int | None]

#: After its last move a session is kept for so long.
LINGER_S = 10.0
#: What may wait between QEMU and its relay in a shortened stream.
SHORT_BYTES = 64 * 1024
#: A relay that does not answer within this is not waited for to show figures.
ANSWER_WITHIN_S = 1.0
#: When a stream broke, its relay is about to end, or has nothing to do with it.
ENDS_WITHIN_S = 1.0


def no_cap(_address: str) -> int:
    """The :data:`LaneShare` of what no cap is for."""
    return 0


class Outbound:
    """A session, and its relay while there is one.

    ``dial`` connects it over one of ``ways``, or, if it is ``striped``, over each; ``several``: each connection goes
    over several NICs by itself. Without ``compress`` everything goes as it is. After its last move it is kept for
    ``linger_s``.
    """

    def __init__(
        self,
        dial: Dial,
        *,
        encrypt: bool,
        several: bool,
        window_log: int,
        user: str | None,
        ways: Sequence[AddressPair] = (("", ""),),
        striped: bool = False,
        compress: bool = True,
        linger_s: float = LINGER_S,
    ) -> None:
        self._token = secrets.token_hex(16)
        self._server: StreamCredentials | None = None
        self._client: StreamCredentials | None = None
        if encrypt:
            self._server, self._client = make_credentials()
        self._several = several
        self._striped = striped
        self.compress = compress
        self._linger_s = linger_s
        self._window_log = window_log
        self._user = user
        self._numbers = itertools.count()
        self._seats: set[Seat] = set()
        self.carriers = Carriers(dial, ways, striped=striped, is_used=lambda: bool(self._seats), pace=self._pace)
        self._starting: asyncio.Task[Relay] | None = None
        self._opening: asyncio.Task[Relay] | None = None
        self._relay: Relay | None = None
        self._linger: asyncio.TimerHandle | None = None
        self._ending = False
        self._background = Background()
        #: the last figures of channels
        self.figures: dict[int, ChannelStatistics] = {}

    @property
    def is_running(self) -> bool:
        """Whether there is a relay, which may have other moves' channels already."""
        return self._relay is not None

    @property
    def is_over(self) -> bool:
        """Whether nobody takes part any more and nothing is kept, so that a new session is as good."""
        if self._relay is not None:
            return self._ending or self._relay.ended.is_set()
        return not self._seats if self._starting is None else self._starting.done()  # which failed

    def seat(self, share: LaneShare = no_cap) -> Seat:
        """A place for another stream of the move that ``share`` is of, to be released when that has ended."""
        place = RelayPlace(
            session=self._token,
            channel=next(self._numbers),
            window_log=self._window_log,
            credentials=self._server,
            several=self._several,
            striped=self._striped,
        )
        seat = Seat(self, place, share)
        self._seats.add(seat)
        if self._linger is not None:
            self._linger.cancel()
        return seat

    async def started(self) -> Relay:
        """The relay, be the session open or not; the first who asks has it started. Raises :class:`RelayFailed`."""
        if self._starting is None:
            self._starting = asyncio.ensure_future(self._start())
            self._starting.add_done_callback(_look_at)
        return await asyncio.shield(self._starting)

    async def relay(self, prepared: Prepared) -> Relay:
        """The relay of the open session; the first who asks has it opened. Raises :class:`LimosaError`."""
        if self._opening is None:
            self._opening = asyncio.ensure_future(self._open(prepared))
            self._opening.add_done_callback(_look_at)
        return await asyncio.shield(self._opening)

    def leave(self, seat: Seat) -> None:
        """A move has ended; after the last one the session is kept for a while."""
        self._seats.discard(seat)
        self.figures.pop(seat.place.channel, None)
        self.carriers.leave(seat.place.channel)
        if not self._seats:
            self._linger = asyncio.get_running_loop().call_later(self._linger_s, self.end)

    def end(self) -> None:
        """End the session for good, unless somebody takes part."""
        if self._relay is not None and not self._seats:
            self._ending = True
            self._background.spawn(self._relay.end())

    def _pace(self, address: str) -> int:
        """Bytes per second that all moves here together may use over a lane to an address, 0: no cap."""
        shares = [share(address) for share in {seat.share for seat in self._seats}]
        return 0 if 0 in shares else sum(share for share in shares if share is not None)

    async def _start(self) -> Relay:
        relay = self._relay = await Relay.start(user=self._user)
        relay.on_channel_ended = self._keep_last
        relay.on_lane_lost = self.carriers.lose
        self._background.spawn(self._until_ended(relay))
        if not self._seats:
            self.end()  # whoever it was started for has left meanwhile
        return relay

    async def _open(self, prepared: Prepared) -> Relay:
        relay = await self.started()
        credentials, window_log, level = self._client, self._window_log, DEFAULT_LEVEL if self.compress else None
        try:
            if self._striped:
                await relay.call_lanes(credentials=credentials, window_log=window_log, level=level)
                await self.carriers.open_lanes(prepared, relay)
            else:
                send = partial(relay.open_sender, credentials=credentials, window_log=window_log, level=level)
                await self.carriers.open(prepared, relay, send)
        except BaseException:
            await asyncio.shield(relay.end())
            raise
        return relay

    def _keep_last(self, statistics: ChannelStatistics) -> None:
        if statistics.channel in self.figures:
            self.figures[statistics.channel] = statistics

    async def _until_ended(self, relay: Relay) -> None:
        await relay.ended.wait()
        self._ending = True
        self.carriers.close()


class Seat:
    """One move's part in a session. Made by :meth:`Outbound.seat`."""

    def __init__(self, session: Outbound, place: RelayPlace, share: LaneShare) -> None:
        self.place = place
        self.share = share
        self._session = session
        #: opens the channel; its socket is ours until :meth:`connect` has given it away
        self._opening: asyncio.Task[socket.socket] | None = None

    async def open(self) -> None:
        """Open the channel here. A relay that is still to be started is not waited for: what it is asked before its
        session is open it does before that. Raises :class:`RelayFailed`."""
        at_once = self._session.is_running
        self._opening = asyncio.ensure_future(self._open())
        self._opening.add_done_callback(_look_at)
        if at_once:
            await asyncio.shield(self._opening)

    async def connect(self, prepared: Prepared) -> RelayChannel:
        """The connection for QEMU. Raises :class:`RelayFailed`, :class:`DestinationLost`, :class:`NetworkError`."""
        assert self._opening is not None
        connection = await asyncio.shield(self._opening)
        relay = await self._session.relay(prepared)
        number = self.place.channel
        self._session.figures[number] = ChannelStatistics(channel=number)
        self._opening = None
        return RelayChannel(self._session, relay, number, connection)

    def release(self) -> None:
        """The move has ended. May be repeated."""
        if self._opening is not None:
            then(self._opening, socket.socket.close)
            self._opening = None
        self._session.leave(self)

    async def _open(self) -> socket.socket:
        relay = await self._session.started()
        return await relay.open_channel(self.place.channel)


class RelayChannel:
    """One VM's stream: a :class:`limosa.transport.channel.Channel` whose socket leads to the relay."""

    def __init__(self, session: Outbound, relay: Relay, number: int, connection: socket.socket) -> None:
        self.stream = connection
        self._session = session
        self._relay = relay
        self._number = number
        self._background = Background()
        self._paced = 0
        #: what the session had sent over each path before this stream began
        self._before = {(one.here, one.there): one.sent_bytes for one in session.carriers.used()}

    @property
    def connections(self) -> Sequence[SocketChannel]:
        """See :class:`limosa.transport.channel.Channel`: the session's."""
        return self._session.carriers.forward

    def set_short(self, short: bool, pace: float) -> None:
        """See :class:`limosa.transport.channel.Channel`."""
        with contextlib.suppress(OSError):  # it is closed: then the stream is at its end
            if short:
                self.stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SHORT_BYTES)
            else:
                widen(self.stream)
        self._background.spawn(self._set_short(short))

    def pace(self, bytes_per_s: int) -> bool:
        """See :class:`limosa.transport.channel.SocketChannel`: its relay takes no more, before compression."""
        if bytes_per_s != self._paced:
            self._paced = bytes_per_s
            self._background.spawn(self._set_pace(bytes_per_s))
        return True

    def spread_over(self, ways: Iterable[AddressPair]) -> None:
        """See :class:`limosa.transport.channel.Channel`: the session is, and other VMs' streams with it."""
        self._session.carriers.want(self._number, ways)

    def used(self) -> tuple[Used, ...]:
        """See :class:`limosa.transport.channel.Channel`: the VM's part of what each path of the session has carried."""
        since = [
            Used(one.here, one.there, max(0, one.sent_bytes - self._before.get((one.here, one.there), 0)), one.alive)
            for one in self._session.carriers.used()
        ]
        whole, own = sum(one.sent_bytes for one in since), self._figures().wire_bytes
        return tuple(Used(one.here, one.there, own * one.sent_bytes // max(1, whole), one.alive) for one in since)

    async def compressed(self) -> Compressed | None:
        """See :class:`limosa.transport.channel.Channel`."""
        with contextlib.suppress(LimosaError, TimeoutError):  # then what was known last has to do
            async with asyncio.timeout(ANSWER_WITHIN_S):
                for statistics in (await self._relay.statistics()).channels:
                    if statistics.channel == self._number:
                        self._session.figures[self._number] = statistics
        if not self._session.compress:
            return None
        figures = self._figures()
        return Compressed(
            raw_bytes=figures.raw_bytes,
            sent_bytes=figures.wire_bytes,
            ratio=round(figures.raw_bytes / figures.wire_bytes, 3) if figures.wire_bytes else None,
            cpu_s=round(figures.cpu_s, 3),
            connections=self._session.carriers.alive(),
        )

    async def fault(self) -> LimosaError | None:
        """See :class:`limosa.transport.channel.Channel`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ENDS_WITHIN_S):
                await self._relay.ended.wait()
        if not self._relay.ended.is_set():
            return None
        return RelayFailed(
            "the relay that carried the VM's memory ended",
            why=self._relay.why(),
            todo="move the VM again; if this repeats, choose another transport and see the logs of both hosts",
        )

    def close(self) -> None:
        """See :class:`limosa.transport.channel.Channel`."""
        self.stream.close()

    def _figures(self) -> ChannelStatistics:
        return self._session.figures.get(self._number, ChannelStatistics(channel=self._number))

    async def _set_pace(self, bytes_per_s: int) -> None:
        with contextlib.suppress(LimosaError):  # as below
            await self._relay.set_pace(self._number, bytes_per_s)

    async def _set_short(self, short: bool) -> None:
        with contextlib.suppress(LimosaError):  # it ended, and so does the move
            await self._relay.set_short(self._number, short)


def _look_at(task: asyncio.Task[Any]) -> None:
    """Whoever asked has what was raised, if anybody still waits."""
    if not task.cancelled():
        task.exception()
