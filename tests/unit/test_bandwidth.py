"""How the host shares its caps among moves: who counts when, and who is told."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from test_again import Move as WholeMove
from test_again import play
from test_source_disks import PLAN

from limosa.errors import Conflict
from limosa.host import bandwidth
from limosa.host.bandwidth import MBIT_BYTES, Bandwidth
from limosa.host.outgoing import Outgoing
from limosa.model.migration import Outcome, Phase
from limosa.model.route import Path as Way
from limosa.model.route import Route
from limosa.settings.host import HostSettings
from limosa.transport.shares import Kind

FIRST, SECOND = "10.1.0.2", "10.2.0.2"


class Move:
    """A move as far as caps are concerned. ``memory`` and ``disks`` are what it was told, in Mbit/s."""

    def __init__(self, phase: Phase, *addresses: str, disks: bool = False, striped: bool = False) -> None:
        paths = tuple(Way(here="", there=address) for address in addresses or (FIRST,))
        self.route = Route(transport="multichannel" if striped else "tcp", paths=paths, striped=striped)
        self.report = SimpleNamespace(
            now=SimpleNamespace(
                outcome=Outcome.UNDER_WAY,
                phase=phase,
                disks=(PLAN,) if disks else (),
                layers=(),
                route=self.route,
            )
        )
        self.in_post_copy = False
        #: whether its QEMU answers
        self.answers = asyncio.Event()
        self.answers.set()
        self.memory: int | None = None
        self.disks: int | None = None
        self.machine = SimpleNamespace()
        self.mirrors = SimpleNamespace() if disks else None
        self.home = SimpleNamespace(own_cap=0)

    async def cap_memory(self, bytes_per_s: int) -> None:
        await self.answers.wait()
        self.memory = bytes_per_s // MBIT_BYTES

    async def cap_copies(self, bytes_per_s: int) -> None:
        self.disks = bytes_per_s // MBIT_BYTES


class Host:
    """A host with these caps and moves, of which the first is ``a``."""

    def __init__(self, caps: dict[str, Any], *moves: Move) -> None:
        self.paced = 0
        self.page = SimpleNamespace(now=HostSettings(**caps))
        named = dict(zip("abc", moves, strict=False))
        self.bandwidth = Bandwidth(cast(Any, self.page), cast(Any, named), cast(Any, SimpleNamespace(pace=self._pace)))

    def share(self) -> None:
        asyncio.run(self.bandwidth.share())

    def lane(self, name: str, address: str) -> int | None:
        share = self.bandwidth.of_lane(name, address)
        return share // MBIT_BYTES if share else share

    def _pace(self) -> None:
        self.paced += 1


MEMORY = {"bandwidth_mbit_per_s": 1000}
NETWORK = {"network_bandwidth_mbit_per_s": {"10.1.0.0/24": 100}}


@pytest.mark.parametrize(
    ("phase", "counts"),
    [
        (Phase.WAITING, False),
        (Phase.BUILD_UP, True),
        (Phase.COPY, True),
        (Phase.SYNCHRONISE, True),
        (Phase.SWITCHOVER, True),
        (Phase.TEAR_DOWN, False),
    ],
)
def test_moves_share_while_they_send(phase: Phase, counts: bool) -> None:
    move, other = Move(Phase.COPY), Move(phase)
    Host(MEMORY, move, other).share()
    assert move.memory == (500 if counts else 1000)
    assert other.memory == (500 if counts and phase is not Phase.SWITCHOVER else None)


def test_a_move_that_failed_and_waits_for_its_destination_has_no_share() -> None:
    move, other = Move(Phase.COPY), Move(Phase.COPY)
    other.report.now.outcome = Outcome.FAILED
    Host(MEMORY, move, other).share()
    assert (move.memory, other.memory) == (1000, None)


@pytest.mark.parametrize("phase", [Phase.SWITCHOVER, Phase.TEAR_DOWN])
def test_memory_that_follows_a_guest_counts(phase: Phase) -> None:
    move, other = Move(Phase.COPY), Move(phase)
    other.in_post_copy = True
    Host(MEMORY, move, other).share()
    assert (move.memory, other.memory) == (500, 500)


def test_a_qemu_that_hangs_keeps_no_other_waiting_and_has_the_latest_when_it_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bandwidth, "TAKES_WITHIN_S", 0.05)

    async def scenario() -> None:
        hangs, other = Move(Phase.COPY, disks=True), Move(Phase.COPY)
        hangs.answers.clear()
        host = Host(MEMORY, hangs, other)
        await host.bandwidth.share()
        assert (hangs.memory, other.memory) == (None, 500)
        host.page.now = HostSettings(bandwidth_mbit_per_s=200, storage_bandwidth_mbit_per_s=30)
        await host.bandwidth.share()
        assert (hangs.memory, other.memory) == (None, 100)
        told = list(host.bandwidth._telling.values())
        hangs.answers.set()
        await asyncio.wait_for(asyncio.gather(*told), 20)
        assert (hangs.memory, hangs.disks) == (100, 30)
        host.page.now = HostSettings()
        await host.bandwidth.share()
        assert (hangs.memory, hangs.disks, other.memory) == (0, 0, 0)

    asyncio.run(scenario())


def test_who_is_cancelled_while_a_qemu_hangs_leaves_it_to_be_told() -> None:
    async def scenario() -> None:
        hangs = Move(Phase.COPY)
        hangs.answers.clear()
        host = Host(MEMORY, hangs)
        sharing = asyncio.ensure_future(host.bandwidth.share())
        await asyncio.sleep(0)
        told = list(host.bandwidth._telling.values())
        sharing.cancel()
        await asyncio.wait({sharing})
        hangs.answers.set()
        await asyncio.wait_for(asyncio.gather(*told), 20)
        assert hangs.memory == 1000

    asyncio.run(scenario())


def test_copies_that_keep_up_have_the_cap_of_disks_beside_memory() -> None:
    move, other = Move(Phase.COPY, disks=True), Move(Phase.STORAGE, disks=True)
    Host({**MEMORY, "storage_bandwidth_mbit_per_s": 200}, move, other).share()
    assert (move.memory, move.disks, other.memory, other.disks) == (1000, 100, None, 100)


def test_memory_and_disks_of_a_move_share_what_a_network_gives_it() -> None:
    move, other = Move(Phase.COPY, disks=True), Move(Phase.COPY)
    Host(NETWORK, move, other).share()
    assert (move.memory, move.disks, other.memory) == (25, 25, 50)


def test_lanes_are_paced_by_network_with_each_share() -> None:
    move, other = Move(Phase.COPY, FIRST, SECOND, striped=True), Move(Phase.COPY)
    host = Host(NETWORK, move, other)
    host.share()
    assert (host.paced, move.memory, other.memory) == (1, 0, 50)
    assert (host.lane("a", FIRST), host.lane("a", SECOND)) == (50, 0)
    other.report.now.phase = Phase.WAITING
    assert (host.lane("a", FIRST), host.lane("b", FIRST)) == (100, None)


@pytest.mark.parametrize(("striped", "mbit_per_s"), [(False, 100), (True, 0)])
def test_caps_by_network_are_the_lanes_own_where_a_route_has_some(striped: bool, mbit_per_s: int) -> None:
    caps = {"network_bandwidth_mbit_per_s": {"10.1.0.0/24": 400, "10.2.0.0/24": 100}}
    route = Move(Phase.BUILD_UP, FIRST, SECOND, striped=striped).route
    assert Host(caps).bandwidth.alone(Kind.MEMORY, route) == mbit_per_s * MBIT_BYTES
    assert Host({**caps, **MEMORY}).bandwidth.alone(Kind.MEMORY, route) == (mbit_per_s or 1000) * MBIT_BYTES


def test_a_move_tells_the_others_before_it_sends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        move, said = WholeMove(tmp_path), list[str]()
        migrate = move.source.migrate

        async def sending() -> None:
            said.append(move.report.now.phase)

        async def noted(stream: Any) -> None:
            said.append("migrate")
            await migrate(stream)

        monkeypatch.setattr(move.home, "sending", sending)
        monkeypatch.setattr(move.source, "migrate", noted)
        await move.run()
        assert said[:2] == [Phase.COPY, "migrate"]

    play(scenario())


def test_a_move_by_rdma_cannot_be_capped() -> None:
    async def scenario() -> None:
        view = SimpleNamespace(
            vm="web1", outcome=Outcome.UNDER_WAY, route=Route(transport="rdma", paths=(Way(here="", there=FIRST),))
        )
        page = SimpleNamespace(now=HostSettings(), on_change=lambda _: None)
        parts = SimpleNamespace(name="host1", page=page, vms=None, relays=SimpleNamespace(pace=lambda: None))
        outgoing = Outgoing(cast(Any, parts), Path(), cast(Any, SimpleNamespace(show=lambda _: view)))
        move = Move(Phase.COPY)
        outgoing._active["a"] = cast(Any, move)
        with pytest.raises(Conflict, match="RDMA"):
            await outgoing.limit("a", 100)
        assert move.home.own_cap == 0
        await outgoing.limit("a", 0)

    asyncio.run(scenario())
