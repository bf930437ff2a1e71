"""What is set in the kernel's path manager while moves run, and that nothing of it is left, nor more taken away."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limosa.errors import NetworkError
from limosa.network.mptcp import FLAG_IMPLICIT, FLAG_SIGNAL, Endpoint, Limits
from limosa.transport.endpoints import Endpoints

#: From linux/mptcp.h: connections from here use it besides their own.
FLAG_SUBFLOW = 2
MINE, OTHER, THEIRS = "10.79.0.11", "10.80.0.11", "10.81.0.11"
DEFAULT, RAISED = Limits(2, 0), Limits(8, 8)


class Kernel:
    """A path manager that behaves as Linux's: one endpoint an address, an explicit one replaces an implicit one."""

    def __init__(self, limits: Limits = DEFAULT, endpoints: tuple[Endpoint, ...] = ()) -> None:
        self.now = limits
        self.there = {one.address: one for one in endpoints}
        self.acts: list[str] = []
        self.refuses = False
        #: addresses whose endpoints an administrator removes right before we do
        self.flushed: set[str] = set()
        self._numbers = iter(range(100, 10_000))

    async def endpoints(self) -> tuple[Endpoint, ...]:
        return tuple(self.there.values())

    async def announce(self, address: str, port: int = 0) -> Endpoint:
        place = f"{address} port {port}" if port else address
        old = self.there.get(place)
        if self.refuses or (old is not None and not old.flags & FLAG_IMPLICIT):
            raise NetworkError("refused")
        if len(self.there) == 8:
            raise NetworkError("the kernel has room for 8")
        self.there[place] = Endpoint(address, next(self._numbers), FLAG_SIGNAL, port)
        self.acts.append(f"announce {place}")
        return self.there[place]

    async def withdraw(self, endpoint: Endpoint) -> None:
        place = next((place for place, one in self.there.items() if one == endpoint), None)
        if place is None or endpoint.address in self.flushed:
            self.there = {place: one for place, one in self.there.items() if one != endpoint}
            raise NetworkError("there is no such endpoint")
        del self.there[place]
        self.acts.append(f"withdraw {place}")

    async def limits(self) -> Limits:
        return self.now

    async def set_limits(self, limits: Limits) -> None:
        if self.refuses:
            raise NetworkError("refused")
        self.now = limits


def play(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_set_by_the_first_move_and_gone_with_the_last(tmp_path: Path) -> None:
    async def scenario() -> None:
        kernel = Kernel()
        endpoints = Endpoints(kernel, tmp_path / "mptcp.json")
        first, second = await endpoints.hold([MINE]), await endpoints.hold([MINE, OTHER])
        assert (kernel.now, set(kernel.there)) == (RAISED, {MINE, OTHER})
        assert kernel.acts == [f"announce {MINE}", f"announce {OTHER}"], "the first one's connections are left alone"
        second.release()
        second.release()
        await endpoints.idle()
        assert (kernel.now, set(kernel.there)) == (RAISED, {MINE})
        first.release()
        await endpoints.idle()
        assert (kernel.now, kernel.there) == (DEFAULT, {})
        assert list(tmp_path.iterdir()) == []

    play(scenario)


def test_what_an_administrator_made_is_used_and_left_alone(tmp_path: Path) -> None:
    async def scenario() -> None:
        theirs = Endpoint(THEIRS, 1, FLAG_SIGNAL)
        kernel = Kernel(Limits(8, 8), (theirs,))
        endpoints = Endpoints(kernel, tmp_path / "mptcp.json")
        hold = await endpoints.hold([THEIRS, MINE])
        await endpoints.announce(hold, [THEIRS], again=True)
        hold.release()
        await endpoints.idle()
        assert kernel.there == {THEIRS: theirs}
        assert kernel.acts == [f"announce {MINE}", f"withdraw {MINE}"]
        assert kernel.now == Limits(8, 8)

    play(scenario)


def test_an_administrators_endpoint_that_is_not_announced_costs_its_path_and_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        theirs = Endpoint(THEIRS, 1, FLAG_SUBFLOW)
        kernel = Kernel(endpoints=(theirs,))
        endpoints = Endpoints(kernel, tmp_path / "mptcp.json")
        hold = await endpoints.hold([THEIRS, MINE])
        assert kernel.acts == [f"announce {MINE}"]
        hold.release()
        await endpoints.idle()
        assert kernel.there == {THEIRS: theirs}

    play(scenario)
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"{THEIRS} is not announced")
    assert "'signal'" in said


