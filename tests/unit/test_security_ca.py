"""The authority: what it writes, what it refuses, and that TLS believes exactly what it should."""

from __future__ import annotations

import datetime
import socket
import ssl
import stat
import threading
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from limosa.errors import Conflict, InvalidInput, LimosaError, NotFound, NotPermitted, StateError
from limosa.security import ca, tls
from limosa.security.identity import Identity, from_peer_certificate, from_unix_peer
from limosa.wire.endpoints import Role


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    folder = tmp_path / "ca"
    ca.create_authority(folder)
    return folder


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def load(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def test_authority_files_are_private_and_never_overwritten(authority: Path) -> None:
    assert mode(authority) == 0o700
    assert mode(authority / "ca.pem") == 0o644
    assert mode(authority / "ca.key") == 0o600
    before = (authority / "ca.key").read_bytes()
    with pytest.raises(Conflict) as caught:
        ca.create_authority(authority)
    assert "--folder" in caught.value.todo
    assert (authority / "ca.key").read_bytes() == before


def test_host_certificate_says_who_and_where(authority: Path, tmp_path: Path) -> None:
    ca.issue_host(authority, "host1", ["10.0.0.1", "host1.example", "fd00::1"], tmp_path / "pki")
    certificate = load(tmp_path / "pki/host.pem")
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["urn:limosa:host:host1"]
    assert names.get_values_for_type(x509.DNSName) == ["host1", "host1.example"]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.1", "fd00::1"]
    uses = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert set(uses) == {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
    assert isinstance(certificate.public_key(), ec.EllipticCurvePublicKey)
    assert mode(tmp_path / "pki/host.key") == 0o600
    assert mode(tmp_path / "pki") == 0o700
    assert (tmp_path / "pki/ca.pem").read_bytes() == (authority / "ca.pem").read_bytes()


def test_renewal_keeps_the_key_and_moves_the_dates(authority: Path, tmp_path: Path) -> None:
    out = tmp_path / "pki"
    ca.issue_host(authority, "host1", [], out, life=datetime.timedelta(days=1))
    key, first = (out / "host.key").read_bytes(), load(out / "host.pem")
    ca.issue_host(authority, "host1", [], out)
    second = load(out / "host.pem")
    assert (out / "host.key").read_bytes() == key
    assert second.not_valid_after_utc > first.not_valid_after_utc
    assert second.serial_number != first.serial_number


def test_another_name_is_never_overwritten(authority: Path, tmp_path: Path) -> None:
    ca.issue_person(authority, "alice", Role.VIEWER, tmp_path / "out")
    before = (tmp_path / "out/client.pem").read_bytes()
    with pytest.raises(Conflict, match="viewer 'alice'"):
        ca.issue_person(authority, "alice", Role.OPERATOR, tmp_path / "out")
    assert (tmp_path / "out/client.pem").read_bytes() == before


def test_certificates_do_not_outlive_the_authority(authority: Path, tmp_path: Path) -> None:
    ca.issue_host(authority, "host1", [], tmp_path / "pki", life=datetime.timedelta(days=36500))
    assert load(tmp_path / "pki/host.pem").not_valid_after_utc == load(authority / "ca.pem").not_valid_after_utc


def test_issued_lists_each_name_once(authority: Path, tmp_path: Path) -> None:
    ca.issue_host(authority, "host1", [], tmp_path / "one")
    ca.issue_host(authority, "host1", [], tmp_path / "one")
    ca.issue_person(authority, "alice", Role.OPERATOR, tmp_path / "two")
    assert [ca.identity_of(certificate) for certificate in ca.issued(authority)] == [
        Identity("host1", Role.HOST),
        Identity("alice", Role.OPERATOR),
    ]


@pytest.mark.parametrize("name", ["", "../x", "a/b", "-x", "a b", "x" * 64, "a\n"])
def test_bad_names_are_refused(authority: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidInput):
        ca.issue_host(authority, name, [], tmp_path / "pki")
    assert not (tmp_path / "pki").exists()


@pytest.mark.parametrize("address", ["", "a b", "*.example", "10.0.0.1:7411", "höst", "http://x", "a@b", "a\n"])
def test_bad_addresses_are_refused(authority: Path, tmp_path: Path, address: str) -> None:
    with pytest.raises(InvalidInput):
        ca.issue_host(authority, "host1", [address], tmp_path / "pki")


def test_errors_of_a_damaged_or_missing_authority(authority: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        ca.issue_host(tmp_path / "nowhere", "host1", [], tmp_path / "pki")
    other = tmp_path / "other"
    ca.create_authority(other)
    (authority / "ca.key").write_bytes((other / "ca.key").read_bytes())
    with pytest.raises(StateError, match=r"not the key of ca\.pem"):
        ca.issue_host(authority, "host1", [], tmp_path / "pki")
    (authority / "ca.key").write_text("rubbish")
    with pytest.raises(StateError, match="not a private key"):
        ca.issue_host(authority, "host1", [], tmp_path / "pki")


def test_a_folder_others_may_write_to_is_refused(authority: Path, tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(StateError, match="other users may write"):
        ca.issue_host(authority, "host1", [], folder)


def shake_hands(server: ssl.SSLContext, client: ssl.SSLContext, hostname: str) -> Identity:
    """Whom the server sees. Raises what either side raises; one byte goes back so that TLS 1.3 has settled."""
    here, there = socket.socketpair()
    seen: list[Identity | Exception] = []

    def serve() -> None:
        try:
            with server.wrap_socket(there, server_side=True) as stream:
                seen.append(from_peer_certificate(stream.getpeercert()))
                stream.sendall(b"x")
        except (OSError, LimosaError) as error:
            seen.append(error)
            there.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with client.wrap_socket(here, server_hostname=hostname) as stream:
            assert stream.version() == "TLSv1.3"
            stream.recv(1)
    finally:
        here.close()
        thread.join()
    if isinstance(seen[0], Exception):
        raise seen[0]
    return seen[0]


def test_mutual_tls_accepts_whom_it_should(authority: Path, tmp_path: Path) -> None:
    ca.issue_host(authority, "host1", ["10.0.0.1"], tmp_path / "one")
    ca.issue_host(authority, "host2", [], tmp_path / "two")
    ca.issue_person(authority, "alice", Role.OPERATOR, tmp_path / "alice")
    server = tls.server_context(tmp_path / "one")
    host2, alice = tls.client_context(tmp_path / "two", "host"), tls.client_context(tmp_path / "alice", "client")
    assert shake_hands(server, host2, "host1") == Identity("host2", Role.HOST)
    assert shake_hands(server, alice, "10.0.0.1") == Identity("alice", Role.OPERATOR)


def test_mutual_tls_refuses_whom_it_should(authority: Path, tmp_path: Path) -> None:
    ca.issue_host(authority, "host1", [], tmp_path / "one")
    ca.issue_person(authority, "alice", Role.OPERATOR, tmp_path / "alice")
    ca.create_authority(tmp_path / "foreign")
    ca.issue_person(tmp_path / "foreign", "alice", Role.OPERATOR, tmp_path / "mallory")
    server = tls.server_context(tmp_path / "one")
    alice = tls.client_context(tmp_path / "alice", "client")
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        shake_hands(server, alice, "host2")
    mallory = tls.client_context(tmp_path / "mallory", "client")
    mallory.load_verify_locations(authority / "ca.pem")
    with pytest.raises(ssl.SSLError):
        shake_hands(server, mallory, "host1")
    nobody = ssl.create_default_context(cafile=str(authority / "ca.pem"))
    with pytest.raises(ssl.SSLError):
        shake_hands(server, nobody, "host1")
    old = tls.client_context(tmp_path / "alice", "client")
    old.minimum_version = ssl.TLSVersion.TLSv1_2
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError):
        shake_hands(server, old, "host1")


def test_a_person_cannot_pose_as_a_host(authority: Path, tmp_path: Path) -> None:
    ca.issue_person(authority, "host1", Role.OPERATOR, tmp_path / "person")
    ca.issue_person(authority, "alice", Role.OPERATOR, tmp_path / "alice")
    for kind in ("pem", "key"):
        (tmp_path / f"person/client.{kind}").rename(tmp_path / f"person/host.{kind}")
    alice = tls.client_context(tmp_path / "alice", "client")
    alice.check_hostname = False  # the purpose alone must refuse it
    with pytest.raises(ssl.SSLCertVerificationError, match="purpose"):
        shake_hands(tls.server_context(tmp_path / "person"), alice, "host1")


def test_contexts_say_what_is_wrong_with_files(authority: Path, tmp_path: Path) -> None:
    with pytest.raises(StateError, match=r"ca\.pem: No such file"):
        tls.client_context(tmp_path / "nowhere", "client")
    pki = tmp_path / "pki"
    ca.issue_host(authority, "host1", [], pki, life=datetime.timedelta(minutes=-1))
    with pytest.raises(StateError, match="has expired"):
        tls.check_dates(pki / "host.pem")
    (pki / "host.pem").write_text("rubbish")
    with pytest.raises(StateError, match="no certificate and its key"):
        tls.server_context(pki)


def test_a_daemon_has_the_certificate_of_its_own_name(authority: Path, tmp_path: Path) -> None:
    ca.issue_host(authority, "host1", [], tmp_path / "pki")
    tls.check_holder(tmp_path / "pki" / "host.pem", "host1")
    with pytest.raises(StateError, match=r"not of host 'host2': it is of host 'host1'"):
        tls.check_holder(tmp_path / "pki" / "host.pem", "host2")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601])
def test_a_private_key_that_others_get_at_is_refused(authority: Path, tmp_path: Path, mode: int) -> None:
    pki, person = tmp_path / "pki", tmp_path / "person"
    ca.issue_host(authority, "host1", [], pki)
    ca.issue_person(authority, "alice", Role.OPERATOR, person)
    (pki / "host.key").chmod(mode)
    (person / "client.key").chmod(mode)
    with pytest.raises(StateError, match="not private") as refused:
        tls.server_context(pki)
    assert f"chmod 600 {pki}/host.key" in refused.value.todo
    with pytest.raises(StateError, match="not private"):
        tls.client_context(person, "client")


@pytest.mark.parametrize(
    "names",
    [
        (),
        (("DNS", "urn:limosa:host:host1"),),
        (("URI", "urn:limosa:host:host1"), ("URI", "urn:limosa:operator:alice")),
        (("URI", "urn:limosa:root:alice"),),
        (("URI", "urn:limosa:host:../x"),),
        (("URI", "urn:limosa:host:"),),
    ],
)
def test_certificates_without_exactly_one_identity_are_refused(names: tuple[tuple[str, str], ...]) -> None:
    with pytest.raises(NotPermitted):
        from_peer_certificate({"subjectAltName": names})


def test_no_certificate_is_no_identity() -> None:
    with pytest.raises(NotPermitted):
        from_peer_certificate(None)


def test_unix_peers() -> None:
    assert from_unix_peer(0, daemon_uid=990) == Identity("root", Role.OPERATOR)
    assert from_unix_peer(990, daemon_uid=990) == Identity("uid-990", Role.OPERATOR)
    with pytest.raises(NotPermitted):
        from_unix_peer(1000, daemon_uid=990)
