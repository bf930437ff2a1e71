"""What becomes of the disks of a VM that moves: pure plans, and when a copy is told that it does not end."""

from __future__ import annotations

import asyncio
import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_preflight import HERE, THERE, VM

from limosa.errors import MigrationFailed, NotConverging, StorageError
from limosa.migration import disks, examination, mirrors
from limosa.migration.mirrors import Excess, Keeping, Mirrors
from limosa.migration.progress import Bar, of_disks
from limosa.model.base import NAME_PATTERN
from limosa.model.finding import Severity
from limosa.model.migration import Phase, Progress
from limosa.model.storage import BackingFile, Chain, DiskAction, DiskFacts, DiskPlan, DiskProgress, Location
from limosa.model.units import KIB, MIB
from limosa.model.vm import Disk, DiskFormat
from limosa.qemu.protocol import CopyState, CopyStatistics, Event, MigrationStatistics
from limosa.settings.host import ConvergencePolicy
from limosa.testing.disks import FakeDisks

GIB = 1 << 30
FACT = DiskFacts(
    name="vda",
    path="/vm/web1.qcow2",
    format="qcow2",
    virtual_bytes=8 * GIB,
    allocated_bytes=GIB,
    chain_bytes=2 * GIB,
    location="fast",
)
IMAGES = Location(name="images", path="/var/images", default=True, total_bytes=100 * GIB, free_bytes=50 * GIB)
FAST = Location(name="fast", path="/srv/fast", total_bytes=100 * GIB, free_bytes=50 * GIB)
BULK = Location(
    name="bulk", path="/dev/vg0", kind="lvm", unit_bytes=4 << 20, total_bytes=100 * GIB, free_bytes=50 * GIB
)
POOL = msgspec.structs.replace(BULK, name="pool", source="vg0/pool", thin=True, unit_bytes=1)
PRIVATE = msgspec.structs.replace(HERE, files=(msgspec.structs.replace(HERE.files[0], private=True),))

CD = msgspec.structs.replace(VM, disks=(msgspec.structs.replace(VM.disks[0], format="raw", read_only=True),))


def planned(
    *locations: Location,
    fact: DiskFacts = FACT,
    wishes: dict[str, str] | None = None,
    found: dict[str, BackingFile] | None = None,
) -> tuple[DiskPlan, list[str]]:
    there = msgspec.structs.replace(THERE, locations=locations)
    chain: Chain = "keep" if found is not None else "flatten"
    made = disks.plan(VM, [fact], there, wishes or {}, "abc", found or {}, chain)
    (plan,) = made.disks
    assert made.layers == ()
    return plan, [finding.code for finding in made.findings]


class TestWhatIsCopied:
    """Only what the destination does not see, or was asked to go elsewhere."""

    def test_what_both_see_stays(self) -> None:
        assert disks.to_copy(VM, HERE, THERE, {}) == ()

    def test_what_only_the_source_sees_goes(self) -> None:
        unseen = msgspec.structs.replace(THERE, files=())
        assert disks.to_copy(VM, HERE, unseen, {}) == VM.disks
        assert disks.to_copy(VM, PRIVATE, THERE, {}) == VM.disks

    def test_what_was_asked_for_goes(self) -> None:
        assert disks.to_copy(VM, HERE, THERE, {"vda": "fast"}) == VM.disks

    def test_what_is_only_read_is_sent(self) -> None:
        assert disks.to_copy(CD, PRIVATE, THERE, {"vda": "fast"}) == ()
        assert disks.to_send(CD, PRIVATE, THERE, {}) == CD.disks
        assert disks.to_send(CD, HERE, THERE, {"vda": "fast"}) == CD.disks
        assert disks.to_send(CD, HERE, THERE, {}) == ()
        assert disks.to_send(VM, PRIVATE, THERE, {}) == ()


