"""A daemon under bad input: by its API, on its TLS port, in a session between hosts.

Whatever comes, there is a clear refusal, never an internal error; the daemon goes on, and nothing is left behind.
"""

from __future__ import annotations

import base64
import contextlib
import os
import socket
import ssl
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException

from harness import values
from harness.fuzz import extents
from harness.hosts import Host, running_hosts, tiny, wait_until
from harness.raw import (
    PeerSession,
    false_destination,
    fault_of,
    nothing_landed,
    peer_session,
    raw_request,
    request,
    tls_context,
    tls_request,
    ungreeted_session,
)
from limosa.errors import InvalidInput, LimosaError
from limosa.model.migration import Side
from limosa.model.storage import ImageSought
from limosa.model.vm import CloudInit, Disk, Nic, VmConfig, VmState
from limosa.security import ca
from limosa.security.stream import make_credentials
from limosa.settings.daemon import DEFAULT_PORT
from limosa.settings.host import HostSettings
from limosa.wire import api, endpoints
from limosa.wire import peer as say
from limosa.wire.endpoints import ENDPOINTS, Endpoint, Role

pytestmark = [pytest.mark.qemu, pytest.mark.lab]


class Place:
    """Two daemons, and certificates of hosts and people that are no daemons."""

    def __init__(self, alpha: Host, beta: Host, pki: Path, vm: VmConfig) -> None:
        self.alpha = alpha
        self.beta = beta
        self.pki = pki
        self.vm = vm


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    with running_hosts("alpha", "beta") as (alpha, beta):
        pki = alpha.folder.parent
        ca.issue_host(pki / "ca", "gamma", ["127.0.0.1"], pki / "gamma")
        ca.issue_person(pki / "ca", "alice", Role.OPERATOR, pki / "alice")
        ca.issue_person(pki / "ca", "victor", Role.VIEWER, pki / "victor")
        ca.create_authority(pki / "other")
        ca.issue_host(pki / "other", "alpha", [alpha.address], pki / "false")
        ca.issue_person(pki / "other", "alice", Role.OPERATOR, pki / "mallory")
        alpha.client.call(endpoints.CREATE_VM, tiny("vm"))
        yield Place(alpha, beta, pki, alpha.show("vm").config)
        for host in (alpha, beta):
            log = (host.folder / "log").read_text()
            assert host.process is not None
            assert host.process.poll() is None, log
            assert "Traceback" not in log, log
            assert "internal error" not in log, log


# The API --------------------------------------------------------------------------------------------------------------

EXAMPLES: dict[type, Any] = {
    api.Empty: {},
    api.SettingsChange: api.SettingsChange(values={"max_outgoing": 3, "convergence.post_copy": True}),
    api.NewVm: api.NewVm(
        name="new",
        memory_mib=32,
        disks=(api.NewDisk(path="/nowhere/disk.raw", format="raw"),),
        nics=(api.NewNic(switch="lan"),),
        cloud_init=CloudInit(user_data="#cloud-config"),
    ),
    api.DiskMoveRequest: api.DiskMoveRequest(vm="vm", location="images"),
    api.LimitRequest: api.LimitRequest(bandwidth_mbit_per_s=1),
    api.CheckRequest: api.CheckRequest(vm="vm", destination="127.0.0.1:1"),
    api.MoveRequest: api.MoveRequest(vm="vm", destination="127.0.0.1:1", options=api.MoveOptions(post_copy=True)),
    api.ReleaseRequest: api.ReleaseRequest(image="/nowhere/disk.qcow2", dead="gamma"),
    api.CleanRequest: api.CleanRequest(paths=("/nowhere/disk.qcow2",)),
    api.ImagesSought: api.ImagesSought(
        images=(ImageSought(migration="abcdefghijkl", location="images", name="vm-vda.qcow2", share="nas:/vms"),)
    ),
    api.ResolveRequest: api.ResolveRequest(owner=Side.SOURCE),
}
PARAMETERS = st.sampled_from(["vm", "nobody", "abcdefghijkl", "%2e%2e", "%00", "%ff", "a%2Fb", "-rf", "x" * 3000])


