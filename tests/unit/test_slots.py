"""The line in front of the slots."""

from __future__ import annotations

import asyncio

from limosa.host.slots import Slots


async def line_up(slots: Slots, count: int) -> tuple[list[asyncio.Task[None]], list[list[int]]]:
    places: list[list[int]] = [[] for _ in range(count)]
    tasks = [asyncio.ensure_future(slots.acquire(places[number].append)) for number in range(count)]
    await asyncio.sleep(0)
    return tasks, places


def test_first_come_first_served_and_places_are_told() -> None:
    async def run() -> None:
        slots = Slots(lambda: 1)
        tasks, places = await line_up(slots, 3)
        assert [task.done() for task in tasks] == [True, False, False]
        assert places == [[], [1], [2]]
        slots.release()
        await asyncio.sleep(0)
        assert [task.done() for task in tasks] == [True, True, False]
        assert places[1:] == [[1, 0], [2, 1]]
        slots.release()
        await tasks[2]
        assert places[2] == [2, 1, 0]
        assert slots.taken == 1

    asyncio.run(run())


def test_leaving_the_line_moves_the_others_up() -> None:
    async def run() -> None:
        slots = Slots(lambda: 1)
        tasks, places = await line_up(slots, 3)
        tasks[1].cancel()
        await asyncio.wait({tasks[1]})
        assert places[2] == [2, 1]
        slots.release()
        await tasks[2]

    asyncio.run(run())


def test_a_turn_that_comes_while_leaving_is_passed_on() -> None:
    async def run() -> None:
        slots = Slots(lambda: 1)
        tasks, _ = await line_up(slots, 3)
        slots.release()
        tasks[1].cancel()
        await asyncio.wait({tasks[1]})
        await tasks[2]
        assert slots.taken == 1

    asyncio.run(run())


def test_a_raised_limit_admits_those_in_line() -> None:
    async def run() -> None:
        limit = [1]
        slots = Slots(lambda: limit[0])
        tasks, _ = await line_up(slots, 3)
        limit[0] = 3
        slots.admit()
        await asyncio.gather(*tasks)
        assert slots.taken == 3

    asyncio.run(run())


def test_a_lowered_limit_holds_back_the_next() -> None:
    async def run() -> None:
        limit = [2]
        slots = Slots(lambda: limit[0])
        tasks, _ = await line_up(slots, 3)
        limit[0] = 1
        slots.release()
        await asyncio.sleep(0)
        assert not tasks[2].done()
        slots.release()
        await tasks[2]

    asyncio.run(run())
