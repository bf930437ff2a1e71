"""What two host daemons say to each other while a VM moves: JSON messages on one WebSocket, source first.

::

    source                              destination
    Hello            ->                 agree on a version
                     <-  Welcome
    Inspect          ->                 gather facts for preflight
                     <-  Facts
    FindFiles        ->                 look for what lies below disks that are to be copied
                     <-  FoundFiles
    Prepare          ->                 reserve, start QEMU with -S, taps, TLS; await the stream
                     <-  InLine         (any number, while no slot is free)
                     <-  LayersAwaited  (if files below disks are to be sent: they flow now, from daemon to daemon)
                     <-  Prepared
                                        (guest memory flows from QEMU to QEMU)
    Announce         ->                 (no answer) let the stream use these addresses of yours, if it can
                     <-  Offered        (any number, if relays spread the stream) this is my network now
    DisksWhole       ->                 (no answer) nobody writes your disks any more
    TakeOver         ->                 continue the guest
                     <-  Running        as soon as it runs
                     <-  Adopted        when it is durable that the VM belongs here
    Abort            ->                 destroy what was prepared
                     <-  Gone
    Attach           ->                 after a broken session: how do you stand?
                     <-  Standing
                     <-  Failed         instead of any answer: what was asked failed
                     <-  Lost           at any time: the waiting QEMU died

The session is the lease: if it breaks before the destination's QEMU has the whole state, and no other takes its place
(``Attach``) within seconds, the destination destroys what it prepared. After that it keeps the guest paused until the
source, or a person, says whose it is.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from msgspec import Meta

from limosa.model.base import MigrationId, Model, Name
from limosa.model.facts import DestinationFacts
from limosa.model.migration import Fault
from limosa.model.network import HostNetwork
from limosa.model.storage import BackingFile, DiskPlan, LayerPlan
from limosa.model.vm import Accelerator, VmConfig

Address = Annotated[str, Meta(max_length=64)]
Pem = Annotated[str, Meta(max_length=8192)]
#: Files below the disks of one VM, at most.
MAX_LAYERS = 1024
Base64 = Annotated[str, Meta(max_length=8 * 1024 * 1024)]


class Message(Model, frozen=True, tag_field="type"):
    """Base of all messages."""


class Answer(Message, forbid_unknown_fields=False, frozen=True):
    """Base of what a destination says. A source overlooks what a newer one adds: it asks for nothing to be done."""


class Hello(Message, tag="hello", forbid_unknown_fields=False, frozen=True):
    """Who calls, and the versions it speaks. The same in every version, which is not agreed on yet."""

    host: Name
    oldest: int
    newest: int


class Welcome(Answer, tag="welcome", frozen=True):
    """Who answers, and the version both will use."""

    host: Name
    version: int


class Inspect(Message, tag="inspect", frozen=True):
    """Gather the facts preflight needs for this VM."""

    vm: VmConfig
    accelerator: Accelerator


class Facts(Answer, tag="facts", frozen=True):
    """The answer to :class:`Inspect`."""

    facts: DestinationFacts


class FindFiles(Message, tag="find-files", frozen=True):
    """Look for files with these contents, which lie below disks that are to be copied."""

    files: Annotated[tuple[BackingFile, ...], Meta(max_length=MAX_LAYERS)]


class FoundFiles(Answer, tag="found-files", frozen=True):
    """The answer to :class:`FindFiles`, in its order: where they are at the destination, null where they are not."""

    files: tuple[BackingFile | None, ...]


class StreamCredentials(Model, frozen=True):
    """TLS credentials made for one migration stream by the source and thrown away after it.

    The authority that signed the certificate signs only this pair, so the destination's QEMU accepts exactly the
    source's QEMU and the other way round, and no QEMU ever holds a key of its host.
    """

    authority: Pem
    certificate: Pem
    key: Pem


class RelayPlace(Model, frozen=True):
    """Where a stream goes that relays carry: a channel of a session between the two hosts' relays.

    The source's daemon makes sessions and numbers the channels of each. A destination that does not know the session
    makes its end of it.
    """

    session: Annotated[str, Meta(pattern=r"\A[0-9a-f]{32}\Z")]
    channel: Annotated[int, Meta(ge=0, lt=2**32)]
    #: how many bytes the destination may keep of what comes, as a power of two, as far as the source is concerned
    window_log: Annotated[int, Meta(ge=20, le=30)]
    #: of the session, null: it is not encrypted. QEMU's own stream inside it never is.
    credentials: StreamCredentials | None
    #: whether its connections go over several NICs, by Multipath TCP
    several: bool
    #: whether it has connections of its own for each path, by plain TCP, of which more may come at any time
    striped: bool = False


class Prepare(Message, tag="prepare", frozen=True):
    """Reserve and build everything the VM needs at the destination."""

    migration: MigrationId
    vm: VmConfig
    accelerator: Accelerator
    transport: str
    #: null: QEMU does not encrypt the stream
    credentials: StreamCredentials | None
    post_copy: bool
    #: whether the guest is to run here, or was paused and stays so
    running: bool
    #: addresses of the destination the source has chosen, best first; none: the destination chooses
    addresses: Annotated[tuple[Address, ...], Meta(max_length=256)] = ()
    #: connections over each of ``addresses``, where that is more than one
    streams: Annotated[tuple[Annotated[int, Meta(ge=1, le=8)], ...], Meta(max_length=256)] = ()
    #: with RDMA: lock all memory at the beginning
    rdma_pin_all: bool = False
    #: networks the source has an address in that may carry moves, for addresses that appear later
    networks: Annotated[tuple[Address, ...], Meta(max_length=4096)] = ()
    #: with the transport ``compression``, and where relays spread the stream over several paths
    relay: RelayPlace | None = None
    #: small files of the VM's own that the destination must have bit by bit (the cloud-init seed), by name
    files: dict[Name, Base64] = {}
    #: disks that are to be copied into new images; ``vm`` names those
    disks: Annotated[tuple[DiskPlan, ...], Meta(max_length=26)] = ()
    #: with which they are copied; null where relays carry them
    disk_credentials: StreamCredentials | None = None
    #: for each of them its place in the session of relays; none: without relays
    disk_relays: Annotated[tuple[RelayPlace, ...], Meta(max_length=26)] = ()
    #: files below them that are sent before, each after the one below it
    layers: Annotated[tuple[LayerPlan, ...], Meta(max_length=MAX_LAYERS)] = ()
    #: where those come, with relays
    layers_relay: RelayPlace | None = None


class InLine(Answer, tag="in-line", frozen=True):
    """No slot is free yet; ``place`` counts from 1. With 0 the wait is over and the VM is being prepared."""

    place: int


class Prepared(Answer, tag="prepared", frozen=True):
    """The destination waits for the connection on which the guest's memory comes.

    Who connects must say ``token`` (as bytes) first: then the destination's QEMU gets the connection.
    """

    address: str
    port: int
    token: Annotated[str, Meta(pattern=r"\A[0-9a-f]{32}\Z")]
    #: where QEMU's NBD server awaits the disks, on the same address; 0 if there are none, or relays carry them
    disks_port: int = 0


class LayersAwaited(Answer, tag="layers-awaited", frozen=True):
    """The destination waits for a connection on which those of :attr:`Prepare.layers` come that it does not have.

    Who connects must say ``token`` first. Encrypted with the credentials of disks, unless relays carry it.
    """

    address: str
    port: int
    token: Annotated[str, Meta(pattern=r"\A[0-9a-f]{32}\Z")]
    #: which, by their place in the request, in the order in which they are to come
    wanted: Annotated[tuple[Annotated[int, Meta(ge=0)], ...], Meta(max_length=MAX_LAYERS)]


class Announce(Message, tag="announce", frozen=True):
    """A NIC has appeared at the source that leads to these addresses of the destination. There is no answer."""

    addresses: Annotated[tuple[Address, ...], Meta(max_length=64)]


class DisksWhole(Message, tag="disks-whole", frozen=True):
    """The guest stands still and the copies of its disks have ended: nobody is to write them any more. There is no
    answer."""


class Offered(Answer, tag="offered", frozen=True):
    """Said unasked where the stream may use paths that appear: the destination's network, as it is now.

    Only to a source whose relays spread the stream; one that does not know this does not have them do so.
    """

    network: HostNetwork
    #: those for guest memory, in the destination's order
    addresses: Annotated[tuple[Address, ...], Meta(max_length=4096)]


class TakeOver(Message, tag="take-over", frozen=True):
    """The source's QEMU has completed and will not run again: continue the guest, unless it was paused before."""


