"""Places among the moves of disks, and among those of memory alone: nobody keeps one of each."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import nullcontext, suppress
from types import SimpleNamespace
from typing import Any, cast

import pytest
from test_host_storage import TAG, plan, storage
from test_preflight import VM

from limosa.errors import Conflict, StorageError
from limosa.host.home import HomeHere
from limosa.host.landing import LandingHere
from limosa.host.leasing import Leasing
from limosa.host.slots import Place, Slots
from limosa.host.storage import Storage
from limosa.migration.journal import Header
from limosa.model.migration import Side

__all__ = ["storage"]
Line = Callable[[int], None]


def parts(storage: Storage, **more: Any) -> Any:
    unused = ("vms", "inspector", "relays", "multichannel", "page", "neighbours")
    leasing = Leasing("host2", "boot", "machine", lambda _: False)
    files = SimpleNamespace(migrations=None)
    values = {"name": "host2", "boot": "boot", "storage": storage, "leasing": leasing, "files": files}
    return SimpleNamespace(**(dict.fromkeys(unused) | values | more))


def nobody(place: int) -> None:
    raise AssertionError("nobody has to wait")


async def settled(tasks: list[asyncio.Task[None]]) -> list[bool]:
    for _ in range(5):
        await asyncio.sleep(0)
    return [task.done() for task in tasks]


class TestAtTheSource:
    """It learns that it needs a place among the moves of disks when it has one among the others."""

    def home(self, storage: Storage, slots: Slots) -> tuple[HomeHere, Place]:
        place = Place(slots)
        return HomeHere(parts(storage), None, cast(Any, SimpleNamespace(of_lane=lambda _: None)), TAG, 0, place), place

    @pytest.mark.parametrize("waits", [False, True])
    def test_the_place_it_has_is_another_s_then(self, storage: Storage, waits: bool) -> None:
        asyncio.run(storage._page.change({"max_storage_moves": 1}))

        async def scenario() -> None:
            slots, told = Slots(lambda: 1), list[int]()
            if waits:
                await storage.leaving.acquire(nobody)
            home, place = self.home(storage, slots)
            await place.take(nobody)
            memory = asyncio.ensure_future(Place(slots).take(lambda _: None))
            await settled([memory])
            disks = asyncio.ensure_future(home.take_storage_slot(told.append))
            assert await settled([memory, disks]) == [True, not waits]
            if waits:
                storage.leaving.release()
            await disks
            assert told == ([1, 0] if waits else [])
            assert (slots.taken, storage.leaving.taken) == (1, 1)
            for _ in range(2):
                home.disconnect()
                place.give_back()
            assert (slots.taken, storage.leaving.taken) == (1, 0)

        asyncio.run(scenario())

    def test_who_is_cancelled_while_it_waits_has_none(self, storage: Storage) -> None:
        asyncio.run(storage._page.change({"max_storage_moves": 1}))

        async def scenario() -> None:
            slots = Slots(lambda: 1)
            await storage.leaving.acquire(nobody)
            home, place = self.home(storage, slots)
            await place.take(nobody)
            waiting = asyncio.ensure_future(home.take_storage_slot(lambda _: None))
            await settled([waiting])
            waiting.cancel()
            await asyncio.wait({waiting})
            home.disconnect()
            place.give_back()
            assert (slots.taken, storage.leaving.taken) == (0, 1)

        asyncio.run(scenario())


class FakeLayers:
    """Sees for what space is held when what lies below disks begins to come."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self.held: list[str] | None = None

    async def take(self, *_: Any) -> None:
        self.held = list(self._storage._held)

    async def give_up(self, *_: Any) -> None:
        pass


class TestAtTheDestination:
    """It knows what comes along from the beginning."""

    def landing(self, storage: Storage, slots: Slots, *images: str) -> LandingHere:
        header = Header(
            migration=TAG,
            side=Side.DESTINATION,
            vm=VM,
            accelerator="tcg",
            source="host1",
            destination="host2",
            address="",
            accepted_at=0.0,
            boot="boot",
            images=images,
        )

        def reserve(*_: Any) -> None:
            return None

        vms = SimpleNamespace(reserve=reserve, find_landing=reserve)
        return LandingHere(parts(storage, vms=vms), cast(Any, FakeLayers(storage)), header, slots, "10.0.0.2")

    def test_memory_alone_does_not_wait_for_disks_nor_they_for_it(self, storage: Storage) -> None:
        asyncio.run(storage._page.change({"max_storage_moves": 1}))

        async def scenario() -> None:
            slots, told = Slots(lambda: 1), list[int]()
            image = plan(storage).path
            first = self.landing(storage, slots, image)
            await first.reserve(nobody)
            second = asyncio.ensure_future(self.landing(storage, slots, image).reserve(told.append))
            await self.landing(storage, slots).reserve(nobody)
            assert await settled([second]) == [False]
            await first.release(None)
            await second
            assert told == [1, 0]
            assert (slots.taken, storage.arriving.taken) == (1, 1)

        asyncio.run(scenario())

    def test_who_cannot_be_reserved_has_no_place(self, storage: Storage) -> None:
        async def scenario() -> None:
            slots = Slots(lambda: 1)
            landing = self.landing(storage, slots, plan(storage).path)

            def refuse(*_: Any) -> None:
                raise Conflict("it is taken")

            cast(Any, landing)._vms.reserve = refuse
            with pytest.raises(Conflict):
                await landing.reserve(nobody)
            assert (slots.taken, storage.arriving.taken) == (0, 0)

        asyncio.run(scenario())

    def test_disks_have_their_space_before_anything_comes(self, storage: Storage) -> None:
        async def scenario() -> None:
            (free,) = [one.free_bytes for one in await storage.locations() if one.name == "fast"]
            disks = tuple(plan(storage, name, expected=free * 2 // 5) for name in ("vda", "vdb", "vdc"))
            for some, held in ((disks, None), (disks[:2], [disk.path for disk in disks[:2]])):
                landing = self.landing(storage, Slots(lambda: 1), *(disk.path for disk in disks))
                request = cast(Any, SimpleNamespace(vm=VM, disks=some, layers=(), layers_relay=object()))
                with suppress(StorageError) if held is None else nullcontext():
                    await landing.take_layers(request, lambda _: None)
                assert cast(Any, landing)._layers.held == held
                await landing.release(None)
                assert storage._held == {}

        asyncio.run(scenario())
