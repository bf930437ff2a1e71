"""Which images may be removed: judged from what is known here and what other hosts say."""

from __future__ import annotations

import subprocess
from pathlib import Path

import msgspec
import pytest

from harness.landings import header
from limosa.host.claims import Claims, Known
from limosa.host.leftovers import _candidates, _highest_first, _use
from limosa.host.neighbours import is_same
from limosa.host.proof import Elsewhere, all_judged, doubts_here, verdict
from limosa.migration.disks import Made, image_name, read_name
from limosa.migration.journal import Journal
from limosa.migration.ownership import SourceStep
from limosa.model.migration import Side
from limosa.model.storage import ImageUse, Leftover, Location, Place
from limosa.storage import layers, leases, marks
from limosa.storage.locations import Locations
from limosa.storage.stores import Folder

TAG = "abcdefabcdef"
ONE = Leftover(
    path="/srv/fast/web1-vda.abcdefabcdef.qcow2",
    location="fast",
    vm="web1",
    disk="vda",
    migration="abcdefabcdef",
    size_bytes=1,
    changed_at=0.0,
    host="host1",
)
UNUSED = ImageUse(use="")


@pytest.mark.parametrize("vm", ["web1", "a-vdb.b-c", "x.abcdefabcdef.qcow2"])
def test_the_name_of_an_image_says_which_move_made_it(vm: str) -> None:
    assert read_name(image_name(vm, "vdc", "abcdefabcdef", "raw")) == Made("abcdefabcdef", vm, "vdc")


@pytest.mark.parametrize("origin", ["/srv/golden.raw", "/srv/-.qcow2", "/a/win 11.v2.qcow2", f"/a/{'n' * 300}"])
def test_that_of_a_file_below_disks_does_too(origin: str) -> None:
    assert read_name(layers.name(origin, "abcdefabcdef", 12, "qcow2")) == Made("abcdefabcdef")


@pytest.mark.parametrize(
    "name",
    [
        "golden.abcdefabcdef-1",
        "golden.abcdefabcdef-.raw",
        "golden-1.raw",
        ".golden.abcdefabcdef-1.raw",
        "a b.abcdefabcdef-1.raw",
        "golden.abcdefabcdef-1.raw\n",
        "web1.qcow2",
        "web1-vda.qcow2",
        "web1-vda.abcdef.qcow2",
        "web1-vda.ABCDEFABCDEF.qcow2",
        "web1-vda.abcdefabcdef.qcow2.bak",
        "web1-sda.abcdefabcdef.qcow2",
        ".web1-vda.abcdefabcdef.qcow2",
        "-vda.abcdefabcdef.qcow2",
        "web1-vda.abcdefabcdef.qcow2\n",
    ],
)
def test_other_names_are_somebodys(name: str) -> None:
    assert read_name(name) is None


class TestCandidates:
    """What a folder holds that may be a leftover."""

    def test_files_with_such_a_name(self, tmp_path: Path) -> None:
        names = [image_name("web1", f"vd{letter}", "abcdefabcdef", "raw") for letter in "abcde"]
        marked, plain, link, folder, missing = (tmp_path / name for name in names)
        for path in (marked, missing):
            marks.begin(str(path), marks.Mark(host="host1", at=7.0))
        for path in (marked, plain, tmp_path / "own.raw"):
            path.write_bytes(b"data")
        link.symlink_to(tmp_path / "own.raw")
        folder.mkdir()
        found = {one.path: one.host for one in _candidates("fast", Folder(str(tmp_path)))}
        assert found == {str(marked): "host1", str(plain): "", str(missing): "host1"}

    def test_a_location_that_has_gone(self, tmp_path: Path) -> None:
        assert list(_candidates("fast", Folder(str(tmp_path / "gone")))) == []