class TestThePlan:
    """Where a copy goes, and what stands against it."""

    def test_to_the_location_of_the_same_name(self) -> None:
        plan, against = planned(IMAGES, FAST)
        assert against == []
        assert (plan.action, plan.location) == (DiskAction.COPY, "fast")
        assert plan.path == "/srv/fast/web1-vda.abc.qcow2"
        assert plan.expected_bytes == 2 * GIB
        assert 2 * GIB < plan.space_bytes < 2.01 * GIB, "with the image's own tables"

    def test_else_to_the_default(self) -> None:
        plan, against = planned(IMAGES)
        assert (plan.location, against) == ("images", [])

    def test_where_it_was_asked_to_go(self) -> None:
        plan, against = planned(IMAGES, FAST, wishes={"vda": "images"})
        assert (plan.location, against) == ("images", [])

    @pytest.mark.parametrize(
        ("locations", "wishes", "code"),
        [
            ((IMAGES,), {"vda": "fast"}, "location-unknown"),
            ((IMAGES,), {"vdb": "images"}, "disk-unknown"),
            ((msgspec.structs.replace(IMAGES, free_bytes=GIB),), {}, "space-short"),
            ((msgspec.structs.replace(IMAGES, fault="No such file or directory"),), {}, "location-unusable"),
        ],
    )
    def test_what_stands_against_it(self, locations: tuple[Location, ...], wishes: dict[str, str], code: str) -> None:
        there = msgspec.structs.replace(THERE, locations=locations)
        made = disks.plan(VM, [FACT], there, wishes, "abc", {})
        assert [finding.code for finding in made.findings] == [code]

    def test_no_location_at_all(self) -> None:
        there = msgspec.structs.replace(THERE, locations=(FAST,))
        elsewhere = msgspec.structs.replace(FACT, location="")
        made = disks.plan(VM, [elsewhere], there, {}, "abc", {})
        assert (made.disks, [finding.code for finding in made.findings]) == ((), ["location-unknown"])

    def test_snapshots_are_not_lost(self) -> None:
        _, against = planned(IMAGES, fact=msgspec.structs.replace(FACT, snapshots=2))
        assert against == ["disk-snapshots"]

    def test_that_bitmaps_are_lost_is_said(self) -> None:
        (found,) = disks.against_copying(msgspec.structs.replace(FACT, bitmaps=2))
        assert (found.code, found.severity) == ("disk-bitmaps", Severity.WARNING)

    def test_several_disks_share_what_is_free(self) -> None:
        plans = [disks.copied("web1", msgspec.structs.replace(FACT, name=name), FAST, "abc") for name in ("vda", "vdb")]
        tight = msgspec.structs.replace(FAST, free_bytes=3 * GIB)
        assert [finding.code for finding in disks.space(plans, {"fast": tight}, "host2")] == ["space-short"]
        assert disks.space(plans[:1], {"fast": tight}, "host2") == []

    def test_a_file_system_that_does_not_say_how_large_it_is_has_room(self) -> None:
        plan = disks.copied("web1", FACT, FAST, "abc")
        untold = msgspec.structs.replace(FAST, total_bytes=0, free_bytes=0)
        assert disks.space([plan], {"fast": untold}, "host2") == []
        assert msgspec.structs.replace(untold, fault="it is mounted read-only").lacks(1)

    def test_on_a_logical_volume_it_is_raw_and_whole(self) -> None:
        base = BackingFile(path="/var/images/golden.qcow2", format="qcow2", size=GIB, digest="d")
        overlay = msgspec.structs.replace(FACT, below=(base,))
        plan, against = planned(IMAGES, BULK, fact=overlay, wishes={"vda": "bulk"}, found={"d": base})
        assert against == []
        assert (plan.action, plan.format, plan.device, plan.backing) == (DiskAction.COPY, "raw", True, None)
        assert plan.path == "/dev/vg0/web1-vda.abc.raw"
        assert disks.landed(VM, [plan]).disks == (
            Disk(name="vda", path=plan.path, format="raw", size_bytes=FACT.virtual_bytes),
        )

    def test_a_logical_volume_takes_all_its_space_and_whole_extents_unless_it_is_thin(self) -> None:
        odd = msgspec.structs.replace(FACT, virtual_bytes=8 * GIB + 512)
        thick, thin = (disks.copied("web1", odd, location, "abc") for location in (BULK, POOL))
        assert (thick.space_bytes, thin.space_bytes) == (8 * GIB + (4 << 20), 8 * GIB + 512)
        assert thick.expected_bytes == thin.expected_bytes == 2 * GIB, "holes and zeroes are not sent"

    def test_a_location_must_have_the_space_and_not_only_what_is_sent(self) -> None:
        bulk = msgspec.structs.replace(BULK, free_bytes=8 * GIB)
        assert planned(IMAGES, bulk, wishes={"vda": "bulk"})[1] == []
        short = msgspec.structs.replace(BULK, free_bytes=8 * GIB - 1)
        assert planned(IMAGES, short, wishes={"vda": "bulk"})[1] == ["space-short"]

    def test_from_a_logical_volume_to_a_file(self) -> None:
        on_volume = Disk(name="vda", path="/dev/vg0/web1-vda.abc.raw", format="raw", size_bytes=8 * GIB)
        vm = msgspec.structs.replace(VM, disks=(on_volume,))
        plan = disks.copied("web1", msgspec.structs.replace(FACT, format="raw"), FAST, "xyz")
        landed = Disk(name="vda", path="/srv/fast/web1-vda.xyz.raw", format="raw")
        assert disks.landed(vm, [plan]).disks == (landed,)
        stays = disks.plan(vm, [], THERE, {}, "abc", {})
        assert disks.landed(vm, stays.disks) == vm

    @pytest.mark.parametrize(
        ("location", "image_format", "thick", "refused"),
        [
            (FAST, "qcow2", True, False),
            (BULK, None, True, False),
            (BULK, "raw", False, False),
            (BULK, "qcow2", False, True),
            (POOL, None, False, False),
            (POOL, None, True, True),
        ],
    )
    def test_what_an_image_cannot_be(
        self, location: Location, image_format: DiskFormat | None, thick: bool, refused: bool
    ) -> None:
        found = disks.against_form(location, image_format, thick=thick)
        assert [finding.code for finding in found] == ["form-not-possible"] * refused

    @given(vm=st.from_regex(NAME_PATTERN).filter(lambda name: len(name) <= 63))
    def test_every_name_is_one_a_logical_volume_may_have(self, vm: str) -> None:
        name = disks.image_name(vm, "vda", "abcdefabcdef", "raw")
        assert re.fullmatch(r"[A-Za-z0-9.][A-Za-z0-9.-]*", name)
        assert not name.startswith(("snapshot", "pvmove"))
        assert name.endswith("-vda.abcdefabcdef.raw")
        assert len(name.replace("-", "--")) <= 110

    def test_a_disk_knows_that_its_image_is_thick(self) -> None:
        thick = disks.copied("web1", FACT, FAST, "abc", "raw", thick=True)
        vm = disks.landed(VM, [thick])
        assert vm.disks[0].thick
        assert not disks.landed(vm, [disks.copied("web1", FACT, FAST, "abc")]).disks[0].thick

    @pytest.mark.parametrize("location", [FAST, BULK, POOL])
    def test_a_thick_disk_stays_thick_at_another_host_but_in_a_thin_pool(self, location: Location) -> None:
        vm = msgspec.structs.replace(VM, disks=(msgspec.structs.replace(VM.disks[0], thick=True),))
        below = BackingFile(path="/vm/golden.raw", format="raw", size=GIB, digest="d", allocated_bytes=GIB)
        fact = msgspec.structs.replace(FACT, below=(below,))
        there = msgspec.structs.replace(THERE, locations=(location,))
        made = disks.plan(vm, [fact], there, {"vda": location.name}, "abc", {"d": below})
        assert [one.action for one in made.disks] == [DiskAction.COPY], "with nothing below it"
        assert made.disks[0].space_bytes >= 8 * GIB
        assert made.disks[0].expected_bytes == 2 * GIB
        assert disks.landed(vm, made.disks).disks[0].thick is not location.thin
        assert [one.code for one in made.findings] == ["thick-lost"] * location.thin
        assert disks.plan(VM, [FACT], there, {"vda": location.name}, "abc", {}).findings == ()

    def test_thick_takes_all_it_may(self) -> None:
        assert disks.copied("web1", FACT, FAST, "abc", "raw", thick=True).space_bytes == 8 * GIB

    def test_a_disk_never_costs_more_than_it_shows(self) -> None:
        full = msgspec.structs.replace(FACT, chain_bytes=100 * GIB)
        plan = disks.copied("web1", full, FAST, "abc", "raw")
        assert plan.expected_bytes == plan.space_bytes == 8 * GIB

    def test_the_vm_as_it_lands(self) -> None:
        stays = Disk(name="vdb", path="/mnt/b.raw", format="raw", read_only=True)
        vm = msgspec.structs.replace(VM, disks=(*VM.disks, stays))
        landed = disks.landed(vm, [disks.copied("web1", FACT, FAST, "abc", "raw")])
        assert landed.disks == (Disk(name="vda", path="/srv/fast/web1-vda.abc.raw", format="raw"), stays)
        assert msgspec.structs.replace(landed, disks=vm.disks) == vm


