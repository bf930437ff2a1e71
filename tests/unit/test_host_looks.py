"""Looks at storage that may not answer."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from limosa.background import apart
from limosa.errors import StorageError
from limosa.host.looks import Step, Walks

WITHIN_S = 0.2


class Dead:
    """A share that does not answer until it does, and how often it was asked."""

    def __init__(self) -> None:
        self.answers = threading.Event()
        self.asked = 0

    def look(self, step: Step) -> str:
        step("/dead/a.raw")
        self.asked += 1
        self.answers.wait()
        step("/elsewhere/b.raw")
        return "all"


def test_a_walk_may_take_long_if_no_step_does() -> None:
    def look(step: Step) -> str:
        for number in range(10):
            step(f"/srv/{number}")
            time.sleep(WITHIN_S / 4)
        return "all"

    assert asyncio.run(Walks(WITHIN_S).walk(look)) == "all"


def test_what_fails_there_fails_here() -> None:
    def look(_: Step) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        asyncio.run(Walks(WITHIN_S).walk(look))


def test_what_does_not_answer_is_named_and_not_asked_again_until_it_does() -> None:
    async def scenario() -> None:
        walks, dead = Walks(WITHIN_S), Dead()
        for _ in range(3):
            with pytest.raises(StorageError, match=r"/dead/a\.raw does not answer"):
                await walks.walk(dead.look)
        assert dead.asked == 1
        await walks.walk(lambda step: step("/elsewhere/b.raw"))
        dead.answers.set()
        async with asyncio.timeout(10):
            while dead.asked == 1:
                try:
                    assert await walks.walk(dead.look) == "all"
                except StorageError:  # it has answered, and that is about to be known
                    await asyncio.sleep(0)

    asyncio.run(scenario())


def test_a_walk_that_nobody_waits_for_ends_at_its_next_step() -> None:
    async def scenario() -> None:
        ended, dead = threading.Event(), Dead()

        def look(step: Step) -> None:
            try:
                dead.look(step)
            except StorageError:
                ended.set()
                raise

        with pytest.raises(StorageError):
            await Walks(WITHIN_S).walk(look)
        dead.answers.set()
        assert await apart(ended.wait, 10)

    asyncio.run(scenario())
