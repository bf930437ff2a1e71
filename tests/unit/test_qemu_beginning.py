"""How a copy begins, where no QEMU at hand does just that: one look at the job after another."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest

from limosa.qemu.beginning import Beginning
from limosa.qemu.protocol import CopyState, CopyStatistics

MIB = 1024 * 1024
SIZE = 64 * MIB


class Moment(NamedTuple):
    """One in which somebody looks at a job: what has happened since the one before, but for ``total``."""

    #: bytes to be copied, 0: the job keeps no account yet
    total: int = 0
    #: bytes the job has written to the target
    filled: int = 0
    #: bytes the guest has written
    writes: int = 0


class Qemu:
    """One whose jobs go so, each; the last moment of one stays. A guest that is stopped writes nothing."""

    def __init__(self, *jobs: Sequence[Moment]) -> None:
        self._jobs = iter(jobs)
        self._moments: list[Moment] = []
        #: what a job copies, for each that was started
        self.syncs: list[str] = []
        self._counts: dict[str, dict[str, int]] = {"vda": {}, "vda.abc": {}}
        self._status = "running"

    async def begin(self, *, below: int = 0) -> None:
        beginning = Beginning("vda", self._execute, self._look, self._give_up)
        job = {"device": "vda", "target": "vda.abc", "sync": "full"}
        node = {"drv": "qcow2", "backing_file_depth": below, "image": {"virtual-size": SIZE}}
        await beginning.run(job, node)

    async def _look(self) -> CopyStatistics:
        moment = self._moments.pop(0)
        if not self._moments:
            self._moments.append(Moment(moment.total))
        self._count("vda.abc", moment.filled)
        if self._status == "running":
            self._count("vda", moment.writes)
        return CopyStatistics(CopyState.COPYING, 0, moment.total)

    def _count(self, node: str, written: int) -> None:
        if "copy-vda" in self._counts[node]:
            self._counts[node]["copy-vda"] += written

    async def _give_up(self) -> None: ...

    async def _execute(self, command: str, words: dict[str, Any] | None = None) -> Any:
        words = words or {}
        match command:
            case "blockdev-mirror":
                self.syncs.append(words["sync"])
                self._moments = list(next(self._jobs))
            case "block-dirty-bitmap-add" | "block-dirty-bitmap-clear":
                self._counts[words["node"]][words["name"]] = 0
            case "block-dirty-bitmap-remove":
                del self._counts[words["node"]][words["name"]]
            case "query-named-block-nodes":
                return [
                    {"node-name": node, "dirty-bitmaps": [{"name": name, "count": n} for name, n in counts.items()]}
                    for node, counts in self._counts.items()
                ]
            case "stop" | "cont":
                self._status = "paused" if command == "stop" else "running"
            case "query-status":
                return {"status": self._status}
        return {}


#: The target is made zero, the disk is looked at, and all is well.
ZEROED = (Moment(), Moment(filled=SIZE // 2), Moment(filled=SIZE // 2), Moment(total=MIB))
#: The same, and the guest writes while the disk is looked at.
ZEROED_AND_WRITTEN = (*ZEROED[:3], Moment(writes=MIB), ZEROED[3])


def test_a_target_that_is_zero_is_not_made_so_again() -> None:
    qemu = Qemu(ZEROED_AND_WRITTEN, [Moment(), Moment(total=MIB)])
    asyncio.run(qemu.begin())
    assert qemu.syncs == ["full", "top"]


def test_what_is_below_a_disk_is_copied_whatever_the_target_is() -> None:
    qemu = Qemu(ZEROED_AND_WRITTEN, ZEROED)
    asyncio.run(qemu.begin(below=1))
    assert qemu.syncs == ["full", "full"]


@pytest.mark.parametrize("filled", [0, SIZE // 2, SIZE - 1])
def test_a_target_that_is_not_zero_is_written_in_full(filled: int) -> None:
    """QEMU cannot make it so, and copies all of the disk instead; it has not come far when that begins anew."""
    begun = [Moment(total=SIZE, filled=filled, writes=MIB)]
    qemu = Qemu(begun, begun)
    asyncio.run(qemu.begin())
    assert qemu.syncs == ["full", "full"]


@pytest.mark.parametrize("copied", [0, MIB], ids=["", "and copied while it is looked at"])
def test_a_write_is_missed_also_where_the_target_need_not_be_made_zero(copied: int) -> None:
    """As from QEMU 10.1 on where it reads as zero: at once the job looks what is allocated."""
    qemu = Qemu([Moment(), Moment(writes=MIB), Moment(filled=copied), Moment(total=MIB)], ZEROED)
    asyncio.run(qemu.begin())
    assert qemu.syncs == ["full", "full"]


def test_what_is_written_while_the_target_is_made_zero_is_not_missed() -> None:
    qemu = Qemu([ZEROED[0], ZEROED[1], Moment(writes=MIB), *ZEROED[2:]])
    asyncio.run(qemu.begin())
    assert qemu.syncs == ["full"]
