"""How the two relays of a session begin: handshakes and first words on both carriers.

The daemons have connected the two and know who called (``transport.tcp``: the token first). What comes is therefore the
other relay, or somebody who holds its daemon's secrets; TLS with the session's own credentials proves the rest.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from limosa.security.tls import stream_context
from limosa.transport.relay.carrier import Carrier
from limosa.transport.relay.control import Open
from limosa.transport.relay.errors import BrokenStream
from limosa.transport.relay.frames import HELLO_BYTES, Hello, Way

HANDSHAKE_WITHIN_S = 10.0


def connect(connections: Sequence[socket.socket], wish: Open) -> tuple[Carrier, Carrier, int]:
    """The source's side: forward and backward carrier, and the window that is agreed on.

    Raises :class:`BrokenStream`, or ``StateError`` if the credentials are none.
    """
    carriers = _carriers(connections, wish, server=False)
    for carrier, way in zip(carriers, (Way.FORWARD, Way.BACKWARD), strict=True):
        carrier.send(Hello(way, wish.window_log).pack())
    forward, backward = carriers
    answer = Hello.parse(backward.receive(HELLO_BYTES))
    if answer.way is not Way.ANSWER or answer.window_log > wish.window_log:
        raise BrokenStream("the other relay gave an answer to something else")
    return _settled(forward), _settled(backward), answer.window_log


def admit(connections: Sequence[socket.socket], wish: Open) -> tuple[Carrier, Carrier, int]:
    """The destination's side; the connections may come in any order. Otherwise as :func:`connect`."""
    ways: dict[Way, Carrier] = {}
    window_log = wish.window_log
    for carrier in _carriers(connections, wish, server=True):
        hello = Hello.parse(carrier.receive(HELLO_BYTES))
        ways[hello.way] = carrier
        window_log = min(window_log, hello.window_log)
    if ways.keys() != {Way.FORWARD, Way.BACKWARD}:
        raise BrokenStream("the two connections are not one of each way")
    forward, backward = ways[Way.FORWARD], ways[Way.BACKWARD]
    backward.send(Hello(Way.ANSWER, window_log).pack())
    return _settled(forward), _settled(backward), window_log


def _carriers(connections: Sequence[socket.socket], wish: Open, *, server: bool) -> list[Carrier]:
    """All handshakes at once: the other side may hold the connections in another order."""
    context = stream_context(wish.credentials, server=server) if wish.credentials else None
    make = partial(Carrier, context=context, server=server, timeout_s=HANDSHAKE_WITHIN_S)
    with ThreadPoolExecutor(len(connections)) as handshakes:
        return list(handshakes.map(make, connections))


def _settled(carrier: Carrier) -> Carrier:
    carrier.settle()
    return carrier
