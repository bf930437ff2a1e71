"""The parts of a host daemon that both ends of a move use."""

from __future__ import annotations

from dataclasses import dataclass

from limosa.host.files import Files
from limosa.host.inspection import Inspector
from limosa.host.leasing import Leasing
from limosa.host.multichannel import Multichannel
from limosa.host.neighbours import Neighbours
from limosa.host.page import Page
from limosa.host.relays import Relays
from limosa.host.storage import Storage
from limosa.host.vms import Vms


@dataclass(frozen=True)
class Parts:
    """One of each. ``boot`` identifies this run of the kernel."""

    name: str
    boot: str
    files: Files
    page: Page
    vms: Vms
    storage: Storage
    leasing: Leasing
    inspector: Inspector
    multichannel: Multichannel
    relays: Relays
    neighbours: Neighbours
