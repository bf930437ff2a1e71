"""What of the queue is compressed, and when it is not waited for any longer: the sender's dealings with its worker.

All of it happens under the sender's lock.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator

from limosa.transport.relay.carrier import Carrier
from limosa.transport.relay.control import CompressionStatistics
from limosa.transport.relay.errors import WorkerLost
from limosa.transport.relay.frames import MAX_RAW_BYTES
from limosa.transport.relay.pace import Line, Pace, Patience
from limosa.transport.relay.pump import Interest
from limosa.transport.relay.queue import Chunk, Queue, State
from limosa.transport.relay.worker import Worker

_log = logging.getLogger(__name__)
#: Two: while the worker is at one it need not wait to be told of the next.
_MOST_OFFERED = 2
#: A worker that has begun is waited for so long before it is lifted, and after that, before it is given up.
_BEFORE_LIFT_S = 0.002
_AFTER_LIFT_S = 2.0
_LIFT_AGAIN_S = 0.01
#: A chunk is what the carrier needs this long for: other streams wait for no more, and the worker can be waited for.
_CHUNK_S = 0.003
#: Of the time that waiting for the worker costs nothing, so much is spent on it.
_SAFELY = 0.7


class Compression:
    """Without a ``worker``, and when it is lost, everything goes raw."""

    def __init__(self, queue: Queue, carrier: Carrier, worker: Worker | None) -> None:
        self._queue, self._carrier, self._worker = queue, carrier, worker
        self._offered: dict[int, Chunk] = {}
        self._number = 0
        self._line, self._pace, self._patience = Line(), Pace(), Patience()
        self.statistics = CompressionStatistics()

    def interests(self, act: Callable[[], None]) -> Iterator[Interest]:
        """What the pump has to wait for; ``act`` is to call :meth:`take_results`."""
        if self._worker is not None:
            yield Interest(self._worker.fileno(), act)

    def offer(self) -> None:
        """Offer the worker what is worth it."""
        if self._worker is not None and self._worker.lifted and not self._offered:
            self._worker.put_last()
        if self._worker is None or not self._patience.allows(time.monotonic()):
            return
        self._look()
        while (
            (worker := self._worker) is not None
            and not worker.lifted
            and len(self._offered) < _MOST_OFFERED
            and (chunk := self._worth()) is not None
        ):
            self._number += 1
            self._give(worker, self._number, chunk)

    def _worth(self) -> Chunk | None:
        """The next chunk that the worker can do without keeping the carrier waiting."""
        if not self._line.rate:
            return None
        return self._queue.worth(
            self._line.busy_for_s(), self._line.rate, self._pace.seconds_per_byte, self._pace.remainder
        )

    def take_results(self) -> None:
        """Take what the worker has done."""
        try:
            while self._worker is not None and (result := self._worker.result()) is not None:
                chunk = self._offered.pop(result.number)
                chunk.state, chunk.wire_length, chunk.digest = State.DONE, result.wire_length, result.digest
                self._pace.note(chunk.length, result.wire_length, result.seconds, result.cpu_seconds)
                chunk.cpu_s = result.cpu_seconds
                self.statistics.cpu_s += result.cpu_seconds
                self._patience.served(result.seconds, result.cpu_seconds, lifted=self._worker.lifted)
        except WorkerLost:
            self._lose_worker()
        self.offer()

    def decide(self, chunk: Chunk, done: threading.Condition) -> None:
        """The carrier has reached a chunk that was offered: wait for it as long as that costs nothing, or must be.

        Afterwards the chunk is done, or waits and is to be sent raw. ``done`` is told of results; its lock is held.
        """

        def offered() -> bool:
            return chunk.state is State.OFFERED

        done.wait_for(lambda: not offered(), _SAFELY * self._costs_nothing_for_s(chunk))
        if offered() and not self._withdraw(chunk):
            done.wait_for(lambda: not offered(), _BEFORE_LIFT_S)
        if offered():
            self._lift(lambda: not offered(), done)
        if offered():
            self._lose_worker()

    def _lift(self, is_done: Callable[[], bool], done: threading.Condition) -> None:
        """Have the worker get on with what it has begun. The kernel may want to be asked more than once."""
        self.statistics.lifts += 1
        self._patience.late(time.monotonic(), lifted=True)
        for _ in range(int(_AFTER_LIFT_S / _LIFT_AGAIN_S)):
            if self._worker is None:
                return
            self._worker.lift()
            if done.wait_for(is_done, _LIFT_AGAIN_S):
                return

    def _costs_nothing_for_s(self, chunk: Chunk) -> float:
        """How long to wait for a chunk: until the carrier has nothing to do; and, while the worker can be relied on,
        for as long as it takes to send what compressing will save."""
        saved = chunk.length * (1 - self._pace.remainder) if self._patience.trusts else 0.0
        return self._line.busy_for_s() + saved / (self._line.rate or float("inf"))

    def _withdraw(self, chunk: Chunk) -> bool:
        """Take the oldest offer back if the worker has not begun with it. False: it has."""
        number = self._worker.withdraw() if self._worker is not None else None
        if self._worker is None or number is None:
            return False
        if self._offered[number] is not chunk:
            # It is at the chunk and this is the next: what is left to it in the order it was.
            self._give(self._worker, number, self._offered[number])
            return False
        self._offered.pop(number).state = State.WAITING
        self.statistics.withdrawn += 1
        self._patience.late(time.monotonic())
        return True

    def _give(self, worker: Worker, number: int, chunk: Chunk) -> None:
        chunk.state = State.OFFERED
        self._offered[number] = chunk
        try:
            worker.offer(number, self._queue.offset(chunk), chunk.length)
        except WorkerLost:
            self._lose_worker()

    def _look(self) -> None:
        unacknowledged, unsent = self._carrier.unacknowledged()
        self._line.note(time.monotonic(), self._carrier.sent_bytes, unacknowledged, unsent)
        carried = self._line.carries(_CHUNK_S) or MAX_RAW_BYTES
        self._queue.set_chunk_limit(int(carried / self._pace.remainder) if self._patience.trusts else carried)

    def _lose_worker(self) -> None:
        """It died or does not get on: what it had goes raw, and so does all that follows. What it knew is lost with it,
        and the next session is the time to begin anew."""
        if self._worker is not None:
            _log.warning("lost the process that compresses; going on without")
            self._worker.end()
            self._worker = None
        for chunk in self._offered.values():
            chunk.state = State.WAITING
        self._offered.clear()
