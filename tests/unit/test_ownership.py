"""The ownership rules, walked over every interleaving of acts, crashes and lost messages.

The model below is small on purpose: two hosts, one guest, a journal each, a network that may lose any message and any
connection. Its state space is searched exhaustively; the invariants are checked in every state.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

from limosa.migration.ownership import (
    SOURCE_ENDED,
    DestinationAction,
    DestinationQemu,
    DestinationStep,
    SourceAction,
    SourceQemu,
    SourceStep,
    decide_destination,
    decide_source,
    destination_state,
)
from limosa.wire.peer import DestinationState


@dataclass(frozen=True)
class World:
    """Everything that decides who runs the guest."""

    source_step: SourceStep = SourceStep.MIGRATING
    source_qemu: SourceQemu = SourceQemu.HOLDS
    source_runs: bool = True
    step: DestinationStep = DestinationStep.RESERVED
    qemu: DestinationQemu = DestinationQemu.INCOMING
    #: the guest ran at the destination at some time, so its disks moved on there
    ran_there: bool = False
    #: the source's users may do with the VM what they like
    is_free: bool = False
    session: bool = True
    crashes: int = 0


def scripted(world: World) -> Iterator[World]:
    """What happens when nothing breaks, and QEMU's own doings."""
    if world.source_qemu is SourceQemu.HOLDS and world.qemu is DestinationQemu.INCOMING and world.source_runs:
        # The destination's QEMU has everything before the source's reports completed.
        yield replace(world, qemu=DestinationQemu.LOADED, source_runs=False)
    stopped = world.source_qemu is SourceQemu.HOLDS and not world.source_runs
    if stopped and world.qemu is DestinationQemu.LOADED:
        yield replace(world, source_qemu=SourceQemu.COMPLETED)
    if stopped:
        # The return path broke at the last moment: QEMU resumes the guest by itself.
        yield replace(world, source_runs=True, session=False)
    if world.session and world.source_qemu is SourceQemu.COMPLETED and world.source_step is SourceStep.MIGRATING:
        yield replace(world, source_step=SourceStep.HANDING_OVER)
    if world.session and world.source_step is SourceStep.HANDING_OVER:
        yield from taken_over(world)
    if world.is_free:
        # It is stopped, started anew, paused, or moved away by a move of its own, of which its QEMU says "completed".
        yield replace(world, source_qemu=SourceQemu.DEAD, source_runs=False)
        yield replace(world, source_qemu=SourceQemu.HOLDS, source_runs=True)
        yield replace(world, source_qemu=SourceQemu.HOLDS, source_runs=False)
        yield replace(world, source_qemu=SourceQemu.COMPLETED, source_runs=False)


def taken_over(world: World) -> Iterator[World]:
    """The word arrives at the destination."""
    if world.step is DestinationStep.RESERVED and world.qemu is DestinationQemu.LOADED:
        yield replace(world, step=DestinationStep.CONTINUING)
        yield replace(world, step=DestinationStep.CONTINUING, qemu=DestinationQemu.RUNNING, ran_there=True)
        # QEMU refuses to run it, or ends before: that it is continued is taken back before anybody can ask.
        yield from destroyed(world)
    elif world.step is DestinationStep.RESERVED:
        yield from destroyed(world)


def destroyed(world: World) -> Iterator[World]:
    """The line that says so may be missing, on a full disk."""
    yield replace(world, step=DestinationStep.GONE, qemu=DestinationQemu.DEAD)
    yield replace(world, step=DestinationStep.RESERVED, qemu=DestinationQemu.DEAD)


def broken(world: World) -> Iterator[World]:
    """Everything that can break, a few times."""
    if world.crashes >= 3:
        return
    again = replace(world, crashes=world.crashes + 1)
    yield replace(again, session=False)
    yield replace(again, source_qemu=SourceQemu.DEAD, source_runs=False)
    yield replace(again, qemu=DestinationQemu.DEAD)


def settled(world: World) -> Iterator[World]:
    """Both sides do what the rules say, when their session is gone."""
    if world.session:
        return
    for seen in looks(world):
        yield from destination_settles(world, seen)
        yield from source_settles(world, destination_state(world.step, seen))
    yield from source_settles(world, None)


def looks(world: World) -> Iterator[DestinationQemu]:
    """What the destination sees of its QEMU, which may hang."""
    yield world.qemu
    if world.qemu is not DestinationQemu.DEAD:
        yield DestinationQemu.SILENT


def destination_settles(world: World, seen: DestinationQemu) -> Iterator[World]:
    match decide_destination(world.step, seen):
        case DestinationAction.DESTROY if world.step is not DestinationStep.GONE:
            yield from destroyed(world)
        case DestinationAction.OWN if world.qemu is DestinationQemu.LOADED:
            yield replace(world, step=DestinationStep.OWNED, qemu=DestinationQemu.RUNNING, ran_there=True)
        case DestinationAction.OWN:
            yield replace(world, step=DestinationStep.OWNED)


def source_settles(world: World, heard: DestinationState | None) -> Iterator[World]:
    if world.source_step in SOURCE_ENDED:
        return
    match decide_source(world.source_step, world.source_qemu, heard):
        case SourceAction.UNDO if world.source_qemu is SourceQemu.HOLDS:
            yield replace(world, source_step=SourceStep.UNDOING)
            yield from given_back(replace(world, source_runs=True))
        case SourceAction.UNDO:
            yield from aborted(replace(world, source_step=SourceStep.UNDOING))
        case SourceAction.RESUME:
            yield replace(world, source_step=SourceStep.UNDOING)
            yield from given_back(replace(world, source_qemu=SourceQemu.HOLDS, source_runs=True))
        case SourceAction.HAND_OVER:
            word = replace(world, source_step=SourceStep.HANDING_OVER)
            yield word
            yield from taken_over(word)
        case SourceAction.TEAR_DOWN:
            yield replace(world, source_step=SourceStep.FINISHED, source_qemu=SourceQemu.DEAD, source_runs=False)
        case SourceAction.CRASHED:
            yield replace(world, source_step=SourceStep.UNDOING)
            yield from given_back(world)
        case SourceAction.DISMISS:
            if world.step is DestinationStep.GONE:
                yield replace(world, source_step=SourceStep.UNDONE)
            yield from aborted(world)


