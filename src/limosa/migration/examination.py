"""What stands against a move, and how it would be done: the same for ``limosa check`` and for the move itself."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import msgspec

from limosa.migration import disks, preflight
from limosa.migration.peer import Peer
from limosa.model.facts import DestinationFacts, VmFacts
from limosa.model.finding import Finding
from limosa.model.route import Path, Route
from limosa.model.storage import BackingFile, Chain, DiskFacts, DiskPlan, LayerPlan
from limosa.model.vm import Accelerator, Disk, VmConfig
from limosa.transport import trials
from limosa.transport.advise import between, loses_long_packets, not_by_rdma
from limosa.transport.choice import Ends, choose, is_allowed
from limosa.transport.relay.frames import VERSION as RELAY_VERSION

T = TypeVar("T")


@dataclass(frozen=True)
class Question:
    """Which VM would move from which host, and how."""

    vm: VmConfig
    source: str
    accelerator: Accelerator
    transport: str
    #: which location of the destination a disk goes to, by the disk's name
    storage: Mapping[str, str]
    #: whether files below disks that are copied stay files below them
    chain: Chain
    #: the identity of the move
    tag: str
    #: whether images the VM leaves behind are kept
    keep: bool = False
    #: why RDMA, by which the move began, is not to be tried again; empty if it was not tried
    rdma_failed: str = ""


class DisksHere(Protocol):
    """What is asked of this host about disks that must be copied. Raises :class:`StorageError`."""

    async def facts(self, disks: Iterable[Disk]) -> tuple[DiskFacts, ...]:
        """What there is to know about them."""

    async def digest(self, backing: BackingFile) -> BackingFile:
        """The same file with its digest."""


@dataclass(frozen=True)
class Examined:
    """What stands against a move, the way it would take between which ends, and what becomes of each disk."""

    findings: tuple[Finding, ...]
    route: Route
    ends: Ends
    disks: tuple[DiskPlan, ...]
    #: files below them that are sent too
    layers: tuple[LayerPlan, ...] = ()
    #: addresses of the destination to which no connection could be made
    blocked: frozenset[str] = frozenset()

    @property
    def post_copy_possible(self) -> bool:
        """Whether the move may end by post-copy, if that is allowed."""
        # Post-copy by RDMA is a way of QEMU's that hardly anybody goes, and a guest is lost with it if it fails.
        return self.route.transport != "rdma" and all(one.code != "post-copy-not-possible" for one in self.findings)


async def examine(
    peer: Peer,
    question: Question,
    facts: Coroutine[Any, Any, VmFacts],
    disks_here: DisksHere,
) -> Examined:
    """Ask the destination, try its ports, choose the way, plan for the disks, and judge.

    ``facts`` are gathered here while the destination gathers its own; ``disks_here`` is asked about disks that must be
    copied.
    """
    vm = question.vm
    (there, skew), here = await both(peer.inspect(vm, question.accelerator), facts)
    no_relay = "" if there.relay == RELAY_VERSION else f"host '{there.host}' knows another version of it, or none"
    copied = disks.to_copy(vm, here, there, question.storage)
    sent = disks.to_send(vm, here, there, question.storage)
    ends = Ends(
        question.source,
        there.host,
        here.network,
        there.network,
        there.addresses,
        no_relay,
        _no_rdma(question, disks_move=bool(copied or sent)),
        capped=here.capped,
        memory_mib=vm.memory_mib,
        post_copy=here.post_copy and there.post_copy_possible,
    )
    asked = "rdma" if question.rdma_failed else question.transport
    tried = await _try_routes(ends, asked, there)
    route = tried.route
    of_disks = await disks_here.facts((*copied, *sent)) if copied or sent else ()
    as_they_are = {disk.name for disk in sent}
    if question.chain == "keep":
        wishes = question.storage
        as_they_are |= {fact.name for fact in of_disks if disks.may_lie_above(fact, there, wishes.get(fact.name, ""))}
    of_disks = await _with_digests(disks_here, of_disks, as_they_are)
    found = await _found(peer, of_disks)
    planned = disks.plan(vm, of_disks, there, question.storage, question.tag, found, question.chain)
    findings = preflight.check(
        vm,
        question.source,
        here,
        there,
        clock_skew_s=skew,
        reachable=bool(route.paths or tried.lossy),
        copied={disk.path for disk in (*copied, *sent)},
        relayed=route.is_relayed,
    )
    instead = (not_by_rdma(route),) if asked == "rdma" and route.transport != "rdma" else ()
    leaving = () if question.keep else tuple(one for fact in of_disks for one in disks.against_leaving(fact))
    lossy = (loses_long_packets(ends, path, only=not route.paths) for path in tried.lossy)
    all_findings = (*planned.findings, *leaving, *findings, *instead, *between(ends, route), *lossy)
    return Examined(all_findings, route, ends, planned.disks, planned.layers, tried.blocked)


def _no_rdma(question: Question, *, disks_move: bool) -> str:
    """What keeps this move from RDMA, whatever devices there are; empty if nothing does."""
    if question.rdma_failed:
        return question.rdma_failed
    return "disks move along, which RDMA does not carry" if disks_move else ""


async def _with_digests(
    disks_here: DisksHere, facts: Iterable[DiskFacts], names: Collection[str]
) -> tuple[DiskFacts, ...]:
    """The facts with the digests of all files below the disks of these names."""
    known = []
    for fact in facts:
        below = fact.below
        if fact.name in names:
            below = tuple([await disks_here.digest(file) for file in below])
        known.append(msgspec.structs.replace(fact, below=below))
    return tuple(known)


async def _found(peer: Peer, facts: Sequence[DiskFacts]) -> dict[str, BackingFile]:
    """What lies below disks here, where the destination has it too; by digest."""
    wanted = {file.digest: file for fact in facts for file in fact.below if file.digest}
    if not wanted:
        return {}
    found = await peer.find_files(list(wanted.values()))
    return {digest: file for digest, file in zip(wanted, found, strict=True) if file is not None}


@dataclass(frozen=True)
class _Tried:
    """The best route of which every path carries what it should, one without paths if there is none."""

    route: Route
    #: addresses of the destination to which no connection could be made
    blocked: frozenset[str]
    #: paths over which long packets do not arrive
    lossy: tuple[Path, ...]


async def _try_routes(ends: Ends, transport: str, there: DestinationFacts) -> _Tried:
    open_: set[str] = set()
    port = there.trial_port
    blocked: set[str] = set() if port else set(ends.offered)
    lossy: dict[str, Path] = {}
    while True:
        route = choose(ends, transport, blocked | lossy.keys())
        untried = [path for path in route.paths if path.there not in open_]
        if not untried:
            return _Tried(route, frozenset(blocked), tuple(lossy.values()))
        tries = (trials.reach(path.there, port, path.here, answers=there.trial_answers) for path in untried)
        for path, reached in zip(untried, await asyncio.gather(*tries), strict=True):
            # Where our routing decides, it may lead out over a network that may not carry moves.
            if reached is None or not is_allowed(reached.own, ends.here.allowed):
                blocked.add(path.there)
            elif reached.whole:
                open_.add(path.there)
            else:
                lossy[path.there] = msgspec.structs.replace(path, here=reached.own)


async def both(first: Coroutine[Any, Any, T], second: Coroutine[Any, Any, Any]) -> tuple[T, Any]:
    """Do both at once; if one fails, the other is cancelled and the failure raised."""
    try:
        async with asyncio.TaskGroup() as group:
            one, two = group.create_task(first), group.create_task(second)
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return one.result(), two.result()
