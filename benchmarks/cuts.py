"""A NIC is cut in mid-move: its plug is pulled out, each NIC in turn, at the source and at the destination.

Two NICs carry the move. Progress is followed as a user would, by Limosa's own words.
"""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Iterator
from itertools import cycle, islice, product

from benchmarks.ground import HOSTS, TWO_NICS, Ground, ground
from benchmarks.guest import IDLE, Guest
from benchmarks.measurements import Cut, Measurements
from benchmarks.program import say
from benchmarks.systems import other
from benchmarks.systems.limosa import boot
from limosa.client.host import HostClient
from limosa.model.migration import Migration, Outcome
from limosa.wire import api, endpoints

#: The plug is pulled when so much of the memory was sent.
EARLIEST, LATEST = 0.1, 0.6
HEALED_WITHIN_S = 20.0
_ASK_EVERY_S = 0.05


class _Follower:
    """Sees how much of a move was sent, and when."""

    def __init__(self) -> None:
        self.sent = 0
        self.longest_s = 0.0
        self._grew_at = 0.0

    def look(self, view: Migration) -> None:
        """Take note of a view of the move."""
        now, sent = time.monotonic(), view.progress.transferred_bytes
        if sent > self.sent:
            if self.sent:
                self.longest_s = max(self.longest_s, now - self._grew_at)
            self.sent, self._grew_at = sent, now


def cuts(rounds: int, measured: Measurements) -> None:
    """So many moves of the small guest, back and forth."""
    with ground(TWO_NICS) as place:
        say(f"cuts, {TWO_NICS.name}: booting the small guest")
        guest = Guest("small", 0, load=IDLE)
        boot(place, guest)
        whole = _Follower()
        for view in _move(place, guest.name, HOSTS[0]):
            whole.look(view)
        source = HOSTS[1]
        chance = random.Random(1)
        for number, (nic, at_source) in enumerate(islice(cycle(product(place.lab.nic_names, (True, False))), rounds)):
            cut = source if at_source else other(source)
            after = whole.sent * chance.uniform(EARLIEST, LATEST)
            found = _cut(place, guest.name, source, (cut, nic), after, number, whole.sent)
            measured.cuts.append(found)
            say(
                f"cuts, {number + 1} of {rounds}: {nic} of {cut} after {found.after_percent:.0f} %: "
                f"{found.failed or f'{found.wall_s:.2f} s, stall {found.stall_s:.2f} s'}"
            )
            source = source if found.failed else other(source)


def _cut(place: Ground, vm: str, source: str, plug: tuple[str, str], after: float, number: int, whole: int) -> Cut:
    """Move the VM and pull a host's plug on the way; afterwards it is in again."""
    host, nic = plug
    follower = _Follower()
    began, at = time.monotonic(), 0
    try:
        for view in _move(place, vm, source):
            follower.look(view)
            if not at and follower.sent >= after:
                at = follower.sent
                place.plug(host, nic, in_=False)
        wall_s = time.monotonic() - began
    finally:
        place.plug(host, nic, in_=True)
    if not at:
        raise RuntimeError(f"the move of {vm} was over before a plug could be pulled")
    failed = "" if view.outcome is Outcome.COMPLETED else f"{view.fault.what if view.fault else view.outcome}"
    _wait_until_healed(place, nic)
    return Cut(
        nic=nic,
        host="source" if host == source else "destination",
        round=number,
        after_percent=100 * at / whole,
        wall_s=wall_s,
        stall_s=follower.longest_s,
        failed=failed,
    )


def _move(place: Ground, vm: str, source: str) -> Iterator[Migration]:
    """Move a VM to the other host over all NICs; the views of it up to its end."""
    with HostClient(str(place.lab.socket(source))) as client:
        options = api.MoveOptions(transport="multichannel")
        began = client.call(endpoints.MOVE, api.MoveRequest(vm=vm, destination=other(source), options=options))
        yield from client.stream(endpoints.WATCH_MIGRATION, migration=began.id)


def _wait_until_healed(place: Ground, nic: str) -> None:
    """Return when the hosts see each other again through a NIC. Raises ``TimeoutError``."""
    address = place.lab.migration_addresses(HOSTS[1])[place.lab.nic_names.index(nic)]
    deadline = time.monotonic() + HEALED_WITHIN_S
    while not place.inside(HOSTS[0], lambda: _answers(address)):
        if time.monotonic() > deadline:
            raise TimeoutError(f"no way to {address} although the plug is in")
        time.sleep(_ASK_EVERY_S)


def _answers(address: str) -> bool:
    """Whether a host says that nobody listens there."""
    with socket.socket() as caller:
        caller.settimeout(1)
        try:
            caller.connect((address, 1))
        except ConnectionRefusedError:
            return True
        except OSError:
            pass
        return False