@st.composite
def requests(draw: st.DrawFn) -> tuple[Endpoint[Any, Any], str, bytes]:
    """A request to some endpoint, most often nearly right."""
    endpoint = draw(st.sampled_from(ENDPOINTS))
    path = endpoint.path.replace("{vm}", draw(PARAMETERS)).replace("{migration}", draw(PARAMETERS))
    spoilt = values.spoilt(EXAMPLES[endpoint.request]).map(msgspec.json.encode)
    return endpoint, path, draw(st.one_of(spoilt, spoilt, values.JUNK.map(msgspec.json.encode), st.binary()))


@extents
def test_every_answer_is_a_reply_or_a_fault(place: Place, extent: settings) -> None:
    host = place.alpha

    @extent
    @given(requests())
    def check(asked: tuple[Endpoint[Any, Any], str, bytes]) -> None:
        endpoint, path, body = asked
        status, data = request(host, endpoint.method, path, body)
        if status == 200:
            msgspec.json.decode(data, type=endpoint.reply)
        else:
            fault_of(data)
            assert 400 <= status < 500 or status in (500, 503)

    try:
        check()
    finally:
        as_before(place)


def as_before(place: Place) -> None:
    """Undo what random requests may have done."""

    def is_free(name: str) -> bool:
        return place.alpha.show(name).migration is None

    client = place.alpha.client
    for name in [vm.config.name for vm in client.call(endpoints.LIST_VMS).vms]:
        wait_until(partial(is_free, name), "no move")
        if place.alpha.show(name).pid is not None:
            client.call(endpoints.STOP_VM, vm=name)
        client.call(endpoints.DELETE_VM, vm=name)
    client.call(endpoints.CREATE_VM, tiny("vm"))
    defaults: dict[str, Any] = dict.fromkeys(HostSettings.__struct_fields__)
    client.call(endpoints.CHANGE_SETTINGS, api.SettingsChange(values=defaults))


@pytest.mark.parametrize(
    "body",
    [
        b'{"name":"a","memory_mib":64,"on_crash":"' + b"x" * (5 * 1024 * 1024) + b'"}',
        b"[" * 200_000,
        b'{"values":{"peers":' + b'{"a":' * 100_000,
        b'{"name":"\xff\xfe","memory_mib":64}',
        b'{"name":"\\ud800","memory_mib":64}',
        b'{"name":"a","memory_mib":' + b"9" * 5000 + b"}",
        b'{"name":"a","memory_mib":1e999}',
        b'{"name":"a","memory_mib":64.5}',
        b'{"name":"a","memory_mib":64,"disks":[{"path":"/a/../etc/passwd"}]}',
        b'{"name":"a","memory_mib":64,"disks":[{"path":"/dev/zero"}]}',
        b'{"name":"a","memory_mib":64,"disks":[{"path":"/%s"}]}' % (b"x" * 300),
        b'{"name":"../a","memory_mib":64}',
        b'{"name":"a","memory_mib":64,"colour":"red"}',
        b'{"name":"a","memory_mib":64,"machine":"pc-i440fx-1.0"}',
        b"\0",
        b"null",
    ],
    ids=lambda body: body[:40].decode("latin1"),
)
def test_a_bad_body_creates_nothing(place: Place, body: bytes) -> None:
    status, data = request(place.alpha, "POST", "/v1/vms", body)
    assert status in (400, 500)
    assert fault_of(data).code in ("invalid-input", "storage-error")
    assert [vm.config.name for vm in place.alpha.client.call(endpoints.LIST_VMS).vms] == ["vm"]


def test_a_fifo_as_disk_keeps_nobody_waiting(place: Place, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "disk.raw")
    body = msgspec.json.encode({"name": "a", "memory_mib": 64, "disks": [{"path": str(tmp_path / "disk.raw")}]})
    status, data = request(place.alpha, "POST", "/v1/vms", body)
    assert (status, fault_of(data).code) == (500, "storage-error")


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [
        ("PUT", "/v1/vms", 405),
        ("DELETE", "/v1/settings", 405),
        ("MKCOL", "/v1/vms", 405),
        ("GET", "/", 404),
        ("GET", "/v2/vms", 404),
        ("GET", "/v1/vms/", 404),
        ("GET", "/v1/vms/../../etc/passwd", 404),
        ("GET", "/v1/vms/" + "a" * 10000, 404),
        ("GET", "/v1/migrations/nope/watch", 404),
        ("GET", "/v1/peer", 404),
        ("GET", "/v1/vms/vm/console", 404),
    ],
)
def test_wrong_methods_and_paths(place: Place, method: str, path: str, expected: int) -> None:
    status, data = request(place.alpha, method, path)
    assert status == expected
    assert fault_of(data).code == "not-found"


