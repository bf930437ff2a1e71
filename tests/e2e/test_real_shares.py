"""VMs on shares that the kernel has mounted: CIFS (SMB 3.1.1) of a real Samba server and NFS 4.2 of a real NFS server.

Two lab VMs are the hosts; the servers are with the tests and outlive them. On SMB the lease keeps a second host off an
image, on NFS QEMU's own locks do, which the server lets go of when it has not heard of a host for a while. What is not
found again, or is written by two, the guest notices itself (:mod:`harness.labvm.scribe`).
"""

from __future__ import annotations

import pwd
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from harness import nfs, samba
from harness.disks import assert_clean
from harness.labvm import LabVm, scribe
from harness.labvm.hosts import VmHost, running_vm_hosts
from harness.labvm.network import PREFIX, SERVER, Network, network
from harness.samba import Share
from limosa.client.host import HostClient
from limosa.errors import Conflict, HostUnreachable, ImageLeased, LimosaError, QemuError
from limosa.model.migration import Migration, Outcome, Phase
from limosa.model.storage import DiskAction
from limosa.model.vm import VmState
from limosa.storage import leases
from limosa.wire import api, endpoints
from limosa.wire.endpoints import Endpoint, Reply, Request

pytestmark = [pytest.mark.qemu, pytest.mark.labvm, pytest.mark.long]

KINDS = ("smb", "nfs")
USER = "limosa-qemu"
#: Emulated hosts on a machine that may do other things too.
WITHIN_S = 180.0
IMAGE = "web.qcow2"
#: The whole memory of a VM is some 10 s under it.
SLOWLY_MBIT_PER_S = 1


class Lab:
    """Two hosts with both shares: VMs ``smb`` and ``nfs`` are each on the share of that name."""

    def __init__(self, net: Network, hosts: tuple[VmHost, VmHost], served: dict[str, Path]) -> None:
        self.net = net
        self.hosts = hosts
        #: what the servers have of the shares
        self.served = served

    def call(
        self, host: VmHost, endpoint: Endpoint[Request, Reply], request: Request | None = None, **at: str
    ) -> Reply:
        """Ask a host's daemon."""
        return self.net.inside(lambda: HostClient(host.route).call(endpoint, request, **at))

    def answers(self, host: VmHost) -> bool:
        """Whether a daemon answers in time: the first time it has much to load."""
        with suppress(HostUnreachable):
            self.call(host, endpoints.LOCATIONS)
            return True
        return False

    def move(self, vm: str, source: VmHost, destination: VmHost, options: api.MoveOptions) -> Migration:
        """A move that sends memory, or has ended.

        One whose destination did not answer in time has touched nothing, and is begun anew: the first session takes
        emulated hosts longer than a source waits, and each may on a machine that does other things too.
        """
        request = api.MoveRequest(vm=vm, destination=destination.name, options=options)
        found: list[Migration] = []

        def heard() -> bool:
            begun = self.call(source, endpoints.MOVE, request)
            found.append(self.first(source, begun, lambda view: view.phase is Phase.COPY))
            fault = found[-1].fault
            return fault is None or fault.code != HostUnreachable.code

        wait_until(heard, f"{destination.name} answers {source.name}")
        return found[-1]

    def first(self, host: VmHost, migration: Migration, what: Callable[[Migration], bool]) -> Migration:
        """A move as it was when that was so first, or else when it had ended.

        The host says each change by itself; to ask for it takes longer than some last.
        """

        def work() -> Migration:
            for view in HostClient(host.route).stream(endpoints.WATCH_MIGRATION, migration=migration.id):
                if what(view):
                    break
            return view

        return self.net.inside(work)

    def ended(self, host: VmHost, migration: Migration) -> Migration:
        """A move when it has ended."""
        return self.first(host, migration, lambda view: view.outcome is not Outcome.UNDER_WAY)

    def ends(self, vm: str) -> tuple[VmHost, VmHost]:
        """The host where it runs, and the other one."""
        (here,) = self.runners(vm)
        return here, next(host for host in self.hosts if host is not here)

    def runners(self, vm: str) -> list[VmHost]:
        """The hosts where it runs."""
        return [host for host, state in zip(self.hosts, self.states(vm), strict=True) if state is VmState.RUNNING]

    def states(self, vm: str) -> list[VmState | None]:
        """What each host says of it."""
        lists = [self.call(host, endpoints.LIST_VMS).vms for host in self.hosts]
        return [next((one.state for one in vms if one.config.name == vm), None) for vms in lists]

    def image(self, host: VmHost, vm: str) -> Path:
        """The VM's image, by its path on the hosts."""
        return Path(self.call(host, endpoints.SHOW_VM, vm=vm).config.disks[0].path)

    def at_server(self, image: Path) -> Path:
        """The same, where the server has it."""
        return self.served[image.parent.name] / image.name

    def holder(self, image: Path) -> str:
        """The host that holds the lease on an image, as the server has it."""
        return leases.read(str(self.at_server(image))).host

    def goes_on(self, host: VmHost, vm: str) -> None:
        """The guest writes, and finds all it has written."""
        before = self._later(host, vm, -1)
        self._later(host, vm, before + scribe.SECTORS)

    def _later(self, host: VmHost, vm: str, number: int) -> int:
        """The guest's number when it is larger than that."""

        def found() -> int:
            said = host.console(vm)
            assert scribe.LOST not in said, said
            last = scribe.number(said)
            return -1 if last is None else last

        wait_until(lambda: found() > number, f"{vm} counts beyond {number}")
        return found()


