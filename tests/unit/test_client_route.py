"""How hosts are found, and a whole call over mutual TLS on loopback."""

from __future__ import annotations

import asyncio
import shutil
import socket
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from harness.background import Background
from limosa.client.host import HostClient
from limosa.client.route import TlsRoute, UnixRoute, configuration_folders, find_route, local_route
from limosa.errors import HostNotTrusted, HostUnreachable, InvalidInput, StateError
from limosa.security import ca, tls
from limosa.settings.address import split_address
from limosa.wire.api import VmList
from limosa.wire.endpoints import LIST_VMS, Role


@pytest.mark.parametrize(
    ("text", "name", "port"),
    [
        ("host1", "host1", None),
        ("host1:7412", "host1", 7412),
        ("10.0.0.1", "10.0.0.1", None),
        ("10.0.0.1:1", "10.0.0.1", 1),
        ("fd00::1", "fd00::1", None),
        ("[fd00::1]", "fd00::1", None),
        ("[fd00::1]:65535", "fd00::1", 65535),
        ("host_1.example", "host_1.example", None),
    ],
)
def test_addresses(text: str, name: str, port: int | None) -> None:
    assert split_address(text) == (name, port)


@pytest.mark.parametrize(
    "text", ["", ":1", "a b", "a..b", "host1:0", "host1:65536", "host1:x", "a/b", "a@b", "é", "x" * 64]
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(InvalidInput):
        split_address(text)


def test_a_persons_configuration_comes_first(tmp_path: Path) -> None:
    mine, machine = tmp_path / "mine", tmp_path / "machine"
    for folder in (mine, machine):
        folder.mkdir()
        (folder / "host.key").touch()
    (machine / "hosts.toml").write_text('[hosts]\nhost1 = "10.0.0.1"\nhost2 = "10.0.0.2:7412"\n')
    (mine / "hosts.toml").write_text('[hosts]\nhost1 = "10.9.9.9"\n')
    assert find_route("host1", (mine, machine)) == TlsRoute("host1", "10.9.9.9", 7411, mine, "host")
    assert find_route("host2", (mine, machine)) == TlsRoute("host2", "10.0.0.2", 7412, mine, "host")
    assert find_route("host2:1", (mine, machine)) == TlsRoute("host2", "10.0.0.2", 1, mine, "host")
    (machine / "client.key").touch()
    assert find_route("host3", (mine, machine)) == TlsRoute("host3", "host3", 7411, machine, "client")


def test_faults_of_the_configuration_are_named(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="no certificate to show to host 'lab1-host9'"):
        find_route("lab1-host9", (tmp_path,))
    (tmp_path / "hosts.toml").write_text('[hosts]\nhost1 = "a b"\n')
    with pytest.raises(InvalidInput, match=r"hosts\.toml"):
        find_route("host1", (tmp_path,))


def test_the_local_socket() -> None:
    assert local_route({}) == UnixRoute("/run/limosa/api.sock")
    assert local_route({"LIMOSA_SOCKET": "/x"}) == UnixRoute("/x")
    assert configuration_folders({"HOME": "/home/a"})[0] == Path("/home/a/.config/limosa")
    assert configuration_folders({"XDG_CONFIG_HOME": "/c"})[0] == Path("/c/limosa")


@pytest.fixture
def pki(tmp_path: Path) -> Path:
    """An authority, host1 on loopback, and an operator."""
    ca.create_authority(tmp_path / "ca")
    ca.issue_host(tmp_path / "ca", "host1", ["127.0.0.1"], tmp_path / "host1")
    ca.issue_person(tmp_path / "ca", "alice", Role.OPERATOR, tmp_path / "alice")
    return tmp_path


class TlsHost:
    """Answers one connection after a handshake with an empty list of VMs."""

    def __init__(self, pki: Path) -> None:
        self.context = tls.server_context(pki / "host1")
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self.listener.getsockname()[1])
        self.thread = threading.Thread(target=self.serve)

    def __enter__(self) -> TlsHost:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.thread.join()
        self.listener.close()

    def serve(self) -> None:
        plain, _ = self.listener.accept()
        try:
            with self.context.wrap_socket(plain, server_side=True) as stream:
                stream.recv(4096)
                stream.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n{"vms":[]}')
        except OSError:
            plain.close()


def call(route: TlsRoute) -> VmList:
    with HostClient(route) as client:
        return client.call(LIST_VMS)


