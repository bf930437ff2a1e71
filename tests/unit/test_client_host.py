"""The client against a stand-in of the daemon: typed replies, errors, streams, broken connections."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from standin import StandIn

from limosa.client.host import HostClient, fill_path
from limosa.errors import HostUnreachable, InvalidInput, LimosaError, NotFound, OwnerUnknown, PreflightRefused
from limosa.model.finding import Finding, Severity
from limosa.model.migration import Migration, Outcome, Phase, Progress, Side
from limosa.wire.api import CheckReport, CheckRequest, Empty, VmList
from limosa.wire.endpoints import CHECK, DELETE_VM, LIST_VMS, MOVE, SHOW_MIGRATION, SHOW_VM, WATCH_MIGRATION, Endpoint

ID = "0123456789ab"


def migration(percent: float = 0, outcome: Outcome = Outcome.UNDER_WAY) -> Migration:
    return Migration(
        id=ID,
        vm="web1",
        source="host1",
        destination="host2",
        side=Side.SOURCE,
        transport="tcp",
        phase=Phase.COPY,
        outcome=outcome,
        progress=Progress(percent=percent),
        accepted_at=1.0,
    )


#: functions, or what they would return
Answers = dict[Endpoint[Any, Any], object]


def serve(tmp_path: Path, answers: Answers) -> StandIn:
    functions = {
        key: value if callable(value) else lambda *_, _value=value, **__: _value for key, value in answers.items()
    }
    return StandIn(tmp_path / "s", functions)


def test_a_typed_call_and_one_connection_for_several(tmp_path: Path) -> None:
    def check(request: CheckRequest) -> CheckReport:
        return CheckReport(vm=request.vm, source="host1", destination=request.destination, possible=True, findings=())

    with serve(tmp_path, {CHECK: check, LIST_VMS: VmList(vms=()), DELETE_VM: Empty()}) as server:
        with HostClient(server.path) as client:
            assert client.call(CHECK, CheckRequest(vm="web1", destination="host2")).destination == "host2"
            assert client.call(LIST_VMS) == VmList(vms=())
            assert client.call(DELETE_VM, vm="web1") == Empty()
        assert server.connections == 1
        body = json.loads(server.seen[0][2])
        assert (body["vm"], body["destination"]) == ("web1", "host2")


def test_errors_arrive_as_they_were_raised(tmp_path: Path) -> None:
    finding = Finding(code="name-taken", severity=Severity.ERROR, what="a VM 'web1' is there", todo="delete it")

    def refuse(*_: object) -> None:
        raise PreflightRefused((finding,), vm="web1", host="host2")

    def lose(*_: object, **__: object) -> None:
        raise OwnerUnknown("nobody knows", why="the network", todo="resolve", vm="web1")

    with serve(tmp_path, {CHECK: refuse, SHOW_MIGRATION: lose}) as server, HostClient(server.path) as client:
        with pytest.raises(PreflightRefused) as refused:
            client.call(CHECK, CheckRequest(vm="web1", destination="host2"))
        assert refused.value.findings == (finding,)
        with pytest.raises(OwnerUnknown) as lost:
            client.call(SHOW_MIGRATION, migration=ID)
        assert (lost.value.why, lost.value.todo, lost.value.vm) == ("the network", "resolve", "web1")
        with pytest.raises(NotFound):
            client.call(LIST_VMS)


def test_a_stream_gives_each_line_and_frees_the_connection(tmp_path: Path) -> None:
    lines = [migration(percent) for percent in (1, 50, 100)]
    answers: Answers = {WATCH_MIGRATION: lambda *_, **__: iter(lines), LIST_VMS: VmList(vms=())}
    with serve(tmp_path, answers) as server, HostClient(server.path) as client:
        assert list(client.stream(WATCH_MIGRATION, migration=ID)) == lines
        client.call(LIST_VMS)
        assert server.connections == 1


def test_a_stream_left_early_costs_the_connection_only(tmp_path: Path) -> None:
    answers: Answers = {WATCH_MIGRATION: lambda *_, **__: iter([migration(1), migration(2)]), LIST_VMS: VmList(vms=())}
    with serve(tmp_path, answers) as server, HostClient(server.path) as client:
        for _ in client.stream(WATCH_MIGRATION, migration=ID):
            break
        assert client.call(LIST_VMS) == VmList(vms=())


def test_a_stream_that_breaks_says_so(tmp_path: Path) -> None:
    def breaks(*_: object, **__: object) -> Iterator[Migration]:
        yield migration(1)
        raise ConnectionAbortedError

    with serve(tmp_path, {WATCH_MIGRATION: breaks}) as server, HostClient(server.path) as client:
        replies = client.stream(WATCH_MIGRATION, migration=ID)
        assert next(replies).progress.percent == 1
        with pytest.raises(HostUnreachable, match="before the reply had ended"):
            next(replies)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "closed before"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{", "closed before"),
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "no HTTP reply"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n", "too many headers"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "no HTTP reply"),
    ],
)
def test_what_is_no_reply_is_an_error(tmp_path: Path, raw: bytes, words: str) -> None:
    with (
        serve(tmp_path, {LIST_VMS: raw}) as server,
        HostClient(server.path) as client,
        pytest.raises(HostUnreachable, match=words),
    ):
        client.call(LIST_VMS)


def test_a_reply_without_bounds_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("limosa.client.http.MAX_BODY_BYTES", 1000)
    with (
        serve(tmp_path, {LIST_VMS: b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n" + b"x" * 5000}) as server,
        HostClient(server.path) as client,
        pytest.raises(HostUnreachable, match="larger than 1000 bytes"),
    ):
        client.call(LIST_VMS)


def test_a_body_of_another_shape_is_an_error(tmp_path: Path) -> None:
    with (
        serve(tmp_path, {LIST_VMS: Empty()}) as server,
        HostClient(server.path) as client,
        pytest.raises(HostUnreachable, match="does not understand"),
    ):
        client.call(LIST_VMS)


def test_a_refusal_without_a_fault_is_shown_as_it_is(tmp_path: Path) -> None:
    with (
        serve(tmp_path, {LIST_VMS: b"HTTP/1.1 502 Bad\r\nContent-Length: 4\r\n\r\nnope"}) as server,
        HostClient(server.path) as client,
        pytest.raises(LimosaError, match="status 502: nope"),
    ):
        client.call(LIST_VMS)


def test_silence_is_bounded(tmp_path: Path) -> None:
    import threading  # noqa: PLC0415

    release = threading.Event()
    answers: Answers = {LIST_VMS: lambda *_: release.wait(30) and VmList(vms=())}
    with serve(tmp_path, answers) as server, HostClient(server.path, timeout_s=0.05) as client:
        with pytest.raises(HostUnreachable, match="took too long"):
            client.call(LIST_VMS)
        release.set()


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(HostUnreachable, match="no such socket"):
        HostClient(str(tmp_path / "s")).call(LIST_VMS)
    serve(tmp_path, {}).server_close()
    with pytest.raises(HostUnreachable, match="does not run"):
        HostClient(str(tmp_path / "s")).call(LIST_VMS)


def test_path_parameters_stay_in_their_place() -> None:
    assert fill_path(SHOW_VM.path, {"vm": "a/../b?c#d e%"}) == "/v1/vms/a%2F..%2Fb%3Fc%23d%20e%25"
    for value in ("", ".", ".."):
        with pytest.raises(InvalidInput):
            fill_path(SHOW_VM.path, {"vm": value})
    with pytest.raises(TypeError):
        fill_path(SHOW_VM.path, {})


def test_a_request_that_lacks_its_body_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(TypeError):
        HostClient("/nowhere").call(MOVE)
