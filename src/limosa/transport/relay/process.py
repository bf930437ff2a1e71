"""The relay's main thread: it does what the daemon asks, and ends with it.

The control socket is the relay's life. When the daemon closes it, or dies, the process exits at once, and with it
everything: carriers, streams, the worker.

A relay that is started by root gives up root's rights as soon as it is loaded and has forked its worker, before it
hears a word. (An unprivileged user might not even be able to read this program.) The kernel then lets nobody look into
it, not even a QEMU that runs as the same user and got out of hand.
"""

from __future__ import annotations

import encodings.idna  # noqa: F401 - for server names; once rights are given up it might not be found
import logging
import os
import socket
from functools import partial
from threading import Lock, Thread

import msgspec

from limosa.errors import InvalidInput
from limosa.model import reading
from limosa.transport.relay import control
from limosa.transport.relay.carrier import In, Out
from limosa.transport.relay.control import (
    AddConnection,
    AddLane,
    FromDaemon,
    OpenChannel,
    OpenReceiver,
    OpenSender,
    SetPace,
    SetShort,
)
from limosa.transport.relay.joining import Admission, Calling
from limosa.transport.relay.lanes import Lanes
from limosa.transport.relay.notices import Notices
from limosa.transport.relay.pages import Finder
from limosa.transport.relay.plug import Plug
from limosa.transport.relay.receiver import Receiver
from limosa.transport.relay.sender import Sender
from limosa.transport.relay.session import admit, connect
from limosa.transport.relay.worker import Memory, Worker
from limosa.wire.parsing import parse

#: Chunks that wait for the carrier, of some milliseconds each.
SLOTS = 20

_decoder: msgspec.json.Decoder[FromDaemon] = reading.decoder(FromDaemon)