@pytest.mark.parametrize(
    "data",
    [
        b"hello\r\n\r\n",
        b"BREW /v1/vms HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET /v1/vms HTTP/9.9\r\n\r\n",
        b"GET /v1/vms\xff\xfe HTTP/1.1\r\n\r\n",
        b"GET /v1/vms HTTP/1.1\r\nno colon here\r\n\r\n",
        b"POST /v1/vms HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/vms HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n12345",
        b"POST /v1/vms HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_what_is_no_http_is_refused(place: Place, data: bytes) -> None:
    head, _, body = raw_request(place.alpha, data).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert fault_of(body).code == "invalid-input"


def test_a_request_that_breaks_off_changes_nothing(place: Place) -> None:
    raw_request(place.alpha, b'POST /v1/vms HTTP/1.1\r\nHost: a\r\nContent-Length: 500\r\n\r\n{"name":"half"')
    assert request(place.alpha, "GET", "/v1/vms/half")[0] == 404


# The TLS port ---------------------------------------------------------------------------------------------------------


def test_garbage_and_silence_on_the_tls_port_disturb_nobody(place: Place) -> None:
    address = (place.alpha.address, DEFAULT_PORT)
    silent = [socket.create_connection(address) for _ in range(100)]
    half_open = [socket.create_connection(address) for _ in range(20)]
    try:
        for stream in half_open:
            stream.sendall(b"\x16\x03\x01\x02\x00\x01\x00")
        for garbage in (b"GET /v1/vms HTTP/1.1\r\nHost: a\r\n\r\n", os.urandom(4096), b"\0" * 100_000):
            with socket.create_connection(address, timeout=10) as stream:
                assert b"HTTP" not in exchange(stream, garbage)
        context = tls_context(place.pki / "alice", "client")
        assert tls_request(place.alpha, context, "GET", "/v1/vms")[0] == 200
    finally:
        for stream in silent + half_open:
            stream.close()


def exchange(stream: socket.socket, data: bytes) -> bytes:
    try:
        stream.sendall(data)
        return b"".join(iter(lambda: stream.recv(65536), b""))
    except ConnectionError:
        return b""


def test_who_has_no_certificate_of_ours_is_refused(place: Place) -> None:
    stranger = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    stranger.load_verify_locations(place.pki / "alice" / "ca.pem")
    other = tls_context(place.pki / "mallory", "client")
    other.load_verify_locations(place.pki / "alice" / "ca.pem")
    old = tls_context(place.pki / "alice", "client")
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    for context in (stranger, other, old):
        with pytest.raises(OSError, match=r"alert|reset|EOF|closed|Broken pipe"):
            tls_request(place.alpha, context, "GET", "/v1/vms")


def test_a_viewer_may_look_and_nothing_else(place: Place) -> None:
    context = tls_context(place.pki / "victor", "client")
    for endpoint in ENDPOINTS:
        path = endpoint.path.replace("{vm}", "vm").replace("{migration}", "abcdefghijkl")
        status, data = tls_request(place.alpha, context, endpoint.method, path)
        if endpoint.role > Role.VIEWER:
            assert (status, fault_of(data).code) == (403, "not-permitted")
        else:
            assert status in (200, 400, 404)


def test_a_host_may_ask_another_what_hosts_ask_and_nothing_else(place: Place) -> None:
    context = tls_context(place.pki / "gamma", "host")
    for endpoint in ENDPOINTS:
        path = endpoint.path.replace("{vm}", "vm").replace("{migration}", "abcdefghijkl")
        status, data = tls_request(place.alpha, context, endpoint.method, path)
        if endpoint.role > Role.HOST:
            assert (status, fault_of(data).code) == (403, "not-permitted")
        else:
            assert status in (200, 400)
    assert tls_request(place.alpha, context, "GET", "/v1/openapi.json")[0] == 403


@pytest.mark.parametrize("person", ["alice", "victor"])
def test_people_may_not_open_sessions_between_hosts(place: Place, person: str) -> None:
    with (
        pytest.raises(InvalidStatus, match="403"),
        ungreeted_session(place.beta, tls_context(place.pki / person, "client")),
    ):
        pass


def test_a_host_of_another_authority_is_refused(place: Place) -> None:
    context = tls_context(place.pki / "false", "host")
    context.load_verify_locations(place.pki / "alice" / "ca.pem")
    with (
        pytest.raises((OSError, WebSocketException)),
        ungreeted_session(place.beta, context) as session,
    ):
        session.hear()


# Sessions between hosts -----------------------------------------------------------------------------------------------

MIGRATION = "abcdefghijkl"
ATTACH = msgspec.json.encode(say.Attach(migration=MIGRATION))


SERVER, _ = make_credentials()


def prepare(vm: VmConfig, **changes: Any) -> say.Prepare:
    raw: dict[str, Any] = {
        "migration": base64.b32encode(os.urandom(10)).decode().lower()[:12],
        "vm": vm,
        "accelerator": "tcg",
        "transport": "tcp",
        "credentials": SERVER,
        "post_copy": False,
        "running": True,
    }
    return say.Prepare(**raw | changes)


@pytest.fixture
def nothing_left(place: Place) -> Iterator[None]:
    yield
    wait_until(lambda: nothing_landed(place.beta), "nothing of the landing is left")


leaves_nothing = pytest.mark.usefixtures("nothing_left")


@leaves_nothing
def test_nothing_is_answered_before_a_hello(place: Place) -> None:
    for message in (prepare(place.vm), say.TakeOver(), say.Attach(migration=MIGRATION), say.Abort(reason="")):
        with peer_session(place.beta, place.pki / "gamma", "") as session:
            assert session.refusal(message) == "invalid-input"


def test_nobody_speaks_in_anothers_name_or_another_language(place: Place) -> None:
    with peer_session(place.beta, place.pki / "gamma", "") as session:
        assert session.refusal(say.Hello(host="alpha", oldest=1, newest=1)) == "not-permitted"
        assert session.refusal(say.Hello(host="gamma", oldest=2**60, newest=2**61)) == "host-unreachable"
        assert session.refusal(prepare(place.vm)) == "invalid-input"


@leaves_nothing
def test_words_that_come_out_of_order_are_refused(place: Place) -> None:
    with peer_session(place.beta, place.pki / "gamma", "gamma") as session:
        assert session.refusal(say.TakeOver()) == "invalid-input"
        assert session.refusal(say.Abort(reason="why not")) == "invalid-input"
        assert session.ask(say.Attach(migration=MIGRATION)) == say.Standing(state=say.DestinationState.UNKNOWN)
        assert session.refusal(say.TakeOver()) == "invalid-input"


@leaves_nothing
def test_one_session_prepares_one_migration_once(place: Place) -> None:
    first = prepare(place.vm)
    with peer_session(place.beta, place.pki / "gamma", "gamma") as session:
        assert isinstance(session.ask(first), say.Prepared)
        assert session.refusal(first) == "conflict"
        assert session.refusal(prepare(renamed(place.vm, "other"))) == "conflict"
        assert session.refusal(say.Attach(migration=MIGRATION)) == "conflict"
        with peer_session(place.beta, place.pki / "gamma", "gamma") as second:
            assert second.refusal(prepare(place.vm)) == "conflict"
            assert second.refusal(prepare(renamed(place.vm, "other"))) == "conflict"
        assert len(place.beta.qemus()) == 1
        assert isinstance(session.ask(say.Abort(reason="enough")), say.Gone)
        assert isinstance(session.ask(say.Abort(reason="enough")), say.Gone)
        assert session.refusal(say.TakeOver()) == "destination-lost"
    with peer_session(place.beta, place.pki / "gamma", "gamma") as session:
        # What was destroyed here may be tried again, by the same source.
        assert isinstance(session.ask(first), say.Prepared)
        assert isinstance(session.ask(say.Abort(reason="enough")), say.Gone)
    with peer_session(place.beta, place.alpha.folder / "pki", "alpha") as other:
        assert other.refusal(first) == "conflict"


@leaves_nothing
def test_a_landing_belongs_to_the_host_that_prepared_it(place: Place) -> None:
    request = prepare(place.vm)
    with (
        peer_session(place.beta, place.pki / "gamma", "gamma") as gamma,
        peer_session(place.beta, place.alpha.folder / "pki", "alpha") as alpha,
    ):
        assert isinstance(gamma.ask(request), say.Prepared)
        assert alpha.ask(say.Attach(migration=request.migration)) == say.Standing(state=say.DestinationState.UNKNOWN)
        assert alpha.refusal(say.Abort(reason="mine")) == "invalid-input"
        assert alpha.refusal(say.TakeOver()) == "invalid-input"
        assert len(place.beta.qemus()) == 1


@leaves_nothing
@pytest.mark.parametrize(
    "spoil",
    [
        {"migration": "../../../x"},
        {"migration": "ABCDEFGHIJKL"},
        {"files": {"../../../etc/cron.d/x": "eA=="}},
        {"files": {"/etc/cron.d/x": "eA=="}},
        {"files": {"..": "eA=="}},
        {"accelerator": "warp"},
        {"credentials": {"authority": 1}},
        {"vm": None},
        {"colour": "red"},
        {"type": "surprise"},
    ],
    ids=str,
)
def test_a_message_that_is_none_ends_the_session(place: Place, spoil: dict[str, Any]) -> None:
    message = msgspec.to_builtins(prepare(place.vm)) | {"type": "prepare"} | spoil
    with peer_session(place.beta, place.pki / "gamma", "gamma") as session:
        assert session.refusal(message) == "invalid-input"
        with pytest.raises(ConnectionClosed):
            session.hear()


@leaves_nothing
@pytest.mark.parametrize(
    "message",
    [b"", b"\xff\xfe", b"[" * 200_000, b'{"x":' + b"[" * 200_000, "text", b'{"type":"abort","reason":"\xff"}'],
    ids=["empty", "not UTF-8", "deep", "deep below", "text", "text not UTF-8"],
)
def test_garbage_after_a_landing_was_prepared_undoes_it(place: Place, message: bytes | str) -> None:
    with peer_session(place.beta, place.pki / "gamma", "gamma") as session:
        assert isinstance(session.ask(prepare(place.vm)), say.Prepared)
        assert session.refusal(message) == "invalid-input"
        with pytest.raises(ConnectionClosed):
            session.hear()


@leaves_nothing
def test_too_large_a_message_ends_the_session(place: Place) -> None:
    with peer_session(place.beta, place.pki / "gamma", "gamma") as session:
        with contextlib.suppress(ConnectionClosed):
            session.say(b" " * (17 * 1024 * 1024))
        with pytest.raises(ConnectionClosed):
            hear_all(session)


@leaves_nothing
def test_more_than_can_be_answered_ends_the_session(place: Place) -> None:
    with peer_session(place.beta, place.pki / "gamma", "gamma") as session:
        with contextlib.suppress(ConnectionClosed):
            # While QEMU is started nothing else is answered; what is answered at once might never pile up.
            session.say(prepare(place.vm))
            for _ in range(100):
                session.say(ATTACH)
        with pytest.raises(ConnectionClosed):
            hear_all(session)


def hear_all(session: PeerSession) -> None:
    while True:
        session.hear()


@leaves_nothing
@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"disks": (Disk(name="vda", path="/nowhere/disk.raw", format="raw"),)}, "storage-error"),
        ({"disks": (Disk(name="vda", path="/dev/zero", format="raw"),)}, "storage-error"),
        ({"disks": (Disk(name="vda", path="/tmp", format="raw"),)}, "storage-error"),
        ({"disks": (Disk(name="vdn", path="/dev/null", format="raw"),)}, "storage-error"),
        ({"nics": (Nic(switch="nosuch", mac="52:54:00:00:00:01"),)}, "network-error"),
        ({"memory_mib": 16 * 1024 * 1024}, "conflict"),
        ({"machine": "pc-q35-99.0"}, "qemu-error"),
        ({"machine": "none"}, "invalid-input"),
        ({"cpu": "nosuch"}, "qemu-error"),
    ],
    ids=str,
)
def test_a_vm_that_cannot_be_built_leaves_nothing(place: Place, changes: dict[str, Any], code: str) -> None:
    with peer_session(place.beta, place.pki / "gamma", "gamma") as session:
        assert session.refusal(prepare(msgspec.structs.replace(place.vm, **changes))) == code