def test_a_call_over_mutual_tls(pki: Path) -> None:
    with TlsHost(pki) as host:
        assert call(TlsRoute("host1", "127.0.0.1", host.port, pki / "alice", "client")) == VmList(vms=())


def test_another_host_is_not_taken_for_the_one_called(pki: Path) -> None:
    with TlsHost(pki) as host, pytest.raises(HostNotTrusted, match="Hostname mismatch"):
        call(TlsRoute("host2", "127.0.0.1", host.port, pki / "alice", "client"))


def test_a_host_of_another_authority_is_not_trusted(pki: Path) -> None:
    ca.create_authority(pki / "other")
    ca.issue_person(pki / "other", "alice", Role.OPERATOR, pki / "stranger")
    with TlsHost(pki) as host, pytest.raises(HostNotTrusted, match="certificate"):
        call(TlsRoute("host1", "127.0.0.1", host.port, pki / "stranger", "client"))


@pytest.fixture
def stranger(pki: Path) -> Path:
    """Who knows the hosts' authority and has a certificate of another one."""
    ca.create_authority(pki / "other")
    ca.issue_person(pki / "other", "alice", Role.OPERATOR, pki / "stranger")
    shutil.copy(pki / "host1/ca.pem", pki / "stranger/ca.pem")
    return pki / "stranger"


def test_a_host_whose_alert_refuses_our_certificate(pki: Path, stranger: Path) -> None:
    with TlsHost(pki) as host, pytest.raises(HostNotTrusted, match="does not accept your certificate") as refused:
        call(TlsRoute("host1", "127.0.0.1", host.port, stranger, "client"))
    assert refused.value.todo == f"use a certificate of the host's own authority in {stranger}"


@asynccontextmanager
async def daemon(pki: Path, reply: bytes) -> AsyncIterator[int]:
    """A host on an event loop, as the daemon is; its port. It closes each connection after this reply to a request."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(reply)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", ssl=tls.server_context(pki / "host1")) as server:
        yield server.sockets[0].getsockname()[1]


def test_a_host_that_refuses_our_certificate_without_a_word(pki: Path, stranger: Path) -> None:
    with (
        Background() as background,
        background.open(daemon(pki, b"")) as port,
        pytest.raises(HostNotTrusted, match="does not accept your certificate"),
    ):
        call(TlsRoute("host1", "127.0.0.1", port, stranger, "client"))


def test_a_host_that_goes_away_after_it_has_accepted_us_is_not_said_to_refuse(pki: Path) -> None:
    for reply in (b"", b"HTTP/1.1 200 OK\r\n"):
        with (
            Background() as background,
            background.open(daemon(pki, reply)) as port,
            pytest.raises(HostUnreachable, match="closed before the reply"),
        ):
            call(TlsRoute("host1", "127.0.0.1", port, pki / "alice", "client"))


def test_an_expired_certificate_of_ours_is_named(pki: Path) -> None:
    (pki / "alice/client.pem").unlink()
    life = -ca.BACK / 2
    ca.issue_person(pki / "ca", "alice", Role.OPERATOR, pki / "alice", life=life)
    with TlsHost(pki) as host, pytest.raises(StateError, match=r"client\.pem has expired"):
        call(TlsRoute("host1", "127.0.0.1", host.port, pki / "alice", "client"))


def test_an_expired_certificate_of_the_host_is_named_and_how_it_is_renewed(pki: Path) -> None:
    ca.issue_host(pki / "ca", "host1", ["127.0.0.1"], pki / "host1", life=-ca.BACK / 2)
    with (
        TlsHost(pki) as host,
        pytest.raises(HostNotTrusted, match=r"certificate of host 'host1' at .* has expired") as no,
    ):
        call(TlsRoute("host1", "127.0.0.1", host.port, pki / "alice", "client"))
    assert "limosa ca issue host1" in no.value.todo
    assert "without a restart, and VMs go on" in no.value.todo


def test_a_host_that_is_down_or_unknown(pki: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = int(listener.getsockname()[1])
    with pytest.raises(HostUnreachable, match="refused") as caught:
        call(TlsRoute("host1", "127.0.0.1", port, pki / "alice", "client"))
    assert "what was done" not in caught.value.todo
    fault = socket.gaierror(-2, "Name or service not known")
    error = TlsRoute("host9", "host9", 7411, pki / "alice", "client").explain(fault)
    assert "host 'host9' is not known" in error.what
