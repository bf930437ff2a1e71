"""``limosa storage``: what is sent for what was typed, what is shown, and with which code it ends."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from standin import Answers, StandIn

from limosa.cli.main import main
from limosa.errors import Conflict
from limosa.model.migration import Fault, Migration, Outcome, Phase, Progress, Side
from limosa.model.storage import DiskAction, DiskPlan, Location, Place, Sighting
from limosa.settings.host import HostSettings
from limosa.wire import endpoints
from limosa.wire.api import DiskMoveRequest, Empty, LocationList, SettingsChange, SettingsPage, SightingList

GIB = 1 << 30
ID = "a1b2c3d4e5f6"
IMAGES = Location(name="images", path="/var/images", default=True, total_bytes=10 * GIB, free_bytes=GIB)
FAST = Location(
    name="fast",
    path="/srv/fast",
    file_system="xfs",
    source="/dev/sdb1",
    speed="ssd",
    total_bytes=4 * GIB,
    free_bytes=2 * GIB,
)
GONE = Location(name="nas", path="/mnt/nas", shared=True, fault="No such file or directory")
BULK = Location(
    name="bulk", path="/dev/vg0", kind="lvm", thin=True, source="vg0/thin", total_bytes=10 * GIB, free_bytes=GIB
)
SEEN = SightingList(
    sightings=(Sighting(location="nas", host="host2", as_location="store", path="/mnt/store"),),
    silent={"host3": "no answer"},
)
PLAN = DiskPlan(disk="vda", action=DiskAction.COPY, path=f"/srv/fast/web1-vda.{ID}.raw", format="raw", location="fast")
VIEW = Migration(
    id=ID,
    vm="web1",
    source="host1",
    destination="host1",
    side=Side.SOURCE,
    transport="local",
    phase=Phase.STORAGE,
    outcome=Outcome.UNDER_WAY,
    progress=Progress(),
    accepted_at=0.0,
    disks=(PLAN,),
)
DONE = msgspec.structs.replace(VIEW, phase=Phase.TEAR_DOWN, outcome=Outcome.COMPLETED, total_s=1.0)
FAULT = Fault(code="storage-error", what="disk vda could not be copied", why="No space left on device", todo="")


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    monkeypatch.setenv("LIMOSA_SOCKET", str(tmp_path / "s"))
    monkeypatch.chdir(tmp_path)
    settings = HostSettings(locations={"nas": Place(path="/mnt/old", shared=True)}, default_location="nas")
    answers: Answers = {
        endpoints.LOCATIONS: lambda _: LocationList(locations=(FAST, IMAGES, GONE, BULK)),
        endpoints.SIGHTINGS: lambda _: SEEN,
        endpoints.SETTINGS: lambda _: SettingsPage(settings=settings),
        endpoints.CHANGE_SETTINGS: lambda _: SettingsPage(settings=settings),
        endpoints.MOVE_DISKS: lambda _: VIEW,
        endpoints.WATCH_MIGRATION: lambda _, migration: iter([VIEW, DONE]),
    }
    with StandIn(tmp_path / "s", answers) as standin:
        yield standin


def changes(host: StandIn) -> list[dict[str, Any]]:
    """The values of every change of settings that was sent."""
    return [
        msgspec.json.decode(body, type=SettingsChange).values
        for endpoint, _, body in host.seen
        if endpoint is endpoints.CHANGE_SETTINGS
    ]


def asked(host: StandIn) -> DiskMoveRequest:
    return msgspec.json.decode(
        next(body for endpoint, _, body in host.seen if endpoint is endpoints.MOVE_DISKS), type=DiskMoveRequest
    )


def test_list(host: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["storage", "list"]) == 0
    head, fast, images, nas, bulk = capsys.readouterr().out.splitlines()
    assert head.split() == ["NAME", "PLACE", "KIND", "FREE", "TOTAL", "SPEED", "SHARED", "NOTE"]
    assert fast.split() == ["fast", "/srv/fast", "folder", "2.0", "GiB", "4.0", "GiB", "ssd", "no"]
    assert bulk.split()[:3] == ["bulk", "vg0/thin", "LVM"]
    assert "images (default)" in images
    assert nas.endswith("with host2  No such file or directory")
    assert main(["storage", "list", "--json"]) == 0
    fast, images, nas, bulk = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["name"] for one in (fast, images, nas, bulk)] == ["fast", "images", "nas", "bulk"]
    assert (fast["seen_by"], fast["silent"]) == ([], {})
    assert [(one["host"], one["path"]) for one in nas["seen_by"]] == [("host2", "/mnt/store")]
    assert nas["silent"] == {"host3": "no answer"}


def test_show(host: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["storage", "show", "fast"]) == 0
    shown = capsys.readouterr().out
    assert "xfs, /dev/sdb1" in shown
    assert "2.0 GiB of 4.0 GiB free" in shown
    assert "seen by" not in shown
    assert not [endpoint for endpoint, _, _ in host.seen if endpoint is endpoints.SIGHTINGS], "nobody was asked"
    assert main(["storage", "show", "nas"]) == 0
    shown = capsys.readouterr().out
    assert "No such file or directory" in shown
    assert "host 'host2', as 'store' at /mnt/store" in shown
    assert "host 'host3': no answer" in shown
    assert main(["storage", "show", "fast", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["path"] == "/srv/fast"
    assert main(["storage", "show", "nowhere"]) == 4


def test_add(host: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["storage", "add", "fast", "srv/../fast", "--shared", "--default"]) == 0
    assert changes(host) == [
        {"locations.fast": {"path": f"{tmp_path}/fast", "shared": True}, "default_location": "fast"}
    ]
    assert capsys.readouterr().out == "location 'fast' is /srv/fast, 2.0 GiB free\n"


def test_a_volume_group(host: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["storage", "add", "bulk", "--lvm", "vg0/thin"]) == 0
    assert changes(host) == [{"locations.bulk": {"lvm": "vg0/thin", "shared": False}}]
    assert capsys.readouterr().out == "location 'bulk' is vg0/thin, 1.0 GiB free\n"
    assert main(["storage", "show", "bulk"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split(maxsplit=1) for line in shown[:2]] == [["name:", "bulk"], ["kind:", "LVM"]]
    assert any(line.split() == ["thin", "pool:", "vg0/thin"] for line in shown)


@pytest.mark.parametrize("place", [["/mnt/nas", "--shared"], ["--lvm", "vg0"], ["/mnt/old"]])
def test_a_name_that_is_taken_keeps_its_place(
    host: StandIn, capsys: pytest.CaptureFixture[str], place: list[str]
) -> None:
    assert main(["storage", "add", "nas", *place]) == 5
    assert "there already is a location 'nas': /mnt/old, shared" in capsys.readouterr().err
    assert not changes(host)


@pytest.mark.parametrize(
    "words",
    [["add", "fast"], ["add", "fast", "/a", "--lvm", "vg0"], ["add"], ["remove"], ["show"], ["move", "web1"], ["nope"]],
)
def test_bad_words_never_reach_the_host(host: StandIn, words: list[str]) -> None:
    assert main(["storage", *words]) == 2
    assert host.seen == []


@pytest.mark.parametrize(
    "words",
    [["--to", "../x"], ["--to", "fast", "--disk", "sda"], ["--to", "fast", "--bandwidth", "-1"]],
)
def test_bad_moves_never_reach_the_host(host: StandIn, words: list[str]) -> None:
    assert main(["storage", "move", "web1", *words]) == 2
    assert host.seen == []


def test_remove(host: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["storage", "remove", "fast"]) == 0
    assert changes(host) == [{"locations.fast": None}]
    assert "its images stay" in capsys.readouterr().out
    assert main(["storage", "remove", "fast", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"removed": "fast"}
    assert main(["storage", "remove", "images"]) == 2
    assert main(["storage", "remove", "nowhere"]) == 4
    assert len(changes(host)) == 2


def test_the_default_location_is_not_removed(host: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    host.answers[endpoints.LOCATIONS] = lambda _: LocationList(locations=(msgspec.structs.replace(FAST, default=True),))
    assert main(["storage", "remove", "fast"]) == 5
    assert "limosa host settings default_location=NAME" in capsys.readouterr().err
    assert changes(host) == []


def test_release(host: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    host.answers[endpoints.RELEASE_IMAGE] = lambda _: Empty()
    words = ["storage", "release", "/mnt/web1.qcow2", "--from", "alpha"]
    assert main(words) == 0
    assert "lease on /mnt/web1.qcow2 released" in capsys.readouterr().out
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"released": "/mnt/web1.qcow2", "from": "alpha"}


def test_move(host: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--disk", "vda", "--disk", "vdb", "--format", "raw", "--thick", "--keep", "--bandwidth", "500"]
    assert main(["storage", "move", "web1", "--to", "fast", *words]) == 0
    assert asked(host) == DiskMoveRequest(
        vm="web1",
        location="fast",
        disks=("vda", "vdb"),
        format="raw",
        thick=True,
        keep=True,
        bandwidth_mbit_per_s=500,
    )
    assert "/srv/fast/web1-vda.a1b2c3d4e5f6.raw" in capsys.readouterr().out


def test_move_in_json(host: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["storage", "move", "web1", "--to", "fast", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["outcome"] == "completed"
    assert asked(host) == DiskMoveRequest(vm="web1", location="fast")


def test_move_and_look_away(host: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["storage", "move", "web1", "--to", "fast", "--detach"]) == 0
    assert capsys.readouterr().out == "web1: disks to 'fast' (a1b2c3d4e5f6)\n"
    assert main(["storage", "move", "web1", "--to", "fast", "--detach", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["outcome"] == "under-way"
    assert endpoints.WATCH_MIGRATION not in {endpoint for endpoint, _, _ in host.seen}


def test_a_move_that_fails_says_why(host: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    failed = msgspec.structs.replace(VIEW, outcome=Outcome.FAILED, fault=FAULT)
    host.answers[endpoints.WATCH_MIGRATION] = lambda _, migration: iter([VIEW, failed])
    code = main(["storage", "move", "web1", "--to", "fast"])
    assert code not in (0, 2)
    assert "No space left on device" in capsys.readouterr().err
    assert main(["storage", "move", "web1", "--to", "fast", "--json"]) == code


def test_a_move_that_is_refused(host: StandIn) -> None:
    def refuse(_: DiskMoveRequest) -> Migration:
        raise Conflict("VM 'web1' is stopped")

    host.answers[endpoints.MOVE_DISKS] = refuse
    assert main(["storage", "move", "web1", "--to", "fast"]) == 5