@leaves_nothing
@pytest.mark.parametrize(
    "files", [{"seed.iso": "!!!"}, {"seed.iso": "eA="}, {"vm.toml": "eA=="}, {"process.json": "eA=="}], ids=str
)
def test_files_that_come_along_are_the_known_ones_and_whole(place: Place, files: dict[str, str]) -> None:
    vm = msgspec.structs.replace(place.vm, cloud_init=CloudInit(user_data="#cloud-config"))
    with peer_session(place.beta, place.pki / "gamma", "gamma") as session:
        assert session.refusal(prepare(vm, files=files)) == "invalid-input"


@leaves_nothing
def test_credentials_that_are_none_leave_nothing(place: Place) -> None:
    nonsense = say.StreamCredentials(authority="a", certificate="b", key="../../c")
    with peer_session(place.beta, place.pki / "gamma", "gamma") as session:
        assert session.refusal(prepare(place.vm, credentials=nonsense)) == "qemu-error"


@pytest.mark.long
@leaves_nothing
def test_a_word_without_a_stream_never_runs_the_guest(place: Place) -> None:
    with peer_session(place.beta, place.pki / "gamma", "gamma") as session:
        assert isinstance(session.ask(prepare(place.vm)), say.Prepared)
        assert session.refusal(say.TakeOver()) == "destination-lost"


