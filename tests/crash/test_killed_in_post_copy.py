"""kill -9 of the daemons when QEMU has switched to post-copy: each QEMU has a part of the guest, and neither daemon may
give up its own.

The guest writes all the time and runs on, at the destination in the end; nothing is left at the source.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from test_acknowledged_writes import strike

from harness.guests import LanClient, address_of
from harness.labs import LabHost, running_lab
from harness.post_copy import POLICY, daemons_die_in_post_copy, has_arrived, made_possible, start_writer
from harness.steering import change

pytestmark = [pytest.mark.qemu, pytest.mark.lab, pytest.mark.long]

#: Steps of the journals from the switch on. A source that has written HANDING_OVER in post-copy has not sent all yet.
STEPS = ("source:handing-over", "destination:continuing", "destination:owned", "source:confirmed", "source:finished")
MOMENTS = ("before", "after")


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[LabHost]]:
    """Two hosts between which a guest ``web`` moves by post-copy alone."""
    with running_lab() as made:
        start_writer(made[0])
        with made_possible(made):
            for host in made:
                change(host, {**POLICY, "convergence.post_copy": True})
            yield made


@pytest.fixture
def client(hosts: list[LabHost]) -> LanClient:
    return LanClient(hosts[0].lab, address_of(1))


@pytest.mark.parametrize(
    "victims", [("source",), ("destination",), ("source", "destination"), ("destination", "source")], ids=" and ".join
)
def test_while_the_rest_of_its_memory_follows(
    hosts: list[LabHost], client: LanClient, victims: tuple[str, ...]
) -> None:
    source, destination = sorted(hosts, key=lambda host: host.vm("web") is None)
    by_side = {"source": source, "destination": destination}
    daemons_die_in_post_copy(source, destination, [by_side[victim] for victim in victims])
    has_arrived(hosts, source, destination, client)


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("step", STEPS)
def test_at_every_step(hosts: list[LabHost], client: LanClient, step: str, moment: str) -> None:
    source, destination = sorted(hosts, key=lambda host: host.vm("web") is None)
    broken = source if step.startswith("source") else destination
    broken.restart({"LIMOSA_TEST_BREAK": f"{step}:{moment}:daemon"})
    source.move("web", destination.name)
    strike(broken, "daemon")
    has_arrived(hosts, source, destination, client)
