"""kill -9 of the daemon at every step of a move of the disks of a VM that does not run: it has one whole disk."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from harness.crashes import disks_of
from harness.hosts import Host, wait_until
from harness.stopped import assert_one_whole_disk, begin, create, host_with_locations, make_raw
from limosa.errors import LimosaError
from limosa.model.vm import VmState

pytestmark = pytest.mark.qemu

STEPS = ("made", "started", "copied", "settled", "committed", "finalized", "pivoted", "removed")
#: From here on the new image is the VM's.
COMMITTED = {f"{step}:{moment}" for step in STEPS[5:] for moment in ("before", "after")} | {"committed:after"}
QUICK = {"made:after", "started:after", "copied:after", "settled:after", "committed:after", "removed:before"}


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with host_with_locations("fast") as made:
        yield made


@pytest.fixture(scope="module")
def wanted(host: Host) -> bytes:
    """What the disk of ``web`` has."""
    image = host.state / "images" / "web.raw"
    made = make_raw(image)
    create(host, image)
    return made


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(step, marks=[] if step in QUICK else pytest.mark.long)
        for step in (f"{name}:{moment}" for name in STEPS for moment in ("before", "after"))
    ],
)
def test_the_vm_has_one_whole_disk(host: Host, wanted: bytes, step: str) -> None:
    (old,) = disks_of(host, "web")
    where, form = ("images", "raw") if old.parent.name == "fast" else ("fast", "qcow2")
    host.kill()
    host.start(f"host:{step}:daemon")
    with contextlib.suppress(LimosaError):  # the daemon may die before it has answered
        begin(host, where, format=form)
    host.wait_for_death()
    host.start()
    wait_until(lambda: not list((host.state / "migrations").glob("*.disks.json")), "nothing is left to do")
    view = host.show("web")
    assert (view.state, view.migration) == (VmState.STOPPED, None)
    assert (assert_one_whole_disk(host, wanted) != old) == (step in COMMITTED)