def wait_until(what: Callable[[], bool], description: str) -> None:
    """Wait for a condition that only asking can tell."""
    deadline = time.monotonic() + WITHIN_S
    while not what():
        assert time.monotonic() < deadline, f"not within {WITHIN_S:g} s: {description}"
        time.sleep(0.5)


def wire(vm: LabVm, number: int) -> dict[str, Any]:
    """Mount both shares. To NFS servers a client is its host's name."""
    vm.run(f"hostname {vm.name}; ip addr add 10.7.0.{number}/{PREFIX} dev eth0; ip link set eth0 up")
    user = pwd.getpwnam(USER)
    owner = f"uid={user.pw_uid},gid={user.pw_gid},file_mode=0660,dir_mode=0770"
    smb = f"ip={SERVER},vers=3.1.1,username=vms,password=x,nobrl,{owner}"
    # The kernel's own options, so that nobody needs the tools that look names up for it.
    vm.run(f"mkdir -p /shares/smb; mount -i -t cifs //{SERVER}/{samba.SHARE} /shares/smb -o {smb}")
    vm.run(f"mkdir -p /shares/nfs; mount -i -t nfs4 {SERVER}:{nfs.EXPORT} /shares/nfs -o addr={SERVER},vers=4.2")
    return {"locations": {kind: {"path": f"/shares/{kind}"} for kind in KINDS}}


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    samba.skip_without_samba()
    nfs.skip_without_ganesha()
    user = pwd.getpwnam(USER)
    with ExitStack() as held:
        net = held.enter_context(network())
        folder = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="shares-")))
        folder.chmod(0o755)
        (folder / "smb").mkdir()
        share = Share(folder / "smb", net.namespace, SERVER)
        held.enter_context(share.served())
        served = {"smb": share.folder, "nfs": held.enter_context(nfs.served(folder / "nfs", net.namespace, SERVER))}
        for place in served.values():
            scribe.write_image(place / IMAGE, (user.pw_uid, user.pw_gid))
        made = Lab(net, held.enter_context(running_vm_hosts(wire, cables=0, tap=net.tap)), served)
        for host in made.hosts:
            wait_until(partial(made.answers, host), f"{host.name} answers")
        for kind in KINDS:
            start(made, made.hosts[0], kind, Path("/shares", kind, IMAGE))
            made.goes_on(made.hosts[0], kind)
        yield made


def start(lab: Lab, host: VmHost, name: str, image: Path) -> None:
    """Create and start a VM on an image; should it not start, it is forgotten again."""
    disk = api.NewDisk(path=str(image), format="qcow2")
    lab.call(host, endpoints.CREATE_VM, api.NewVm(name=name, memory_mib=32, accelerator="tcg", disks=(disk,)))
    try:
        lab.call(host, endpoints.START_VM, vm=name)
    except LimosaError:
        lab.call(host, endpoints.DELETE_VM, vm=name)
        raise


@pytest.mark.parametrize("vm", KINDS)
def test_it_moves_and_no_disk_is_copied(lab: Lab, vm: str) -> None:
    source, destination = lab.ends(vm)
    image = lab.image(source, vm)
    before = lab.at_server(image).stat().st_ino
    ended = lab.ended(source, lab.move(vm, source, destination, api.MoveOptions()))
    assert ended.outcome is Outcome.COMPLETED, ended.fault
    assert [(plan.action, plan.path) for plan in ended.disks] == [(DiskAction.STAY, str(image))]
    assert ended.phases.get(Phase.STORAGE, 0) == 0
    assert lab.ends(vm) == (destination, source)
    assert lab.holder(image) == {"smb": destination.name, "nfs": ""}[vm]
    lab.goes_on(destination, vm)
    assert lab.at_server(image).stat().st_ino == before
    assert [path.name for path in lab.served[vm].iterdir() if not path.name.startswith(".")] == [IMAGE]


