"""Marks of unfinished copies, having an image to oneself, and what a share calls a file."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from limosa.errors import Conflict, StorageError
from limosa.storage import marks, mounts, openers
from limosa.storage.marks import Mark, Marked

MARK = Mark(host="host1", at=1.5)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """One that a move has begun to make."""
    path = tmp_path / "web1-vda.abcdefabcdef.qcow2"
    marks.begin(str(path), MARK)
    path.write_bytes(b"data")
    return path


class TestMarks:
    """Who takes a mark away first has the image."""

    def test_it_is_found_until_the_image_is_finished(self, image: Path) -> None:
        assert marks.find(image.parent) == [Marked(image, MARK)]
        marks.finish(str(image))
        marks.finish(str(image))
        assert marks.find(image.parent) == []
        assert image.read_bytes() == b"data"

    def test_one_that_is_a_vms_is_not_removed(self, image: Path) -> None:
        marks.claim(str(image))
        assert not marks.condemn(str(image))

    def test_one_that_is_being_removed_is_no_vms(self, image: Path) -> None:
        assert marks.condemn(str(image))
        assert marks.condemn(str(image)), "a removal that was interrupted goes on"
        with pytest.raises(Conflict, match="being removed"):
            marks.claim(str(image))
        assert marks.find(image.parent) == [Marked(image, MARK)]
        marks.spare(str(image))
        marks.claim(str(image))

    def test_what_has_none_is_anybodys(self, tmp_path: Path) -> None:
        path = tmp_path / "web.qcow2"
        marks.claim(str(path))
        marks.forget(str(path))
        assert not marks.condemn(str(path))
        assert marks.find(tmp_path) == []

    def test_it_is_the_files_whichever_way_it_is_named(self, image: Path, tmp_path: Path) -> None:
        link = tmp_path / "link.qcow2"
        link.symlink_to(image)
        marks.claim(str(link))
        assert marks.find(tmp_path) == []

    @pytest.mark.parametrize("data", [b"", b"{", b'{"host": 3, "at": 1}', b"\xff" * 9000])
    def test_a_damaged_one_says_not_who_made_it(self, image: Path, data: bytes) -> None:
        image.with_name(f".{image.name}.limosa-copy").write_bytes(data)
        assert marks.find(image.parent) == [Marked(image, None)]

    def test_one_that_cannot_be_removed_stays(self, image: Path) -> None:
        path = image.with_name(f".{image.name}.limosa-copy")
        path.unlink()
        (path / "inside").mkdir(parents=True)
        with pytest.raises(StorageError):
            marks.finish(str(image))


class TestAlone:
    """An image is had to oneself, or somebody is named who has it."""

    def test_nobody_has_it(self, image: Path) -> None:
        assert openers.use_of(image, openers.everywhere()) == ""
        with openers.alone(image):
            image.unlink()

    @pytest.mark.parametrize("mode", ["rb", "ab"])
    def test_a_program_has_it(self, image: Path, mode: str) -> None:
        with image.open(mode) as stream:
            holder = subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=[stream.fileno()])
        with holder:
            who = f"process {holder.pid} has it open"
            assert openers.use_of(image, openers.everywhere()) == who
            with pytest.raises(StorageError, match=who), openers.alone(image):
                pass
            holder.communicate()

    def test_what_is_no_file(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / "link").symlink_to("/etc/passwd")
        for name in ("pipe", "link", "nothing"):
            with pytest.raises(StorageError), openers.alone(tmp_path / name):
                pass


MOUNTS = """22 1 8:1 / / rw - ext4 /dev/sda1 rw
30 22 0:40 / /mnt/vms rw - nfs4 nas:/export/vms rw
31 22 0:40 /web /srv/web rw - nfs4 nas:/export/vms rw
32 22 0:41 / /mnt/smb\\040share rw - cifs //nas/vms rw
33 22 0:42 / /mnt/fuse rw - fuse.portal portal rw
"""


class TestNamesOnServers:
    """Hosts that have mounted one share at different places find each other's files."""

    @pytest.fixture(autouse=True)
    def _mounts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Path, "read_text", lambda *_: MOUNTS)

    @pytest.mark.parametrize(
        ("path", "device", "name"),
        [
            ("/mnt/vms/web/a.qcow2", (0, 40), "nas:/export/vms/web/a.qcow2"),
            ("/mnt/vms", (0, 40), "nas:/export/vms"),
            ("/srv/web/a.qcow2", (0, 40), "nas:/export/vms/web/a.qcow2"),
            ("/mnt/smb share/a.qcow2", (0, 41), "//nas/vms/a.qcow2"),
            ("/mnt/fuse/a.qcow2", (0, 42), ""),
            ("/var/a.qcow2", (8, 1), ""),
        ],
    )
    def test_what_a_server_calls_it(
        self, monkeypatch: pytest.MonkeyPatch, path: str, device: tuple[int, int], name: str
    ) -> None:
        status = os.stat_result([0, 1, os.makedev(*device), 1, 0, 0, 0, 0, 0, 0])
        monkeypatch.setattr(os, "stat", lambda *_, **__: status)
        monkeypatch.setattr(os.path, "realpath", lambda path: path)
        assert mounts.name_on_server(path) == name

    @pytest.mark.parametrize(
        ("path", "device"), [("/mnt/vms/a", "0:40"), ("/mnt/vms", "0:40"), ("/mnt/vms2/a", "8:1"), ("/a", "8:1")]
    )
    def test_its_file_system_is_known_by_its_name(self, path: str, device: str) -> None:
        assert mounts.device_at(path) == device

    def test_what_is_mounted_over_something_hides_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        over = "33 30 0:43 / /mnt/vms rw - nfs4 other:/vms rw\n"
        monkeypatch.setattr(Path, "read_text", lambda *_: MOUNTS + over)
        assert mounts.device_at("/mnt/vms/a") == "0:43"

    def test_where_it_is_here(self) -> None:
        name = "nas:/export/vms/web/a.qcow2"
        assert mounts.paths_of(name) == ["/mnt/vms/web/a.qcow2", "/srv/web/a.qcow2"]
        assert mounts.paths_of("nas:/export/vms2/a.qcow2") == []
        assert mounts.paths_of("//nas/vms/deep/b.raw") == ["/mnt/smb share/deep/b.raw"]
