"""Disks above other files move: what is there is not sent, what is sent stays below, and nobody's is removed."""

from __future__ import annotations

import json
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from harness.commands import limosa
from harness.crashes import disks_of, images
from harness.disks import assert_clean, raw_copy
from harness.hosts import tiny, wait_until
from harness.images import add_location
from harness.labs import LabHost, running_lab
from harness.steering import follow, move, remove
from limosa.model.migration import Migration, Outcome, Phase
from limosa.wire import api, endpoints

pytestmark = [pytest.mark.qemu, pytest.mark.lab]

MIB = 1024 * 1024
#: What the lowest file holds, most of what there is to send.
GOLDEN_MIB = 24
#: More than a VM with nothing but an image of its own sends, less than the lowest file.
LITTLE = 12 * MIB


@pytest.fixture(scope="module")
def lab() -> Iterator[list[LabHost]]:
    with running_lab() as made:
        yield made


@pytest.fixture
def hosts(lab: list[LabHost]) -> Iterator[list[LabHost]]:
    """Two hosts without VMs and images, then and afterwards."""
    yield lab
    for host in lab:
        for vm in host.client.call(endpoints.LIST_VMS).vms:
            remove(host, vm.config.name)
        for image in images(host):
            image.unlink()


@pytest.fixture
def chain(hosts: list[LabHost]) -> list[Path]:
    """Three files of the first host, each above the one before it: raw, qcow2, and qcow2 with compressed data."""
    folder = hosts[0].state / "images"
    golden, middle, upper = folder / "golden.raw", folder / "middle.qcow2", folder / "upper.qcow2"
    golden.write_bytes(random.Random(1).randbytes(GOLDEN_MIB * MIB))
    with golden.open("r+b") as stream:
        stream.truncate(2 * GOLDEN_MIB * MIB)
    create(middle, golden, "raw", "write -P 2 1M 1M")
    create(upper, middle, "qcow2", "write -c -P 3 3M 64k", "write -z 4M 1M")
    for path in (golden, middle, upper):
        path.chmod(0o444)
    return [golden, middle, upper]


def create(overlay: Path, below: Path, below_format: str, *writes: str) -> None:
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(below), "-F", below_format, str(overlay)], check=True
    )
    words = [word for write in writes for word in ("-c", write)]
    subprocess.run(["qemu-io", "-f", "qcow2", *words, str(overlay)], check=True, stdout=subprocess.DEVNULL)


def start(host: LabHost, name: str, below: Path, *writes: str) -> bytes:
    """Start a VM whose disk lies above ``below``. Returns what the disk holds."""
    disk = host.state / "images" / f"{name}.qcow2"
    create(disk, below, "raw" if below.suffix == ".raw" else "qcow2", *writes)
    copy = raw_copy(disk)
    held = copy.read_bytes()
    copy.unlink()
    host.create(msgspec.structs.replace(tiny(name), disks=(api.NewDisk(path=str(disk)),)))
    return held


def seen(host: LabHost, vm: str) -> bytes:
    """What a VM's disk holds, which is not written."""
    copy = raw_copy(disks_of(host, vm)[0])
    try:
        return copy.read_bytes()
    finally:
        copy.unlink()


def below(host: LabHost, vm: str) -> list[Path]:
    """The files below a VM's disk, the nearest first, as QEMU's own tool finds them; all in order."""
    top = disks_of(host, vm)[0]
    words = ["qemu-img", "info", "-U", "--backing-chain", "--output=json", "-f", "qcow2", str(top)]
    found = json.loads(subprocess.check_output(words))
    for image in found:
        if image["format"] == "qcow2":
            assert_clean(Path(image["filename"]))
    return [Path(image["filename"]) for image in found[1:]]


def check(host: LabHost, vm: str, *words: str) -> dict[str, Any]:
    said = limosa(host, "check", vm, "--to", "host2", *words, "--json")
    assert said.code == 0, said.error
    report: dict[str, Any] = said.object
    return report