class TestTheProof:
    """It holds only if nothing is unknown."""

    def test_on_local_storage(self) -> None:
        assert len(verdict(ONE, "host1", [], None).proof) == 3
        assert verdict(ONE, "host1", ["so"], None).doubts == ("so",)
        assert "host 'host1' made it" in verdict(ONE, "host2", [], None).doubts[0]

    @pytest.mark.parametrize(
        ("uses", "silent", "doubt"),
        [
            ({"host2": UNUSED}, {}, ""),
            ({}, {}, "none is known"),
            ({"host2": UNUSED}, {"host3": "no answer"}, "host 'host3' cannot be asked: no answer"),
            ({"host2": ImageUse(use="process 7 has it open")}, {}, "on host 'host2': process 7"),
        ],
    )
    def test_on_shared_storage(self, uses: dict[str, ImageUse], silent: dict[str, str], doubt: str) -> None:
        found = verdict(ONE, "host1", [], Elsewhere(uses, silent))
        assert (found.doubts == (), bool(found.proof)) == (not doubt, not doubt)
        assert doubt in "".join(found.doubts)

    def test_the_host_that_made_it_must_be_asked(self) -> None:
        assert verdict(ONE, "host2", [], Elsewhere({"host1": UNUSED}, {})).doubts == ()
        assert verdict(ONE, "host2", [], Elsewhere({"host3": UNUSED}, {})).doubts

    @pytest.mark.parametrize(
        ("others", "doubt"),
        [
            (Elsewhere({"host2": UNUSED, "host3": UNUSED}, {}), ""),
            (Elsewhere({"host2": UNUSED}, {"host3": "no answer"}), ""),
            (Elsewhere({"host3": UNUSED}, {}), "only that host knows if the move is over"),
            (Elsewhere({"host3": UNUSED}, {"host2": "no answer"}), "host 'host2' cannot be asked"),
            (Elsewhere({"host2": ImageUse(use="the move is not over")}, {}), "on host 'host2': the move"),
        ],
    )
    def test_the_host_that_had_the_vm_says_that_its_move_is_over(self, others: Elsewhere, doubt: str) -> None:
        """Also of local storage, where nobody else is of interest."""
        one = msgspec.structs.replace(ONE, source="host2")
        found = verdict(one, "host1", [], others.only("host2"))
        assert (found.doubts == (), bool(found.proof)) == (not doubt, not doubt)
        assert doubt in "".join(found.doubts)


class TestWhatTheSourceSays:
    """Of an image that it does not see, about the move that made it."""

    @pytest.fixture
    def journal(self, tmp_path: Path) -> Journal:
        return Journal.begin(tmp_path, msgspec.structs.replace(header(Side.SOURCE), migration=TAG))

    def use(self, tmp_path: Path) -> ImageUse:
        places = Locations({}, "images", tmp_path)
        return _use(TAG, [], Claims.look(tmp_path, Known([], {}), places), (), lambda _: None)

    @pytest.mark.parametrize("step", [SourceStep.MIGRATING, SourceStep.HANDING_OVER, SourceStep.CONFIRMED])
    def test_it_is_not_over(self, tmp_path: Path, journal: Journal, step: SourceStep) -> None:
        journal.record(step, 1.0)
        said = self.use(tmp_path)
        assert (said.named, "the move is not over" in said.use) == (True, True)

    @pytest.mark.parametrize("step", [SourceStep.FINISHED, SourceStep.UNDONE])
    def test_it_is_over(self, tmp_path: Path, journal: Journal, step: SourceStep) -> None:
        journal.record(SourceStep.HANDING_OVER, 1.0)
        journal.record(step, 2.0)
        assert self.use(tmp_path) == UNUSED

    def test_a_person_has_given_the_vm_away(self, tmp_path: Path, journal: Journal) -> None:
        """Nobody has shown that the destination has it as anything but this image."""
        journal.record(SourceStep.CONFIRMED, 1.0, stay=True)
        journal.record(SourceStep.FINISHED, 2.0)
        said = self.use(tmp_path)
        assert (said.named, "administrator's decision" in said.use) == (False, True)


