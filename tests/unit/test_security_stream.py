"""Throw-away credentials: QEMU itself accepts them, and only the pair accepts each other."""

from __future__ import annotations

import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from limosa.security.stream import make_credentials
from limosa.security.tls import SERVER_NAME
from limosa.wire.peer import StreamCredentials

QEMU = "qemu-system-x86_64"


def lay_out(folder: Path, credentials: StreamCredentials, end: str) -> Path:
    """The folder as QEMU's tls-creds-x509 wants it."""
    folder.mkdir(mode=0o700)
    (folder / "ca-cert.pem").write_text(credentials.authority)
    (folder / f"{end}-cert.pem").write_text(credentials.certificate)
    (folder / f"{end}-key.pem").write_text(credentials.key)
    return folder


def qemu_arguments(folder: Path, end: str) -> list[str]:
    credentials = f"tls-creds-x509,id=tls0,dir={folder},endpoint={end},verify-peer=on,sanity-check=on"
    return [QEMU, "-machine", "none", "-nodefaults", "-display", "none", "-object", credentials]


@pytest.mark.qemu
@pytest.mark.parametrize("end", ["server", "client"])
def test_qemu_finds_the_credentials_sane(tmp_path: Path, end: str) -> None:
    server, client = make_credentials()
    folder = lay_out(tmp_path / "tls", server if end == "server" else client, end)
    done = subprocess.run(
        [*qemu_arguments(folder, end), "-monitor", "stdio"],
        input="quit\n",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture
def listen(tmp_path: Path) -> Iterator[Callable[[StreamCredentials], int]]:
    """Starts a QEMU whose monitor serves TLS on loopback with the credentials it is given; gives the port."""
    running: list[subprocess.Popen[bytes]] = []

    def start(credentials: StreamCredentials) -> int:
        folder = lay_out(tmp_path / "tls", credentials, "server")
        # The socket listens before QEMU has it, so a client need not wait for QEMU.
        with socket.create_server(("127.0.0.1", 0)) as listener:
            descriptor = listener.fileno()
            chardev = f"socket,id=c,fd={descriptor},server=on,wait=off,tls-creds=tls0"
            arguments = [*qemu_arguments(folder, "server"), "-chardev", chardev, "-mon", "chardev=c,mode=control"]
            running.append(subprocess.Popen(arguments, pass_fds=[descriptor]))
            return int(listener.getsockname()[1])

    yield start
    for process in running:
        process.kill()
        process.wait()


def greet(port: int, credentials: StreamCredentials, folder: Path) -> bytes:
    """What QEMU's monitor says to a client with these credentials."""
    files = lay_out(folder, credentials, "client")
    context = ssl.create_default_context(cafile=str(files / "ca-cert.pem"))
    context.load_cert_chain(files / "client-cert.pem", files / "client-key.pem")
    with (
        socket.create_connection(("127.0.0.1", port), timeout=30) as plain,
        context.wrap_socket(plain, server_hostname=SERVER_NAME) as stream,
    ):
        return stream.recv(100)


def refused(port: int, credentials: StreamCredentials, folder: Path) -> bool:
    """Whether QEMU ends the connection without a word, by an alert, a reset or an end of file."""
    try:
        return greet(port, credentials, folder) == b""
    except (ssl.SSLError, ConnectionError):
        return True


@pytest.mark.qemu
def test_qemu_speaks_with_the_other_half(tmp_path: Path, listen: Callable[[StreamCredentials], int]) -> None:
    server, client = make_credentials()
    assert b"QMP" in greet(listen(server), client, tmp_path / "client")


@pytest.mark.qemu
def test_qemu_refuses_the_half_of_another_pair(tmp_path: Path, listen: Callable[[StreamCredentials], int]) -> None:
    server, _ = make_credentials()
    _, stranger = make_credentials()
    trusting = StreamCredentials(authority=server.authority, certificate=stranger.certificate, key=stranger.key)
    assert refused(listen(server), trusting, tmp_path / "client")


def test_two_pairs_have_nothing_in_common() -> None:
    first, second = make_credentials(), make_credentials()
    texts = [text for pair in (first, second) for one in pair for text in (one.certificate, one.key)]
    assert len(set(texts)) == 8
    assert first[0].authority == first[1].authority != second[0].authority
