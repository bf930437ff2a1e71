"""A host daemon that dies, or kills its QEMU, at a chosen step of a journal.

The plan comes in LIMOSA_TEST_BREAK as ``SIDE:STEP:MOMENT:VICTIM``, for example ``source:migrating:after:daemon``: when
the journal of that side is about to write (``before``) or has written (``after``) that step. Disks have further steps
that no journal tells, the calls in ``CALLS``; the side ``host`` is a host whose own disks move. Victims are ``daemon``,
``qemu``, ``both``, ``hang`` (its QEMU does nothing any more), ``network`` (the links named in LIMOSA_TEST_LINKS go
down), ``disk`` (from then on the daemon cannot write to any file) and, of calls alone, ``hold`` (the call waits: the
file named in LIMOSA_TEST_HOLD appears, and it goes on when that is gone). It happens once.

With LIMOSA_TEST_RELEASE=next it speaks as a daemon of the next release may. In its event loop it may not work with
images.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from limosa.host import restarting, services, session, storage
from limosa.host.disk_moves import DiskMoves
from limosa.host.layers import Layers
from limosa.host.serve import serve
from limosa.host.stopped import StoppedDisks
from limosa.host.storage import Storage
from limosa.migration import layers
from limosa.migration.journal import Header, Journal
from limosa.migration.mirrors import Mirrors
from limosa.model.base import Model
from limosa.qemu.disks import Disks
from limosa.qemu.machine import Machine
from limosa.settings import toml
from limosa.settings.daemon import DaemonSettings
from limosa.transport.layers import Receiver
from limosa.wire import versions
from limosa.wire.encoding import encode

sys.path.append(str(Path(__file__).parents[1]))
from harness import shares

Plan = tuple[str, str, str, str]
#: Steps of moves of disks, by what is called to take them.
CALLS: dict[tuple[str, str], tuple[type | ModuleType, str]] = {
    ("source", "sent"): (layers, "send"),
    ("source", "copied"): (Mirrors, "until_ready"),
    ("source", "whole"): (Mirrors, "finish"),
    ("source", "continued"): (Machine, "continue_migration"),
    ("source", "dropped"): (Machine, "drop_copy"),
    ("source", "removed"): (Storage, "remove"),
    ("destination", "awaited"): (Storage, "make_layer"),
    ("destination", "received"): (Receiver, "receive"),
    ("destination", "complete"): (Layers, "complete"),
    ("destination", "made"): (Storage, "make"),
    ("destination", "exported"): (Machine, "export_disks"),
    ("destination", "closed"): (Machine, "end_exports"),
    ("host", "made"): (DiskMoves, "make_images"),
    ("host", "copied"): (Mirrors, "until_ready"),
    ("host", "started"): (StoppedDisks, "start"),
    ("host", "settled"): (Disks, "settle_copy"),
    ("host", "committed"): (DiskMoves, "commit"),
    ("host", "finalized"): (Disks, "_dismiss"),
    ("host", "pivoted"): (Disks, "pivot"),
    ("host", "removed"): (Storage, "remove"),
}


def break_at(plan: Plan, vms: Path) -> None:
    """Have the plan carried out when its step comes."""
    side, step, moment, victim = plan
    struck: list[bool] = []

    def strike(journal_side: str, journal_step: str, now: str, vm: str = "*") -> bool:
        if struck or (journal_side, journal_step, now) != (side, step, moment):
            return False
        struck.append(True)
        if victim in ("qemu", "both", "hang"):
            for record in vms.glob(f"{vm}/process.json"):
                # At the last steps the source ends its QEMU by itself, and may have done so already.
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                    pid = json.loads(record.read_bytes())["pid"]
                    os.kill(pid, signal.SIGSTOP if victim == "hang" else signal.SIGKILL)
        if victim == "network":
            for link in os.environ["LIMOSA_TEST_LINKS"].split(","):
                subprocess.run(["ip", "link", "set", link, "down"], check=True)
        if victim == "disk":
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        if victim in ("daemon", "both"):
            os.kill(os.getpid(), signal.SIGKILL)
        return victim == "hold"

    begin, record = Journal.begin.__func__, Journal.record  # type: ignore[attr-defined]

    def begin_and_break(cls: type[Journal], folder: Path, header: Header) -> Journal:
        strike(header.side, "begin", "before", header.vm.name)
        journal: Journal = begin(cls, folder, header)
        strike(header.side, "begin", "after", header.vm.name)
        return journal

    def record_and_break(self: Journal, step: Any, at: float, **evidence: Any) -> None:
        strike(self.header.side, step, "before", self.header.vm.name)
        record(self, step, at, **evidence)
        strike(self.header.side, step, "after", self.header.vm.name)

    Journal.begin = classmethod(begin_and_break)  # type: ignore[assignment]
    Journal.record = record_and_break  # type: ignore[method-assign]
    if (side, step) in CALLS:
        _break_call(*CALLS[side, step], lambda now: strike(side, step, now))


def _break_call(owner: type | ModuleType, name: str, strike: Callable[[str], bool]) -> None:
    """Have ``strike`` told before and after each call of a method; it says whether that is to wait."""
    whole = getattr(owner, name)

    @functools.wraps(whole)
    async def broken_later(*words: Any, **named: Any) -> Any:
        if strike("before"):
            await _held()
        result = await whole(*words, **named)
        if strike("after"):
            await _held()
        return result

    @functools.wraps(whole)
    def broken(*words: Any, **named: Any) -> Any:
        strike("before")
        result = whole(*words, **named)
        strike("after")
        return result

    setattr(owner, name, broken_later if inspect.iscoroutinefunction(whole) else broken)


async def _held() -> None:
    mark = Path(os.environ["LIMOSA_TEST_HOLD"])
    mark.touch()
    while mark.exists():  # noqa: ASYNC110 - a file tells nobody
        await asyncio.sleep(0.01)


def be_newer() -> None:
    """Speak as the next release may: one version more, and one field more in every answer to a source."""

    def encode_more(value: Model) -> bytes:
        return encode(value).removesuffix(b"}") + b',"novelty":1}'

    versions.NEWEST += 1
    session.encode = encode_more  # type: ignore[attr-defined]


def main() -> None:
    """Serve with the settings file named on the command line."""
    settings = Path(sys.argv[1])
    plan = os.environ.get("LIMOSA_TEST_BREAK")
    if plan:
        side, step, moment, victim = plan.split(":")
        daemon = toml.read(settings, DaemonSettings)
        break_at((side, step, moment, victim), Path(daemon.state_dir) / "vms")
    if os.environ.get("LIMOSA_TEST_RELEASE") == "next":
        be_newer()
    # How long a VM must have run to be restarted after a crash: half a minute is long for a test.
    restarting.CRASH_LOOP_S = float(os.environ.get("LIMOSA_TEST_CRASH_LOOP_S", restarting.CRASH_LOOP_S))
    # Nor is a test to wait long for what is known not to answer.
    patience = float(os.environ.get("LIMOSA_TEST_PATIENCE_S", "inf"))
    storage.STEP_WITHIN_S = min(storage.STEP_WITHIN_S, patience)
    services.RECOVERED_WITHIN_S = min(services.RECOVERED_WITHIN_S, patience)
    restarting.LEASES_WITHIN_S = min(restarting.LEASES_WITHIN_S, patience)
    shares.keep_images_out_of_event_loops()
    serve(settings)


if __name__ == "__main__":
    main()
