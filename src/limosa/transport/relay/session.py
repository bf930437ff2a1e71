"""How two relays agree on a path: handshakes and first words on its two connections.

The daemons have connected them and know who called (``transport.tcp``: the token first). What comes is therefore the
other relay, or somebody who holds its daemon's secrets; TLS with the session's own credentials proves the rest.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

from limosa.security.tls import stream_context
from limosa.transport.relay.carrier import Carrier
from limosa.transport.relay.control import Open
from limosa.transport.relay.errors import BrokenStream
from limosa.transport.relay.frames import HELLO_BYTES, Hello, Way

#: Each step: a handshake, or the first words.
HANDSHAKE_WITHIN_S = 10.0


class Agreed(NamedTuple):
    """A path that both relays know: where to send and where to receive, and how much the destination keeps of it."""

    out: Carrier
    back: Carrier
    window_log: int
    lane: int


def connect(connections: Sequence[socket.socket], wish: Open, lane: int = 0) -> Agreed:
    """The source's side, with a forward and a backward connection.

    Raises :class:`BrokenStream`, after which both are at their end, or ``StateError`` if the credentials are none.
    """
    carriers = forward, backward = shake_hands(connections, wish, server=False)
    try:
        for carrier, way in ((forward, Way.FORWARD), (backward, Way.BACKWARD)):
            carrier.send(Hello(way, wish.window_log, lane).pack())
        answer = Hello.parse(backward.receive(HELLO_BYTES))
        if answer.way is not Way.ANSWER or answer.lane != lane or answer.window_log > wish.window_log:
            raise BrokenStream("the other relay gave an answer to something else")
    except BrokenStream:
        end(carriers)
        raise
    return _agreed(forward, backward, answer.window_log, lane)


def admit(connections: Sequence[socket.socket], wish: Open) -> Agreed:
    """The destination's side of a session over one path; the connections may come in any order. As :func:`connect`."""
    carriers = shake_hands(connections, wish, server=True)
    try:
        hellos = [Hello.parse(carrier.receive(HELLO_BYTES)) for carrier in carriers]
        ways = {(hello.lane, hello.way): carrier for hello, carrier in zip(hellos, carriers, strict=True)}
        if ways.keys() != {(0, Way.FORWARD), (0, Way.BACKWARD)}:
            raise BrokenStream("the connections are not one of each way")
        window_log = min(wish.window_log, *(hello.window_log for hello in hellos))
        return answer(ways[0, Way.FORWARD], ways[0, Way.BACKWARD], window_log, 0)
    except BrokenStream:
        end(carriers)
        raise


def answer(forward: Carrier, backward: Carrier, window_log: int, lane: int) -> Agreed:
    """The destination's answer when the source's first words have come on both. Raises :class:`BrokenStream`."""
    backward.send(Hello(Way.ANSWER, window_log, lane).pack())
    return _agreed(backward, forward, window_log, lane)


def shake_hands(connections: Sequence[socket.socket], wish: Open, *, server: bool) -> list[Carrier]:
    """All handshakes at once: the other side may hold the connections in another order. Raises as :func:`connect`."""
    context = stream_context(wish.credentials, server=server) if wish.credentials else None
    make = partial(Carrier, context=context, server=server, timeout_s=HANDSHAKE_WITHIN_S)
    with ThreadPoolExecutor(len(connections)) as handshakes:
        made = [handshakes.submit(make, connection) for connection in connections]
    try:
        return [one.result() for one in made]
    except BrokenStream:
        end([one.result() for one in made if one.exception() is None])
        raise


def end(carriers: Sequence[Carrier]) -> None:
    """Let the other side see that nothing comes of these."""
    for carrier in carriers:
        carrier.end()


def _agreed(out: Carrier, back: Carrier, window_log: int, lane: int) -> Agreed:
    for carrier in (out, back):
        carrier.settle()
    return Agreed(out, back, window_log, lane)
