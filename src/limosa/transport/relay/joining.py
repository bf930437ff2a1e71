"""How lanes join a session while it runs: each in a thread of its own, for which nothing waits.

The source's daemon connects a path and numbers the lane; the destination's lets in whoever knows the token, one
connection at a time, and the first words say which lane it is and which way. Whatever is wrong with a lane before both
ends have agreed on it, it is dropped and the session goes on without. A number is used once, so that two halves never
meet by mistake.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from limosa.errors import InvalidInput
from limosa.transport.relay.carrier import Carrier
from limosa.transport.relay.control import CARRIERS, MAX_LANES, Open
from limosa.transport.relay.errors import BrokenStream
from limosa.transport.relay.frames import HELLO_BYTES, Hello, Way
from limosa.transport.relay.lanes import Lanes
from limosa.transport.relay.session import HANDSHAKE_WITHIN_S, answer, connect, end, shake_hands

#: Makes of work what a thread of the process may run.
Guarded = Callable[[Callable[[], None]], Callable[[], None]]

_LOOK_EVERY_S = 0.1


class Calling:
    """The source's side. ``begin`` is called with the window when the first lane has joined; ``on_lost``: see
    :class:`Lanes`."""

    def __init__(
        self,
        lanes: Lanes,
        wish: Open,
        guarded: Guarded,
        begin: Callable[[int], None],
        on_lost: Callable[[int, str], None],
    ) -> None:
        self._lanes, self._wish = lanes, wish
        self._guarded, self._begin, self._on_lost = guarded, begin, on_lost
        self._window_log: int | None = None
        #: held while a lane joins
        self._turn = threading.Lock()
        self._newest = -1
        #: lanes that are about to join
        self._coming: set[int] = set()

    def add(self, number: int, connections: list[socket.socket]) -> None:
        """Have a lane join over a forward and a backward connection. Returns at once.

        Raises :class:`InvalidInput` if its number is not higher than all before, or there are as many as may be.
        """
        if len(connections) != CARRIERS:
            raise InvalidInput("the wrong number of sockets")
        if number <= self._newest:
            raise InvalidInput(f"a lane {number} was there before")
        if len(self._lanes.numbers | self._coming) >= MAX_LANES:
            raise InvalidInput(f"there are {MAX_LANES} lanes already")
        self._newest = number
        self._coming.add(number)
        threading.Thread(target=self._guarded(partial(self._join, number, connections)), daemon=True).start()

    def _join(self, number: int, connections: list[socket.socket]) -> None:
        try:
            agreed = connect(connections, self._wish, number)
            with self._turn:
                is_first = self._window_log is None
                if not is_first and agreed.window_log != self._window_log:
                    end([agreed.out, agreed.back])
                    raise BrokenStream("the other relay gave an answer to something else")
                self._window_log = agreed.window_log
                self._lanes.join(number, agreed.out, agreed.back)
                if is_first:
                    self._begin(agreed.window_log)
        except BrokenStream as error:
            self._on_lost(number, str(error))
        finally:
            self._coming.discard(number)


class _Half(NamedTuple):
    """A connection whose first words have come, and the other of its lane's has not."""

    carrier: Carrier
    hello: Hello


class Admission:
    """The destination's side. ``begin`` is called with the window when the first lane has joined."""

    def __init__(self, lanes: Lanes, wish: Open, guarded: Guarded, begin: Callable[[int], None]) -> None:
        self._lanes, self._wish, self._guarded, self._begin = lanes, wish, guarded, begin
        self._window_log: int | None = None
        self._halves: dict[int, _Half] = {}
        #: lanes of which anything has come
        self._known: set[int] = set()
        self._changed = threading.Condition()
        #: held while a lane joins
        self._turn = threading.Lock()
        #: connections of which it is not known yet what becomes of them
        self._coming: set[socket.socket] = set()

    def add(self, connection: socket.socket) -> None:
        """Take another connection. Returns at once. Raises :class:`InvalidInput` if there are as many as may be."""
        if len(self._lanes.numbers) >= MAX_LANES or len(self._coming) >= CARRIERS * MAX_LANES:
            raise InvalidInput(f"there are {MAX_LANES} lanes already")
        self._coming.add(connection)
        threading.Thread(target=self._guarded(partial(self._admit, connection)), daemon=True).start()

    def _admit(self, connection: socket.socket) -> None:
        try:
            (carrier,) = shake_hands([connection], self._wish, server=True)
            try:
                self._meet(_Half(carrier, Hello.parse(carrier.receive(HELLO_BYTES))))
            except BrokenStream:
                carrier.end()
        except BrokenStream:
            return  # its handshake failed, which has closed it
        finally:
            self._coming.discard(connection)

    def _meet(self, mine: _Half) -> None:
        """Wait for the other half of the lane, or, if this is it, have the lane join."""
        lane = mine.hello.lane
        with self._changed:
            other = self._halves.pop(lane, None)
            if other is None:
                self._wait(lane, mine)
                return
            self._changed.notify_all()
        try:
            with self._turn:
                self._join(lane, {half.hello.way: half for half in (mine, other)})
        except BrokenStream:
            other.carrier.end()
            raise

    def _wait(self, lane: int, mine: _Half) -> None:
        if lane in self._known:
            raise BrokenStream(f"a lane {lane} was there before")
        self._known.add(lane)
        self._halves[lane] = mine
        until = time.monotonic() + HANDSHAKE_WITHIN_S
        while not self._changed.wait_for(lambda: self._halves.get(lane) is not mine, _LOOK_EVERY_S):
            # A lane that the source has given up must not keep others out.
            if mine.carrier.has_ended() or time.monotonic() > until:
                del self._halves[lane]
                raise BrokenStream("the other connection of the lane did not come")

    def _join(self, lane: int, halves: dict[Way, _Half]) -> None:
        if halves.keys() != {Way.FORWARD, Way.BACKWARD} or len(self._lanes.numbers) >= MAX_LANES:
            raise BrokenStream("the connections are not one of each way, or there are lanes enough")
        forward, backward = halves[Way.FORWARD], halves[Way.BACKWARD]
        is_first = self._window_log is None
        window_log = self._window_log or min(self._wish.window_log, forward.hello.window_log)
        agreed = answer(forward.carrier, backward.carrier, window_log, lane)
        self._window_log = window_log
        self._lanes.join(lane, agreed.out, agreed.back)
        if is_first:
            self._begin(window_log)
