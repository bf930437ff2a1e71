"""Trial connections on loopback."""

from __future__ import annotations

import asyncio
import socket

import pytest

from limosa.transport import trials

LOOPBACK = "127.0.0.1"


def test_a_trial_connection_carries_long_packets_both_ways() -> None:
    async def scenario() -> None:
        async with trials.trial([LOOPBACK, "127.0.0.2"], (20_000, 30_000)) as port:
            for address, source in ((LOOPBACK, ""), ("127.0.0.2", "127.0.0.3")):
                reached = await trials.reach(address, port, source)
                assert reached == trials.Reached(source or LOOPBACK, whole=True)
        assert await trials.reach(LOOPBACK, port) is None

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_a_port_is_taken_that_is_free_on_each_address_that_is_there() -> None:
    async def scenario() -> None:
        second = "127.0.0.2"
        with socket.create_server((second, 0)) as announced:
            last = announced.getsockname()[1]
            async with trials.trial([LOOPBACK, second, "192.0.2.1"], (last - 20, last)) as port:
                assert port < last
                for address in (LOOPBACK, second):
                    assert await trials.reach(address, port) is not None

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_without_such_a_port_it_is_one_that_is_free_on_most() -> None:
    async def scenario() -> None:
        second, third = "127.0.0.2", "127.0.0.3"
        with socket.create_server((second, 0)) as announced:
            only = announced.getsockname()[1]
            async with trials.trial([second, LOOPBACK, third], (only, only)) as port:
                assert port == only
                for address in (LOOPBACK, third):
                    assert await trials.reach(address, port) is not None
            async with trials.trial([second], (only, only)) as port:
                assert port == 0

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_a_way_that_takes_a_connection_and_nothing_more_is_told_from_one_that_carries(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trials, "REACH_WITHIN_S", 0.1)

    async def scenario() -> None:
        with socket.create_server((LOOPBACK, 0)) as listener:
            port = listener.getsockname()[1]
            assert await trials.reach(LOOPBACK, port) == trials.Reached(LOOPBACK, whole=False)
            older = await trials.reach(LOOPBACK, port, answers=False)
            assert older == trials.Reached(LOOPBACK, whole=True), "one that answers nobody says nothing of the way"

    asyncio.run(asyncio.wait_for(scenario(), 20))
