"""What the API says to whom."""

from __future__ import annotations

import asyncio
import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
import test_host_storage
from test_journal import VM

from harness.landings import first_view
from limosa.errors import Conflict, InvalidInput, NotFound, NotPermitted, StorageError
from limosa.host import incoming
from limosa.host.api import Handlers, _route
from limosa.host.storage import Storage
from limosa.host.views import Views
from limosa.migration.ownership import DestinationStep
from limosa.model.migration import Outcome, Phase
from limosa.model.vm import CloudInit, Vm, VmState
from limosa.security.identity import Identity
from limosa.wire import endpoints
from limosa.wire.api import Empty, LimitRequest, VmList
from limosa.wire.endpoints import ENDPOINTS, Endpoint, Role

SECRET = CloudInit(user_data="password: s3cret", meta_data="token: s3cret", network_config="psk: s3cret")
WEB = Vm(
    config=msgspec.structs.replace(VM, cloud_init=SECRET),
    state=VmState.RUNNING,
    host="host1",
)


def answer(
    role: Role, endpoint: Endpoint[Any, Any], reply: Any, name: str = "eve", *, body: bytes = b"", **scope_more: Any
) -> bytes:
    """What somebody of that role gets from ``host1``, where the handler gives ``reply``. Raises what is refused, or
    ``reply`` if that is an exception."""
    sent: list[dict[str, Any]] = []

    async def handler(_: Any, __: dict[str, str]) -> Any:
        if isinstance(reply, BaseException):
            raise reply
        return reply

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": endpoint.method,
        "path": endpoint.path,
        "headers": [],
        "path_params": {},
        "state": {"identity": Identity(name, role)},
        **scope_more,
    }

    async def work() -> None:
        await _route(endpoint, handler, "host1").app(scope, receive, send)

    asyncio.run(work())
    return b"".join(message.get("body", b"") for message in sent)


@pytest.mark.parametrize(("role", "name"), [(Role.OPERATOR, "alice"), (Role.HOST, "host1")])
def test_operators_see_all_of_a_vm(role: Role, name: str) -> None:
    assert msgspec.json.decode(answer(role, endpoints.SHOW_VM, WEB, name), type=Vm) == WEB
    assert msgspec.json.decode(answer(role, endpoints.LIST_VMS, VmList(vms=(WEB,)), name), type=VmList).vms == (WEB,)


#: What hosts ask of one another.
BETWEEN_HOSTS = {endpoints.IMAGE_USES, endpoints.LOCATIONS}
CHANGES = {
    endpoints.CHANGE_SETTINGS,
    endpoints.CREATE_VM,
    endpoints.DELETE_VM,
    endpoints.START_VM,
    endpoints.STOP_VM,
    endpoints.SHUTDOWN_VM,
    endpoints.RESET_VM,
    endpoints.PAUSE_VM,
    endpoints.RESUME_VM,
    endpoints.MOVE_DISKS,
    endpoints.CLEAN,
    endpoints.RELEASE_IMAGE,
    endpoints.MOVE,
    endpoints.CANCEL_MIGRATION,
    endpoints.LIMIT_MIGRATION,
    endpoints.RESOLVE_MIGRATION,
}


@pytest.mark.parametrize(
    ("role", "name", "permitted"),
    [
        (Role.OPERATOR, "alice", set(ENDPOINTS)),
        (Role.VIEWER, "eve", set(ENDPOINTS) - CHANGES),
        (Role.HOST, "host1", set(ENDPOINTS)),
        (Role.HOST, "host2", BETWEEN_HOSTS),
        # Names of people and of hosts are not the same.
        (Role.VIEWER, "host1", set(ENDPOINTS) - CHANGES),
    ],
)
def test_who_may_do_what(role: Role, name: str, permitted: set[Endpoint[Any, Any]]) -> None:
    def may(endpoint: Endpoint[Any, Any]) -> bool:
        try:
            answer(role, endpoint, Empty(), name)
        except NotPermitted:
            return False
        except InvalidInput:
            pass  # what is asked is empty, which not all of them take
        return True

    assert {endpoint for endpoint in ENDPOINTS if may(endpoint)} == permitted


