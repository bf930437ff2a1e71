"""The certificate of a daemon: taken anew while it listens, and said to be out of date before and after it is."""

from __future__ import annotations

import asyncio
import datetime
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import uvloop
from cryptography import x509

from limosa.errors import HostNotTrusted, HostUnreachable, StateError
from limosa.host.calling import Caller
from limosa.host.certificates import Certificates
from limosa.security import ca, expiry, tls
from limosa.security.certificate import CLIENT, SERVER, Authority, Validity, certificate_pem, key_pem, make_key
from limosa.security.files import load_certificate, load_key
from limosa.wire.endpoints import Role

GONE_BY = -ca.BACK / 2
DAY = 86400.0


@pytest.fixture
def pki(tmp_path: Path) -> Path:
    """Of ``host1`` on loopback; ``alice`` is an operator."""
    ca.create_authority(tmp_path / "ca")
    ca.issue_person(tmp_path / "ca", "alice", Role.OPERATOR, tmp_path / "alice")
    issue(tmp_path)
    return tmp_path


def issue(pki: Path, life: datetime.timedelta = ca.LEAF_LIFE) -> None:
    ca.issue_host(pki / "ca", "host1", ["127.0.0.1"], pki / "host1", life=life)


def nameless(pki: Path) -> tuple[bytes, bytes]:
    """A certificate of the same authority that has no alternative names, and its key."""
    authority, key = Authority(load_certificate(pki / "ca/ca.pem"), load_key(pki / "ca/ca.key")), make_key()
    validity = Validity.lasting(ca.LEAF_LIFE, back=ca.BACK)
    made = authority.issue("host1", key.public_key(), validity, alternative_names=(), uses=(SERVER, CLIENT))
    return certificate_pem(made), key_pem(key)


def serial(pki: Path) -> int:
    return x509.load_pem_x509_certificate((pki / "host1/host.pem").read_bytes()).serial_number


@asynccontextmanager
async def listening(pki: Path) -> AsyncIterator[Callable[[str], Awaitable[int]]]:
    """A daemon that listens with them. Gives what calls it by a name and returns the serial number of what it shows."""

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"x")
        writer.close()

    context = Certificates(pki / "host1", "host1").context
    async with await asyncio.start_server(answer, "127.0.0.1", ssl=context) as server:
        port = server.sockets[0].getsockname()[1]

        async def call(name: str) -> int:
            alice = tls.client_context(pki / "alice", "client")
            reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=alice, server_hostname=name)
            try:
                assert await reader.read(1) == b"x"
                shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
                return x509.load_der_x509_certificate(shown).serial_number
            finally:
                writer.close()

        yield call


def play(scenario: Callable[[], Awaitable[None]]) -> None:
    """In a loop as the daemon's."""

    async def within() -> None:
        async with asyncio.timeout(20):
            await scenario()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(within())


@pytest.mark.parametrize("name", ["host1", "127.0.0.1"])
def test_what_is_renewed_is_shown_from_the_next_connection_on(pki: Path, name: str) -> None:
    async def scenario() -> None:
        async with listening(pki) as call:
            shown = [await call(name), await call(name)]
            assert shown == [serial(pki)] * 2
            for _ in range(2):
                issue(pki)
                assert await call(name) == serial(pki)
                assert serial(pki) not in shown
                shown.append(serial(pki))

    play(scenario)


def test_a_new_key_and_authority_are_taken_too(pki: Path) -> None:
    async def scenario() -> None:
        async with listening(pki) as call:
            await call("host1")
            for folder in ("ca", "alice", "host1"):
                (pki / folder).rename(pki / f"old-{folder}")
            ca.create_authority(pki / "ca")
            ca.issue_person(pki / "ca", "alice", Role.OPERATOR, pki / "alice")
            issue(pki)
            assert await call("host1") == serial(pki)

    play(scenario)


