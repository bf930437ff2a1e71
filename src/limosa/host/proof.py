"""Whether an image that a move left behind may be removed: what makes that uncertain, or else what proves it.

A doubt is anything that is not known, and one is enough. What this host knows it has looked at
(:mod:`limosa.host.claims`); what other hosts say has been asked. Of a chain, a file goes only if all above it goes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from limosa.errors import LimosaError
from limosa.host.claims import Claims
from limosa.model.storage import ImageUse, Leftover
from limosa.storage import leases


@dataclass(frozen=True)
class Elsewhere:
    """What other hosts say of an image, by name, and why some say nothing."""

    uses: Mapping[str, ImageUse]
    silent: Mapping[str, str]

    def only(self, host: str) -> Elsewhere:
        """What that one says."""
        return Elsewhere(
            {name: use for name, use in self.uses.items() if name == host},
            {name: why for name, why in self.silent.items() if name == host},
        )


def doubts_here(one: Leftover, claims: Claims, host: str, going: Collection[Path]) -> list[str]:
    """What on this host keeps it from being certain that nobody uses the image, when those that are going have gone."""
    doubts = []
    if not one.host:
        owner = "was the disk of a VM that is no longer known" if one.disk else "was a backing file of VMs' disks"
        doubts.append(f"it carries no mark of an unfinished copy: it was kept, or {owner}")
    if claim := claims.on(Path(one.path), one.migration, going):
        doubts.append(claim)
    try:
        lease = leases.read(one.path)
    except LimosaError as error:
        return [*doubts, *claims.unread, str(error)]
    if lease.host not in ("", host) or lease.promised_to:
        doubts.append(f"host '{lease.promised_to or lease.host}' may write to it, according to the lease beside it")
    return [*doubts, *claims.unread]


def doubts_elsewhere(others: Elsewhere) -> list[str]:
    """What other hosts have against removing the image; one that does not answer may use it."""
    silent = [f"host '{name}' cannot be asked: {why}" for name, why in others.silent.items()]
    return silent + [f"on host '{name}': {use.use}" for name, use in others.uses.items() if use.use]


def verdict(one: Leftover, host: str, doubts: list[str], others: Elsewhere | None) -> Leftover:
    """The image with all doubts, or with the proof; pure. ``others``: None if no other host sees it."""
    asked = {"", host, *(others.uses if others is not None else ())}
    if one.host not in asked:
        doubts = [*doubts, f"host '{one.host}' made it, and only that host knows its own moves"]
    if one.source not in asked:
        doubts = [*doubts, f"its VM was to come from host '{one.source}', and only that host knows if the move is over"]
    if others is not None:
        doubts = [*doubts, *doubts_elsewhere(others)]
        if not others.uses and not others.silent:
            doubts.append("other hosts may use it, but none is known: name them in the setting 'peers'")
    if doubts:
        return msgspec.structs.replace(one, doubts=tuple(doubts))
    proof = [
        f"its mark says that move {one.migration} on host '{one.host}' had not finished it",
        f"no VM of host '{host}' uses it, it is no backing file of an image that stays, "
        "and no unfinished journal mentions its move",
        "no process has it open or holds QEMU's lock on it",
    ]
    if others is not None:
        proof.append(f"other hosts confirm that: {', '.join(others.uses)}")
    return msgspec.structs.replace(one, proof=tuple(proof))


def is_named(others: Elsewhere | None) -> bool:
    """Whether a VM or a move of another host names the image, so that it is no leftover."""
    return others is not None and any(use.named for use in others.uses.values())


def all_judged(images: Sequence[Leftover], judge: Callable[[Leftover, Collection[Path]], Leftover]) -> list[Leftover]:
    """All are going at first; one of which it is not certain stays, and then so does what lies below it."""
    going = {Path(one.path) for one in images}
    while True:
        found = [judge(one, going) for one in images]
        certain = {Path(one.path) for one in found if not one.doubts}
        if going <= certain:
            return found
        going &= certain
