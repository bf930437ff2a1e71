"""Moves that can only end by post-copy: a guest that writes faster than its memory may be sent."""

from __future__ import annotations

import os
import pwd
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from harness.guests import LanClient, linux, wait_for_console
from harness.hosts import runners, settled, wait_until
from harness.labs import RELAYS, LabHost
from harness.steering import follow, settings
from limosa.model.migration import Phase

CAP_MBIT_PER_S = 160
BUDGET_MS = 20
#: With these settings no move of :func:`writer` ends but by post-copy.
POLICY = {
    "bandwidth_mbit_per_s": CAP_MBIT_PER_S,
    "convergence.blackout_budget_ms": BUDGET_MS,
    "convergence.auto_converge": False,
    "convergence.patience_s": 1,
}
LOAD: dict[str, Any] = {"fill_mib": 16, "random_mib": 16, "rewrite_mib_per_s": 200}
#: The rest of the guest takes some seconds to follow.
SLOW_MBIT_PER_S = 80
USERFAULTFD = Path("/dev/userfaultfd")


def start_writer(host: LabHost) -> None:
    """Start a guest ``web`` that rewrites 16 MiB as fast as it can."""
    host.create(linux("web", load=LOAD))
    wait_for_console(host, "web", "LIMOSA REWRITES")


def is_possible() -> bool:
    """Whether QEMU's user may receive a VM by post-copy on this machine."""
    status = USERFAULTFD.stat()
    return bool(status.st_mode & 0o006) or status.st_gid == pwd.getpwnam("limosa-qemu").pw_gid


@contextmanager
def made_possible(hosts: Sequence[LabHost]) -> Iterator[None]:
    """QEMU's user may use ``userfaultfd`` during the block, as the rule in ``packaging`` would have it."""
    if not USERFAULTFD.exists():
        pytest.skip("this kernel has no /dev/userfaultfd")
    before = USERFAULTFD.stat()
    try:
        os.chown(USERFAULTFD, -1, pwd.getpwnam("limosa-qemu").pw_gid)
        USERFAULTFD.chmod(0o660)
        for host in hosts:
            host.start()
        yield
    finally:
        os.chown(USERFAULTFD, before.st_uid, before.st_gid)
        USERFAULTFD.chmod(before.st_mode & 0o777)


def daemons_die_in_post_copy(source: LabHost, destination: LabHost, victims: Sequence[LabHost]) -> None:
    """Move ``web`` and kill -9 these daemons, one after another, while the rest of its memory follows it; then start
    them again in that order."""
    with settings(source, {"convergence.post_copy": True, "bandwidth_mbit_per_s": SLOW_MBIT_PER_S}):
        migration = source.move("web", destination.name).id
        follow(source, migration, lambda view: view.phase is Phase.TEAR_DOWN)
        for victim in victims:
            victim.kill()
        assert len(source.qemus()) == 1, "the rest of its memory is there"
        for victim in victims:
            victim.start()


def has_arrived(hosts: Sequence[LabHost], source: LabHost, destination: LabHost, client: LanClient) -> None:
    """By itself ``web`` comes to run at the destination, alone and without a move."""
    wait_until(lambda: settled(hosts), "every move has ended")
    wait_until(lambda: runners(hosts, "web") == [destination.name], "it runs at the destination")
    source.wait_until_bare(but=RELAYS)
    assert len(destination.qemus()) == 1
    assert destination.show("web").migration is None
    assert client.sees_it_run()