class Relay:
    """One relay: first nothing, then one side of one session."""

    def __init__(self, sock: socket.socket, memory: Memory, worker: Worker) -> None:
        self._socket, self._memory, self._worker = sock, memory, worker
        self._notices = Notices(sock)
        self._session: Sender | Receiver | None = None
        #: of a session that is striped
        self._calling: Calling | None = None
        self._admission: Admission | None = None
        self._opening = False
        #: channels that were opened before the session; the lock is held while either changes
        self._early: list[Plug] = []
        self._lock = Lock()

    def run(self) -> None:
        """Serve the daemon until it is gone; then end the process."""
        self._notices.guarded(self._serve)()
        # Without waiting for any thread: most of them wait for a socket.
        os._exit(0)

    def _serve(self) -> None:
        while True:
            try:
                data, sockets = control.receive(self._socket)
            except ConnectionResetError:
                return
            if not data:
                return
            self._notices.say(self._answer(data, sockets))

    def _answer(self, data: bytes, sockets: list[socket.socket]) -> control.Answer:
        try:
            request = parse(data, _decoder, "the message")
            return self._do(request, sockets)
        except InvalidInput as error:
            for each in sockets:
                each.close()
            return control.Refused(why=str(error))

    def _do(self, request: FromDaemon, sockets: list[socket.socket]) -> control.Answer:
        if isinstance(request, OpenSender | OpenReceiver):
            self._open(request, sockets)
        elif isinstance(request, OpenChannel):
            self._open_channel(request.channel, sockets)
        elif isinstance(request, AddConnection):
            self._add_connection(sockets)
        elif isinstance(request, AddLane):
            self._add_lane(request.lane, sockets)
        elif self._session is None:
            raise InvalidInput("there is no session yet")
        elif isinstance(request, SetShort):
            self._session.set_short(request.channel, request.short)
        elif isinstance(request, SetPace):
            if not isinstance(self._session, Sender):
                raise InvalidInput("nothing is sent from here")
            self._session.set_pace(request.channel, request.bytes_per_s)
        else:
            return self._session.statistics()
        return control.Done()

    def _open(self, wish: OpenSender | OpenReceiver, sockets: list[socket.socket]) -> None:
        if self._opening:
            raise InvalidInput("there is a session already")
        if len(sockets) != (0 if wish.striped else control.CARRIERS):
            raise InvalidInput("the wrong number of sockets")
        self._opening = True
        if wish.striped:
            self._await_lanes(wish)
            return
        work = partial(self._send, wish) if isinstance(wish, OpenSender) else partial(self._receive, wish)
        # The main thread goes on listening to the daemon, whose end is ours, too.
        Thread(target=self._notices.guarded(partial(work, sockets)), daemon=True).start()

    def _send(self, wish: OpenSender, connections: list[socket.socket]) -> None:
        agreed = connect(connections, wish)
        self._begin_to_send(wish, agreed.out, agreed.back, agreed.window_log)

    def _begin_to_send(self, wish: OpenSender, out: Out, back: In, window_log: int) -> None:
        finder, worker = None, None
        if wish.level is None:
            self._worker.end()
        else:
            finder, worker = Finder(1 << window_log), self._worker
            worker.begin(wish.level)
        self._begin(Sender(out, back, self._memory, finder, worker, self._notices), window_log)

    def _receive(self, wish: OpenReceiver, connections: list[socket.socket]) -> None:
        self._worker.end()
        agreed = admit(connections, wish)
        self._begin(Receiver(agreed.back, agreed.out, agreed.window_log, self._notices), agreed.window_log)

    def _await_lanes(self, wish: OpenSender | OpenReceiver) -> None:
        notices = self._notices
        lanes = Lanes(notices.guarded, notices.lane_lost)
        if isinstance(wish, OpenSender):
            send = partial(self._begin_to_send, wish, lanes, lanes)
            self._calling = Calling(lanes, wish, notices.guarded, send, notices.lane_lost)
            return
        self._worker.end()

        def begin(window_log: int) -> None:
            self._begin(Receiver(lanes, lanes, window_log, notices), window_log)

        self._admission = Admission(lanes, wish, notices.guarded, begin)

    def _add_lane(self, number: int, sockets: list[socket.socket]) -> None:
        if self._calling is None:
            raise InvalidInput("no lane joins this session from here")
        self._calling.add(number, sockets)

    def _add_connection(self, sockets: list[socket.socket]) -> None:
        if self._admission is None:
            raise InvalidInput("this session awaits no lanes")
        if len(sockets) != 1:
            raise InvalidInput("the wrong number of sockets")
        self._admission.add(sockets[0])

    def _begin(self, session: Sender | Receiver, window_log: int) -> None:
        with self._lock:
            self._session = session
            for plug in self._early:
                session.open_channel(plug)
        session.start()
        self._notices.say(control.Opened(window_log=window_log))

    def _open_channel(self, number: int, sockets: list[socket.socket]) -> None:
        if len(sockets) != 1:
            raise InvalidInput("the wrong number of sockets")
        with self._lock:
            known = self._session.knows(number) if self._session else any(one.number == number for one in self._early)
            if known:
                raise InvalidInput(f"channel {number} was opened before")
            if (self._session.open_channels if self._session else len(self._early)) >= control.MAX_CHANNELS:
                raise InvalidInput(f"{control.MAX_CHANNELS} channels are open already")
            plug = Plug(number, sockets[0])
            if self._session is None:
                self._early.append(plug)
            else:
                self._session.open_channel(plug)


def main(arguments: list[str]) -> None:
    """Be a relay. Does not return.

    ``arguments``: the descriptor of the control socket; and, if root's rights are to be given up, a uid and a gid.
    """
    logging.basicConfig(format="relay: %(message)s", level=logging.WARNING)
    descriptor, *owner = map(int, arguments)
    sock = socket.socket(fileno=descriptor)
    memory = Memory(SLOTS)

    def prepare_worker() -> None:
        sock.close()
        _become(owner)

    worker = Worker.start(memory, prepare_worker)
    _become(owner)
    Relay(sock, memory, worker).run()


def _become(owner: list[int]) -> None:
    """Be that user, for ever; nothing for an empty list."""
    if owner:
        uid, gid = owner
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