@pytest.mark.parametrize("vm", KINDS)
def test_a_second_host_is_kept_off_the_image(lab: Lab, vm: str) -> None:
    here, other = lab.ends(vm)
    refused, words = {
        "smb": (ImageLeased, f"host '{here.name}' holds the lease"),
        "nfs": (QemuError, 'Failed to get "write" lock'),
    }[vm]
    with pytest.raises(refused, match=words):
        start(lab, other, "thief", lab.image(here, vm))
    lab.goes_on(here, vm)


@pytest.mark.parametrize("vm", KINDS)
def test_a_network_that_is_cut_in_mid_move_leaves_one_owner(lab: Lab, vm: str) -> None:
    """The hosts do not hear each other any more; both still have the shares."""
    source, destination = lab.ends(vm)
    image = lab.image(source, vm)
    begun = lab.move(vm, source, destination, api.MoveOptions(bandwidth_mbit_per_s=SLOWLY_MBIT_PER_S))
    assert begun.outcome is Outcome.UNDER_WAY, begun.fault
    with lab.net.parted():
        # On a slow machine the cut comes late, and may hit the one moment in which nobody can know.
        assert lab.ended(source, begun).outcome in (Outcome.FAILED, Outcome.UNRESOLVED)
        assert lab.runners(vm) in ([source], [])
    wait_until(lambda: len(lab.runners(vm)) == 1 and None in lab.states(vm), "one host has it, the other nothing of it")
    owner, _ = lab.ends(vm)
    assert lab.holder(image) == {"smb": owner.name, "nfs": ""}[vm]
    lab.goes_on(owner, vm)


def test_a_disk_moves_from_one_share_to_the_other_and_back(lab: Lab) -> None:
    host, _ = lab.ends("smb")
    for there, owner in (("nfs", ""), ("smb", host.name)):
        old = lab.image(host, "smb")
        ended = lab.ended(host, lab.call(host, endpoints.MOVE_DISKS, api.DiskMoveRequest(vm="smb", location=there)))
        assert ended.outcome is Outcome.COMPLETED, ended.fault
        new = lab.image(host, "smb")
        assert new.parent == Path("/shares", there)
        assert lab.holder(new) == owner
        assert not lab.at_server(old).exists()
        assert not leases.folder_of(str(lab.at_server(old))).exists()
        lab.goes_on(host, "smb")


def test_a_host_cut_off_from_an_nfs_server_loses_its_locks_and_can_write_no_more(lab: Lab) -> None:
    lost, heir = lab.ends("nfs")
    image = lab.image(lost, "nfs")
    lost.vm.plug("eth0", in_=False)
    wait_until(lambda: _starts(lab, heir, "heir", image), "the server lets go of the locks")
    lab.goes_on(heir, "heir")
    lost.vm.plug("eth0", in_=True)
    wait_until(lambda: scribe.LOST in lost.console("nfs"), "its guest is told that it cannot write")
    lab.goes_on(heir, "heir")
    ended(lab, heir, "heir", image)


def test_a_host_that_died_is_outlived_by_its_leases(lab: Lab) -> None:
    dead, heir = lab.ends("smb")
    image = lab.image(dead, "smb")
    dead.vm.end()
    with pytest.raises(ImageLeased, match=f"host '{dead.name}' holds the lease") as caught:
        start(lab, heir, "heir", image)
    assert "limosa storage release" in caught.value.todo
    with pytest.raises(Conflict):
        lab.call(heir, endpoints.RELEASE_IMAGE, api.ReleaseRequest(image=str(image), dead=heir.name))
    heir.limosa("storage", "release", str(image), "--from", dead.name)
    start(lab, heir, "heir", image)
    assert lab.holder(image) == heir.name
    lab.goes_on(heir, "heir")
    ended(lab, heir, "heir", image)


def ended(lab: Lab, host: VmHost, vm: str, image: Path) -> None:
    """Stop and forget a VM: its image is sound and nobody's."""
    lab.call(host, endpoints.STOP_VM, vm=vm)
    lab.call(host, endpoints.DELETE_VM, vm=vm)
    assert lab.holder(image) == ""
    assert_clean(lab.at_server(image))


def _starts(lab: Lab, host: VmHost, name: str, image: Path) -> bool:
    try:
        start(lab, host, name, image)
    except QemuError as error:
        if "lock" not in str(error):
            raise
        return False
    return True
