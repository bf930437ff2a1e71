"""Who owns a VM after something broke; pure.

At every instant at most one host may run the VM. The rules, and why they suffice:

1. The destination continues the guest only on the source's word (``TakeOver``) or a person's.
2. The source gives that word only after its QEMU reported ``completed``, and writes HANDING_OVER before. QEMU does not
   run a guest whose migration completed unless it is told to.
3. From HANDING_OVER on the source runs the guest again only if the destination answers GONE: it destroyed what it had
   and the guest never ran there. The destination can say so because it writes CONTINUING before it continues. If QEMU
   provably did not run the guest then, it takes that back, durably, before it destroys anything.
4. Such lines are written, not synced, on the way from STOP to RESUME. They survive the daemon. If the destination's
   *machine* died they may be lost, so its GONE counts only within one boot, once the word was given, and it keeps the
   images it made, which the guest may have written. A VM that is the destination's durably was continued there,
   whatever its journal has lost with the machine; within one boot nothing is lost, and a VM of which the journal says
   nothing came in another way. If the source's machine died, HANDING_OVER may be the line that is lost: then the VM
   is a crashed one of the source's only when the destination has answered.
5. Before HANDING_OVER the word was not given, so a source whose QEMU can still run simply goes on, whatever the
   destination says: nobody but a person can have continued the guest there, and a person is told not to while the
   source runs. If the source's QEMU is ``completed`` by then, it needs the destination's answer first.
6. When the destination cannot be asked and the source's QEMU is completed, neither side guesses: the source stays
   paused and keeps asking, the destination runs the guest only if the word has arrived, and a person may resolve it.
7. The source writes HOME before it gives the VM back to its users, who may then stop it, or move it away. From there on
   the move says nothing about the VM any more, however long its destination stays away: all that is left is to have
   that destroy what it has.
8. At a source that gave the VM up its name stays taken until FINISHED is durable. So what has the name there before is
   the VM that left, of which everything is removed, and never the one that came back.

The functions below are these rules as tables; ``tests/unit/test_ownership.py`` walks every interleaving of
crashes and lost messages over them.
"""

from __future__ import annotations

from enum import StrEnum

from limosa.wire.peer import DestinationState

#: Who owns a VM is said to be unresolved when it could not be known for so long; most losses last less.
UNRESOLVED_AFTER_S = 3.0


class SourceStep(StrEnum):
    """Steps of the source's journal, in order."""

    #: waits in line for a slot
    ACCEPTED = "accepted"
    #: the destination may have a reservation
    PREPARING = "preparing"
    #: QEMU was told to migrate, or is about to be
    MIGRATING = "migrating"
    #: the destination was told to take over, or is about to be
    HANDING_OVER = "handing-over"
    #: the destination owns the VM, durably
    CONFIRMED = "confirmed"
    #: nothing of the VM is left here
    FINISHED = "finished"
    #: the move failed or was cancelled; the destination is to destroy what it has
    UNDOING = "undoing"
    #: the VM is its users' again, running or crashed; the destination may still have something to destroy
    HOME = "home"
    #: the VM is here as it was before, and nothing is left at the destination
    UNDONE = "undone"


class DestinationStep(StrEnum):
    """Steps of the destination's journal, in order."""

    #: memory, name and files are reserved, QEMU is about to be started; after CONTINUING: it did not run the guest, and
    #: everything is about to be destroyed
    RESERVED = "reserved"
    #: the guest is about to be continued on the source's or a person's word
    CONTINUING = "continuing"
    #: the VM belongs to this host, durably
    OWNED = "owned"
    #: everything was destroyed; the guest never ran here
    GONE = "gone"


SOURCE_ENDED = frozenset({SourceStep.FINISHED, SourceStep.UNDONE})
DESTINATION_ENDED = frozenset({DestinationStep.OWNED, DestinationStep.GONE})


class SourceQemu(StrEnum):
    """What the source's QEMU can still do."""

    #: its process is gone, and with it the guest's memory
    DEAD = "dead"
    #: it runs the guest, or will when a migration under way is cancelled
    HOLDS = "holds"
    #: its migration completed: it is paused and the destination was sent everything
    COMPLETED = "completed"


class SourceAction(StrEnum):
    """What the source does next."""

    #: cancel, tell the destination to destroy, and let the guest go on here
    UNDO = "undo"
    #: the guest goes on here; the destination has proved that it never ran there
    RESUME = "resume"
    #: write HANDING_OVER and tell the destination to take over
    HAND_OVER = "hand-over"
    #: the destination owns the VM: end QEMU and forget the VM
    TEAR_DOWN = "tear-down"
    #: stay paused and ask again
    ASK = "ask"
    #: the guest died with QEMU before anything was handed over: an ordinary crash here
    CRASHED = "crashed"
    #: leave the VM alone and have the destination destroy what it has
    DISMISS = "dismiss"