def test_what_cannot_serve_is_said_once_and_the_one_before_serves_on(
    pki: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with listening(pki) as call:
            before, whole = serial(pki), (pki / "host1/host.pem").read_bytes()
            ca.issue_host(pki / "ca", "host2", [], pki / "host2")
            other = [(pki / f"host2/host.{kind}").read_bytes() for kind in ("pem", "key")]
            key = (pki / "host1/host.key").read_bytes()
            for certificate, its_key in ((b"rubbish", key), (other[0], key), (other[0], other[1]), nameless(pki)):
                caplog.clear()
                (pki / "host1/host.pem").write_bytes(certificate)
                (pki / "host1/host.key").write_bytes(its_key)
                assert [await call("host1"), await call("host1")] == [before] * 2
                assert len([one for one in caplog.messages if "stays as it was" in one]) == 1
            (pki / "host1/host.pem").unlink()
            assert await call("host1") == before
            (pki / "host1/host.key").write_bytes(key)
            (pki / "host1/host.pem").write_bytes(whole)
            issue(pki)
            assert await call("host1") == serial(pki)

    play(scenario)


def test_one_that_has_expired_serves_nobody_until_it_is_renewed(pki: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        issue(pki, GONE_BY)
        async with listening(pki) as call:
            assert "host.pem has expired" in caplog.text
            with pytest.raises(ssl.SSLCertVerificationError) as refused:
                await call("host1")
            assert expiry.is_expired(refused.value)
            issue(pki)
            assert await call("host1") == serial(pki)

    play(scenario)


def test_one_of_another_host_does_not_start(pki: Path) -> None:
    with pytest.raises(StateError, match="not of host 'host2'"):
        Certificates(pki / "host1", "host2")


def test_one_without_alternative_names_does_not_start(pki: Path) -> None:
    for kind, contents in zip(("pem", "key"), nameless(pki), strict=True):
        (pki / f"host1/host.{kind}").write_bytes(contents)
    with pytest.raises(StateError, match="not of host 'host1'") as refused:
        Certificates(pki / "host1", "host1")
    assert "it has 0 names" in refused.value.why


def test_who_calls_with_one_that_has_expired_is_told_so(pki: Path) -> None:
    """The other end says nothing of it."""
    ca.issue_host(pki / "ca", "host2", [], pki / "host2")

    async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async def scenario() -> None:
        async with await asyncio.start_server(hang_up, "127.0.0.1", ssl=tls.server_context(pki / "host2")) as server:
            address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
            caller = Caller("host2", lambda: address, "host1", pki / "host1")
            with pytest.raises(HostUnreachable) as raised:
                await caller.call()
            assert not isinstance(raised.value, HostNotTrusted)
            issue(pki, GONE_BY)
            with pytest.raises(HostNotTrusted) as refused:
                await caller.call()
            assert "host.pem has expired" in refused.value.why
            assert "limosa ca issue" in refused.value.todo

    play(scenario)


@pytest.mark.parametrize(
    ("life", "words"),
    [
        (datetime.timedelta(days=31), ""),
        (datetime.timedelta(days=1), "expires on"),
        (GONE_BY, "has expired on"),
    ],
)
def test_it_is_warned_of(pki: Path, life: datetime.timedelta, words: str) -> None:
    issue(pki, life)
    until = tls.valid_until(pki / "host1/host.pem")
    found = list(expiry.findings("host1", until, time.time()))
    assert [finding.code for finding in found] == ["certificate-expires"] * bool(words)
    assert all(f"the certificate of host 'host1' {words} 2" in one.what for one in found)


def test_where_there_is_none_nothing_is_said(tmp_path: Path) -> None:
    assert tls.valid_until(tmp_path / "host.pem") is None
    (tmp_path / "host.pem").write_text("rubbish")
    assert tls.valid_until(tmp_path / "host.pem") is None
    assert list(expiry.findings("host1", None, time.time())) == []