WELCOME = msgspec.json.encode(say.Welcome(host="gamma", version=1))


@pytest.mark.parametrize(
    ("answers", "code"),
    [
        ([], "host-unreachable"),
        ([b"\xff\xfe"], "host-unreachable"),
        (["text"], "host-unreachable"),
        ([b'{"x":' + b"[" * 200_000], "host-unreachable"),
        ([msgspec.json.encode(say.Running(resumed_at=1.0))], "host-unreachable"),
        ([b'{"type":"welcome","host":"../x","version":1}'], "host-unreachable"),
        ([msgspec.json.encode(say.Welcome(host="alpha", version=1))], "host-not-trusted"),
        ([WELCOME, WELCOME], "host-unreachable"),
        ([WELCOME, b'{"type":"facts","facts":{"host":"gamma"}}'], "host-unreachable"),
        ([WELCOME, b" " * (17 * 1024 * 1024)], "host-unreachable"),
    ],
    ids=["silence", "not UTF-8", "text", "deep", "unasked", "no name", "other name", "twice", "no facts", "large"],
)
def test_a_destination_that_talks_nonsense_is_a_finding(place: Place, answers: list[bytes | str], code: str) -> None:
    with false_destination(place.pki / "gamma", *answers) as address:
        report = place.alpha.client.call(endpoints.CHECK, api.CheckRequest(vm="vm", destination=address))
    assert [finding.code for finding in report.findings] == [code]


