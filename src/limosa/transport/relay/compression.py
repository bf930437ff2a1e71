"""What is left out of chunks, what of the rest is compressed, and when that is not waited for any longer: the sender's
dealings with its worker.

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
from limosa.transport.relay.frames import HEAD_BYTES, MAX_RAW_BYTES
from limosa.transport.relay.pace import Condensing, Line, Pace, Patience
from limosa.transport.relay.pages import Finder
from limosa.transport.relay.pump import Interest
from limosa.transport.relay.queue import Chunk, Queue, State
from limosa.transport.relay.worker import NO_SLOT, Memory, Worker

_log = logging.getLogger(__name__)
#: While the worker is at one it need not wait to be told of the next.
_MOST_OFFERED = 4
#: A chunk is what the carrier needs this long for: other streams wait for no more, and the worker can be waited for.
_CHUNK_S = 0.003
#: What the kernel may hold unsent, and what may wait for it, is what the carrier needs so long for: a guest that stops
#: waits for all of it. Less when one is about to.
_UNSENT_S, _SHORT_UNSENT_S = 0.008, 0.002
_WAITING_S, _SHORT_WAITING_S = 0.030, 0.002
#: The same where there is no worker, which would need something to be at.
_SHORT_RAW_WAITING_S = 0.0005
#: At most, when a guest is about to stop.
SHORT_WAITING_BYTES = 256 * 1024
#: Of the time that waiting for the worker costs nothing, so much is spent on it.
_SAFELY = 0.7


class Compression:
    """Without a ``finder`` everything goes raw; without a ``worker``, and when it is lost, nothing is compressed.

    ``spend`` is told of processor time that went into a channel.
    """

    def __init__(
        self,
        queue: Queue,
        carrier: Out,
        memory: Memory,
        finder: Finder | None,
        worker: Worker | None,
        spend: Callable[[int, float], None],
    ) -> None:
        self._queue, self._carrier, self._memory = queue, carrier, memory
        self._finder, self._worker = finder, worker
        self._spend = spend
        #: by slot
        self._offered: dict[int, Chunk] = {}
        self._line, self._condensing, self._pace, self._patience = Line(), Condensing(), Pace(), Patience()
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
                if chunk.state is State.LATE:
                    self._queue.leave(chunk)
                    self._held_up = False
                    self._patience.late(time.monotonic())
                else:
                    chunk.state, chunk.compressed_length = State.DONE, result.length
                self._pace.note(chunk.content_length, result.length, result.seconds, result.cpu_seconds)
                self._patience.served(result.seconds, result.cpu_seconds)
                self._spent(chunk, result.cpu_seconds)
        except WorkerLost:
            self._lose_worker()
        self._offer()

    def decide(self, chunk: Chunk, done: threading.Condition) -> None:
        """The carrier has reached a chunk: condense it, or wait for what the worker makes of it as long as that costs
        nothing.

        Afterwards it is known how it is to be sent. ``done`` is told of results; its lock is held.
        """
        if chunk.state is State.WAITING:
            self._condense(self._queue.to_condense(chunk))
            return
        done.wait_for(lambda: chunk.state is not State.OFFERED, _SAFELY * self._costs_nothing_for_s(chunk))
        if chunk.state is State.OFFERED:
            self.take_results()  # whoever tells of them may have no processor itself
        if chunk.state is State.OFFERED and self._worker is not None:
            self._give_up(chunk, self._worker)

    def _offer(self) -> None:
        """Condense what will not grow any more, and offer the worker what is worth it."""
        self._look()
        self._condense(self._queue.to_condense())
        if self._held_up or not self._patience.allows(time.monotonic()):
            return
        while self._worker is not None and len(self._offered) < _MOST_OFFERED and (chunk := self._worth()) is not None:
            if not chunk.content_length:
                self._condense(self._queue.to_condense(chunk), chunk)
                continue  # it may be too little to be worth it by now
            chunk.state = State.OFFERED
            self._offered[chunk.slot] = chunk
            try:
                self._worker.offer(chunk.slot, chunk.content_length)
            except WorkerLost:
                self._lose_worker()

    def _condense(self, chunks: list[Chunk], wanted: Chunk | None = None) -> None:
        """Leave known pages out of chunks, if that takes little of the time that the carrier needs for them; of the one
        that is ``wanted`` in any case."""
        if self._finder is None:
            return
        for chunk in chunks:
            if chunk is not wanted and not self._condensing.pays(self._line.rate):
                continue
            began = time.thread_time()
            chunk.content_length = self._finder.condense(self._memory.content(chunk.slot, HEAD_BYTES + chunk.length))
            took = time.thread_time() - began
            self._condensing.note(chunk.length, chunk.content_length, took)
            self._spent(chunk, took)

    def _spent(self, chunk: Chunk, cpu_s: float) -> None:
        self.statistics.cpu_s += cpu_s
        self._spend(chunk.channel, cpu_s)

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
        saved = chunk.content_length * (1 - self._pace.remainder) if self._patience.trusts else 0.0
        return self._line.busy_for_s() + saved / (self._line.rate or float("inf"))

    def _look(self) -> None:
        unacknowledged, unsent = self._carrier.unacknowledged()
        self._line.note(time.monotonic(), self._carrier.sent_bytes, unacknowledged, unsent)
        self._limit()

    def _limit(self) -> None:
        """Have wait what the carrier takes in a certain time, by what is known of it."""
        remainder = self._condensing.remainder
        if self._worker is not None and self._patience.trusts:
            remainder *= self._pace.remainder
        self._queue.set_waiting_limit(self._line.carries(_WAITING_S / remainder))
        short_s = _SHORT_RAW_WAITING_S if self._worker is None else _SHORT_WAITING_S
        hurried = self._line.carries(short_s / remainder) or SHORT_WAITING_BYTES
        self._queue.set_hurried_limit(min(hurried, SHORT_WAITING_BYTES))
        self._queue.set_chunk_limit(self._line.carries(_CHUNK_S / remainder) or MAX_RAW_BYTES)
        if (unsent := self._line.carries(_SHORT_UNSENT_S if self._queue.any_hurries else _UNSENT_S)) is not None:
            self._carrier.set_unsent(unsent)

    def _lose_worker(self) -> None:
        """It died: nothing is compressed any more. The next session has another."""
        if self._worker is not None:
            _log.warning("lost the process that compresses; going on without")
            self._worker.end()
            self._worker = None
        for chunk in self._offered.values():
            if chunk.state is State.LATE:
                self._queue.leave(chunk)
            else:
                chunk.state = State.WAITING
        self._offered.clear()
