"""What the API says to whom."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
import test_host_storage
from test_journal import VM

from limosa.errors import Conflict, InvalidInput, NotFound, NotPermitted
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


def answer(role: Role, endpoint: Endpoint[Any, Any], reply: Any, name: str = "eve") -> bytes:
    """What somebody of that role gets from ``host1``, where the handler gives ``reply``. Raises what is refused."""
    sent: list[dict[str, Any]] = []

    async def handler(_: Any, __: dict[str, str]) -> Any:
        return reply

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": endpoint.method,
        "path": endpoint.path,
        "headers": [],
        "path_params": {},
        "state": {"identity": Identity(name, role)},
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
    with pytest.raises(NotPermitted, match="host 'host2' may not do this at host 'host1'") as refused:
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


storage = test_host_storage.storage


def test_a_landing_is_watched_here_and_commanded_at_its_source(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(incoming, "LOOK_EVERY_S", 0.001)
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
            with pytest.raises(Conflict, match="is conducted by host 'host1'"):
                await asked
        changes = landings.watch(path["migration"])
        assert changes is not None
        assert (await anext(changes)).phase is Phase.BUILD_UP
        begun.journal.record(DestinationStep.RESERVED, 0.0)
        assert (await anext(changes)).phase is Phase.COPY
        begun.journal.record(DestinationStep.GONE, 0.0)
        landings.settled(begun)
        assert [one.outcome async for one in changes] == [Outcome.FAILED]
        with pytest.raises(NotFound):
            await handlers.show_migration(Empty(), path)

    asyncio.run(asyncio.wait_for(scenario(), 20))
