"""What is found before a move: which addresses are taken for open, and images that others need."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from test_disks import FACT
from test_preflight import HERE, THERE, VM

from limosa.migration import examination
from limosa.migration.examination import Examined, Question, _Tried, _try_routes, examine
from limosa.model.facts import VmFacts
from limosa.model.finding import Severity
from limosa.model.network import HostNetwork, HostNic, NicAddress
from limosa.model.route import Route
from limosa.model.storage import BackingFile, DiskFacts, Location
from limosa.model.vm import Disk
from limosa.transport import trials
from limosa.transport.advise import loses_long_packets
from limosa.transport.choice import Ends

MANAGEMENT, FIRST, SECOND = "192.0.2.1", "10.1.0.1", "10.2.0.1"
ANSWERS = msgspec.structs.replace(THERE, trial_port=1, trial_answers=True)


def nic(name: str, address: str) -> HostNic:
    own = (NicAddress(address=address, prefix=24),)
    return HostNic(name=name, index=2, kind="physical", up=True, carrier=True, mtu=1500, addresses=own)


@pytest.mark.parametrize(("own", "is_open"), [(FIRST, True), (MANAGEMENT, False), (None, False)])
def test_routing_must_lead_out_over_a_network_that_may_carry_moves(
    monkeypatch: pytest.MonkeyPatch, own: str | None, is_open: bool
) -> None:
    async def reach(address: str, port: int, source: str, *, answers: bool) -> trials.Reached | None:
        assert (address, port, source, answers) == (SECOND, 1, "", True)
        return trials.Reached(own, whole=True) if own is not None else None

    monkeypatch.setattr(trials, "reach", reach)
    here = HostNetwork(nics=(nic("eth0", MANAGEMENT), nic("eth1", FIRST)), allowed=("10.1.0.0/24", "10.2.0.0/24"))
    ends = Ends("host1", "host2", here, HostNetwork(nics=(nic("eth0", SECOND),)), [SECOND])
    tried = asyncio.run(_try_routes(ends, "auto", ANSWERS))
    assert bool(tried.route.paths) is is_open
    assert bool(tried.blocked) is not is_open


@pytest.mark.parametrize("other", [True, False], ids=["there is another way", "there is no other"])
def test_a_path_that_swallows_long_packets_is_found_and_done_without(
    monkeypatch: pytest.MonkeyPatch, *, other: bool
) -> None:
    async def reach(address: str, *_: object, **__: object) -> trials.Reached:
        return trials.Reached("10.1.0.9" if address == FIRST else "10.2.0.9", whole=address != FIRST)

    monkeypatch.setattr(trials, "reach", reach)
    addresses = [FIRST, SECOND] if other else [FIRST]
    near = HostNetwork(nics=(nic("eth0", "10.1.0.9"), nic("eth1", "10.2.0.9")))
    far = HostNetwork(nics=tuple(nic(f"mig{number}", address) for number, address in enumerate(addresses)))
    ends = Ends("host1", "host2", near, far, addresses)
    tried = asyncio.run(_try_routes(ends, "auto", ANSWERS))
    assert [path.there for path in tried.route.paths] == addresses[1:]
    assert not tried.blocked, "it is not tried again as long as it is there"
    (path,) = tried.lossy
    finding = loses_long_packets(ends, path, only=not other)
    assert (finding.code, finding.severity) == ("long-packets-lost", Severity.WARNING if other else Severity.ERROR)
    assert "eth0 (MTU 1500) on host 'host1' and mig0 (MTU 1500) on host 'host2'" in finding.what


class DisksHere:
    """One disk, which another VM needs too."""

    async def facts(self, disks: Iterable[Disk]) -> tuple[DiskFacts, ...]:
        return tuple(msgspec.structs.replace(FACT, name=disk.name, needed="VM 'other' uses it") for disk in disks)

    async def digest(self, backing: BackingFile) -> BackingFile:
        raise AssertionError("nothing lies below it")


def examined(monkeypatch: pytest.MonkeyPatch, wishes: dict[str, str], *, keep: bool) -> Examined:
    there = msgspec.structs.replace(THERE, locations=(Location(name="fast", path="/srv/fast"),))

    async def inspect(*_: Any) -> Any:
        return there, 0.0

    async def facts() -> VmFacts:
        return HERE

    async def route(*_: Any) -> Any:
        return _Tried(Route("tcp"), frozenset(), ())

    monkeypatch.setattr(examination, "_try_routes", route)
    question = Question(VM, "host1", "tcg", "tcp", wishes, "flatten", "abcdefabcdef", keep=keep)
    peer = cast(Any, SimpleNamespace(inspect=inspect))
    return asyncio.run(examine(peer, question, facts(), DisksHere()))


@pytest.mark.parametrize(
    ("wishes", "keep", "refused"), [({"vda": "fast"}, False, True), ({"vda": "fast"}, True, False), ({}, False, False)]
)
def test_an_image_others_need_is_left_only_if_it_is_kept(
    monkeypatch: pytest.MonkeyPatch, wishes: dict[str, str], keep: bool, refused: bool
) -> None:
    codes = {finding.code for finding in examined(monkeypatch, wishes, keep=keep).findings}
    assert ("image-needed" in codes) is refused
