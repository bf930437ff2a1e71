"""A host of the next release and one of this one move VMs to each other, as they do while a cluster is upgraded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from unittest import mock

import msgspec
import pytest

from harness.hosts import Host, runners, running_hosts, tiny
from harness.raw import peer_session
from harness.steering import move
from limosa.wire import endpoints
from limosa.wire import peer as say

pytestmark = pytest.mark.qemu


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Host, Host]]:
    """The older and the newer; see ``be_newer`` in ``harness/daemon.py``."""
    with running_hosts("older", "newer") as (older, newer):
        newer.kill()
        with mock.patch.dict(os.environ, LIMOSA_TEST_RELEASE="next"):
            newer.start()
        yield older, newer


def test_a_vm_moves_to_the_newer_host_and_back(hosts: tuple[Host, Host]) -> None:
    older, newer = hosts
    assert [host.client.call(endpoints.HOST).protocol for host in hosts] == [(1, 1), (1, 2)]
    older.create(tiny("vm"))
    move(older, "vm", newer)
    assert runners(hosts, "vm") == ["newer"]
    move(newer, "vm", older)
    assert runners(hosts, "vm") == ["older"]


def test_what_only_the_newer_knows_is_refused_by_name_before_anything_is_made(hosts: tuple[Host, Host]) -> None:
    older, newer = hosts
    newer.create(tiny("novel"))
    asked = {"type": "inspect", "accelerator": "tcg", "vm": msgspec.to_builtins(newer.show("novel").config)}
    asked["vm"]["novelty"] = 1
    with peer_session(older, newer.folder / "pki", "newer") as session:
        answer = session.ask(asked)
    assert isinstance(answer, say.Failed)
    assert answer.fault.what == "host 'older' does not understand the request"
    assert "`novelty`" in answer.fault.why
    assert "upgrade 'older'" in answer.fault.todo