LOWEST = BackingFile(
    path="/gold/golden.raw", format="raw", size=4 * GIB, allocated_bytes=GIB, digest="d0", location="gold"
)
MIDDLE = BackingFile(path="/vm/middle.qcow2", format="qcow2", size=GIB, allocated_bytes=GIB, digest="d1")
OVERLAY = msgspec.structs.replace(FACT, below=(MIDDLE, LOWEST), chain_bytes=3 * GIB)


class TestChains:
    """What lies below a disk: there already, sent, or in one piece with it."""

    def planned(self, *facts: DiskFacts, found: Sequence[BackingFile] = (), free: int = 50 * GIB) -> disks.Planned:
        there = msgspec.structs.replace(THERE, locations=(msgspec.structs.replace(FAST, free_bytes=free), IMAGES))
        named = tuple(Disk(name=fact.name, path=fact.path, format="qcow2") for fact in facts)
        vm = msgspec.structs.replace(VM, disks=named)
        return disks.plan(vm, facts, there, {}, "abcdefabcdef", {file.digest: file for file in found})

    def test_everything_is_sent_from_the_lowest_on(self) -> None:
        made = self.planned(OVERLAY)
        lowest, middle = made.layers
        assert (lowest.origin, lowest.backing, lowest.expected_bytes) == (LOWEST.path, None, GIB)
        assert lowest.file.path == "/srv/fast/golden.abcdefabcdef-1.raw"
        assert (middle.origin, middle.backing) == (MIDDLE.path, lowest.file)
        assert middle.file.path == "/srv/fast/middle.abcdefabcdef-2.qcow2"
        (disk,) = made.disks
        assert (disk.action, disk.backing, disk.expected_bytes) == (DiskAction.COPY_OVERLAY, middle.file, GIB)
        assert "sent as" in disk.why

    def test_what_is_there_is_not_sent(self) -> None:
        there = msgspec.structs.replace(LOWEST, path="/var/images/other-name.raw")
        made = self.planned(OVERLAY, found=[there])
        (middle,) = made.layers
        assert (middle.origin, middle.backing) == (MIDDLE.path, there)
        assert made.disks[0].backing == middle.file

    def test_a_whole_chain_that_is_there(self) -> None:
        there = msgspec.structs.replace(MIDDLE, path="/var/images/middle.qcow2")
        made = self.planned(OVERLAY, found=[there, LOWEST])
        assert (made.layers, made.disks[0].backing) == ((), there)
        assert "there as" in made.disks[0].why

    def test_disks_that_share_a_file_share_its_copy(self) -> None:
        other = msgspec.structs.replace(OVERLAY, name="vdb", path="/vm/b.qcow2", below=(LOWEST,))
        made = self.planned(OVERLAY, other)
        assert [layer.origin for layer in made.layers] == [LOWEST.path, MIDDLE.path]
        assert [disk.backing for disk in made.disks] == [made.layers[1].file, made.layers[0].file]

    def test_it_goes_where_it_was_by_name(self) -> None:
        gold = Location(name="gold", path="/srv/gold", total_bytes=GIB, free_bytes=GIB)
        there = msgspec.structs.replace(THERE, locations=(FAST, IMAGES, gold))
        made = disks.plan(VM, [OVERLAY], there, {"vda": "images"}, "abcdefabcdef", {})
        assert [(layer.location, layer.file.location) for layer in made.layers] == [("gold",) * 2, ("images",) * 2]

    def test_it_goes_where_the_disk_goes_if_that_name_is_a_volume_groups(self) -> None:
        gold = msgspec.structs.replace(BULK, name="gold")
        there = msgspec.structs.replace(THERE, locations=(FAST, IMAGES, gold))
        made = disks.plan(VM, [OVERLAY], there, {}, "abcdefabcdef", {})
        assert [layer.location for layer in made.layers] == ["fast", "fast"]

    def test_of_disks_that_go_to_volumes_nothing_below_is_looked_at(self) -> None:
        on_volume, in_folder = OVERLAY, msgspec.structs.replace(OVERLAY, name="vdb", below=(LOWEST,))
        there = msgspec.structs.replace(THERE, locations=(FAST, IMAGES, BULK))
        asked = []

        class Here:
            async def facts(self, _: Iterable[Disk]) -> tuple[DiskFacts, ...]:
                raise NotImplementedError

            async def digest(self, backing: BackingFile) -> BackingFile:
                asked.append(backing.path)
                return backing

        facts = (on_volume, in_folder)
        names = {fact.name for fact in facts if disks.may_lie_above(fact, there, {"vda": "bulk"}.get(fact.name, ""))}
        assert asyncio.run(examination._with_digests(Here(), facts, names)) == facts
        assert asked == [LOWEST.path]
        assert not disks.may_lie_above(OVERLAY, msgspec.structs.replace(THERE, locations=()), "")

    def test_it_needs_space(self) -> None:
        assert [finding.code for finding in self.planned(OVERLAY, free=3 * GIB - 1).findings] == ["space-short"]
        assert self.planned(OVERLAY, free=3 * GIB).findings == ()

    def test_in_one_piece_if_that_is_wanted(self) -> None:
        plan, _ = planned(FAST, fact=OVERLAY)
        assert (plan.action, plan.backing) == (DiskAction.COPY, None)
        assert plan.space_bytes > plan.expected_bytes == 3 * GIB

    def test_a_disk_with_nothing_below_it(self) -> None:
        plan, _ = planned(FAST, found={})
        assert (plan.action, plan.backing) == (DiskAction.COPY, None)