def test_a_host_that_would_command_another_is_told_what_to_use() -> None:
    with pytest.raises(NotPermitted, match="host 'host2' may not do this on host 'host1'") as refused:
        answer(Role.HOST, endpoints.STOP_VM, WEB, "host2")
    assert "limosa ca issue NAME --role operator" in refused.value.todo
    with pytest.raises(NotPermitted) as refused:
        answer(Role.HOST, endpoints.LIST_VMS, VmList(vms=()), "host2")
    assert "limosa ca issue NAME --role viewer" in refused.value.todo


def test_viewers_do_not_see_what_a_guest_was_told_in_confidence() -> None:
    bare = msgspec.structs.replace(WEB, config=msgspec.structs.replace(WEB.config, cloud_init=None))
    for endpoint, reply in ((endpoints.SHOW_VM, WEB), (endpoints.LIST_VMS, VmList(vms=(WEB, bare)))):
        assert b"s3cret" not in answer(Role.VIEWER, endpoint, reply)
    shown = msgspec.json.decode(answer(Role.VIEWER, endpoints.SHOW_VM, WEB), type=Vm)
    assert shown.withheld == ("cloud_init",)
    assert shown.config.cloud_init == CloudInit(user_data="")
    assert msgspec.json.decode(answer(Role.VIEWER, endpoints.SHOW_VM, bare), type=Vm) == bare


def test_what_is_no_vm_is_shown_to_all() -> None:
    assert answer(Role.VIEWER, endpoints.HOST, Empty()) == b"{}"


