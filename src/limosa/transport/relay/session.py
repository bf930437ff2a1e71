"""How the two relays of a session find each other: handshakes and first words on both carriers.

The source's relay has two connections and says on each what it is for. The destination's relay has a listener, so that
a stranger who connects costs nothing: whoever does not pass the handshake, or does not know the session's token (which
guards streams without TLS), is hung up on, and the listener goes on waiting.
"""

from __future__ import annotations

import hmac
import logging
import socket
import ssl
import threading
from contextlib import suppress

from limosa.security.tls import stream_context
from limosa.transport.relay.carrier import Carrier
from limosa.transport.relay.control import OpenReceiver, OpenSender
from limosa.transport.relay.errors import BrokenStream
from limosa.transport.relay.frames import HELLO_BYTES, Hello, Way

_log = logging.getLogger(__name__)
HANDSHAKE_WITHIN_S = 10.0
#: From the destination's daemon being asked until the source's has connected, which prepares its own things meanwhile.
ADMIT_WITHIN_S = 60.0
_MOST_STRANGERS = 16


def connect(forward: socket.socket, backward: socket.socket, wish: OpenSender) -> tuple[Carrier, Carrier, int]:
    """Both carriers, and the window that is agreed on. Raises :class:`BrokenStream`, or ``StateError``."""
    context = stream_context(wish.credentials, server=False) if wish.credentials else None
    token = bytes.fromhex(wish.token)
    carriers = []
    for connection, way in ((forward, Way.FORWARD), (backward, Way.BACKWARD)):
        carrier = Carrier(connection, context, server=False, timeout_s=HANDSHAKE_WITHIN_S)
        carrier.send(Hello(way, wish.window_log, token).pack())
        carriers.append(carrier)
    answer = Hello.parse(carriers[1].receive(HELLO_BYTES))
    if answer.way is not Way.ANSWER or answer.token != token or answer.window_log > wish.window_log:
        raise BrokenStream("the other relay gave an answer to something else")
    for carrier in carriers:
        carrier.settle()
    return carriers[0], carriers[1], answer.window_log


def admit(listener: socket.socket, wish: OpenReceiver) -> tuple[Carrier, Carrier, int]:
    """Both carriers, and the window that is agreed on; the listener is closed. Raises as :func:`connect`."""
    context = stream_context(wish.credentials, server=True) if wish.credentials else None
    with listener:
        return _Admission(wish, context).both(listener)


class _Admission:
    """Hears everybody who connects, each in a thread of its own, so that one who says nothing holds up nobody."""

    def __init__(self, wish: OpenReceiver, context: ssl.SSLContext | None) -> None:
        self._wish, self._context = wish, context
        self._token = bytes.fromhex(wish.token)
        self._admitted: dict[Way, tuple[Carrier, Hello]] = {}
        self._changed = threading.Condition()
        self._strangers = threading.Semaphore(_MOST_STRANGERS)

    def both(self, listener: socket.socket) -> tuple[Carrier, Carrier, int]:
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()
        try:
            with self._changed:
                if not self._changed.wait_for(lambda: len(self._admitted) == 2, ADMIT_WITHIN_S):
                    raise BrokenStream(f"the source's relay did not come within {ADMIT_WITHIN_S:.0f} s")
        finally:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # ends the accepting thread
        (forward, hello), (backward, _) = self._admitted[Way.FORWARD], self._admitted[Way.BACKWARD]
        window_log = min(hello.window_log, self._wish.window_log)
        backward.send(Hello(Way.ANSWER, window_log, self._token).pack())
        for carrier in (forward, backward):
            carrier.settle()
        return forward, backward, window_log

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                self._strangers.acquire()
                threading.Thread(target=self._hear, args=(connection,), daemon=True).start()

    def _hear(self, connection: socket.socket) -> None:
        try:
            carrier = Carrier(connection, self._context, server=True, timeout_s=HANDSHAKE_WITHIN_S)
            try:
                self._admit(carrier, Hello.parse(carrier.receive(HELLO_BYTES)))
            except BrokenStream:
                carrier.close()
                raise
        except BrokenStream as error:
            _log.warning("refused a connection: %s", error)
        finally:
            self._strangers.release()

    def _admit(self, carrier: Carrier, hello: Hello) -> None:
        with self._changed:
            if hello.way is Way.ANSWER or hello.way in self._admitted:
                raise BrokenStream("it is not expected")
            if not hmac.compare_digest(hello.token, self._token):
                raise BrokenStream("it belongs to another session")
            self._admitted[hello.way] = (carrier, hello)
            self._changed.notify_all()
