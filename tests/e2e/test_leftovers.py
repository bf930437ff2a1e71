"""What crashes left behind, where the journals that would remove it are lost: it is found, shown and removed; and
nothing that anybody uses, or that is anybody's own, ever is."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.commands import limosa
from harness.crashes import disks_of
from harness.disks import assert_keeps, goes_on, number
from harness.guests import LanClient, wait_until_it_serves
from harness.hosts import tiny, wait_until
from harness.images import MIB, add_location, images, numbering
from harness.labs import LabHost, running_lab
from harness.steering import change, follow, remove, settings
from limosa.errors import Conflict, NotFound
from limosa.migration.disks import image_name
from limosa.migration.journal import new_identity
from limosa.model.migration import Migration, Outcome, Phase
from limosa.model.storage import Leftover
from limosa.storage import layers, marks
from limosa.wire import api, endpoints

pytestmark = [pytest.mark.qemu, pytest.mark.lab]

#: The copy of a disk would take minutes.
SLOWLY = 4


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[LabHost]]:
    with running_lab() as made:
        for host in made:
            add_location(host, "fast")
        yield made


@pytest.fixture(scope="module")
def client(hosts: list[LabHost]) -> LanClient:
    """A client of a guest ``web`` on the first host."""
    return numbering(hosts[0])


def found(host: LabHost) -> dict[str, Leftover]:
    return {one.path: one for one in host.client.call(endpoints.LEFTOVERS).leftovers}


def offered(host: LabHost) -> list[str]:
    return [path for path, one in found(host).items() if not one.doubts]


def copying(view: Migration) -> bool:
    return view.phase is Phase.STORAGE and any(disk.copied_bytes for disk in view.progress.disks)


def end(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not Path(f"/proc/{pid}/fd").exists() or not os.listdir(f"/proc/{pid}/fd"), "it has ended")


class TestAfterACrash:
    """A daemon is killed and its journal is lost."""

    def test_a_disk_that_moved_on_its_host(self, hosts: list[LabHost], client: LanClient) -> None:
        host = hosts[0]
        request = api.DiskMoveRequest(vm="web", location="fast", bandwidth_mbit_per_s=SLOWLY)
        begun = host.client.call(endpoints.MOVE_DISKS, request)
        follow(host, begun.id, copying)
        copy = begun.disks[0].path
        assert found(host) == {}, "a move that is under way leaves nothing"
        host.kill()
        (host.state / "migrations" / f"{begun.id}.disks.json").unlink()
        host.restart({})
        assert found(host)[copy].doubts, "its QEMU goes on with the copy"
        assert limosa(host, "storage", "clean", copy, "--yes").code == Conflict.exit_code

        last = number(client)
        host.client.call(endpoints.STOP_VM, vm="web")
        one = found(host)[copy]
        assert (one.vm, one.disk, one.migration, one.host) == ("web", "vda", begun.id, host.name)
        assert one.size_bytes > MIB
        assert time.time() - one.changed_at < 120
        assert len(one.proof) == 3
        shown = limosa(host, "storage", "leftovers")
        assert (shown.code, copy in shown.out, "may be removed" in shown.out) == (0, True, True)
        refused = limosa(host, "storage", "clean")
        assert refused.code == 2, "nobody was asked"
        said = limosa(host, "storage", "clean", "--yes", "--json")
        assert [removed["path"] for removed in said.object["removed"]] == [copy]
        assert found(host) == {}
        assert images(host) == disks_of(host, "web")
        assert not [path for path in Path(copy).parent.iterdir() if "limosa" in path.name]
        assert_keeps(host, "web", last)
        host.client.call(endpoints.START_VM, vm="web")
        wait_until_it_serves(client)

    def test_a_disk_that_went_to_another_host(self, hosts: list[LabHost], client: LanClient) -> None:
        source, destination = hosts
        options = api.MoveOptions(bandwidth_mbit_per_s=SLOWLY)
        change(source, {"storage_bandwidth_mbit_per_s": SLOWLY})
        request = api.MoveRequest(vm="web", destination=destination.name, options=options)
        begun = source.client.call(endpoints.MOVE, request)
        follow(source, begun.id, copying)
        (copy,) = images(destination)
        assert found(destination) == {}
        qemus = destination.qemus()
        destination.kill()
        for pid in qemus:
            end(pid)
        (destination.state / "migrations" / f"{begun.id}.destination.jsonl").write_text("{")
        source.kill()
        destination.restart({})
        assert [doubt for doubt in found(destination)[str(copy)].doubts if "destination.jsonl is damaged" in doubt]
        (destination.state / "migrations" / f"{begun.id}.destination.jsonl").unlink()
        destination.restart({})
        doubts = found(destination)[str(copy)].doubts
        assert f"host '{source.name}', and only that host knows if the move is over" in doubts[0]
        assert limosa(destination, "storage", "clean", str(copy), "--yes").code == Conflict.exit_code
        source.restart({})
        source.outcome(begun.id)
        change(source, {"storage_bandwidth_mbit_per_s": 0})
        wait_until(lambda: offered(destination) == [str(copy)], "the source says that the move is over")
        assert found(destination)[str(copy)].proof[-1] == f"other hosts confirm that: {source.name}"
        assert limosa(destination, "storage", "clean", str(copy), "--yes").code == 0
        assert images(destination) == []
        goes_on(client)


class TestAChain:
    """What lies below a disk is marked, found and removed as the disk is."""

    @pytest.fixture
    def golden(self, hosts: list[LabHost]) -> Iterator[Path]:
        """A VM ``above`` on the first host, with a disk above this file. All is gone afterwards."""
        golden, disk = (hosts[0].state / "images" / name for name in ("golden.raw", "above.qcow2"))
        golden.write_bytes(os.urandom(MIB))
        below = ["-b", str(golden), "-F", "raw", str(disk), str(32 * MIB)]
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *below], check=True)
        subprocess.run(["qemu-io", "-c", "write -P 7 0 24M", str(disk)], check=True, stdout=subprocess.DEVNULL)
        hosts[0].create(tiny_on("above", disk))
        yield golden
        for host in hosts:
            if host.vm("above") is not None:
                remove(host, "above")
            for path in [*host.folder.rglob("above*.qcow2"), *host.folder.rglob("golden*.raw")]:
                path.unlink()

    def test_after_a_crash(self, hosts: list[LabHost], golden: Path) -> None:
        source, destination = hosts
        change(source, {"storage_bandwidth_mbit_per_s": SLOWLY})
        begun = source.move("above", destination.name)
        follow(source, begun.id, copying)
        made = sorted(map(str, images(destination)))
        assert [Path(path).name.split(".")[0] for path in made] == ["above-vda", "golden"]
        assert found(destination) == {}, "a move works with them"
        qemus = destination.qemus()
        destination.kill()
        for pid in qemus:
            end(pid)
        (destination.state / "migrations" / f"{begun.id}.destination.jsonl").unlink()
        destination.restart({})
        source.outcome(begun.id)
        change(source, {"storage_bandwidth_mbit_per_s": 0})
        wait_until(lambda: offered(destination) == made, "the source says that the move is over")
        base = found(destination)[made[1]]
        assert (base.vm, base.disk, base.migration, base.host) == (None, None, begun.id, destination.name)
        alone = limosa(destination, "storage", "clean", made[1], "--yes")
        assert (alone.code, images(destination)) == (Conflict.exit_code, [Path(path) for path in made])
        said = limosa(destination, "storage", "clean", "--yes", "--json")
        assert [removed["path"] for removed in said.object["removed"]] == made
        assert images(destination) == []
        assert not list(destination.folder.rglob("*.limosa-*"))
        shutil.rmtree(destination.state / "vms" / "above")  # as a person is told to, where the journal is lost

    def test_it_has_no_mark_when_the_move_commits(self, hosts: list[LabHost], golden: Path) -> None:
        source, destination = hosts
        moved = source.outcome(source.move("above", destination.name).id)
        assert moved.outcome is Outcome.COMPLETED, moved.fault
        disk, base = sorted(images(destination))
        assert not list(destination.folder.rglob("*.limosa-copy"))
        assert found(destination) == {}
        remove(destination, "above")
        assert "no mark" in found(destination)[str(disk)].doubts[0]
        disk.unlink()
        assert "was a backing file of VMs' disks" in found(destination)[str(base)].doubts[0]

    def test_of_one_that_was_left_another_move_makes_use(self, hosts: list[LabHost], golden: Path) -> None:
        """Then it is no leftover any more."""
        source, destination = hosts
        left = destination.state / "images" / layers.name(str(golden), new_identity(), 1, "raw")
        layers.make(left, marks.Mark(host=destination.name, at=time.time()))
        left.chmod(0o600)
        left.write_bytes(golden.read_bytes())
        layers.finish(left, "", None)
        left.chmod(0o444)
        assert offered(destination) == [str(left)]
        moved = source.outcome(source.move("above", destination.name).id)
        assert (moved.outcome, moved.layers) == (Outcome.COMPLETED, ()), moved.fault
        assert len(images(destination)) == 2
        assert found(destination) == {}
        assert not list(destination.folder.rglob("*.limosa-copy"))


class Made:
    """An image with a mark, as a crash leaves it when all records are lost."""

    def __init__(self, maker: LabHost, folder: Path) -> None:
        self.migration = new_identity()
        self.image = folder / image_name("gone", "vda", self.migration, "qcow2")
        self.path = str(self.image)
        marks.begin(self.path, marks.Mark(host=maker.name, at=time.time()))
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", self.path, "1M"], check=True)


@pytest.fixture
def made(hosts: list[LabHost]) -> Iterator[Made]:
    """On the first host. It is gone afterwards."""
    one = Made(hosts[0], hosts[0].folder / "fast")
    assert offered(hosts[0]) == [one.path], "without what follows it may be removed"
    yield one
    one.image.unlink(missing_ok=True)
    marks.forget(one.path)
    assert found(hosts[0]) == {}


def tiny_on(name: str, image: Path | str) -> api.NewVm:
    disk = api.NewDisk(path=str(image), format="qcow2")
    return api.NewVm(name=name, memory_mib=32, accelerator="tcg", disks=(disk,))


def stays(host: LabHost, one: Made, why: str) -> None:
    """It is shown with that doubt, and not removed, whatever is asked for."""
    assert [doubt for doubt in found(host)[one.path].doubts if why in doubt]
    with pytest.raises(Conflict, match=why):
        host.client.call(endpoints.CLEAN, api.CleanRequest(paths=(one.path,)))
    assert host.client.call(endpoints.CLEAN, api.CleanRequest()) == api.CleanReport(removed=())
    assert one.image.exists()


def hidden(host: LabHost, one: Made) -> None:
    """It is in use, so it is no leftover."""
    assert found(host) == {}
    with pytest.raises(NotFound):
        host.client.call(endpoints.CLEAN, api.CleanRequest(paths=(one.path,)))
    assert host.client.call(endpoints.CLEAN, api.CleanRequest()) == api.CleanReport(removed=())
    assert one.image.exists()


class TestWhatIsUsed:
    """Nothing of it is offered."""

    def test_by_a_vm(self, hosts: list[LabHost], made: Made) -> None:
        host = hosts[0]
        host.client.call(endpoints.CREATE_VM, tiny_on("other", made.image))
        hidden(host, made)
        host.client.call(endpoints.START_VM, vm="other")
        hidden(host, made)
        remove(host, "other")
        stays(host, made, "no mark")  # it was a VM's, and the disks of a VM that is deleted are kept

    def test_by_an_image_above_it(self, hosts: list[LabHost], made: Made) -> None:
        host, above = hosts[0], made.image.with_name("above.qcow2")
        below = ["-b", made.path, "-F", "qcow2"]
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *below, str(above)], check=True)
        hidden(host, made)
        host.client.call(endpoints.CREATE_VM, tiny_on("other", above))
        elsewhere = host.folder / "above.qcow2"
        above.rename(elsewhere)
        assert found(host)[made.path].doubts, "it is not known what lies below the disk of a VM"
        above.symlink_to(elsewhere)
        hidden(host, made)
        host.client.call(endpoints.DELETE_VM, vm="other")
        for path in (above, elsewhere):
            path.unlink()

    def test_by_a_move(self, hosts: list[LabHost], made: Made) -> None:
        host = hosts[0]
        record = host.state / "migrations" / f"{made.migration}.disks.json"
        record.write_text("{}")
        hidden(host, made)
        record.write_text("{")
        stays(host, made, "is damaged")
        record.unlink()

    def test_by_a_program(self, hosts: list[LabHost], made: Made) -> None:
        with subprocess.Popen(["qemu-io", "-r", "-f", "qcow2", made.path], stdin=subprocess.PIPE) as foreign:
            assert foreign.stdin is not None
            wait_until(lambda: offered(hosts[0]) == [], "it has opened the image")
            stays(hosts[0], made, f"process {foreign.pid} has it open")
            foreign.communicate(b"quit\n")

    def test_by_a_vm_whose_file_is_damaged(self, hosts: list[LabHost], made: Made) -> None:
        host = hosts[0]
        damaged = host.state / "vms" / "other" / "vm.toml"
        damaged.parent.mkdir()
        damaged.write_text("[")
        host.restart({})
        stays(host, made, "the file of VM 'other' cannot be read")
        damaged.unlink()
        damaged.parent.rmdir()
        host.restart({})

    def test_what_is_somebodys_own(self, hosts: list[LabHost], made: Made) -> None:
        """Neither a name nor a mark is enough, nor a mark of another image."""
        host = hosts[0]
        named = made.image.with_name(image_name("gone", "vdb", made.migration, "raw"))
        marked = made.image.with_name("precious.raw")
        renamed = made.image.with_name(image_name("gone", "vdc", made.migration, "raw"))
        for path in (named, marked, renamed):
            path.write_bytes(b"precious")
        marks.begin(str(marked), marks.Mark(host=host.name, at=0.0))
        assert offered(host) == [made.path]
        assert set(found(host)) == {made.path, str(named), str(renamed)}
        assert [one.path for one in host.client.call(endpoints.CLEAN, api.CleanRequest()).removed] == [made.path]
        for path in (named, marked, renamed):
            assert path.read_bytes() == b"precious"
            path.unlink()
            marks.forget(str(path))

    def test_what_was_kept(self, hosts: list[LabHost], client: LanClient) -> None:
        host = hosts[0]
        assert limosa(host, "storage", "move", "web", "--to", "fast").code == 0
        old = disks_of(host, "web")[0]
        assert limosa(host, "storage", "move", "web", "--to", "images", "--keep").code == 0
        (one,) = found(host).values()
        assert (one.path, one.proof) == (str(old), ())
        assert "no mark" in one.doubts[0]
        assert limosa(host, "storage", "clean", "--yes").code == 0
        assert old.exists()
        old.unlink()


class TestSharedStorage:
    """Two hosts see one folder, by the word of their administrators."""

    @pytest.fixture
    def left(self, hosts: list[LabHost]) -> Iterator[Made]:
        """What a move of the first host left there."""
        folder = hosts[0].lab.state / f"store-{secrets.token_hex(3)}"
        folder.mkdir(mode=0o711)
        for host in hosts:
            change(host, {"locations.store": {"path": str(folder), "shared": True}})
        yield Made(hosts[0], folder)
        for host in hosts:
            change(host, {"locations.store": None})

    def test_others_are_asked(self, hosts: list[LabHost], left: Made) -> None:
        first, second = hosts
        seen = limosa(first, "storage", "show", "store", "--json").object
        assert [(one["host"], one["as_location"]) for one in seen["seen_by"]] == [(second.name, "store")]
        assert f"with {second.name}" in limosa(first, "storage", "list").out
        for host, other in ((first, second), (second, first)):
            assert found(host)[left.path].proof[-1] == f"other hosts confirm that: {other.name}"
        second.kill()
        stays(first, left, f"host '{second.name}' cannot be asked")
        second.restart({})
        with subprocess.Popen(["qemu-io", "-f", "qcow2", left.path], stdin=subprocess.PIPE) as foreign:
            wait_until(lambda: offered(first) == [], "it has opened the image")
            foreign.communicate(b"quit\n")
        first.create(tiny("small"))
        assert first.outcome(first.move("small", second.name).id).outcome is Outcome.COMPLETED
        remove(second, "small")
        with settings(first, {"peers": {}}):
            stays(first, left, f"host '{second.name}' cannot be asked")  # it is known: a VM has moved there
        assert limosa(second, "storage", "clean", "--yes").code == 0
        assert not left.image.exists()

    def test_a_chain_goes_as_a_whole(self, hosts: list[LabHost], left: Made) -> None:
        """Others are asked about all of it together."""
        below = left.image.with_name(layers.name("golden.raw", left.migration, 1, "raw"))
        layers.make(below, marks.Mark(host=hosts[0].name, at=time.time()))
        words = ["rebase", "-u", "-f", "qcow2", "-b", str(below), "-F", "raw", left.path]
        subprocess.run(["qemu-img", *words], check=True)
        both = [str(below), left.path]
        assert [offered(host) for host in hosts] == [both, both]
        said = limosa(hosts[1], "storage", "clean", "--yes", "--json")
        assert [removed["path"] for removed in said.object["removed"]] == both[::-1]
        assert not list(left.image.parent.iterdir())

    def test_a_vm_of_another_host_has_it(self, hosts: list[LabHost], left: Made) -> None:
        first, second = hosts
        second.client.call(endpoints.CREATE_VM, tiny_on("other", left.image))
        hidden(first, left)
        second.client.call(endpoints.DELETE_VM, vm="other")
        assert [one.path for one in first.client.call(endpoints.CLEAN, api.CleanRequest()).removed] == [left.path]