@pytest.mark.parametrize("changed", [Limits(4, 4), Limits(0, 0)])
def test_limits_somebody_changed_meanwhile_stay(tmp_path: Path, changed: Limits) -> None:
    async def scenario() -> None:
        kernel = Kernel()
        endpoints = Endpoints(kernel, tmp_path / "mptcp.json")
        hold = await endpoints.hold()
        kernel.now = changed
        hold.release()
        await endpoints.idle()
        assert kernel.now == changed

    play(scenario)


def test_what_the_kernel_noted_by_itself_goes_too_unless_it_was_there_before(tmp_path: Path) -> None:
    async def scenario() -> None:
        before = Endpoint(OTHER, 1, FLAG_IMPLICIT)
        kernel = Kernel(endpoints=(before,))
        endpoints = Endpoints(kernel, tmp_path / "mptcp.json")
        hold = await endpoints.hold()
        kernel.there[MINE] = Endpoint(MINE, 2, FLAG_IMPLICIT)
        further = await endpoints.hold([MINE])  # a move to this host, while one from it runs
        assert kernel.there[MINE].flags == FLAG_SIGNAL
        kernel.there[THEIRS] = Endpoint(THEIRS, 3, FLAG_IMPLICIT)
        hold.release()
        further.release()
        await endpoints.idle()
        assert kernel.there == {OTHER: before}

    play(scenario)


def test_announced_again_is_withdrawn_first_since_the_kernel_says_nothing_twice(tmp_path: Path) -> None:
    async def scenario() -> None:
        kernel = Kernel()
        endpoints = Endpoints(kernel, tmp_path / "mptcp.json")
        hold = await endpoints.hold([MINE])
        await endpoints.announce(hold, [MINE], again=True)
        assert kernel.acts == [f"announce {MINE}", f"withdraw {MINE}", f"announce {MINE}"]
        hold.release()
        await endpoints.announce(hold, [OTHER])  # came too late
        await endpoints.idle()
        assert kernel.there == {}

    play(scenario)


@pytest.mark.parametrize("killed", [False, True])
def test_one_that_is_gone_already_keeps_no_other_there(tmp_path: Path, killed: bool) -> None:
    async def scenario() -> None:
        kernel = Kernel()
        endpoints = Endpoints(kernel, tmp_path / "mptcp.json")
        hold = await endpoints.hold([MINE, OTHER])
        kernel.there[THEIRS] = Endpoint(THEIRS, 3, FLAG_IMPLICIT)
        kernel.flushed = {MINE}
        if killed:
            await Endpoints(kernel, tmp_path / "mptcp.json").clean()
        else:
            hold.release()
            await endpoints.idle()
        assert (kernel.now, kernel.there, list(tmp_path.iterdir())) == (DEFAULT, {}, [])

    play(scenario)


def test_one_that_is_gone_can_be_announced_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        kernel = Kernel()
        endpoints = Endpoints(kernel, tmp_path / "mptcp.json")
        hold = await endpoints.hold([MINE])
        kernel.there.clear()
        await endpoints.announce(hold, [MINE], again=True)
        assert set(kernel.there) == {MINE}

    play(scenario)


def test_a_refusal_leaves_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        kernel = Kernel()
        kernel.refuses = True
        endpoints = Endpoints(kernel, tmp_path / "mptcp.json")
        with pytest.raises(NetworkError):
            await endpoints.hold([MINE])
        await endpoints.idle()
        assert (kernel.now, kernel.there, list(tmp_path.iterdir())) == (DEFAULT, {}, [])

    play(scenario)


