"""What of the queue is compressed, and when it is not waited for any longer: the sender's dealings with its worker.

All of it happens under the sender's lock.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator

from limosa.transport.relay.carrier import Out
from limosa.transport.relay.control import CompressionStatistics
from limosa.transport.relay.errors import WorkerLost
from limosa.transport.relay.frames import MAX_RAW_BYTES
from limosa.transport.relay.pace import Line, Pace, Patience
from limosa.transport.relay.pump import Interest
from limosa.transport.relay.queue import Chunk, Queue, State
from limosa.transport.relay.worker import NO_SLOT, Worker

_log = logging.getLogger(__name__)
#: While the worker is at one it need not wait to be told of the next.
_MOST_OFFERED = 4
#: A chunk is what the carrier needs this long for: other streams wait for no more, and the worker can be waited for.
_CHUNK_S = 0.003
#: What the kernel may hold unsent, and what may wait for it, is what the carrier needs so long for: a guest that stops
#: waits for all of it. Less when one is about to.
_UNSENT_S, _SHORT_UNSENT_S = 0.008, 0.002
_WAITING_S, _SHORT_WAITING_S = 0.030, 0.002
#: At most, when a guest is about to stop.
SHORT_WAITING_BYTES = 256 * 1024
#: Of the time that waiting for the worker costs nothing, so much is spent on it.
_SAFELY = 0.7


class Compression:
    """Without a ``worker``, and when it is lost, everything goes raw."""

    def __init__(self, queue: Queue, carrier: Out, worker: Worker | None) -> None:
        self._queue, self._carrier, self._worker = queue, carrier, worker
        #: by slot
        self._offered: dict[int, Chunk] = {}
        self._made_late: list[Chunk] = []
        self._line, self._pace, self._patience = Line(), Pace(), Patience()
        #: the worker had no processor when one was needed, and was not heard of since
        self._held_up = False
        self.statistics = CompressionStatistics()

    def adjust(self) -> None:
        """Another channel hurries, or one that did is gone: then little may wait in the kernel, or more again."""
        self._carrier.set_short(self._queue.any_hurries)
        self._limit()

    def interests(self, act: Callable[[], None]) -> Iterator[Interest]:
        """What the pump has to wait for; ``act`` is to call :meth:`take_results`."""
        if self._worker is not None:
            yield Interest(self._worker.fileno(), act)

    def take_results(self) -> None:
        """Take what the worker has done, and offer it what is worth it."""
        try:
            while self._worker is not None and (result := self._worker.result()) is not None:
                if result.slot == NO_SLOT:
                    self._held_up = False
                    continue
                chunk = self._offered.pop(result.slot)
                chunk.wire_length, chunk.digest, chunk.cpu_s = result.wire_length, result.digest, result.cpu_seconds
                if chunk.state is State.LATE:
                    self._made_late.append(chunk)
                    self._held_up = False
                    self._patience.late(time.monotonic())
                else:
                    chunk.state = State.DONE
                self._pace.note(chunk.length, result.wire_length, result.seconds, result.cpu_seconds)
                self._patience.served(result.seconds, result.cpu_seconds)
                self.statistics.cpu_s += result.cpu_seconds
        except WorkerLost:
            self._lose_worker()
        self._offer()

    def made_late(self) -> list[Chunk]:
        """Chunks that went raw and are in the window nevertheless: the other side is to hear of them, in this order,
        before anything that was compressed after them. The caller says when it has (:meth:`Queue.learn`). What is being
        sent may be among them."""
        made, self._made_late = self._made_late, []
        return made

    def decide(self, chunk: Chunk, done: threading.Condition) -> None:
        """The carrier has reached a chunk that was offered: wait for it as long as that costs nothing.

        Afterwards the chunk is done, or to be sent raw. ``done`` is told of results; its lock is held.
        """
        done.wait_for(lambda: chunk.state is not State.OFFERED, _SAFELY * self._costs_nothing_for_s(chunk))
        if chunk.state is State.OFFERED:
            self.take_results()  # whoever tells of them may have no processor itself
        if chunk.state is State.OFFERED and self._worker is not None:
            self._give_up(chunk, self._worker)

    def _offer(self) -> None:
        """Offer the worker what is worth it."""
        self._look()
        if self._held_up or not self._patience.allows(time.monotonic()):
            return
        while self._worker is not None and len(self._offered) < _MOST_OFFERED and (chunk := self._worth()) is not None:
            chunk.state = State.OFFERED
            self._offered[chunk.slot] = chunk
            try:
                self._worker.offer(chunk.slot, chunk.length)
            except WorkerLost:
                self._lose_worker()

    def _give_up(self, chunk: Chunk, worker: Worker) -> None:
        """Take the chunk back if the worker has not begun with it; else it is late.

        What comes after it would be late, too, so nothing more is offered before the worker was heard of: it has a
        processor again then.
        """
        self._held_up = True
        withdrawn = [slot for slot in iter(worker.withdraw, None) if slot != NO_SLOT]
        for slot in withdrawn:
            self._offered.pop(slot).state = State.WAITING
        if chunk.slot not in withdrawn:
            chunk.state = State.LATE
            self.statistics.late += 1
            return
        self.statistics.withdrawn += 1
        try:
            worker.ask()
        except WorkerLost:
            self._lose_worker()

    def _worth(self) -> Chunk | None:
        """The next chunk that the worker can do without keeping the carrier waiting."""
        if not self._line.rate:
            return None
        return self._queue.worth(
            self._line.busy_for_s(), self._line.rate, self._pace.seconds_per_byte, self._pace.remainder
        )

    def _costs_nothing_for_s(self, chunk: Chunk) -> float:
        """How long to wait for a chunk: until the carrier has nothing to do; and, while the worker can be relied on,
        for as long as it takes to send what compressing will save."""
        saved = chunk.length * (1 - self._pace.remainder) if self._patience.trusts else 0.0
        return self._line.busy_for_s() + saved / (self._line.rate or float("inf"))

    def _look(self) -> None:
        unacknowledged, unsent = self._carrier.unacknowledged()
        self._line.note(time.monotonic(), self._carrier.sent_bytes, unacknowledged, unsent)
        self._limit()

    def _limit(self) -> None:
        """Have wait what the carrier takes in a certain time, by what is known of it."""
        remainder = self._pace.remainder if self._worker is not None and self._patience.trusts else 1.0
        self._queue.set_waiting_limit(self._line.carries(_WAITING_S / remainder))
        hurried = self._line.carries(_SHORT_WAITING_S / remainder) or SHORT_WAITING_BYTES
        self._queue.set_hurried_limit(min(hurried, SHORT_WAITING_BYTES))
        self._queue.set_chunk_limit(self._line.carries(_CHUNK_S / remainder) or MAX_RAW_BYTES)
        if (unsent := self._line.carries(_SHORT_UNSENT_S if self._queue.any_hurries else _UNSENT_S)) is not None:
            self._carrier.set_unsent(unsent)

    def _lose_worker(self) -> None:
        """It died: what it had goes raw, and so does all that follows. What it knew is lost with it, and the next
        session is the time to begin anew."""
        if self._worker is not None:
            _log.warning("lost the process that compresses; going on without")
            self._worker.end()
            self._worker = None
        for chunk in self._offered.values():
            if chunk.state is State.LATE:
                self._queue.learn(chunk)
            else:
                chunk.state = State.WAITING
        self._offered.clear()