class TestWhatIsOnlyRead:
    """It is sent as it is, unless the destination has it."""

    ISO = BackingFile(path="/iso/debian.iso", format="raw", size=GIB, allocated_bytes=GIB, digest="d0")
    FACT = DiskFacts(
        name="vda", path=ISO.path, format="raw", virtual_bytes=GIB, allocated_bytes=GIB, chain_bytes=GIB, below=(ISO,)
    )
    WITH_ROOM = msgspec.structs.replace(THERE, locations=(IMAGES,))

    def planned(
        self, *locations: Location, wish: str = "", found: BackingFile | None = None, chain: Chain = "keep"
    ) -> disks.Planned:
        there = msgspec.structs.replace(THERE, locations=locations)
        known = {found.digest: found} if found is not None else {}
        return disks.plan(CD, [self.FACT], there, {"vda": wish} if wish else {}, "abcdefabcdef", known, chain)

    @pytest.mark.parametrize("chain", ["keep", "flatten"])
    @pytest.mark.parametrize(("wish", "where"), [("", "/var/images"), ("fast", "/srv/fast")])
    def test_it_is_sent(self, chain: Chain, wish: str, where: str) -> None:
        made = self.planned(IMAGES, FAST, BULK, wish=wish, chain=chain)
        (layer,), (plan,) = made.layers, made.disks
        assert layer.origin == self.ISO.path
        assert layer.file.path == plan.path == f"{where}/debian.abcdefabcdef-1.raw"
        assert disks.copies(made.disks) == ()
        assert disks.landed(CD, made.disks).disks[0] == msgspec.structs.replace(CD.disks[0], path=plan.path)
        assert made.findings == ()

    def test_it_is_there(self) -> None:
        there = msgspec.structs.replace(self.ISO, path="/images/d.iso", location="images")
        made = self.planned(IMAGES, FAST, found=there)
        assert made.layers == ()
        assert disks.landed(CD, made.disks).disks[0].path == there.path

    @pytest.mark.parametrize(
        ("is_there", "origins"),
        [
            (False, ["/iso/debian.iso", "/iso/copy1.iso", "/iso/copy2.iso"]),
            (True, ["/iso/copy1.iso", "/iso/copy2.iso"]),
        ],
    )
    def test_equal_ones_of_one_vm_are_files_of_their_own(self, is_there: bool, origins: list[str]) -> None:
        names = {"vda": self.ISO.path, "vdb": "/iso/copy1.iso", "vdc": "/iso/copy2.iso"}
        base = CD.disks[0]
        cds = tuple(msgspec.structs.replace(base, name=name, path=path) for name, path in names.items())
        facts = [
            msgspec.structs.replace(
                self.FACT, name=name, path=path, below=(msgspec.structs.replace(self.ISO, path=path),)
            )
            for name, path in names.items()
        ]
        vm = msgspec.structs.replace(VM, disks=cds)
        there = msgspec.structs.replace(self.ISO, path="/var/images/d.iso", location="images")
        found = {there.digest: there} if is_there else {}
        made = disks.plan(vm, facts, self.WITH_ROOM, {}, "abcdefabcdef", found)
        assert made.findings == ()
        assert [layer.origin for layer in made.layers] == origins
        paths = [disk.path for disk in disks.landed(vm, made.disks).disks]
        sent = [layer.file.path for layer in made.layers]
        assert paths == ([there.path, *sent] if is_there else sent)
        assert ["sent" in plan.why for plan in made.disks] == [path in sent for path in paths]

    def test_it_is_not_the_file_of_a_disk_that_stays(self) -> None:
        stays = msgspec.structs.replace(CD.disks[0], name="vdb", path="/nas/debian.iso")
        vm = msgspec.structs.replace(VM, disks=(*CD.disks, stays))
        there = msgspec.structs.replace(self.ISO, path=stays.path)
        made = disks.plan(vm, [self.FACT], self.WITH_ROOM, {}, "abcdefabcdef", {there.digest: there})
        first, second = disks.landed(vm, made.disks).disks
        assert (first.path, second.path) == (made.layers[0].file.path, stays.path)

    def test_what_lies_below_equal_ones_is_one_file(self) -> None:
        below = msgspec.structs.replace(self.ISO, path="/iso/base.raw", digest="d1")
        facts = [
            msgspec.structs.replace(
                self.FACT, name=name, below=(msgspec.structs.replace(self.ISO, path=f"/iso/{name}.qcow2"), below)
            )
            for name in ("vda", "vdb")
        ]
        base = CD.disks[0]
        cds = tuple(msgspec.structs.replace(base, name=one.name, path=one.below[0].path) for one in facts)
        made = disks.plan(msgspec.structs.replace(VM, disks=cds), facts, self.WITH_ROOM, {}, "abcdefabcdef", {})
        assert [layer.origin for layer in made.layers] == ["/iso/base.raw", "/iso/vda.qcow2", "/iso/vdb.qcow2"]
        assert {layer.backing.path for layer in made.layers[1:] if layer.backing} == {made.layers[0].file.path}

    def test_a_volume_group_holds_none(self) -> None:
        only = msgspec.structs.replace(BULK, default=True)
        (plan,) = self.planned(only, msgspec.structs.replace(FAST, default=False)).disks
        assert plan.location == "fast"
        assert [finding.code for finding in self.planned(only).findings] == ["location-unknown"]
        assert [finding.code for finding in self.planned(IMAGES, BULK, wish="bulk").findings] == ["form-not-possible"]

    def test_there_has_to_be_room(self) -> None:
        full = msgspec.structs.replace(IMAGES, total_bytes=GIB, free_bytes=GIB - 1)
        assert [finding.code for finding in self.planned(full).findings] == ["space-short"]