def test_a_chain_stays_a_chain_and_is_sent_once(hosts: list[LabHost], chain: list[Path]) -> None:
    one, two = hosts
    first, second = start(one, "first", chain[-1], "write -P 8 5M 64k"), start(one, "second", chain[-1])
    planned = check(one, "first")
    assert planned["disks"][0]["action"] == "copy-overlay"
    assert [layer["origin"] for layer in planned["layers"]] == [str(path) for path in chain]
    assert f"file {chain[0]}: sent into location 'images'" in limosa(one, "check", "first", "--to", "host2").out

    moved = move(one, "first", two)
    assert moved.progress.transferred_bytes > GOLDEN_MIB * MIB
    layers = below(two, "first")
    assert [path.name.partition(".")[0] for path in layers] == ["upper", "middle", "golden"]
    assert all(path.parent == two.state / "images" for path in layers)
    assert [path.stat().st_mode & 0o777 for path in layers] == [0o440] * 3
    assert layers[-1].stat().st_blocks * 512 <= (GOLDEN_MIB + 1) * MIB, "it was sparse, and is not any more"
    assert seen(two, "first") == first

    assert check(one, "second")["layers"] == []
    moved = move(one, "second", two)
    assert moved.progress.transferred_bytes < LITTLE
    assert below(two, "second") == layers
    assert (seen(two, "second"), seen(two, "first")) == (second, first)

    moved = move(two, "first", one)
    assert moved.progress.transferred_bytes < LITTLE
    assert below(one, "first") == chain[::-1], "the originals were not found again"
    assert seen(one, "first") == first


def test_what_is_there_is_not_sent(hosts: list[LabHost], chain: list[Path]) -> None:
    one, two = hosts
    golden = two.state / "images" / "golden.raw"
    golden.write_bytes(chain[0].read_bytes())
    golden.chmod(0o444)
    held = start(one, "first", chain[-1])
    moved = move(one, "first", two)
    assert moved.progress.transferred_bytes < LITTLE
    upper, middle, lowest = below(two, "first")
    assert lowest == golden
    assert upper.name.startswith("upper.")
    assert middle.name.startswith("middle.")
    assert seen(two, "first") == held


def test_a_file_above_another_than_here_is_not_taken_for_it(hosts: list[LabHost], chain: list[Path]) -> None:
    """The middle one is there bit by bit, but what shows through it is not the same."""
    one, two = hosts
    folder = two.state / "images"
    (folder / "golden.raw").write_bytes(os.urandom(2 * GOLDEN_MIB * MIB))
    (folder / "middle.qcow2").write_bytes(chain[1].read_bytes())
    subprocess.run(
        ["qemu-img", "rebase", "-u", "-f", "qcow2", "-b", folder / "golden.raw", "-F", "raw", folder / "middle.qcow2"],
        check=True,
    )
    held = start(one, "first", chain[1])
    assert len(check(one, "first")["layers"]) == 2
    move(one, "first", two)
    assert seen(two, "first") == held


def test_two_at_once_send_it_once(hosts: list[LabHost], chain: list[Path]) -> None:
    one, two = hosts
    held = [start(one, name, chain[-1]) for name in ("first", "second")]
    begun = [one.move(name, "host2") for name in ("first", "second")]
    ended = [one.outcome(migration.id) for migration in begun]
    assert [migration.outcome for migration in ended] == [Outcome.COMPLETED] * 2, [one.fault for one in ended]
    assert sum(migration.progress.transferred_bytes > LITTLE for migration in ended) == 1
    assert len(list((two.state / "images").glob("golden.*"))) == 1
    assert below(two, "first") == below(two, "second")
    assert [seen(two, name) for name in ("first", "second")] == held


@pytest.mark.parametrize("transport", ["multichannel", "compression"])
def test_it_goes_by_every_transport(hosts: list[LabHost], chain: list[Path], transport: str) -> None:
    one, two = hosts
    held = start(one, "first", chain[-1])
    said = limosa(one, "move", "first", "--to", "host2", "--transport", transport, "--json")
    assert said.code == 0, said.error
    assert len(below(two, "first")) == 3
    assert seen(two, "first") == held


def test_in_one_piece_if_that_is_wanted(hosts: list[LabHost], chain: list[Path]) -> None:
    one, two = hosts
    held = start(one, "first", chain[-1])
    assert check(one, "first", "--chain", "flatten")["disks"][0]["action"] == "copy"
    said = limosa(one, "move", "first", "--to", "host2", "--chain", "flatten", "--json")
    assert said.code == 0, said.error
    assert (below(two, "first"), images(two)) == ([], disks_of(two, "first"))
    assert seen(two, "first") == held