class TestTheLog:
    """It says who did what, and how it ended, on one line each."""

    @pytest.fixture(autouse=True)
    def _hear(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO, "limosa.host.audit")

    def test_of_a_command(self, caplog: pytest.LogCaptureFixture) -> None:
        answer(Role.OPERATOR, endpoints.STOP_VM, WEB, "alice", path="/v1/vms/web1/stop", client=("10.0.0.5", 41234))
        answer(Role.OPERATOR, endpoints.STOP_VM, WEB, "root", path="/v1/vms/web1/stop")
        assert caplog.messages == [
            "operator alice at 10.0.0.5: POST /v1/vms/web1/stop: ok",
            "operator root by the Unix socket: POST /v1/vms/web1/stop: ok",
        ]

    @pytest.mark.parametrize(
        ("fault", "code"),
        [(Conflict("it runs"), "conflict"), (ValueError("x"), "internal"), (asyncio.CancelledError(), "broke off")],
    )
    def test_of_one_that_fails(self, caplog: pytest.LogCaptureFixture, fault: BaseException, code: str) -> None:
        with pytest.raises(type(fault)):
            answer(Role.OPERATOR, endpoints.STOP_VM, fault, "alice", path="/v1/vms/web1/stop")
        assert caplog.messages == [f"operator alice by the Unix socket: POST /v1/vms/web1/stop: {code}"]

    def test_of_one_that_is_refused(self, caplog: pytest.LogCaptureFixture) -> None:
        with pytest.raises(NotPermitted):
            answer(Role.VIEWER, endpoints.MOVE, WEB, body=b'{"vm": "web1", "destination": "host2"}')
        with pytest.raises(InvalidInput):
            answer(Role.OPERATOR, endpoints.MOVE, WEB, body=b'{"vm": "we\nb1"}')
        with pytest.raises(NotPermitted):
            answer(Role.OPERATOR, endpoints.MOVE, WEB, state={}, client=("10.0.0.5", 41234))
        assert caplog.messages == [
            "viewer eve by the Unix socket: POST /v1/migrations: not-permitted",
            "operator eve by the Unix socket: POST /v1/migrations: invalid-input",
            "somebody at 10.0.0.5: POST /v1/migrations: not-permitted",
        ]

    def test_has_what_was_asked_for_and_no_secret(self, caplog: pytest.LogCaptureFixture) -> None:
        for endpoint, body in (
            (endpoints.RESOLVE_MIGRATION, {"owner": "source"}),
            (endpoints.CHANGE_SETTINGS, {"values": {"encrypt": False}}),
            (endpoints.CREATE_VM, {"name": "web1", "memory_mib": 64, "cloud_init": {"user_data": "s3cret"}}),
        ):
            answer(Role.OPERATOR, endpoint, Empty(), path="/p", body=msgspec.json.encode(body))
        assert [message.partition("/p ")[2] for message in caplog.messages] == [
            "(owner='source'): ok",
            "(values={'encrypt': False}): ok",
            "(name='web1'): ok",
        ]

    def test_has_one_line_of_a_reasonable_length_whatever_comes(self, caplog: pytest.LogCaptureFixture) -> None:
        evil = "\n\r\x1b[2J\x9b\u2028INFO x" + "x" * 5000
        answer(Role.OPERATOR, endpoints.STOP_VM, WEB, path=f"/v1/vms/{evil}/stop")
        change = {"values": {evil[:128]: evil}}
        answer(Role.OPERATOR, endpoints.CHANGE_SETTINGS, Empty(), body=msgspec.json.encode(change))
        assert len(caplog.messages) == 2
        assert all(message.isprintable() and len(message) < 1200 for message in caplog.messages)

    def test_has_nothing_of_who_only_looks(self, caplog: pytest.LogCaptureFixture) -> None:
        answer(Role.OPERATOR, endpoints.SHOW_VM, WEB)
        answer(Role.HOST, endpoints.LOCATIONS, Empty())
        assert caplog.messages == []

    def test_of_a_move(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        begun = first_view()
        failed = msgspec.structs.replace(begun, outcome=Outcome.FAILED, total_s=1.25, fault=Conflict("no").fault())
        views = Views(begun.source, tmp_path)
        for view in (begun, msgspec.structs.replace(begun, phase=Phase.COPY), failed):
            views.publish(view)
        move = f"move {begun.id} of VM {begun.vm} from host {begun.source} to host {begun.destination}"
        assert caplog.messages == [f"{move}: begins", f"{move}: failed after 1.250 s (conflict)"]


storage = test_host_storage.storage


def test_a_landing_is_watched_here_and_commanded_at_its_source(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(incoming, "LOOK_EVERY_S", 0.001)
    caplog.set_level(logging.INFO, "limosa.host.audit")
    there = test_host_storage.TestWhatASourceMayName()

    async def scenario() -> None:
        landings = there.incoming(storage)
        services = SimpleNamespace(incoming=landings, views=Views("host2", storage._files.migrations))
        handlers = Handlers(cast(Any, services))
        begun = await landings.begin(there.request(test_host_storage.plan(storage)), "host1", "10.0.0.2")
        path = {"migration": begun.journal.header.migration}
        for asked in (
            handlers.cancel_migration(Empty(), path),
            handlers.limit_migration(LimitRequest(bandwidth_mbit_per_s=1), path),
        ):
            with pytest.raises(Conflict, match="is controlled by host 'host1'"):
                await asked
        changes = landings.watch(path["migration"])
        assert changes is not None
        assert (await anext(changes)).phase is Phase.BUILD_UP
        begun.journal.record(DestinationStep.RESERVED, 0.0)
        assert (await anext(changes)).phase is Phase.COPY
        begun.journal.record(DestinationStep.GONE, 0.0)
        for _ in range(2):  # it ends but once
            landings.settled(begun, StorageError("no space"))
        assert [one.outcome async for one in changes] == [Outcome.FAILED]
        with pytest.raises(NotFound):
            await handlers.show_migration(Empty(), path)

    asyncio.run(asyncio.wait_for(scenario(), 20))
    began, ended = caplog.messages
    assert began.endswith("of VM web1 from host host1 to host host2: begins")
    assert re.search(r"to host host2: failed after \d+\.\d{3} s \(storage-error\)$", ended)
