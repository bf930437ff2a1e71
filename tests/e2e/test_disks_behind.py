"""A guest writes its disk faster than that can be copied when its copy was ready already, and while memory goes.

The guest begins when it is told to. Its memory takes two seconds when it is let loose, and the copy longer to catch up:
only the host keeps the guest from standing still for what is left.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import msgspec
import pytest

from harness.disks import assert_keeps, number
from harness.guests import LanClient, address_of, linux, type_in, wait_until_it_serves
from harness.hosts import wait_until
from harness.images import MIB, images
from harness.labs import LabHost, running_lab
from harness.steering import BRAKE, change, views
from limosa.model.migration import Migration, Outcome, Phase
from limosa.model.vm import VmState
from limosa.wire import api, endpoints

pytestmark = [pytest.mark.qemu, pytest.mark.lab]

#: Less than half of what the guest writes, and so little that a piece takes many seconds.
SLOW_MBIT_PER_S, TOO_SLOW_MBIT_PER_S = 10, 1
#: So long it is looked at whether a cap is kept.
MEASURE_S = 5.0
#: What may be left of a copy when the guest stops: a piece of QEMU's.
PIECE = MIB
POLICY = {
    "convergence.auto_converge": False,
    # Memory alone would let the guest stop at the first chance.
    "convergence.first_downtime_ms": 60,
    "convergence.blackout_budget_ms": 60,
}
#: Writes numbers, each into its block, as many as fit into a MiB at once, and says which was the last that is written.
NUMBER = """n=0; while [ ! -e /run/enough ]; do
awk -v n=$n 'BEGIN { for (i = n; i < n + 256; i++) printf "%-4095s\\n", "limosa " i }' |
dd of=/dev/vda bs=1M iflag=fullblock oflag=direct seek=$((n / 256 % 8)) conv=notrunc status=none;
n=$((n + 256)); echo $((n - 1)) >/run/number.new; mv /run/number.new /run/number; done &"""
#: Writes four times as much as may be left.
FLOOD = """for i in 8 9 10 11; do while [ ! -e /run/enough ]; do
dd if=/bin/busybox of=/dev/vda bs=1M count=1 oflag=direct seek=$i conv=notrunc status=none; done & done"""


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[LabHost]]:
    with running_lab() as made:
        for host in made:
            change(host, POLICY)
        yield made


@pytest.fixture(scope="module")
def client(hosts: list[LabHost]) -> LanClient:
    """A client of a guest ``web`` on the first host, which does nothing. Its disk is empty, so that the copy of it is
    ready at once."""
    path = hosts[0].state / "images" / "web.qcow2"
    hosts[0].create(msgspec.structs.replace(linux("web"), disks=(api.NewDisk(path=str(path), size_mib=16),)))
    client = LanClient(hosts[0].lab, address_of(1))
    wait_until_it_serves(client)
    return client


def left(view: Migration) -> int:
    """Bytes of the disk that have yet to be copied."""
    return sum(disk.total_bytes - disk.copied_bytes for disk in view.progress.disks)


def move_and_write(hosts: list[LabHost], program: str, mbit_per_s: int) -> list[Migration]:
    """Every view of a move whose guest begins with a program when the copy of its disk is ready, which has this cap
    from then on, and whose memory may go when that has fallen behind."""
    source, destination = hosts
    change(source, {**BRAKE, "storage_bandwidth_mbit_per_s": None})
    seen: list[Migration] = []
    begun = let_loose = False
    for view in views(source, source.move("web", destination.name).id):
        seen.append(view)
        if not begun and view.phase is Phase.COPY:
            assert [disk.ready for disk in view.progress.disks] == [True]
            assert left(view) == 0
            change(source, {"storage_bandwidth_mbit_per_s": mbit_per_s})
            type_in(source, program)
            begun = True
        if not let_loose and is_held(view):
            change(source, {"bandwidth_mbit_per_s": None})
            let_loose = True
    assert let_loose, seen[-1].fault
    return seen


def is_held(view: Migration) -> bool:
    return "the copy of disk vda has to catch up before the guest may stop" in view.progress.note


def is_slowed(view: Migration) -> bool:
    return "the guest's writes to disk vda are slowed" in view.progress.note


def test_one_that_does_not_catch_up_ends_the_move(hosts: list[LabHost], client: LanClient) -> None:
    source, destination = hosts
    change(source, {"convergence.patience_s": 1})
    before = images(source)
    with client.talking() as conversation:
        seen = move_and_write(hosts, FLOOD, TOO_SLOW_MBIT_PER_S)
        conversation.wait_for_more()
    type_in(source, "touch /run/enough; wait; rm /run/enough")
    last = seen[-1]
    assert (last.outcome, last.blackout_ms) == (Outcome.FAILED, None)
    assert last.fault is not None
    assert (last.fault.code, last.fault.what) == ("not-converging", "the copy of disk vda falls behind")
    assert any(is_slowed(view) for view in seen)
    assert source.show("web").state is VmState.RUNNING
    assert conversation.faults == []
    assert images(source) == before
    wait_until(lambda: images(destination) == [], "the destination keeps nothing")


@pytest.mark.long
def test_a_guest_is_slowed_where_nothing_on_the_way_keeps_the_cap(hosts: list[LabHost], client: LanClient) -> None:
    source, destination = hosts
    change(source, {**BRAKE, "storage_bandwidth_mbit_per_s": None, "transport": "multichannel"})
    begun, slowed_at, before = False, 0.0, 0
    with client.talking() as conversation:
        migration = source.move("web", destination.name).id
        for view in views(source, migration):
            assert view.outcome is Outcome.UNDER_WAY, view.fault
            assert not is_held(view)
            if not begun and view.phase is Phase.COPY:
                change(source, {"storage_bandwidth_mbit_per_s": SLOW_MBIT_PER_S})
                type_in(source, FLOOD)
                begun = True
            sent = sum(disk.sent_bytes or 0 for disk in view.progress.disks)
            if not slowed_at and is_slowed(view):
                slowed_at, before = time.monotonic(), sent
            if slowed_at and time.monotonic() - slowed_at > MEASURE_S:
                break
        source.client.call(endpoints.CANCEL_MIGRATION, migration=migration)
        conversation.wait_for_more()
    type_in(source, "touch /run/enough; wait; rm /run/enough")
    change(source, {"transport": None})
    assert view.transport == "multichannel"
    assert sent - before <= SLOW_MBIT_PER_S / 8 * 1e6 * MEASURE_S
    assert conversation.faults == []


def test_a_guest_is_slowed_and_stops_when_the_copy_has_caught_up(hosts: list[LabHost], client: LanClient) -> None:
    source, destination = hosts
    change(source, {"convergence.patience_s": 60})
    with client.talking() as conversation:
        seen = move_and_write(hosts, NUMBER, SLOW_MBIT_PER_S)
        conversation.wait_for_more()
    last = seen[-1]
    assert last.outcome is Outcome.COMPLETED, last.fault
    assert conversation.faults == []
    assert any(is_held(view) and is_slowed(view) for view in seen)
    ready = [view for view in seen if view.phase in (Phase.COPY, Phase.SYNCHRONISE)][-1]
    assert not is_held(ready)
    assert left(ready) <= PIECE
    assert left(last) == 0
    assert_keeps(destination, "web", number(client))