def test_addresses_that_the_kernel_has_no_room_for_cost_their_paths_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        theirs = tuple(Endpoint(f"10.90.0.{number}", number, FLAG_SIGNAL) for number in range(1, 8))
        kernel = Kernel(endpoints=theirs)
        endpoints = Endpoints(kernel, tmp_path / "mptcp.json")
        hold = await endpoints.hold([MINE, OTHER, THEIRS])
        assert set(kernel.there.values()) > set(theirs)
        assert kernel.acts == [f"announce {MINE}"]
        assert [record.getMessage().split()[0] for record in caplog.records] == [OTHER, THEIRS]
        del kernel.there["10.90.0.1"]
        second = await endpoints.hold([OTHER])  # there is room now
        assert kernel.acts[1:] == [f"announce {OTHER}"]
        for one in (hold, second):
            one.release()
        await endpoints.idle()
        assert (kernel.now, tuple(kernel.there.values())) == (DEFAULT, theirs[1:])

    play(scenario)


@given(
    mine=st.sets(st.sampled_from([MINE, OTHER])),
    theirs=st.sets(st.just(THEIRS)),
    limits=st.builds(Limits, st.integers(0, 8), st.integers(0, 8)),
)
@settings(deadline=None)
def test_the_next_daemon_takes_away_what_a_killed_one_left(
    tmp_path_factory: pytest.TempPathFactory, mine: set[str], theirs: set[str], limits: Limits
) -> None:
    file = tmp_path_factory.mktemp("run") / "mptcp.json"

    async def scenario() -> None:
        kernel = Kernel(limits, tuple(Endpoint(address, 1, FLAG_SIGNAL) for address in theirs))
        await Endpoints(kernel, file).hold(mine)
        kernel.there.setdefault("10.82.0.11", Endpoint("10.82.0.11", 9, FLAG_IMPLICIT))
        await Endpoints(kernel, file).clean()  # another process: it knows the file only
        assert (kernel.now, set(kernel.there)) == (limits, theirs)
        assert not file.exists()
        await Endpoints(kernel, file).clean()

    play(scenario)


def test_a_file_that_cannot_be_read_stops_nobody(tmp_path: Path) -> None:
    async def scenario() -> None:
        (tmp_path / "mptcp.json").write_text("{")
        kernel = Kernel()
        await Endpoints(kernel, tmp_path / "mptcp.json").clean()
        assert kernel.acts == []

    play(scenario)


def test_ports_are_shared_by_moves_and_gone_with_the_last(tmp_path: Path) -> None:
    async def scenario() -> None:
        kernel = Kernel()
        endpoints = Endpoints(kernel, tmp_path / "mptcp.json")
        first, second = await endpoints.hold(), await endpoints.hold()
        await endpoints.announce_ports(first, MINE, 2, iter([7, 8, 9]))
        await endpoints.announce_ports(second, MINE, 3, iter([10, 11]))
        assert {one.port for one in kernel.there.values()} == {7, 8, 10}
        first.release()
        await endpoints.idle()
        assert {one.port for one in kernel.there.values()} == {7, 8, 10}
        second.release()
        await endpoints.idle()
        assert (kernel.now, kernel.there, list(tmp_path.iterdir())) == (DEFAULT, {}, [])

    play(scenario)


def test_it_is_said_that_no_port_is_free(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        kernel = Kernel()
        endpoints = Endpoints(kernel, tmp_path / "mptcp.json")
        with caplog.at_level("WARNING"):
            await endpoints.announce_ports(await endpoints.hold(), MINE, 3, iter([7]))
        assert {one.port for one in kernel.there.values()} == {7}
        assert caplog.messages == [f"no further port of {MINE} is free, so that a move has fewer connections"]

    play(scenario)


def test_more_ports_than_the_kernel_has_room_for_cost_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        kernel = Kernel()
        endpoints = Endpoints(kernel, tmp_path / "mptcp.json")
        hold = await endpoints.hold([MINE, OTHER])
        with caplog.at_level("WARNING"):
            await endpoints.announce_ports(hold, MINE, 7, iter(range(1, 100)))
        assert len(kernel.there) == 8
        assert caplog.messages == [
            f"{MINE} port 7 is not announced, so that a move has one connection less: the kernel has room for 8"
        ]
        await Endpoints(kernel, tmp_path / "mptcp.json").clean()  # the next daemon, if this one is killed now
        assert kernel.there == {}

    play(scenario)
