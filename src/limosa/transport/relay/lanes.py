"""One session's bytes over several paths: what a pair of carriers is to a session with one path.

::

    send ──► Outgoing ──► writer 0 ═══ carrier out ═══►  reader 0 ──► Incoming ──► receive_into
                     └──► writer 1 ═══ carrier out ═══►  reader 1 ──┘

Both ends have all of it, for one way each. A lane is a path's two carriers, with a thread that writes one and a thread
that reads the other. What goes where and when it goes again is decided in ``blocks``; here are sockets, threads and one
lock. A writer waits for room in its socket, and a reader for nothing but its socket, so neither end can make the other
wait for ever.

A lane whose connection breaks is lost and the others go on; another may join at any time (``joining``). What makes no
sense, and the loss of the last lane, raise :class:`BrokenStream`, which ends the session.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial

from limosa.transport.relay import blocks
from limosa.transport.relay.blocks import BLOCK_BYTES, WINDOW_BYTES, Header, Incoming, Outgoing
from limosa.transport.relay.carrier import Carrier
from limosa.transport.relay.errors import BrokenStream, ConnectionLost
from limosa.transport.relay.pace import Line

#: What the kernel may hold unsent is what the lane carries in this time; less when a guest is about to stand still.
_UNSENT_S, _SHORT_UNSENT_S = 0.008, 0.0005
#: That is looked at so often.
_ADJUST_S = 0.01
#: The other end hears of what was read in portions of this.
_TELL_BYTES = WINDOW_BYTES // 4
#: Blocks are as small as this on slow lines, and when a guest is about to stand still, so that none is waited for long.
_LEAST_BLOCK_BYTES = 32 * 1024
#: A block is so much of what all lanes together may hold unsent: large ones cost less processor time.
_OF_UNSENT = 0.5


class Lane:
    """One path: the carriers for each way, and what was said and heard on them."""

    def __init__(self, number: int, out: Carrier, back: Carrier, lock: threading.Lock) -> None:
        self.number, self.out, self.back = number, out, back
        #: blocks that came, and of how many the other end was told
        self.came = self.told = 0
        self.told_read = 0
        self.lost = False
        #: there may be something for the writer to do
        self.turn = threading.Condition(lock)
        self._line = Line()
        self._adjusted_at = 0.0

    def adjust(self, *, short: bool) -> None:
        """Keep in the kernel what the lane carries in a moment, so that what waits is sent by whoever has room."""
        now = time.monotonic()
        if now - self._adjusted_at < _ADJUST_S:
            return
        self._adjusted_at = now
        self._line.note(now, self.out.sent_bytes, *self.out.unacknowledged())
        if (unsent := self._line.carries(_SHORT_UNSENT_S if short else _UNSENT_S)) is not None:
            self.out.set_unsent(unsent)


class Lanes:
    """All lanes of a session: a :class:`~limosa.transport.relay.carrier.Out` and an ``In`` at once.

    It has none until the first joins, and waits for that. ``guarded`` makes of work what a thread of the process may
    run (see ``notices``); ``on_lost`` is called, by any thread, with the number of a lane that is lost and the reason.
    """

    def __init__(
        self,
        guarded: Callable[[Callable[[], None]], Callable[[], None]],
        on_lost: Callable[[int, str], None],
    ) -> None:
        #: taken from the caller so far
        self.sent_bytes = 0
        self._guarded, self._on_lost = guarded, on_lost
        self._lock = threading.Lock()
        #: those that are not lost; replaced as a whole, for who goes through them without the lock
        self._lanes: tuple[Lane, ...] = ()
        self._outgoing, self._incoming = Outgoing(), Incoming()
        #: there is room to send, there is something to read
        self._room, self._came = threading.Condition(self._lock), threading.Condition(self._lock)
        self._rest = memoryview(b"")
        self._block_bytes = _LEAST_BLOCK_BYTES
        self._short = False
        self._why = ""

    @property
    def numbers(self) -> set[int]:
        """Those of the lanes that are not lost."""
        return {lane.number for lane in self._lanes}

    def join(self, number: int, out: Carrier, back: Carrier) -> None:
        """Have another lane, of a number that was never used: the carrier to send on and the one to receive on."""
        lane = Lane(number, out, back, self._lock)
        with self._lock:
            self._lanes += (lane,)
            self._outgoing.join(number)
            self._room.notify()
        out.set_short(self._short)
        for work in (self._write, self._read):
            threading.Thread(target=self._guarded(partial(self._run, work, lane)), daemon=True).start()

    # --- what a carrier can do ---

    def send(self, header: bytes, payload: memoryview | bytes = b"") -> None:
        """See :class:`limosa.transport.relay.carrier.Out`."""
        size = self._block_bytes
        first = size - len(header)
        self._add(b"".join((header, payload[:first])))
        for begin in range(first, len(payload), size):
            self._add(bytes(payload[begin : begin + size]))

    def receive_into(self, view: memoryview) -> None:
        """See :class:`limosa.transport.relay.carrier.In`."""
        while len(view):
            if not self._rest:
                self._rest = memoryview(self._take())
            count = min(len(view), len(self._rest))
            view[:count] = self._rest[:count]
            view, self._rest = view[count:], self._rest[count:]

    def receive(self, count: int) -> bytes:
        """See :class:`limosa.transport.relay.carrier.In`."""
        data = bytearray(count)
        self.receive_into(memoryview(data))
        return bytes(data)

    def set_short(self, short: bool) -> None:
        """See :class:`limosa.transport.relay.carrier.Out`."""
        self._short = short
        for lane in self._lanes:
            lane.out.set_short(short)

    def set_unsent(self, limit: int) -> None:
        """See :class:`limosa.transport.relay.carrier.Out`. Each lane sees itself to its part; here it sizes blocks."""
        most = _LEAST_BLOCK_BYTES if self._short else BLOCK_BYTES
        self._block_bytes = max(_LEAST_BLOCK_BYTES, min(int(_OF_UNSENT * limit), most))

    def unacknowledged(self) -> tuple[int, int]:
        """See :class:`limosa.transport.relay.carrier.Out`."""
        unsent = sum(lane.out.unacknowledged()[1] for lane in self._lanes)
        with self._lock:
            return self._outgoing.under_way_bytes, self._outgoing.waiting_bytes + unsent

    def _add(self, data: bytes) -> None:
        with self._lock:
            while not self._outgoing.has_room():
                self._check()
                self._room.wait()
            self._check()
            self._outgoing.add(data)
            self.sent_bytes += len(data)
            self._wake()

    def _take(self) -> bytes | bytearray:
        with self._lock:
            while (data := self._incoming.take()) is None:
                self._check()
                self._came.wait()
            if any(self._has_much_to_tell(lane) for lane in self._lanes):
                self._wake()
            return data

    def _check(self) -> None:
        if self._why:
            raise BrokenStream(self._why)

    def _wake(self) -> None:
        for lane in self._lanes:
            lane.turn.notify()

    # --- a lane's threads ---

    def _run(self, work: Callable[[Lane], None], lane: Lane) -> None:
        try:
            work(lane)
        except ConnectionLost as error:
            self._lose(lane, str(error))

    def _write(self, lane: Lane) -> None:
        while True:
            with self._lock:
                while (said := self._next(lane)) is None:
                    if lane.lost:
                        return
                    at = self._outgoing.look_again_at()
                    lane.turn.wait(None if at is None else max(0.0, at - time.monotonic()) + 0.001)
                self._room.notify()
                # Those with nothing to do have to know when this may be late.
                self._wake()
            lane.out.send(*said)
            lane.adjust(short=self._short)

    def _next(self, lane: Lane) -> tuple[bytes, bytes] | None:
        """What is to be said on a lane now: a header and a block, or nothing behind it."""
        block = None if lane.lost else self._outgoing.take(lane.number, time.monotonic())
        if block is None and (lane.lost or (lane.came == lane.told and not self._has_much_to_tell(lane))):
            return None
        lane.told, lane.told_read = lane.came, self._incoming.read
        place, data = (block.place, block.data) if block is not None else (0, b"")
        return Header(place, lane.told_read, lane.told, len(data)).pack(), data

    def _has_much_to_tell(self, lane: Lane) -> bool:
        return self._incoming.read - lane.told_read >= _TELL_BYTES

    def _read(self, lane: Lane) -> None:
        while True:
            header = Header.parse(lane.back.receive(blocks.HEADER_BYTES))
            data = bytearray(header.length)
            lane.back.receive_into(memoryview(data))
            with self._lock:
                self._outgoing.on_header(lane.number, header, time.monotonic())
                self._room.notify()
                if header.length:
                    lane.came += 1
                    if self._incoming.put(header.place, data):
                        self._came.notify()
                lane.turn.notify()

    def _lose(self, lane: Lane, why: str) -> None:
        with self._lock:
            if lane.lost:
                return
            lane.lost = True
            self._lanes = tuple(one for one in self._lanes if one is not lane)
            self._outgoing.lose(lane.number)
            if not self._lanes:
                self._why = why
            self._room.notify_all()
            self._came.notify_all()
            self._wake()
            lane.turn.notify()  # its own writer ends
        lane.out.end()
        lane.back.end()
        self._on_lost(lane.number, why)