class TestKeeping:
    """When the guest's writes are slowed, and when a copy is given up."""

    @given(
        patience=st.floats(1, 1000),
        looks=st.lists(st.tuples(st.floats(0, 300), st.integers(0, 1000)), max_size=100),
    )
    def test_writes_are_slowed_before_anything_is_given_up(
        self, patience: float, looks: list[tuple[float, int]]
    ) -> None:
        keeping, now, told = Keeping(patience, 0.0), 0.0, []
        for pause, remaining in looks:
            now += pause
            keeping, what = keeping.judge(now, remaining)
            told.append((now, what))
        acts = [what for _, what in told if what]
        assert acts.count("slow-writes") <= mirrors.MOST_SLOWED
        if "give-up" in acts:
            slowed = [at for at, what in told if what == "slow-writes"]
            given_up = next(at for at, what in told if what == "give-up")
            assert len(slowed) == mirrors.MOST_SLOWED
            assert given_up - slowed[-1] >= patience

    @given(st.lists(st.integers(1, 3), min_size=1, max_size=50))
    def test_one_that_comes_nearer_is_left_alone(self, steps: list[int]) -> None:
        keeping, remaining = Keeping(10.0, 0.0), 1000
        for number, step in enumerate(steps):
            remaining -= step
            keeping, what = keeping.judge(100.0 * number, remaining)
            assert what == ""

    def test_a_ready_one_that_falls_behind_for_more_than_a_moment(self) -> None:
        keeping, told = Keeping(100.0, 0.0, least=0), []
        for tick, remaining in enumerate([50, 500, 50, *[500] * 7, 400, *[500] * 6, 50]):
            keeping, what = keeping.judge(tick / 4, remaining, 100)
            told.append((tick, what, keeping.is_behind))
        acts = [(tick, what) for tick, what, _ in told if what]
        assert acts == [(7, "slow-writes"), (14, "slow-writes")]
        assert [tick for tick, _, behind in told if behind] == list(range(6, 17))

    def test_one_whose_guest_is_slow_already_is_not_behind_for_a_moment(self) -> None:
        keeping = Keeping(100.0, 0.0, slowed=1)
        for tick, remaining in enumerate([50, 500, 500, 50, 500, 500, 500, 50]):
            keeping, what = keeping.judge(tick / 5, remaining, 100)
            assert (what, keeping.is_behind) == ("", False)

    def test_a_ready_one_that_never_catches_up_is_given_up(self) -> None:
        keeping, told = Keeping(10.0, 0.0), []
        for second in range(17):
            keeping, what = keeping.judge(float(second), 500, 100)
            told.append(what)
        assert told == ["", "", *["slow-writes"] * 4, *[""] * 9, "give-up", "give-up"]

    def test_while_nothing_of_it_is_copied_the_guest_is_left_alone(self) -> None:
        for allowed in (None, 100):
            keeping, told = Keeping(10.0, 0.0, ready=allowed is not None), []
            for second in range(13):
                keeping, what = keeping.judge(float(second), 500, allowed, stands_still=True)
                told.append((second, what))
            assert [one for one in told if one[1]] == [(10, "give-up"), (11, "give-up"), (12, "give-up")]

    def test_what_has_gone_beyond_a_cap_slows_the_guest_and_holds_nothing_up(self) -> None:
        keeping, told = Keeping(10.0, 0.0), []
        for second, excess in enumerate([0, *[500] * 20, *range(400, 0, -100), *[0] * 5]):
            # What is left for a moment, too, does not count longer for it.
            keeping, _ = keeping.judge(second - 0.5, 500, 100, excess=excess) if second == 18 else (keeping, "")
            keeping, what = keeping.judge(float(second), 50, 100, excess=excess)
            told.append(what)
            assert not keeping.is_behind
        assert told[:7] == ["", "", *["slow-writes"] * 4, ""]
        assert set(told[7:-1]) == {""}
        assert told[-1] == "ease-writes"

    def test_excess_is_paid_off_by_sending_less_and_forgotten_with_the_cap(self) -> None:
        excess = Excess(0.0, 1000)
        for at, sent, cap, beyond in [(1, 1500, 100, 400), (2, 1500, 100, 300), (9, 1500, 100, 0), (10, 1601, 100, 1)]:
            excess = excess.after(at, sent, cap)
            assert excess.bytes == beyond
        assert excess.after(11, 9999, 0).bytes == 0

    def test_a_guest_has_its_speed_back_step_by_step_when_the_copy_has_kept_up(self) -> None:
        keeping, told = Keeping(100.0, 0.0), []
        for second, remaining in enumerate([50, *[500] * 4, *[50] * 12]):
            keeping, what = keeping.judge(float(second), remaining, 100)
            told.append((second, what))
        acts = [one for one in told if one[1]]
        assert acts == [
            (2, "slow-writes"),
            (3, "slow-writes"),
            (4, "slow-writes"),
            (9, "ease-writes"),
            (14, "ease-writes"),
        ]
        assert keeping.slowed == 1