def test_a_move_to_a_destination_that_falls_silent_fails_and_the_vm_goes_on(place: Place) -> None:
    place.alpha.client.call(endpoints.START_VM, vm="vm")
    try:
        with false_destination(place.pki / "gamma") as address:
            ended = place.alpha.outcome(place.alpha.move("vm", address).id)
        assert ended.fault is not None
        assert ended.fault.code == "host-unreachable"
        view = place.alpha.show("vm")
        assert (view.state, view.migration) == (VmState.RUNNING, None)
    finally:
        place.alpha.client.call(endpoints.STOP_VM, vm="vm")


def renamed(vm: VmConfig, name: str) -> VmConfig:
    return msgspec.structs.replace(vm, name=name)


def test_the_client_says_what_the_daemon_said(place: Place) -> None:
    with pytest.raises(InvalidInput, match="size"):
        place.alpha.client.call(endpoints.CREATE_VM, unchecked_vm())
    with pytest.raises(LimosaError, match="no VM"):
        place.alpha.client.call(endpoints.START_VM, vm="nobody")


def unchecked_vm() -> api.NewVm:
    """A request no command would send; structs made in Python are not validated."""
    return api.NewVm(name="a", memory_mib=64, disks=(api.NewDisk(path="/a", size_mib=-1),))