class TestChains:
    """What a move that did not end has left of one goes as a whole, from above; what is somebody's keeps all below."""

    @pytest.fixture
    def chain(self, tmp_path: Path) -> list[Path]:
        """Three files with marks, each above the next."""
        names = [image_name("web1", "vda", TAG, "qcow2"), f"middle.{TAG}-2.qcow2", f"golden.{TAG}-1.raw"]
        disk, middle, golden = chain = [tmp_path / name for name in names]
        golden.write_bytes(bytes(65536))
        for above, below, kind in ((middle, golden, "raw"), (disk, middle, "qcow2")):
            words = ["-f", "qcow2", "-b", str(below), "-F", kind, str(above)]
            subprocess.run(["qemu-img", "create", "-q", *words], check=True)
        for path in chain:
            marks.begin(str(path), marks.Mark(host="host1", at=7.0))
        for folder in ("migrations", "own"):
            (tmp_path / folder).mkdir()
        return chain

    def judged(self, tmp_path: Path) -> dict[Path, Leftover]:
        """Those that no VM and no move works with."""
        places = Locations({"fast": Place(path=str(tmp_path))}, "fast", tmp_path / "own")
        claims = Claims.look(tmp_path / "migrations", Known([], {}), places)
        found = list(_candidates("fast", places.store("fast")))
        unused = [one for one in found if not claims.by_name(Path(one.path), TAG)]
        judged = all_judged(
            unused, lambda one, going: verdict(one, "host1", doubts_here(one, claims, "host1", going), None)
        )
        return {Path(one.path): one for one in judged}

    def test_all_of_it_may_go(self, tmp_path: Path, chain: list[Path]) -> None:
        found = self.judged(tmp_path)
        assert {path: one.doubts for path, one in found.items()} == dict.fromkeys(chain, ())
        assert [Path(one.path) for one in _highest_first(found.values())] == chain

    def test_what_stays_keeps_what_is_below_it(self, tmp_path: Path, chain: list[Path]) -> None:
        leases.change(str(chain[0]), lambda _: leases.Lease(host="host3", boot="b"))
        found = self.judged(tmp_path)
        assert [len(found[path].doubts) for path in chain] == [1, 1, 1]
        assert found[chain[2]].doubts == (f"it is the backing file of {chain[1]}, an unfinished copy",)

    def test_what_is_somebodys_is_above_no_leftover(self, tmp_path: Path, chain: list[Path]) -> None:
        marks.finish(str(chain[1]))
        assert set(self.judged(tmp_path)) == {chain[0], chain[1]}

    def test_nor_is_what_a_move_works_with(self, tmp_path: Path, chain: list[Path]) -> None:
        (tmp_path / "migrations" / f"{TAG}.disks.json").write_text("{}")
        assert self.judged(tmp_path) == {}

    def test_what_lies_in_a_circle(self, tmp_path: Path, chain: list[Path]) -> None:
        """It is nobody's, and looking at it comes to an end."""
        words = ["-f", "qcow2", "-b", str(chain[0]), "-F", "qcow2", str(chain[1])]
        subprocess.run(["qemu-img", "rebase", "-u", *words], check=True)
        assert set(self.judged(tmp_path)) == set(chain)


def location(**changes: object) -> Location:
    return msgspec.convert({"name": "store", "path": "/mnt", "shared": True} | changes, Location)


@pytest.mark.parametrize(
    ("ours", "theirs", "same"),
    [
        ({}, {}, True),
        ({}, {"name": "other"}, False),
        ({}, {"shared": False}, False),
        ({"shared": False}, {}, False),
        ({"share": "nas:/vms"}, {"share": "nas:/vms", "name": "other"}, True),
        ({"share": "nas:/vms"}, {"share": "nas:/more"}, False),
        ({"share": "nas:/vms"}, {}, True),
    ],
)
def test_which_locations_are_the_same(ours: dict[str, object], theirs: dict[str, object], same: bool) -> None:
    assert is_same(location(**ours), location(**theirs)) is same