def sending_layers(view: Migration) -> bool:
    return view.phase is Phase.STORAGE and view.progress.transferred_bytes > 0 and not view.progress.disks


def copying_the_disk(view: Migration) -> bool:
    return any(disk.copied_bytes for disk in view.progress.disks)


@pytest.mark.parametrize("until", [sending_layers, copying_the_disk])
def test_cancelled_it_leaves_nothing(hosts: list[LabHost], chain: list[Path], until: Any) -> None:
    one, two = hosts
    held = start(one, "first", chain[1], "write -P 7 0 20M")
    before = images(one)
    follow(one, slowed(one, "first", two, sent=until is copying_the_disk), until)
    said = limosa(one, "migration", "cancel", "first", "--json")
    assert (said.code, said.object["outcome"]) == (0, "cancelled")
    wait_until(lambda: images(two) == [], "the destination has removed what it made")
    assert images(one) == before
    assert seen(one, "first") == held


def slowed(host: LabHost, vm: str, to: LabHost, *, sent: bool) -> str:
    """A move that takes its time, from the beginning or when what lies below the disk was ``sent``."""
    options = api.MoveOptions(bandwidth_mbit_per_s=0 if sent else 20)
    begun = host.client.call(endpoints.MOVE, api.MoveRequest(vm=vm, destination=to.name, options=options)).id
    if sent:
        follow(host, begun, lambda view: sending_layers(view) and view.progress.transferred_bytes > MIB)
        host.client.call(endpoints.LIMIT_MIGRATION, api.LimitRequest(bandwidth_mbit_per_s=40), migration=begun)
    return begun


def test_what_another_vm_lies_above_outlives_a_move_that_is_undone(hosts: list[LabHost], chain: list[Path]) -> None:
    one, two = hosts
    start(one, "first", chain[-1], "write -P 7 0 20M")
    held = start(one, "second", chain[1])
    begun = slowed(one, "first", two, sent=True)
    follow(one, begun, copying_the_disk)
    moved = move(one, "second", two)
    assert moved.progress.transferred_bytes < LITTLE
    said = limosa(one, "migration", "cancel", "first", "--json")
    assert (said.code, said.object["outcome"]) == (0, "cancelled")
    wait_until(lambda: not list((two.state / "images").glob("upper.*")), "what nobody uses is removed")
    assert sorted(images(two)) == sorted([*disks_of(two, "second"), *below(two, "second")])
    assert seen(two, "second") == held


def test_a_file_that_was_changed_since_is_noticed(hosts: list[LabHost], chain: list[Path]) -> None:
    one, two = hosts
    start(one, "first", chain[0])
    begun = one.client.call(
        endpoints.MOVE,
        api.MoveRequest(vm="first", destination="host2", options=api.MoveOptions(bandwidth_mbit_per_s=20)),
    )
    follow(one, begun.id, sending_layers)
    with chain[0].open("r+b") as stream:
        stream.seek((GOLDEN_MIB - 1) * MIB)
        stream.write(bytes(4096))
    one.client.call(endpoints.LIMIT_MIGRATION, api.LimitRequest(bandwidth_mbit_per_s=0), migration=begun.id)
    ended = one.outcome(begun.id)
    assert ended.outcome is Outcome.FAILED
    assert ended.fault is not None
    assert "did not arrive as it was sent" in ended.fault.what
    wait_until(lambda: images(two) == [], "the destination has removed what it made")


def test_on_one_host_what_lies_below_stays(lab: list[LabHost], hosts: list[LabHost], chain: list[Path]) -> None:
    one = hosts[0]
    fast = add_location(one, "fast")
    held = start(one, "first", chain[-1], "write -P 9 6M 64k")
    assert limosa(one, "storage", "move", "first", "--to", "fast", "--json").code == 0
    (disk,) = disks_of(one, "first")
    assert disk.parent == fast
    assert disk.stat().st_size < MIB
    assert below(one, "first") == chain[::-1]
    assert seen(one, "first") == held
    assert limosa(one, "storage", "move", "first", "--to", "images", "--chain", "flatten", "--json").code == 0
    assert below(one, "first") == []
    assert seen(one, "first") == held
