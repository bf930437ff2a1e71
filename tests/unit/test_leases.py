"""Leases on images: never two hosts that write one, whatever order things happen in and whoever dies."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from limosa.errors import ImageLeased, StorageError
from limosa.model import reading
from limosa.storage import leases, mounts
from limosa.storage.leases import FREE, Change, Lease, Rule, change, read

IMAGE = "/share/web.qcow2"
VM = "0b9a6a5e-8a6f-4f0e-9d6c-6f3f4f3b2a1d"
MOVE = "aaaaaaaaaaaa"


def alpha(boot: str = "one") -> Rule:
    return Rule(IMAGE, "alpha", boot, VM)


def beta(boot: str = "one") -> Rule:
    return Rule(IMAGE, "beta", boot, VM)


def test_a_lease_goes_with_a_move_and_back() -> None:
    ours = alpha().take(FREE)
    promised = alpha().promise(ours, "beta", MOVE)
    assert promised.host == "alpha", "until it is claimed"
    claimed = beta().claim(promised, MOVE)
    assert (claimed.host, claimed.promised_to) == ("beta", "")
    assert beta().claim(claimed, MOVE) == claimed, "the source's word may come twice"
    back = alpha().claim(beta().promise(claimed, "alpha", "bbbbbbbbbbbb"), "bbbbbbbbbbbb")
    assert back.host == "alpha"
    assert [ours.epoch, promised.epoch, claimed.epoch, back.epoch] == [1, 2, 3, 5]


def test_what_another_holds_is_not_taken_and_the_error_says_what_to_do() -> None:
    with pytest.raises(ImageLeased, match="'alpha' holds the lease") as caught:
        beta().take(alpha().take(FREE))
    assert "limosa storage release /share/web.qcow2 --from alpha" in caught.value.todo


def test_a_host_takes_its_own_again_after_a_restart_of_it_or_of_its_daemon() -> None:
    held = alpha().take(FREE)
    assert alpha().take(held) == held
    again = alpha("two").take(held)
    assert (again.boot, again.epoch) == ("two", held.epoch + 1)


def test_two_hosts_of_one_name_do_not_take_it_from_each_other() -> None:
    def of(machine: str, boot: str) -> Rule:
        return Rule(IMAGE, "alpha", boot, VM, machine)

    held = of("first", "one").take(FREE)
    twin = of("second", "two")
    for change_it in (twin.take, lambda now: twin.promise(now, "beta", MOVE), lambda now: twin.reclaim(now, MOVE)):
        with pytest.raises(ImageLeased, match="another machine named 'alpha'"):
            change_it(held)
    assert twin.give_back(held) == twin.withdraw(held, MOVE) == held
    assert of("first", "three").take(held).boot == "three"
    assert twin.take(leases.release(held, IMAGE, "alpha")).machine == "second"


def test_a_lease_of_before_machines_were_written_is_its_host_s() -> None:
    older = reading.decode(b'{"epoch": 3, "host": "alpha", "boot": "one", "vm": "%s"}' % VM.encode(), Lease)
    assert Rule(IMAGE, "alpha", "two", VM, "first").take(older).machine == "first"


def test_what_was_handed_back_is_its_machine_s_again() -> None:
    ours, theirs = Rule(IMAGE, "alpha", "one", VM, "first"), Rule(IMAGE, "beta", "one", VM, "second")
    claimed = theirs.claim(ours.promise(ours.take(FREE), "beta", MOVE), MOVE)
    assert claimed.machine == "second"
    assert ours.reclaim(theirs.hand_back(claimed, "alpha", MOVE), MOVE).machine == "first"


def test_two_vms_of_one_host_do_not_share_an_image() -> None:
    with pytest.raises(ImageLeased):
        Rule(IMAGE, "alpha", "one", "another VM").take(alpha().take(FREE))


def test_what_is_promised_is_not_started_anew_at_the_source_before_it_is_withdrawn() -> None:
    promised = alpha().promise(alpha().take(FREE), "beta", MOVE)
    for boot in ("one", "two"):
        with pytest.raises(ImageLeased):
            alpha(boot).take(promised)
        assert alpha(boot).give_back(promised) == promised
    with pytest.raises(ImageLeased):
        beta().claim(alpha().reclaim(promised, MOVE), MOVE)
    assert alpha().withdraw(promised, MOVE) == Lease(epoch=promised.epoch + 1)


def test_nobody_but_the_promised_claims_and_by_no_other_move() -> None:
    promised = alpha().promise(alpha().take(FREE), "beta", MOVE)
    with pytest.raises(ImageLeased):
        Rule(IMAGE, "gamma", "one", VM).claim(promised, MOVE)
    with pytest.raises(ImageLeased):
        beta().claim(promised, "cccccccccccc")
    with pytest.raises(ImageLeased):
        beta().claim(FREE, MOVE)


def test_release_is_for_the_host_that_is_named() -> None:
    held = alpha().take(FREE)
    with pytest.raises(ImageLeased):
        leases.release(held, IMAGE, "beta")
    with pytest.raises(ImageLeased, match="no host") as caught:
        leases.release(FREE, IMAGE, "alpha")
    assert "start a VM" in caught.value.todo
    assert beta().take(leases.release(held, IMAGE, "alpha")).host == "beta"


# Every order ----------------------------------------------------------------------------------------------------------

HOSTS = ("alpha", "beta")


@dataclass(frozen=True)
class Site:
    """A host, as far as leases are concerned."""

    #: its QEMU writes the image
    writes: bool = False
    #: its QEMU has sent everything away, and could go on
    stopped: bool = False
    #: it moves the VM to the other, and has not settled that
    leaves: bool = False
    #: it awaits the VM of the other
    awaits: bool = False
    #: the change it is about to make, by the lease it has read, and what the host is when it is made
    wants: Lease | None = None
    then: Site | None = None
    read_of: int = -1


@dataclass(frozen=True)
class World:
    """The lease and the hosts. Only what tells worlds apart is in it: epochs are made relative, boots old or new."""

    lease: Lease
    sites: tuple[Site, Site]

    def with_site(self, number: int, site: Site) -> World:
        sites = (site, self.sites[1]) if number == 0 else (self.sites[0], site)
        return replace(self, sites=sites)

    def normal(self) -> World:
        """The same with the lease at epoch 100; a change that read an older one failed already, whichever it was."""
        now = self.lease.epoch
        sites = [
            replace(site, read_of=100 if site.read_of == now else 0) if site.wants else site for site in self.sites
        ]
        return World(msgspec.structs.replace(self.lease, epoch=100), (sites[0], sites[1]))


def rule_at(number: int) -> Rule:
    return Rule(IMAGE, HOSTS[number], "new", VM)


def wanting(world: World, number: int, how: Callable[[Lease], Lease], then: Site) -> Iterator[World]:
    """The host reads the lease and is about to change it."""
    try:
        following = how(world.lease)
    except ImageLeased:
        return
    if following == world.lease:
        yield world.with_site(number, then)
    else:
        yield world.with_site(
            number, replace(world.sites[number], wants=following, then=then, read_of=world.lease.epoch)
        )


def after(world: World) -> Iterator[World]:
    for number in (0, 1):
        yield from acts(world, number)
        yield from accidents(world, number)


def acts(world: World, number: int) -> Iterator[World]:
    """What a host can do next."""
    site, other, own = world.sites[number], world.sites[1 - number], rule_at(number)
    if site.wants is not None and site.then is not None:
        made = world.lease.epoch == site.read_of
        settled = site.then if made else replace(site, wants=None, then=None, read_of=-1)
        yield replace(world.with_site(number, settled), lease=site.wants if made else world.lease)
        return
    if site == Site():
        yield from wanting(world, number, own.take, Site(writes=True))
        if other.leaves:
            yield world.with_site(number, Site(awaits=True))
    if site == Site(writes=True):
        yield from wanting(world.with_site(number, Site()), number, own.give_back, Site())
        yield from wanting(
            world, number, lambda now: own.promise(now, HOSTS[1 - number], MOVE), Site(writes=True, leaves=True)
        )
    if site.leaves and site.writes:
        yield world.with_site(number, Site(stopped=True, leaves=True))
    if site.leaves:
        # Its QEMU ends, be it because the other has taken over.
        ended = Site(leaves=True)
        yield from wanting(world.with_site(number, ended), number, own.give_back, ended)
        # Also when it is wrong, for a person may say so.
        if site.writes or site.stopped:
            yield from wanting(world, number, lambda now: own.reclaim(now, MOVE), Site(writes=True))
        if not site.writes:
            yield from wanting(world.with_site(number, Site()), number, lambda now: own.withdraw(now, MOVE), Site())
            yield world.with_site(number, Site())
    if site.awaits:
        if not other.writes:  # the one rule of ownership that is taken for granted
            yield from wanting(world, number, lambda now: own.claim(now, MOVE), Site(writes=True))
            yield from wanting(world, number, lambda now: own.claim(now, MOVE), site)  # and it dies before it goes on
        gone = world.with_site(number, Site())
        yield from wanting(gone, number, lambda now: own.hand_back(now, HOSTS[1 - number], MOVE), Site())


def accidents(world: World, number: int) -> Iterator[World]:
    """A daemon dies; a host starts anew; a person releases the lease of a host on which nothing writes, or will."""
    site = world.sites[number]
    yield world.with_site(number, replace(site, wants=None, then=None, read_of=-1))
    lease = world.lease
    if lease.host == HOSTS[number]:
        lease = msgspec.structs.replace(lease, boot="old")
        if site == Site():
            yield replace(world, lease=leases.release(lease, IMAGE, HOSTS[number]))
    yield replace(world.with_site(number, Site(leaves=site.leaves, awaits=site.awaits)), lease=lease)


def faults(limit: int = 2_000_000) -> list[World]:
    """Worlds in which two write, or one whom the lease does not name. Walks all there are."""
    first = World(FREE, (Site(), Site())).normal()
    seen, waiting, found = {first}, [first], []
    while waiting:
        world = waiting.pop()
        writers = [HOSTS[number] for number in (0, 1) if world.sites[number].writes]
        if writers not in ([], [world.lease.host]):
            found.append(world)
            continue
        for following in map(World.normal, after(world)):
            if following not in seen:
                seen.add(following)
                waiting.append(following)
        assert len(seen) < limit
    assert any(world.lease.promised_to and world.sites[1].stopped for world in seen), "moves are among them"
    return found


def test_no_order_of_things_makes_two_writers() -> None:
    assert faults() == []


@pytest.mark.parametrize("broken", ["take", "claim", "give_back", "reclaim"])
def test_the_walk_finds_what_a_weaker_rule_would_allow(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def take_it_all(rule: Rule, now: Lease, *_: str) -> Lease:
        return Lease(epoch=now.epoch + 1, host=rule.host, boot=rule.boot, vm=rule.vm)

    def free_it_all(_: Rule, now: Lease) -> Lease:
        return Lease(epoch=now.epoch + 1)

    monkeypatch.setattr(Rule, broken, free_it_all if broken == "give_back" else take_it_all)
    assert faults()


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def image(tmp_path: Path) -> str:
    path = tmp_path / "web.qcow2"
    path.touch()
    return str(path)


def rule_of(host: str, image: str) -> Rule:
    return Rule(image, host, "one", VM)


def test_one_of_many_gets_it_each_time(image: str) -> None:
    for _ in range(20):
        winners: list[str] = []
        start = threading.Barrier(4)

        def want(host: str, winners: list[str] = winners, start: threading.Barrier = start) -> None:
            start.wait()
            try:
                change(image, rule_of(host, image).take)
                winners.append(host)
            except ImageLeased:
                pass

        threads = [threading.Thread(target=want, args=(f"host{number}",)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [read(image).host] == winners
        change(image, rule_of(winners[0], image).give_back)


def test_a_change_that_comes_too_late_is_not_made(image: str) -> None:
    slow = Change(image, rule_of("slow", image).take(read(image)))
    fast = rule_of("fast", image)
    change(image, fast.take)
    change(image, fast.give_back)
    change(image, fast.take)  # the number the slow one wants is free again: what had it was removed
    assert not (leases.folder_of(image) / "00000001").exists()
    assert not slow.make()
    assert read(image).host == "fast"
    slow.close()
    assert [path.name for path in leases.folder_of(image).iterdir()] == ["00000003"]


def test_a_lease_is_beside_the_image_by_its_real_name(image: str) -> None:
    other = Path(image).with_name("link.qcow2")
    other.symlink_to(image)
    change(str(other), rule_of("alpha", image).take)
    assert read(image).host == "alpha"
    leases.forget(image)
    assert read(image) == FREE


def test_a_damaged_lease_is_nobodys_to_take(image: str) -> None:
    change(image, rule_of("alpha", image).take)
    (leases.folder_of(image) / "00000001" / "lease.json").write_text("{")
    with pytest.raises(StorageError, match="cannot read the lease"):
        change(image, rule_of("beta", image).take)


def test_a_lease_without_contents_is_nobodys_to_take(image: str) -> None:
    change(image, rule_of("alpha", image).take)
    (leases.folder_of(image) / "00000001" / "lease.json").unlink()
    with pytest.raises(StorageError, match="cannot read the lease"):
        read(image)


@pytest.mark.parametrize(
    ("kind", "source", "options", "none"),
    [
        ("cifs", "//server/vms", "serverino", True),
        ("smb3", "//server/vms", "serverino,nobrl", True),
        ("fuse.smbnetfs", "smbnetfs", "", True),
        ("fuse", "//server/vms", "", True),
        ("fuse.sshfs", "server:/vms", "", False),
        ("nfs4", "server:/vms", "rw,vers=4.2,local_lock=none", False),
        ("nfs", "server:/vms", "rw,vers=3,local_lock=none", False),
        ("nfs", "server:/vms", "rw,vers=3,local_lock=flock", False),
        ("nfs", "server:/vms", "rw,vers=3,local_lock=posix", True),
        ("nfs", "server:/vms", "rw,vers=3,nolock,local_lock=all", True),
        ("ext4", "/dev/sda1", "local_lock=all", False),
    ],
)
def test_file_systems_whose_locks_do_not_reach_other_hosts(kind: str, source: str, options: str, none: bool) -> None:
    assert mounts.Mount(kind, source, frozenset(options.split(","))).has_no_locks is none


@pytest.mark.parametrize(
    ("kind", "source", "options", "may"),
    [
        ("fuse.sshfs", "server:/vms", "", True),
        ("fuse.rclone", "remote:", "", True),
        ("9p", "vms", "trans=virtio", True),
        ("ocfs2", "/dev/sdb", "", True),
        ("lustre", "mds@tcp:/vms", "flock", False),
        ("lustre", "mds@tcp:/vms", "localflock", True),
        ("gfs2", "/dev/sdb", "localflocks", True),
        ("gfs2", "/dev/sdb", "", False),
        ("fuse.glusterfs", "server:vms", "", False),
        ("fuse.ceph", "ceph-fuse", "", False),
        ("ceph", "server:/", "", False),
        ("nfs4", "server:/vms", "local_lock=none", False),
        ("nfs", "server:/vms", "local_lock=all", True),
        ("cifs", "//server/vms", "nobrl", True),
        ("ext4", "/dev/sda1", "", False),
    ],
)
def test_shares_of_which_it_is_not_known_that_locks_reach_others(
    kind: str, source: str, options: str, may: bool
) -> None:
    assert mounts.Mount(kind, source, frozenset(options.split(","))).locks_may_end_here is may


def test_a_client_that_remembers_what_a_folder_held_is_made_to_look(
    image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As sshfs does: what this host has listed stays so for it until it changes the folder itself."""
    change(image, rule_of("alpha", image).take)
    known = {leases.folder_of(image): ["00000001"]}
    change(image, lambda now: rule_of("alpha", image).promise(now, "beta", MOVE))
    listdir, mkdir = os.listdir, Path.mkdir

    def made(path: Path, *how: Any, **more: Any) -> None:
        mkdir(path, *how, **more)
        known.pop(path.parent, None)

    monkeypatch.setattr(os, "listdir", lambda folder: known.get(folder) or listdir(folder))
    monkeypatch.setattr(Path, "mkdir", made)
    assert read(image).promised_to == "beta"
    assert [path.name for path in leases.folder_of(image).iterdir()] == ["00000002"]


def test_an_image_needs_one_where_there_is_one(image: str) -> None:
    assert not leases.is_needed(image)
    change(image, rule_of("alpha", image).take)
    assert leases.is_needed(image)
    assert not leases.is_needed(image + ".gone")
