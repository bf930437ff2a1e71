"""How the two relays of a session begin: handshakes and first words on all carriers.

The daemons have connected them and know who called (``transport.tcp``: the token first). What comes is therefore the
other relay, or somebody who holds its daemon's secrets; TLS with the session's own credentials proves the rest.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

from limosa.security.tls import stream_context
from limosa.transport.relay.carrier import Carrier, In, Out
from limosa.transport.relay.control import Open
from limosa.transport.relay.errors import BrokenStream
from limosa.transport.relay.frames import HELLO_BYTES, Hello, Way
from limosa.transport.relay.lanes import Lanes

#: Makes of work what a thread of the process may run.
Guarded = Callable[[Callable[[], None]], Callable[[], None]]

HANDSHAKE_WITHIN_S = 10.0


class Ends(NamedTuple):
    """A session that is agreed on: where frames go out and come in, and the window of the compressed stream."""

    out: Out
    back: In
    window_log: int


def connect(connections: Sequence[socket.socket], wish: Open, guarded: Guarded) -> Ends:
    """The source's side. Of each path come two connections, forward and backward.

    Raises :class:`BrokenStream`, or ``StateError`` if the credentials are none.
    """
    carriers = _carriers(connections, wish, server=False)
    lanes = list(zip(carriers[0::2], carriers[1::2], strict=True))
    for number, lane in enumerate(lanes):
        for carrier, way in zip(lane, (Way.FORWARD, Way.BACKWARD), strict=True):
            carrier.send(Hello(way, wish.window_log, number).pack())
    answers = {Hello.parse(backward.receive(HELLO_BYTES))._replace(lane=0) for _, backward in lanes}
    answer = answers.pop()
    if answers or answer.way is not Way.ANSWER or answer.window_log > wish.window_log:
        raise BrokenStream("the other relay gave an answer to something else")
    return _ends(lanes, guarded, answer.window_log)


def admit(connections: Sequence[socket.socket], wish: Open, guarded: Guarded) -> Ends:
    """The destination's side; the connections may come in any order. Otherwise as :func:`connect`."""
    ways: dict[tuple[int, Way], Carrier] = {}
    window_log = wish.window_log
    for carrier in _carriers(connections, wish, server=True):
        hello = Hello.parse(carrier.receive(HELLO_BYTES))
        ways[hello.lane, hello.way] = carrier
        window_log = min(window_log, hello.window_log)
    numbers = range(len(connections) // 2)
    if ways.keys() != {(number, way) for number in numbers for way in (Way.FORWARD, Way.BACKWARD)}:
        raise BrokenStream("the connections are not one of each way for each path")
    for number in numbers:
        ways[number, Way.BACKWARD].send(Hello(Way.ANSWER, window_log, number).pack())
    lanes = [(ways[number, Way.BACKWARD], ways[number, Way.FORWARD]) for number in numbers]
    return _ends(lanes, guarded, window_log)


def _carriers(connections: Sequence[socket.socket], wish: Open, *, server: bool) -> list[Carrier]:
    """All handshakes at once: the other side may hold the connections in another order."""
    context = stream_context(wish.credentials, server=server) if wish.credentials else None
    make = partial(Carrier, context=context, server=server, timeout_s=HANDSHAKE_WITHIN_S)
    with ThreadPoolExecutor(len(connections)) as handshakes:
        return list(handshakes.map(make, connections))


def _ends(lanes: Sequence[tuple[Carrier, Carrier]], guarded: Guarded, window_log: int) -> Ends:
    """A path alone needs nothing that puts in order."""
    for lane in lanes:
        for carrier in lane:
            carrier.settle()
    if len(lanes) == 1:
        return Ends(*lanes[0], window_log)
    striped = Lanes(lanes, guarded)
    return Ends(striped, striped, window_log)
