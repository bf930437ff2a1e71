"""What a move's connections have carried, by path, and which paths it is to use when NICs come and go."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any, cast

import msgspec
import pytest

from harness.channels import BareChannel
from limosa.migration.paths import Paths
from limosa.model.network import HostNetwork, HostNic, NicAddress
from limosa.model.route import Path, Route
from limosa.qemu.protocol import RdmaAddress
from limosa.transport.channel import SocketChannel, Used
from limosa.transport.choice import Ends
from limosa.transport.rdma import RdmaChannel
from limosa.wire.peer import Offered

HERE, THERE = "10.0.0.1", "10.0.0.2"
ENDS = Ends("host1", "host2", HostNetwork(), HostNetwork(), (THERE,))


class Connection(BareChannel):
    """Always busy, at 100 MB/s."""

    sent_bytes, busy_s = 0, 0.0

    def used(self) -> tuple[Used, ...]:
        return (Used(HERE, THERE, self.sent_bytes, busy_s=self.busy_s),)

    def later(self, seconds: float) -> None:
        self.sent_bytes += int(100e6 * seconds)
        self.busy_s += seconds


class Stream(BareChannel):
    """One of several that share a connection; its own is a third of what that carries."""

    def __init__(self, connection: Connection) -> None:
        self.connections = (connection,)

    def used(self) -> tuple[Used, ...]:
        return tuple(Used(one.here, one.there, one.sent_bytes // 3) for one in self.connections[0].used())


@pytest.mark.parametrize("streams", [1, 2])
def test_a_connection_that_streams_share_is_as_fast_as_it_is(monkeypatch: pytest.MonkeyPatch, streams: int) -> None:
    now = 5.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    connection = Connection()
    channels: list[SocketChannel] = [Stream(connection) for _ in range(streams)]
    route = Route(transport="compression", paths=(Path(here=HERE, there=THERE),))
    paths = Paths(route, ENDS, channels)
    asyncio.run(paths.look())
    now = 6.0
    connection.later(1.0)
    seen = asyncio.run(paths.look())
    assert [one.mbit_per_s for one in paths.carried()] == [800]
    assert [path.sent_bytes for path in seen.paths] == [streams * (100_000_000 // 3)]


@pytest.mark.parametrize("shared", [True, False])
def test_a_connection_counts_once_however_many_streams_share_it(*, shared: bool) -> None:
    one = Connection()
    channels: list[SocketChannel] = [Stream(one), Stream(one if shared else Connection())]
    route = Route(
        transport="compression", paths=(Path(here=HERE, there=THERE), Path(here="10.1.0.1", there="10.1.0.2"))
    )
    seen = asyncio.run(Paths(route, ENDS, channels).look())
    assert [path.connections for path in seen.paths] == [1 if shared else 2, 0]


@pytest.mark.parametrize(("transport", "sent"), [("rdma", 77), ("tcp", 0)])
def test_what_goes_by_rdma_is_what_qemu_says(transport: str, sent: int) -> None:
    route = Route(transport=transport, paths=(Path(here=HERE, there=THERE),))
    channels: list[Any] = [RdmaChannel(RdmaAddress(THERE, 1))]
    (path,) = asyncio.run(Paths(route, ENDS, channels).look(77)).paths
    assert (path.sent_bytes, path.connections) == (sent, 0)


Way = tuple[str, str]


def address(network: int, host: int) -> str:
    return f"10.{network}.0.{host}"


def way(network: int) -> Way:
    return address(network, 1), address(network, 2)


def network(host: int, *networks: int) -> HostNetwork:
    """A host with a NIC on each of these networks."""
    nics = [
        HostNic(
            name=f"mig{number}",
            index=number,
            kind="physical",
            up=True,
            carrier=True,
            mtu=1500,
            speed_mbit_per_s=100,
            addresses=(NicAddress(address=address(number, host), prefix=24),),
        )
        for number in networks
    ]
    return HostNetwork(nics=tuple(nics))


def offered(there: HostNetwork) -> tuple[str, ...]:
    return tuple(own.address for nic in there.nics for own in nic.addresses)


class Spread:
    """A stream that relays spread over paths, and the destination's end of its session."""

    connections = ()

    def __init__(self, *networks: int) -> None:
        self.alive = [way(network) for network in networks]
        self.wanted: list[Way] = []
        self.announced: list[str] = []
        self.changes_there: Sequence[HostNetwork] = ()

    def used(self) -> tuple[Used, ...]:
        return tuple(Used(*one, 0) for one in self.alive)

    def spread_over(self, ways: Iterable[Way]) -> None:
        self.wanted = list(ways)

    async def announce(self, addresses: Sequence[str]) -> None:
        self.announced += addresses

    async def offers(self) -> AsyncIterator[Offered]:
        for there in self.changes_there:
            yield Offered(network=there, addresses=offered(there))

    def follow(
        self,
        chosen: Sequence[int],
        before: Ends,
        here: Sequence[HostNetwork] = (),
        there: Sequence[HostNetwork] = (),
        blocked: Sequence[str] = (),
    ) -> None:
        """Follow these changes, here first."""
        self.changes_there = there
        route = Route(
            transport="multichannel",
            paths=tuple(Path(here=one[0], there=one[1]) for one in map(way, chosen)),
            striped=True,
        )
        paths = Paths(route, before, cast(Any, [self]), blocked)

        async def changes() -> AsyncIterator[HostNetwork]:
            for one in here:
                yield one

        asyncio.run(paths.follow(changes(), cast(Any, self)))