def decide_source(
    step: SourceStep,
    qemu: SourceQemu,
    destination: DestinationState | None,
    *,
    rebooted: bool = False,
    rebooted_here: bool = False,
) -> SourceAction:
    """The source's next act. ``destination`` is its answer, or None if it cannot be asked.

    ``rebooted``: the destination's machine restarted since the move was prepared; ``rebooted_here``: the source's did
    since it was accepted.
    """
    if step in (SourceStep.CONFIRMED, SourceStep.FINISHED):
        return SourceAction.TEAR_DOWN
    if step is SourceStep.HOME:
        return SourceAction.DISMISS
    if destination is DestinationState.OWNED:
        # Only our word or a person's can have led to this; either way the guest lives there.
        return SourceAction.TEAR_DOWN
    if step is SourceStep.HANDING_OVER:
        return _after_the_word(qemu, destination, rebooted)
    if qemu is SourceQemu.HOLDS:
        return SourceAction.UNDO
    if qemu is SourceQemu.DEAD:
        may_have_lost_the_word = rebooted_here and step in (SourceStep.PREPARING, SourceStep.MIGRATING)
        return SourceAction.ASK if may_have_lost_the_word and destination is None else SourceAction.CRASHED
    return _completed_before_the_word(step, destination)


def _completed_before_the_word(step: SourceStep, destination: DestinationState | None) -> SourceAction:
    match destination:
        case DestinationState.LOADED | DestinationState.INCOMING:
            # A cancel that came too late: everything was sent, the move ends as if it had not been asked for.
            return SourceAction.HAND_OVER if step is SourceStep.MIGRATING else SourceAction.UNDO
        case DestinationState.GONE:
            return SourceAction.RESUME
        case _:
            return SourceAction.ASK


def _after_the_word(qemu: SourceQemu, destination: DestinationState | None, rebooted: bool) -> SourceAction:
    match destination:
        case DestinationState.LOADED | DestinationState.INCOMING:
            # The word did not arrive. Our QEMU is completed or dead, and we never resumed it: say it again.
            return SourceAction.HAND_OVER
        case DestinationState.GONE if not rebooted:
            return SourceAction.CRASHED if qemu is SourceQemu.DEAD else SourceAction.RESUME
        case _:
            return SourceAction.ASK


class DestinationQemu(StrEnum):
    """What the destination's QEMU has."""

    DEAD = "dead"
    #: it waits for guest state, or has part of it
    INCOMING = "incoming"
    #: it has the whole state and is paused
    LOADED = "loaded"
    #: its process lives but does not answer: it may have the whole state
    SILENT = "silent"
    #: the guest was continued
    RUNNING = "running"


class DestinationAction(StrEnum):
    """What the destination does after its session or its daemon broke."""

    #: kill QEMU, give everything back, write GONE
    DESTROY = "destroy"
    #: keep the guest paused until the source or a person says whose it is
    HOLD = "hold"
    #: the word was given: continue the guest if it does not run yet, and own it
    OWN = "own"


def decide_destination(step: DestinationStep, qemu: DestinationQemu) -> DestinationAction:
    """The destination's next act when the source's session is gone.

    Destroying a partly loaded QEMU is always safe: the source's cannot have completed, or will be answered GONE. A
    loaded one, or one that may be, is kept, because if the source died it is the only copy there is.
    """
    if step in (DestinationStep.CONTINUING, DestinationStep.OWNED) or qemu is DestinationQemu.RUNNING:
        return DestinationAction.OWN
    if step is DestinationStep.RESERVED and qemu in (DestinationQemu.LOADED, DestinationQemu.SILENT):
        return DestinationAction.HOLD
    return DestinationAction.DESTROY


def destination_state(step: DestinationStep | None, qemu: DestinationQemu) -> DestinationState:
    """What the destination answers when the source asks how it stands."""
    match step:
        case None:
            return DestinationState.UNKNOWN
        case DestinationStep.CONTINUING | DestinationStep.OWNED:
            return DestinationState.OWNED
        case DestinationStep.GONE:
            return DestinationState.GONE
    match qemu:
        case DestinationQemu.LOADED | DestinationQemu.SILENT:
            return DestinationState.LOADED
        case DestinationQemu.INCOMING:
            return DestinationState.INCOMING
        case DestinationQemu.RUNNING:
            return DestinationState.OWNED
        case DestinationQemu.DEAD:
            return DestinationState.GONE
