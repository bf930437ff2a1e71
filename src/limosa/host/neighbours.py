"""Other hosts, as far as this one knows them, and asking them something.

There is no registry of hosts. One is known if the setting ``peers`` names it, or a VM has moved between it and this
one, by the journals that are kept. So "no host that is known uses it" is all that can be said; who needs more names all
hosts in ``peers``.

Hosts are asked by the API that people use, with this host's own certificate.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic

import msgspec

from limosa.client.host import HostClient
from limosa.client.route import TlsRoute
from limosa.errors import HostUnreachable, LimosaError
from limosa.host.page import Page
from limosa.host.proof import Elsewhere
from limosa.model import reading
from limosa.model.base import Model, Name
from limosa.model.storage import ImageSought, Location, Sighting
from limosa.settings.address import split_address
from limosa.settings.daemon import DEFAULT_PORT
from limosa.storage import mounts
from limosa.storage.locations import Locations
from limosa.wire import endpoints
from limosa.wire.api import ImagesSought
from limosa.wire.endpoints import Endpoint, Reply, Request

ANSWER_WITHIN_S = 5.0


class Met(Model, frozen=True, forbid_unknown_fields=False):
    """Who took part in a move, from the first line of its journal."""

    source: Name
    destination: Name
    address: str


@dataclass(frozen=True)
class Answers(Generic[Reply]):
    """What hosts have answered, and why others have not; by name."""

    given: Mapping[str, Reply]
    silent: Mapping[str, str]


class Neighbours:
    """Hosts this one knows. ``pki`` has its certificate, ``migrations`` its journals."""

    def __init__(self, host: str, page: Page, pki: Path, migrations: Path) -> None:
        self._host = host
        self._page = page
        self._pki = pki
        self._migrations = migrations

    async def ask(self, endpoint: Endpoint[Request, Reply], request: Request | None = None) -> Answers[Reply]:
        """Ask all of them at once."""
        known = await asyncio.to_thread(self._known)
        answers = await asyncio.gather(
            *(self._ask(name, address, endpoint, request) for name, address in known.items()), return_exceptions=True
        )
        given: dict[str, Reply] = {}
        silent: dict[str, str] = {}
        for name, answer in zip(known, answers, strict=True):
            if isinstance(answer, LimosaError):
                silent[name] = str(answer)
            elif isinstance(answer, BaseException):
                raise answer
            else:
                given[name] = answer
        return Answers(given, silent)

    async def uses(self, images: Mapping[str, ImageSought]) -> dict[str, Elsewhere]:
        """What each of them says of images on shared storage; by the same keys."""
        if not images:
            return {}
        answers = await self.ask(endpoints.IMAGE_USES, ImagesSought(images=tuple(images.values())))
        given = {host: reply.uses for host, reply in answers.given.items() if len(reply.uses) == len(images)}
        silent = {**answers.silent, **dict.fromkeys(answers.given.keys() - given.keys(), "it answered something else")}
        return {
            image: Elsewhere({host: uses[number] for host, uses in given.items()}, silent)
            for number, image in enumerate(images)
        }

    async def who_sees(self, locations: Iterable[Location]) -> tuple[tuple[Sighting, ...], Mapping[str, str]]:
        """Which of these locations each host sees; and which hosts could not be asked, and why.

        What is not shared is nobody else's, so that then nobody is asked.
        """
        shared = [location for location in locations if location.shared]
        if not shared:
            return (), {}
        answers = await self.ask(endpoints.LOCATIONS)
        sightings = (
            Sighting(location=ours.name, host=host, as_location=theirs.name, path=theirs.path)
            for host, reply in answers.given.items()
            for ours in shared
            for theirs in reply.locations
            if is_same(ours, theirs)
        )
        return tuple(sightings), answers.silent

    async def _ask(self, name: str, address: str, endpoint: Endpoint[Request, Reply], request: Request | None) -> Reply:
        place, port = split_address(address)
        route = TlsRoute(name, place, port or DEFAULT_PORT, self._pki, "host")

        def ask() -> Reply:
            with HostClient(route, timeout_s=ANSWER_WITHIN_S) as client:
                return client.call(endpoint, request)

        try:
            async with asyncio.timeout(ANSWER_WITHIN_S):
                return await asyncio.to_thread(ask)
        except TimeoutError as error:
            raise HostUnreachable(f"host '{name}' does not answer", host=name) from error

    def _known(self) -> dict[str, str]:
        """Addresses by name."""
        known: dict[str, str] = {}
        for move in map(met, self._migrations.glob("*.jsonl")):
            if move is not None:
                known.setdefault(move.source, move.source)
                known[move.destination] = move.address or move.destination
        known |= self._page.now.peers
        return {name: known[name] for name in sorted(known) if name != self._host}


def is_same(ours: Location, theirs: Location) -> bool:
    """Whether another host's location shows the files of ours: it is the same folder of the same server; or, where that
    cannot be told, administrators say of both that they are shared, and have given them one name."""
    if not (ours.shared and theirs.shared):
        return False
    if ours.share and theirs.share:
        return ours.share == theirs.share
    return ours.name == theirs.name


def sought(image: str, migration: str, places: Locations) -> ImageSought:
    """An image of this host, as others may know it; ``migration`` has made it."""
    location, inside = places.place(image)
    folder, name = os.path.split(os.path.realpath(image))
    try:
        share = mounts.name_on_server(folder)
    except OSError:
        share = ""
    return ImageSought(
        migration=migration,
        location=location or None,
        name=inside or name,
        share=f"{share}/{name}" if share else "",
    )


def met(journal: Path) -> Met | None:
    """Who took part in the move of a journal; None if that cannot be read."""
    try:
        with journal.open("rb") as stream:
            return reading.decode(stream.readline(), Met)
    except (OSError, msgspec.MsgspecError):
        return None
