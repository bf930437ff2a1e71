"""What a move's connections have carried, by path."""

from __future__ import annotations

import asyncio
import time

import pytest

from limosa.migration.paths import Paths
from limosa.model.network import HostNetwork
from limosa.model.route import Path, Route
from limosa.transport.channel import SocketChannel, Used
from limosa.transport.choice import Ends

HERE, THERE = "10.0.0.1", "10.0.0.2"
ENDS = Ends("host1", "host2", HostNetwork(), HostNetwork(), (THERE,))


class Connection:
    """Always busy, at 100 MB/s."""

    sent_bytes, busy_s = 0, 0.0

    def used(self) -> tuple[Used, ...]:
        return (Used(HERE, THERE, self.sent_bytes, busy_s=self.busy_s),)

    def later(self, seconds: float) -> None:
        self.sent_bytes += int(100e6 * seconds)
        self.busy_s += seconds


class Stream:
    """One of several that share a connection; its own is a third of what that carries."""

    def __init__(self, connection: Connection) -> None:
        self.connections = (connection,)

    def used(self) -> tuple[Used, ...]:
        return tuple(Used(one.here, one.there, one.sent_bytes // 3) for one in self.connections[0].used())

    async def compressed(self) -> None:
        return None


@pytest.mark.parametrize("streams", [1, 2])
def test_a_connection_that_streams_share_is_as_fast_as_it_is(monkeypatch: pytest.MonkeyPatch, streams: int) -> None:
    now = 5.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    connection = Connection()
    channels: list[SocketChannel] = [Stream(connection) for _ in range(streams)]  # type: ignore[misc]
    route = Route(transport="compression", paths=(Path(here=HERE, there=THERE),))
    paths = Paths(route, ENDS, channels)
    asyncio.run(paths.look())
    now = 6.0
    connection.later(1.0)
    seen = asyncio.run(paths.look())
    assert [one.mbit_per_s for one in paths.carried()] == [800]
    assert [path.sent_bytes for path in seen.paths] == [streams * (100_000_000 // 3)]
