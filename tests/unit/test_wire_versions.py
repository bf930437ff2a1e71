"""Hosts of neighbouring releases: what one says, the other understands or refuses in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest

from limosa.errors import HostUnreachable
from limosa.model import reading
from limosa.model.vm import VmConfig
from limosa.wire import peer as say
from limosa.wire import versions
from limosa.wire.api import MoveOptions, MoveRequest
from limosa.wire.encoding import encode

VM = VmConfig(
    name="web1",
    uuid="00000000-0000-4000-8000-000000000001",
    memory_mib=1024,
    cpus=2,
    machine="pc-q35-10.0",
    cpu="x86-64-v2",
)
PREPARE = say.Prepare(
    migration="abcdefghijkl",
    vm=VM,
    accelerator="kvm",
    transport="tcp",
    credentials=None,
    post_copy=False,
    running=True,
)


@pytest.mark.parametrize(
    ("ours", "theirs", "agreed"), [((1, 1), (1, 1), 1), ((1, 2), (1, 1), 1), ((1, 1), (1, 2), 1), ((2, 3), (1, 2), 2)]
)
def test_neighbours_agree_on_the_newest_both_know(ours: tuple[int, int], theirs: tuple[int, int], agreed: int) -> None:
    assert versions.agree(ours, theirs, host="host2") == agreed


@pytest.mark.parametrize(("ours", "theirs"), [((1, 1), (2, 3)), ((2, 3), (1, 1))])
def test_without_a_common_version_both_ranges_are_told(ours: tuple[int, int], theirs: tuple[int, int]) -> None:
    with pytest.raises(HostUnreachable) as caught:
        versions.agree(ours, theirs, host="host2")
    assert caught.value.why == f"this host speaks {ours[0]} to {ours[1]}, 'host2' {theirs[0]} to {theirs[1]}"


def test_what_has_its_default_is_not_said() -> None:
    assert json.loads(encode(PREPARE)) == {
        "type": "prepare",
        "migration": "abcdefghijkl",
        "vm": {
            "name": "web1",
            "uuid": "00000000-0000-4000-8000-000000000001",
            "memory_mib": 1024,
            "cpus": 2,
            "machine": "pc-q35-10.0",
            "cpu": "x86-64-v2",
        },
        "accelerator": "kvm",
        "transport": "tcp",
        "credentials": None,
        "post_copy": False,
        "running": True,
    }


def test_what_differs_from_its_default_is_said_however_deep() -> None:
    request = MoveRequest(vm="web1", destination="host2", options=MoveOptions(storage={"vda": "fast"}))
    assert json.loads(encode(request)) == {
        "vm": "web1",
        "destination": "host2",
        "options": {"storage": {"vda": "fast"}},
    }


def test_a_host_refuses_what_a_newer_one_asks_and_reads_what_it_answers() -> None:
    asked = {**json.loads(encode(PREPARE)), "novelty": 1}
    with pytest.raises(msgspec.ValidationError, match="unknown field `novelty`"):
        reading.decode(json.dumps(asked), say.FromSource)
    for answered in (say.Welcome(host="host2", version=1), say.Prepared(address="::1", port=1, token="0" * 32)):
        data = {**json.loads(encode(answered)), "novelty": 1}
        assert reading.decode(json.dumps(data), say.FromDestination) == answered
    greeting = say.Hello(host="host1", oldest=1, newest=2)
    assert reading.decode(json.dumps({**json.loads(encode(greeting)), "novelty": 1}), say.FromSource) == greeting


def test_every_answer_is_read_tolerantly_and_every_request_strictly() -> None:
    tolerant = {cls for cls in messages() if not cls.__struct_config__.forbid_unknown_fields}
    assert tolerant == {say.Hello, *get_args(say.FromDestination)}


def test_version_1_is_still_spoken() -> None:
    """Nothing of the first release's schemas is gone or has another meaning, and nothing new must be said."""
    before: dict[str, Any] = json.loads((Path(__file__).parent / "peer-1.json").read_text())
    now = schemas()
    assert {name: kept(schema, now[name]) for name, schema in before.items()} == before


def kept(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Of today's schema what was there before, and all that it requires."""
    if "properties" not in before:
        return now
    return {**now, "properties": {name: now["properties"].get(name) for name in before["properties"]}}


def schemas() -> dict[str, Any]:
    """Of every struct that goes over the peer session, without its words for people."""
    _, found = msgspec.json.schema_components(messages())
    return {name: without_words(schema) for name, schema in json.loads(json.dumps(found)).items()}


def without_words(schema: Any) -> Any:
    """A schema without titles and descriptions."""
    if isinstance(schema, dict):
        return {key: without_words(value) for key, value in schema.items() if key not in ("title", "description")}
    return [without_words(one) for one in schema] if isinstance(schema, list) else schema


def messages() -> tuple[type[say.Message], ...]:
    """Everything that either side says."""
    return get_args(say.FromSource) + get_args(say.FromDestination)
