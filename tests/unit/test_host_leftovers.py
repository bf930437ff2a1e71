"""Which images may be removed: judged from what is known here and what other hosts say."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from limosa.host.leftovers import Elsewhere, _candidates, _judged
from limosa.host.neighbours import is_same
from limosa.migration.disks import Made, image_name, read_image_name
from limosa.model.storage import ImageUse, Leftover, Location
from limosa.storage import marks
from limosa.storage.stores import Folder

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
    assert read_image_name(image_name(vm, "vdc", "abcdefabcdef", "raw")) == Made(vm, "vdc", "abcdefabcdef")


@pytest.mark.parametrize(
    "name",
    [
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
    assert read_image_name(name) is None


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
        assert len(_judged(ONE, "host1", [], None).proof) == 3
        assert _judged(ONE, "host1", ["so"], None).doubts == ("so",)
        assert "host 'host1' made it" in _judged(ONE, "host2", [], None).doubts[0]

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
        judged = _judged(ONE, "host1", [], Elsewhere(uses, silent))
        assert (judged.doubts == (), bool(judged.proof)) == (not doubt, not doubt)
        assert doubt in "".join(judged.doubts)

    def test_the_host_that_made_it_must_be_asked(self) -> None:
        assert _judged(ONE, "host2", [], Elsewhere({"host1": UNUSED}, {})).doubts == ()
        assert _judged(ONE, "host2", [], Elsewhere({"host3": UNUSED}, {})).doubts


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