class TestTheBar:
    """It never goes back, with disks before the memory."""

    @given(
        share=st.tuples(st.integers(0, 10**12), st.integers(0, 10**12)),
        looks=st.lists(st.tuples(st.integers(0, 10**9), st.integers(0, 10**9)), max_size=30),
        passes=st.lists(st.integers(0, 10**9), max_size=30),
    )
    def test_it_never_goes_back(self, share: tuple[int, int], looks: list[tuple[int, int]], passes: list[int]) -> None:
        bar, shown = Bar().entered(Phase.BUILD_UP).entered(Phase.STORAGE).with_disks(*share), Progress()
        seen = [bar.percent]
        for at, (copied, more) in enumerate(looks):
            disk = DiskProgress(disk="vda", copied_bytes=copied, total_bytes=copied + more)
            bar, shown = of_disks(bar, shown, [disk], float(at))
            assert shown.rate_bytes_per_s >= 0
            seen.append(bar.percent)
        bar = bar.entered(Phase.COPY)
        for phase in (Phase.COPY, Phase.SYNCHRONISE):
            bar = bar.entered(phase)
            for remaining in passes:
                bar = bar.moved(phase, MigrationStatistics(remaining_bytes=remaining, total_bytes=10**9))
                seen.append(bar.percent)
        assert seen == sorted(seen)
        assert all(0 <= percent < 100 for percent in seen)

    def test_disks_take_their_share_of_it(self) -> None:
        bar = Bar().entered(Phase.STORAGE).with_disks(3 * GIB, GIB)
        assert 60 < bar.copied(1.0).percent < 65
        assert bar.copied(1.0).entered(Phase.COPY).percent == bar.copied(1.0).percent