class Running(Answer, tag="running", frozen=True):
    """The guest runs at the destination since ``resumed_at`` (seconds since the epoch, by QEMU's RESUME event).

    A guest that was paused before the move stays so; ``resumed_at`` is then null.
    """

    resumed_at: float | None
    #: seconds from when :class:`TakeOver` was heard, which do not depend on whose clock counts them
    after_s: float | None = None


class Adopted(Answer, tag="adopted", frozen=True):
    """It is durable at the destination that the VM belongs to it."""


class AwaitRest(Message, tag="await-rest", frozen=True):
    """The stream broke in post-copy: await another for the rest of the guest's memory."""


class RestAwaited(Answer, tag="rest-awaited", frozen=True):
    """The answer: the destination waits for that connection for as long as the session lasts.

    Who connects must say ``token`` first.
    """

    #: in the destination's order; the port is the same on all
    addresses: Annotated[tuple[Address, ...], Meta(max_length=256)]
    port: int
    token: Annotated[str, Meta(pattern=r"\A[0-9a-f]{32}\Z")]


class Abort(Message, tag="abort", frozen=True):
    """Destroy what was prepared."""

    reason: str


class Gone(Answer, tag="gone", frozen=True):
    """Nothing of the migration is left at the destination, and the guest never ran there."""