def given_back(world: World) -> Iterator[World]:
    """The source may die before it has written that, and between that and giving the VM back."""
    yield replace(world, source_step=SourceStep.UNDOING)
    yield replace(world, source_step=SourceStep.HOME)
    yield replace(world, source_step=SourceStep.HOME, is_free=True)


def aborted(world: World) -> Iterator[World]:
    if world.step is DestinationStep.RESERVED:
        yield from destroyed(world)


def every_world() -> list[World]:
    seen = {World()}
    queue = deque(seen)
    while queue:
        world = queue.popleft()
        for step in (scripted, broken, settled):
            for following in step(world):
                if following not in seen:
                    seen.add(following)
                    queue.append(following)
    return list(seen)


WORLDS = every_world()


def test_the_search_reaches_the_interesting_states() -> None:
    assert any(world.ran_there and world.source_step is SourceStep.FINISHED for world in WORLDS)
    assert any(world.source_step is SourceStep.UNDONE for world in WORLDS)
    assert len(WORLDS) > 150


def test_never_do_two_copies_run() -> None:
    for world in WORLDS:
        assert not (world.source_runs and world.qemu is DestinationQemu.RUNNING), world


def test_the_source_never_runs_a_guest_that_ran_at_the_destination() -> None:
    for world in WORLDS:
        assert not (world.source_runs and world.ran_there), world


def test_the_source_gives_up_its_copy_only_to_an_owner() -> None:
    for world in WORLDS:
        if world.source_step is SourceStep.FINISHED:
            assert world.step in (DestinationStep.CONTINUING, DestinationStep.OWNED), world


def test_a_reboot_of_the_destination_voids_its_proof_once_the_word_was_given() -> None:
    gone = DestinationState.GONE
    handed = SourceStep.HANDING_OVER
    assert decide_source(handed, SourceQemu.COMPLETED, gone, rebooted=True) is SourceAction.ASK
    assert decide_source(handed, SourceQemu.COMPLETED, gone) is SourceAction.RESUME
    assert decide_source(SourceStep.MIGRATING, SourceQemu.COMPLETED, gone, rebooted=True) is SourceAction.RESUME


def test_a_reboot_of_the_source_may_have_lost_that_the_word_was_given() -> None:
    dead = SourceQemu.DEAD
    for step in (SourceStep.PREPARING, SourceStep.MIGRATING):
        assert decide_source(step, dead, None) is SourceAction.CRASHED
        assert decide_source(step, dead, None, rebooted_here=True) is SourceAction.ASK
        assert decide_source(step, dead, DestinationState.OWNED, rebooted_here=True) is SourceAction.TEAR_DOWN
        for answer in (DestinationState.GONE, DestinationState.LOADED, DestinationState.UNKNOWN):
            assert decide_source(step, dead, answer, rebooted_here=True) is SourceAction.CRASHED
    for step in (SourceStep.ACCEPTED, SourceStep.UNDOING):
        assert decide_source(step, dead, None, rebooted_here=True) is SourceAction.CRASHED


def test_a_destination_that_cannot_be_asked_leaves_a_completed_source_paused() -> None:
    for step in (SourceStep.MIGRATING, SourceStep.HANDING_OVER, SourceStep.UNDOING):
        assert decide_source(step, SourceQemu.COMPLETED, None) is SourceAction.ASK
        assert decide_source(step, SourceQemu.COMPLETED, DestinationState.UNKNOWN) is SourceAction.ASK


def test_a_source_that_holds_the_guest_goes_on_without_asking() -> None:
    for step in (SourceStep.PREPARING, SourceStep.MIGRATING, SourceStep.UNDOING):
        assert decide_source(step, SourceQemu.HOLDS, None) is SourceAction.UNDO


def test_a_held_guest_is_kept_and_a_partial_one_destroyed() -> None:
    reserved = DestinationStep.RESERVED
    assert decide_destination(reserved, DestinationQemu.LOADED) is DestinationAction.HOLD
    assert decide_destination(reserved, DestinationQemu.SILENT) is DestinationAction.HOLD
    assert decide_destination(reserved, DestinationQemu.INCOMING) is DestinationAction.DESTROY
    assert decide_destination(reserved, DestinationQemu.DEAD) is DestinationAction.DESTROY
    assert decide_destination(DestinationStep.CONTINUING, DestinationQemu.LOADED) is DestinationAction.OWN


def test_a_vm_that_was_given_back_to_its_users_is_left_alone() -> None:
    free = [world for world in WORLDS if world.is_free]
    assert {world.source_qemu for world in free} == set(SourceQemu)
    assert any(world.step is DestinationStep.RESERVED and world.qemu is DestinationQemu.LOADED for world in free)
    for world in free:
        assert world.source_step in (SourceStep.HOME, SourceStep.UNDONE), world
        if world.source_step is SourceStep.HOME:
            for heard in (None, *DestinationState):
                for following in source_settles(world, heard):
                    assert following.source_qemu is world.source_qemu, world
                    assert following.source_runs is world.source_runs, world