class Copying(FakeDisks):
    """A QEMU whose copies stand as a test says, one word for each look."""

    def __init__(self, *looks: CopyStatistics) -> None:
        super().__init__()
        self.gone = asyncio.Event()
        self._looks = list(looks)
        self.dropped: list[str] = []
        self.tell: Callable[[Event], None] = lambda event: None

    def on_event(self, callback: Callable[[Event], None]) -> Callable[[], None]:
        self.tell = callback
        return lambda: None

    async def copies(self) -> dict[str, CopyStatistics]:
        if self._looks:
            self.copying["vda"] = self._looks.pop(0)
        return dict(self.copying)

    async def drop_copy(self, disk: str, tag: str) -> None:
        self.dropped.append(disk)
        if disk == "vdb":
            raise StorageError("vdb")

    async def _answer(self) -> None:
        await asyncio.sleep(0)


def at(copied: int, state: CopyState = CopyState.COPYING, error: str = "") -> CopyStatistics:
    return CopyStatistics(state, copied, 100, error)


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirrors, "LOOK_EVERY_S", 0.0)


async def nothing() -> None:
    """Show nothing."""


class TestMirrors:
    """Looking at copies."""

    def test_until_it_keeps_up(self) -> None:
        async def scenario() -> None:
            copying = Mirrors(
                Copying(at(0), at(50), at(100, CopyState.READY)), ["vda"], ConvergencePolicy(patience_s=100)
            )
            shown: list[int] = []

            async def show() -> None:
                shown.append(copying.progress()[0].copied_bytes)

            await copying.until_ready(show)
            assert shown == [0, 50, 100]
            assert copying.progress()[0].ready

        asyncio.run(scenario())

    def test_qemu_says_when(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(mirrors, "LOOK_EVERY_S", 3600.0)

        async def scenario() -> None:
            machine = Copying(at(50), at(100, CopyState.READY))
            waiting = asyncio.ensure_future(
                Mirrors(machine, ["vda"], ConvergencePolicy(patience_s=100)).until_ready(nothing)
            )
            await asyncio.sleep(0)
            machine.tell(Event("JOB_STATUS_CHANGE", {"id": "copy-vda", "status": "ready"}, 0.0))
            async with asyncio.timeout(10):
                await waiting

        asyncio.run(scenario())

    @pytest.mark.parametrize(
        ("last", "why"), [(at(50, error="No space left on device"), "No space"), (at(100, CopyState.ENDED), "ended it")]
    )
    def test_one_that_fails_fails_the_move(self, last: CopyStatistics, why: str) -> None:
        async def scenario() -> None:
            copying = Mirrors(Copying(at(0), last), ["vda"], ConvergencePolicy(patience_s=100))
            with pytest.raises(MigrationFailed, match="vda") as caught:
                await copying.until_ready(nothing)
            assert why in caught.value.why

        asyncio.run(scenario())

    def test_one_that_qemu_does_not_know_fails_the_move(self) -> None:
        async def scenario() -> None:
            with pytest.raises(MigrationFailed):
                await Mirrors(Copying(), ["vda"], ConvergencePolicy(patience_s=100)).look()

        asyncio.run(scenario())

    @pytest.mark.parametrize("least_kib", [64, 2048])
    def test_a_guest_that_is_too_fast_waits_and_is_told(self, least_kib: int) -> None:
        async def scenario() -> None:
            machine = Copying(*[at(50)] * 1000)
            copying = Mirrors(machine, ["vda"], ConvergencePolicy(patience_s=0.02, least_write_kib_per_s=least_kib))
            with pytest.raises(NotConverging):
                await copying.until_ready(nothing)
            assert machine.slowed == {"vda": least_kib * KIB}
            assert copying.progress()[0].slowed

        asyncio.run(scenario())

    def test_a_guest_that_may_not_be_slowed_is_left_alone(self) -> None:
        async def scenario() -> None:
            machine = Copying(*[at(50)] * 1000)
            copying = Mirrors(machine, ["vda"], ConvergencePolicy(patience_s=0.02, slow_writes=False))
            with pytest.raises(NotConverging) as caught:
                await copying.until_ready(nothing)
            assert "convergence.slow_writes" in caught.value.todo
            assert machine.slowed == {}

        asyncio.run(scenario())

    def test_a_ready_copy_may_have_left_what_it_copies_within_a_blackout(self, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = iter(range(100))
        monkeypatch.setattr(mirrors, "time", SimpleNamespace(monotonic=lambda: clock.__next__() / 4))

        async def scenario() -> None:
            fast = [CopyStatistics(CopyState.READY, 100 * MIB * n, 100 * MIB * n + 5 * MIB) for n in range(10)]
            slow = [CopyStatistics(CopyState.READY, 10 * MIB * n, 10 * MIB * n + 5 * MIB) for n in range(100, 110)]
            machine = Copying(*fast, *slow)
            copying = Mirrors(machine, ["vda"], ConvergencePolicy(patience_s=100))
            for _ in fast:
                await copying.keep_up(0.06)
            assert machine.slowed == {}
            assert not copying.behind
            for _ in slow:
                await copying.keep_up(0.06)
            assert 0 < machine.slowed["vda"] <= 20 * MIB
            assert list(copying.behind) == ["vda"]

        asyncio.run(scenario())

    def test_a_guest_that_was_slowed_has_its_speed_back(self, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = iter(range(1000))
        monkeypatch.setattr(mirrors, "time", SimpleNamespace(monotonic=lambda: clock.__next__() / 4))

        async def scenario() -> None:
            behind = [CopyStatistics(CopyState.READY, 10 * MIB * n, 10 * MIB * n + 20 * MIB) for n in range(10)]
            along = [CopyStatistics(CopyState.READY, 10 * MIB * n, 10 * MIB * n) for n in range(10, 100)]
            machine = Copying(*behind, *along)
            copying = Mirrors(machine, ["vda"], ConvergencePolicy(patience_s=100))
            for _ in behind:
                await copying.keep_up(0.06)
            assert 0 < machine.slowed["vda"] <= 20 * MIB
            for _ in along:
                await copying.keep_up(0.06)
            assert machine.slowed["vda"] == 0
            assert not copying.progress()[0].slowed

        asyncio.run(scenario())

    def test_while_the_target_is_filled_with_zeroes_no_guest_is_slowed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = iter(range(10000))
        monkeypatch.setattr(mirrors, "time", SimpleNamespace(monotonic=lambda: float(clock.__next__())))

        async def scenario() -> None:
            zeroing = CopyStatistics(CopyState.COPYING, 0, 0)
            machine = Copying(*[zeroing] * 500, at(50), at(100, CopyState.READY))
            copying = Mirrors(machine, ["vda"], ConvergencePolicy(patience_s=10))
            seen = []

            async def show() -> None:
                bar, shown = of_disks(
                    Bar().entered(Phase.STORAGE).with_disks(1, 0), Progress(), copying.progress(), 0.0
                )
                seen.append((bar.percent, shown.note))

            await copying.until_ready(show)
            assert machine.slowed == {}
            assert seen[0][0] < seen[-2][0] < seen[-1][0]
            assert "zeroes" in seen[0][1]
            assert seen[-2][1] == ""

        asyncio.run(scenario())

    def test_one_whose_target_does_not_answer_says_so(self, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = iter(range(10000))
        monkeypatch.setattr(mirrors, "time", SimpleNamespace(monotonic=lambda: float(clock.__next__())))

        async def scenario() -> None:
            machine = Copying(*[at(50)] * 100)
            with pytest.raises(NotConverging, match="nothing of it is copied"):
                await Mirrors(machine, ["vda"], ConvergencePolicy(patience_s=10)).until_ready(nothing)
            assert machine.slowed == {}

        asyncio.run(scenario())

    def test_all_are_dropped_although_one_refuses(self) -> None:
        async def scenario() -> None:
            machine = Copying()
            with pytest.raises(StorageError, match="vdb"):
                await mirrors.drop(machine, "abc", ["vda", "vdb", "vdc"])
            assert machine.dropped == ["vda", "vdb", "vdc"]

        asyncio.run(scenario())

    def test_the_end_of_one_that_failed_is_no_success(self) -> None:
        async def scenario() -> None:
            machine = Copying()
            machine.copying["vda"] = dataclasses.replace(at(100, CopyState.READY), error="Input/output error")
            with pytest.raises(StorageError):
                await Mirrors(machine, ["vda"], ConvergencePolicy(patience_s=1)).finish()

        asyncio.run(scenario())
