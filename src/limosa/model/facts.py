"""Facts about two hosts, gathered for one VM, that preflight judges. Plain values: gathering is elsewhere."""

from __future__ import annotations

from limosa.model.base import Model, Name
from limosa.model.network import HostNetwork
from limosa.model.storage import Location
from limosa.model.vm import Accelerator


class FileIdentity(Model, forbid_unknown_fields=False, frozen=True):
    """What tells whether two hosts mean the same file by a path.

    ``machine`` and ``device``/``inode`` decide on one machine (hosts that are namespaces), ``share`` or ``on_server``
    and ``inode`` on a network file system, ``location`` and ``location_path`` where an administrator named the storage
    alike on both, together with ``holder``, ``device_bytes`` or ``inode``; ``digest`` (SHA-256, hex) serves for small
    read-only files that may be copies.
    """

    path: str
    machine: str
    device: int
    inode: int
    #: size of a block device, which does not grow by being written as an image does; 0 for a file
    device_bytes: int = 0
    #: who holds the lease on it, if it was looked for and there is one
    holder: str = ""
    share: str = ""
    #: what it is called wherever the server's share is mounted, such as ``nfs4 nas:/vms/web.qcow2``; empty if unknown
    on_server: str = ""
    location: str = ""
    location_path: str = ""
    digest: str = ""
    writable: bool = True
    #: path of the disk this file lies below, if it does
    below: str = ""
    #: it lies in the host's own folder: another that sees it there, as the hosts of a lab do, has no business with it
    private: bool = False


class LeaseConflict(Model, forbid_unknown_fields=False, frozen=True):
    """Why the source cannot promise the lease on an image to a destination, and what to do."""

    image: str
    why: str
    todo: str


class VmFacts(Model, forbid_unknown_fields=False, frozen=True):
    """What the source knows about the VM that is to move."""

    running: bool
    accelerator: Accelerator
    qemu: tuple[int, int, int]
    files: tuple[FileIdentity, ...]
    live_migration: bool
    encrypt: bool
    post_copy: bool
    network: HostNetwork = HostNetwork()
    #: what it may send is capped, over whatever network
    capped: bool = False
    #: images whose leases it could not hand on
    leases: tuple[LeaseConflict, ...] = ()
    #: features the guest sees, where its CPU model leaves them to the host
    cpu_features: tuple[str, ...] = ()
    #: the end of its certificate, seconds since the epoch; null if it has none, or does not say
    certificate_until: float | None = None


class DestinationFacts(Model, forbid_unknown_fields=False, frozen=True):
    """What the destination knows, gathered for the VM that is to come."""

    host: Name
    qemu: tuple[int, int, int]
    live_migration: bool
    accelerators: tuple[Accelerator, ...]
    machine_known: bool
    cpu_known: bool
    #: features of the VM's CPU model this host cannot offer
    cpu_missing: tuple[str, ...]
    #: names of switches the VM wants and the host has not
    switches_missing: tuple[str, ...]
    memory_available_mib: int
    name_taken: bool
    uuid_taken: bool
    #: one for each of the VM's host files that is visible here, and for what lies below them
    files: tuple[FileIdentity, ...]
    firmware_available: bool
    post_copy_possible: bool
    #: addresses on which it would receive guest memory, best first
    addresses: tuple[str, ...]
    #: a port on the first address on which it listens for a trial connection, 0 if every port of the range is taken
    trial_port: int
    #: its clock, seconds since the epoch
    time: float
    #: version of what its relay speaks; 0: it has none
    relay: int = 0
    #: it answers a trial connection, so that long packets are tried both ways
    trial_answers: bool = False
    network: HostNetwork = HostNetwork()
    #: where it could put new images
    locations: tuple[Location, ...] = ()
    #: features the guest would see, where its CPU model leaves them to the host
    cpu_features: tuple[str, ...] = ()
    #: the end of its certificate, seconds since the epoch; null if it has none, or does not say
    certificate_until: float | None = None
