"""Leases on images: never two hosts that write one, whatever order things happen in and whoever dies."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from limosa.errors import ImageLeased, StorageError
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
    with pytest.raises(ImageLeased, match="no host"):
        leases.release(FREE, IMAGE, "alpha")
    assert beta().take(leases.release(held, IMAGE, "alpha")).host == "beta"


# Every order ----------------------------------------------------------------------------------------------------------


@dataclass
class Site:
    """A host, as far as leases are concerned."""

    name: str
    boots: int = 0
    #: its QEMU writes the image
    writes: bool = False
    #: its QEMU has sent everything away, and could go on
    stopped: bool = False
    #: the host it was told to move to, which is still to decide
    moves_to: str = ""
    #: it awaits the guest of this host
    awaits: str = ""
    #: a change it has prepared, and what follows if it is made
    pending: tuple[int, Lease, Callable[[], None]] | None = field(default=None)

    @property
    def rule(self) -> Rule:
        return Rule(IMAGE, self.name, str(self.boots), VM)


SITES = st.sampled_from(["alpha", "beta", "gamma"])


class Interleavings(RuleBasedStateMachine):
    """Hosts that read the lease and change it later, when it may be another, and die in between.

    Of the rules of ownership only one is taken for granted: a destination claims when the source's QEMU has stopped for
    good or until it is told otherwise. People may say anything but that a host is dead which is not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lease = FREE
        self.sites = {name: Site(name) for name in ("alpha", "beta", "gamma")}

    def _prepare(self, site: Site, how: Callable[[Lease], Lease], then: Callable[[], None]) -> None:
        try:
            following = how(self.lease)
        except ImageLeased:
            return
        if following == self.lease:
            then()
        else:
            site.pending = (self.lease.epoch, following, then)

    @rule(name=SITES)
    def commit(self, name: str) -> None:
        site = self.sites[name]
        if site.pending is None:
            return
        epoch, following, then = site.pending
        site.pending = None
        if self.lease.epoch == epoch:
            self.lease = following
            then()

    @rule(name=SITES)
    def start(self, name: str) -> None:
        site = self.sites[name]
        if not (site.writes or site.stopped or site.moves_to or site.awaits or site.pending):
            self._prepare(site, site.rule.take, lambda: setattr(site, "writes", True))

    @rule(name=SITES)
    def stop(self, name: str) -> None:
        site = self.sites[name]
        if site.writes and not site.moves_to and not site.pending:
            site.writes = False
            self._prepare(site, site.rule.give_back, lambda: None)

    @rule(name=SITES, there=SITES)
    def promise(self, name: str, there: str) -> None:
        site, other = self.sites[name], self.sites[there]
        if not site.writes or site.pending or site.moves_to or other is site or self._is_busy(other):
            return

        def then() -> None:
            if not self._is_busy(other):
                site.moves_to, other.awaits = there, name

        self._prepare(site, lambda now: site.rule.promise(now, there, MOVE), then)

    def _is_busy(self, site: Site) -> bool:
        return bool(site.writes or site.stopped or site.awaits or site.pending or site.moves_to)

    @rule(name=SITES)
    def complete(self, name: str) -> None:
        site = self.sites[name]
        if site.moves_to and site.writes and not site.pending:
            site.writes, site.stopped = False, True

    @rule(name=SITES)
    def claim(self, name: str) -> None:
        site = self.sites[name]
        if site.awaits and not site.pending and not self.sites[site.awaits].writes:
            self._prepare(site, lambda now: site.rule.claim(now, MOVE), lambda: self._land(site))

    def _land(self, site: Site) -> None:
        site.awaits, site.writes = "", True

    @rule(name=SITES)
    def destroy(self, name: str) -> None:
        site = self.sites[name]
        if site.awaits and not site.pending:
            source, site.awaits = site.awaits, ""
            self._prepare(site, lambda now: site.rule.hand_back(now, source, MOVE), lambda: None)

    @rule(name=SITES)
    def claim_and_die_before_it_continues(self, name: str) -> None:
        site = self.sites[name]
        if site.awaits and not site.pending and not self.sites[site.awaits].writes:
            self._prepare(site, lambda now: site.rule.claim(now, MOVE), lambda: None)

    @rule(name=SITES)
    def reclaim(self, name: str) -> None:
        """Also when it is wrong: a person may say so."""
        site = self.sites[name]
        if site.moves_to and site.stopped and not site.pending:
            self._prepare(site, lambda now: site.rule.reclaim(now, MOVE), lambda: self._stay(site))

    def _stay(self, site: Site) -> None:
        site.moves_to, site.stopped, site.writes = "", False, True

    @rule(name=SITES)
    def daemon_dies(self, name: str) -> None:
        self.sites[name].pending = None

    @rule(name=SITES)
    def host_dies(self, name: str) -> None:
        site = self.sites[name]
        self.sites[name] = Site(name, site.boots + 1, moves_to=site.moves_to, awaits=site.awaits)

    @rule(name=SITES)
    def crashed_here(self, name: str) -> None:
        """The guest died at the source, by the rules of ownership or a person's word."""
        site = self.sites[name]
        if site.moves_to and not site.writes and not site.pending:
            site.stopped, site.moves_to = False, ""
            self._prepare(site, lambda now: site.rule.withdraw(now, MOVE), lambda: None)

    @rule(name=SITES)
    def release(self, name: str) -> None:
        site = self.sites[name]
        if self.lease.host == name and not site.writes and not site.pending and not site.awaits:
            self.lease = leases.release(self.lease, IMAGE, name)

    @invariant()
    def one_writes_at_most_and_the_lease_names_it(self) -> None:
        writers = [site.name for site in self.sites.values() if site.writes]
        assert len(writers) <= 1
        assert writers in ([], [self.lease.host])


TestInterleavings = Interleavings.TestCase
TestInterleavings.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)


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
    ("kind", "source", "none"),
    [
        ("cifs", "//server/vms", True),
        ("smb3", "//server/vms", True),
        ("fuse.smbnetfs", "smbnetfs", True),
        ("fuse", "//server/vms", True),
        ("fuse.sshfs", "server:/vms", False),
        ("nfs4", "server:/vms", False),
        ("ext4", "/dev/sda1", False),
    ],
)
def test_file_systems_whose_locks_do_not_reach_other_hosts(kind: str, source: str, none: bool) -> None:
    assert mounts.Mount(kind, source).has_no_locks is none


def test_an_image_needs_one_where_there_is_one(image: str) -> None:
    assert not leases.is_needed(image)
    change(image, rule_of("alpha", image).take)
    assert leases.is_needed(image)
    assert not leases.is_needed(image + ".gone")
