"""``limosa host serve``: one event loop, one Unix socket, and one mutual-TLS listener for each configured address.

Everything is taken up again before the first request is answered. SIGTERM ends the daemon and nothing else: VMs go on,
and the next daemon takes them up. Readiness is told to systemd (``Type=notify``) or whoever gave NOTIFY_SOCKET.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import uvicorn
import uvloop
from starlette.applications import Starlette
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from limosa.background import Background
from limosa.errors import InvalidInput, NetworkError, NotPermitted
from limosa.host import history, logs
from limosa.host.api import application
from limosa.host.calling import MAX_MESSAGE_BYTES, PING_EVERY_S, PONG_WITHIN_S
from limosa.host.certificates import Certificates
from limosa.host.files import Files
from limosa.host.services import assemble, recover
from limosa.security.identity import Identity, from_peer_certificate, from_unix_peer
from limosa.settings import toml
from limosa.settings.address import split_address
from limosa.settings.daemon import DEFAULT_PORT, DaemonSettings

_log = logging.getLogger(__name__)

#: What is under way when the daemon ends may take so long to its end. Of what takes longer, as on a share that does not
#: answer, the next daemon finds what it would after a crash.
END_WITHIN_S = 10.0


def serve(settings_file: Path) -> None:
    """Run the daemon until SIGTERM or SIGINT. Raises :class:`LimosaError` if it cannot start."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    for chatty in ("uvicorn", "qemu.qmp"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    daemon = toml.read(settings_file, DaemonSettings)
    os.umask(0o077)
    uvloop.run(_serve(daemon))


async def _serve(daemon: DaemonSettings) -> None:
    files = Files(Path(daemon.state_dir), Path(daemon.run_dir))
    files.make()
    files.claim()
    # Who cannot be reached must not touch a VM either, so listening comes first.
    listeners = [(_unix_listener(files.socket), None), *_tls_listeners(daemon)]
    services = await assemble(daemon, files)
    app = application(services)
    servers = [(_Server(_config(app, context)), sock) for sock, context in listeners]
    await recover(services)
    upkeep = Background()
    upkeep.spawn(logs.keep_bounded(files.vms))
    upkeep.spawn(history.keep_bounded(files.migrations, services.views))
    # What is here now stays. Looking through it for garbage could take milliseconds of a blackout.
    gc.collect()
    gc.freeze()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    # The sockets listen already: who connects before a server has begun is served when it has.
    tasks = [asyncio.ensure_future(server.serve(sockets=[sock])) for server, sock in servers]
    _notify("READY=1")
    _log.info("host %s serves %s", daemon.name, ", ".join([str(services.parts.files.socket), *daemon.listen]))
    await stop.wait()
    _notify("STOPPING=1")
    services.incoming.stop()
    for server, _ in servers:
        server.should_exit = True
        server.force_exit = True
    upkeep.cancel()
    await asyncio.wait(tasks, timeout=2)
    _end_in_time()


def _end_in_time() -> None:
    """Have the process end within :data:`END_WITHIN_S`, whatever hangs: the loop waits for work in threads that must
    not be left half done, and that, on a share that does not answer, for the share."""
    deadline = threading.Timer(END_WITHIN_S, _end_at_once)
    deadline.daemon = True
    deadline.start()


def _end_at_once() -> None:
    _log.warning("what has not ended within %g s is left as it is, for the next daemon", END_WITHIN_S)
    os._exit(0)


class IdentifyingProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol, which also tells the application who is at the other end of the connection."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Add ``identity`` to the state of every request on this connection; None if it is nobody we know."""
        super().connection_made(transport)
        self.app_state = {**self.app_state, "identity": _identify(transport)}

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP in the same form as everything else."""
        body = msgspec.json.encode(InvalidInput("the request is not valid", why=msg).fault())
        lines = ["HTTP/1.1 400 Bad Request", "content-type: application/json", f"content-length: {len(body)}"]
        self.transport.write("\r\n".join([*lines, "connection: close", "", ""]).encode("ascii") + body)
        self.transport.close()


class SilenceEndingProtocol(WebSocketsSansIOProtocol):
    """uvicorn's WebSocket protocol, for which a connection is over as soon as the other end has been silent for too
    long: it would wait half a minute for it to end TLS, too."""

    def keepalive_timeout(self) -> None:
        """Say why, if that still gets through, and end it."""
        super().keepalive_timeout()
        self.transport.abort()


def _identify(transport: asyncio.Transport) -> Identity | None:
    try:
        if transport.get_extra_info("sslcontext") is not None:
            return from_peer_certificate(transport.get_extra_info("peercert"))
        return from_unix_peer(_peer_uid(transport.get_extra_info("socket")))
    except NotPermitted as error:
        _log.warning("refused: %s", error)
        return None


def _peer_uid(sock: Any) -> int:
    # struct ucred: pid, uid, gid, each 32 bits
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return int.from_bytes(credentials[4:8], "little")


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the daemon: there are several servers in it."""
        yield


def _unix_listener(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    try:
        if _is_served(path):
            raise NetworkError(f"another daemon serves {path}", todo="give each daemon a run_dir of its own")
        path.unlink(missing_ok=True)
        os.fchmod(sock.fileno(), 0o600)
        sock.bind(str(path))
        sock.listen(128)
    except OSError as error:
        raise NetworkError(f"cannot listen on {path}", why=error.strerror or str(error)) from error
    return sock


def _is_served(path: Path) -> bool:
    """Whether somebody listens. A socket that nobody listens on is what a daemon that was killed left."""
    with socket.socket(socket.AF_UNIX) as trial:
        trial.setblocking(False)  # a daemon that is too busy to take us is one too
        try:
            trial.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except BlockingIOError:
            pass
    return True


def _tls_listeners(daemon: DaemonSettings) -> Iterator[tuple[socket.socket, ssl.SSLContext]]:
    if not daemon.listen:
        return
    context = Certificates(Path(daemon.certificates), daemon.name).context
    for address in daemon.listen:
        host, port = split_address(address)
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            yield socket.create_server((host, port or DEFAULT_PORT), family=family, backlog=128), context
        except OSError as error:
            raise NetworkError(
                f"cannot listen on {address}",
                why=error.strerror or str(error),
                todo="see 'listen' in host.toml, and whether another daemon has the port",
            ) from error


def _config(app: Starlette, context: ssl.SSLContext | None = None) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=IdentifyingProtocol,
        ws=SilenceEndingProtocol,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,  # nothing is between us and who shows a certificate
        timeout_keep_alive=30,
        ws_max_size=MAX_MESSAGE_BYTES,
        ws_ping_interval=PING_EVERY_S,
        ws_ping_timeout=PONG_WITHIN_S,
        ws_per_message_deflate=False,
        ssl_context_factory=(lambda *_: context) if context is not None else None,
    )


def _notify(state: str) -> None:
    """Tell the service manager (sd_notify(3)); no effect without one."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.connect(address.replace("@", "\0", 1) if address.startswith("@") else address)
        sock.send(state.encode())