def both(here: HostNetwork, there: HostNetwork) -> Ends:
    return Ends("host1", "host2", here, there, offered(there))


def test_a_path_that_appears_here_is_asked_for_and_used() -> None:
    stream = Spread(1)
    stream.follow([1], both(network(1, 1), network(2, 1, 2)), here=[network(1, 1), network(1, 1, 2)])
    assert stream.wanted == [way(1), way(2)]
    assert stream.announced == [way(2)[1]]


def test_a_path_that_appears_there_is_asked_for_and_used() -> None:
    stream = Spread(1)
    stream.follow([1], both(network(1, 1, 2), network(2, 1)), there=[network(2, 1, 2)])
    assert stream.wanted == [way(1), way(2)]
    assert stream.announced == [way(2)[1]]


def test_what_could_have_been_chosen_and_was_not_stays_out_until_it_goes_and_comes_again() -> None:
    all_, without = network(1, 1, 2, 3), network(1, 1, 2)
    stream = Spread(1, 2)
    stream.follow([1, 2], both(all_, network(2, 1, 2, 3)), here=[all_])
    assert stream.wanted == [way(1), way(2)]
    stream.follow([1, 2], both(all_, network(2, 1, 2, 3)), here=[all_, without, all_])
    assert stream.wanted == [way(1), way(2), way(3)]


def test_what_was_only_blocked_is_tried_again() -> None:
    ends = both(network(1, 1, 2, 3), network(2, 1, 2, 3))
    stream = Spread(1, 2)
    stream.follow([1, 2], ends, here=[ends.here], blocked=[way(3)[1]])
    assert stream.wanted == [way(1), way(2), way(3)]
    assert stream.announced == [way(3)[1]]


def test_a_path_without_a_lane_is_wanted_as_long_as_its_nics_are_there() -> None:
    ends = both(network(1, 1, 2), network(2, 1, 2))
    stream = Spread(1)
    stream.follow([1, 2], ends, here=[ends.here])
    assert stream.wanted == [way(1), way(2)]
    stream.follow([1, 2], ends, there=[network(2, 1)])
    assert stream.wanted == [way(1)]


def test_a_connection_whose_nic_is_gone_keeps_no_place() -> None:
    stream = Spread(1, 2)
    stream.follow([1, 2], both(network(1, 1, 2), network(2, 1, 2)), here=[network(1, 1)])
    assert stream.wanted == [way(1)]


def test_nics_that_carry_get_no_second_path() -> None:
    twice = msgspec.structs.replace(
        network(2, 1).nics[0],
        addresses=(NicAddress(address=address(1, 2), prefix=24), NicAddress(address=address(1, 3), prefix=24)),
    )
    stream = Spread(1)
    stream.follow([1], both(network(1, 1), network(2, 1)), there=[HostNetwork(nics=(twice,))])
    assert stream.wanted == [way(1)]
    assert stream.announced == []