class Attach(Message, tag="attach", frozen=True):
    """Take up an earlier migration in a new session, and ask how it stands."""

    migration: MigrationId
    #: this session takes the place of one that broke: what is said there unasked after ``Prepared`` is said here, too
    goes_on: bool = False


class DestinationState(StrEnum):
    """How an earlier migration stands at the destination."""

    #: no journal speaks of it
    UNKNOWN = "unknown"
    #: its QEMU waits for guest state
    INCOMING = "incoming"
    #: its QEMU has the whole state and is paused
    LOADED = "loaded"
    #: the guest belongs to the destination (and runs, or ran and crashed there)
    OWNED = "owned"
    #: destroyed; the guest never ran there
    GONE = "gone"


class Standing(Answer, tag="standing", frozen=True):
    """The answer to :class:`Attach`.

    ``rebooted`` tells that the destination's machine restarted since :class:`Prepare`, in which case ``GONE`` is no
    proof that the guest did not run there for a moment.
    """

    state: DestinationState
    rebooted: bool = False
    resumed_at: float | None = None


class Failed(Answer, frozen=True, tag="failed"):
    """What was asked failed; it left nothing behind."""

    fault: Fault


class Lost(Answer, frozen=True, tag="lost"):
    """The waiting QEMU died, unasked."""

    fault: Fault


FromSource = Hello | Inspect | FindFiles | Prepare | Announce | DisksWhole | TakeOver | AwaitRest | Abort | Attach
FromDestination = (
    Welcome
    | Facts
    | FoundFiles
    | InLine
    | LayersAwaited
    | Prepared
    | Offered
    | Running
    | Adopted
    | RestAwaited
    | Gone
    | Standing
    | Failed
    | Lost
)
