"""Images: made, recognised and given away, and all the ways in which that is refused."""

from __future__ import annotations

import asyncio
import os
import pwd
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import limosa
from limosa.errors import InvalidInput, StorageError
from limosa.host.files import Files
from limosa.model.vm import DiskFormat
from limosa.storage import access, images, mounts, qcow2

MIB = 1024 * 1024
USER = "nobody"

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.mark.parametrize("image_format", ["qcow2", "raw"])
def test_a_new_image_is_ours_and_has_its_size(tmp_path: Path, image_format: DiskFormat) -> None:
    path = tmp_path / f"a.{image_format}"
    asyncio.run(images.create(path, image_format, 8 * MIB))
    assert path.stat().st_mode & 0o777 == 0o600
    found = asyncio.run(images.info(path, image_format))
    assert (found.format, found.virtual_size) == (image_format, 8 * MIB)
    assert found.actual_size < MIB
    assert asyncio.run(images.detect_format(path)) == image_format


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "a.raw"
    path.write_bytes(b"precious")
    with pytest.raises(StorageError, match="exists"):
        asyncio.run(images.create(path, "raw", MIB))
    assert path.read_bytes() == b"precious"


def test_a_failed_creation_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        asyncio.run(images.create(tmp_path / "a.qcow2", "qcow2", 2**62))
    with pytest.raises(StorageError, match="No such file"):
        asyncio.run(images.create(tmp_path / "no" / "a.raw", "raw", MIB))
    assert list(tmp_path.iterdir()) == []


def test_its_bitmaps_are_seen_unless_they_are_not_true_any_more(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    asyncio.run(images.create(path, "qcow2", 8 * MIB))
    assert qcow2.read(path).bitmaps == 0
    for name in ("monday", "tuesday"):
        subprocess.run(["qemu-img", "bitmap", "--add", "-f", "qcow2", path, name], check=True)
    assert qcow2.read(path).bitmaps == 2
    with path.open("r+b") as stream:
        stream.seek(88)  # autoclear_features
        stream.write(bytes(8))
    assert qcow2.read(path).bitmaps == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "full"
    place.mkdir()
    subprocess.run(["/bin/mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place], check=True)
    yield place
    subprocess.run(["/bin/umount", place], check=True)


@needs_root
@pytest.mark.lab
def test_a_full_disk_is_named(small_disk: Path) -> None:
    (small_disk / "filler").write_bytes(bytes(60 * 1024))
    with pytest.raises(StorageError, match="No space left"):
        asyncio.run(images.create(small_disk / "a.qcow2", "qcow2", 1024 * MIB))
    assert not (small_disk / "a.qcow2").exists()


def test_a_header_in_a_raw_disk_is_not_believed(tmp_path: Path) -> None:
    """What a guest could write into its raw disk to have another file opened when its VM is made anew."""
    path = tmp_path / "a.raw"
    asyncio.run(images.create(tmp_path / "evil.qcow2", "qcow2", MIB))
    path.write_bytes((tmp_path / "evil.qcow2").read_bytes())
    with pytest.raises(InvalidInput, match="not certain"):
        asyncio.run(images.detect_format(path))


@pytest.mark.parametrize("name", ["a.qcow2", "a.vmdk", "a"])
def test_a_name_that_does_not_say_raw_is_asked_about(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(bytes(512))
    with pytest.raises(InvalidInput, match="not certain"):
        asyncio.run(images.detect_format(tmp_path / name))


def test_unreadable_images(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No such file"):
        asyncio.run(images.detect_format(tmp_path / "a.raw"))
    with pytest.raises(StorageError):
        asyncio.run(images.detect_format(tmp_path))
    (tmp_path / "a.qcow2").write_bytes(b"QFI\xfb" + bytes(100))
    with pytest.raises(StorageError, match="qemu-img info failed"):
        asyncio.run(images.detect_format(tmp_path / "a.qcow2"))


def test_a_backing_file_must_say_its_format(tmp_path: Path) -> None:
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    asyncio.run(images.create(base, "qcow2", MIB))
    subprocess.run(["/usr/bin/qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top], check=True)
    found = asyncio.run(images.info(top, "qcow2"))
    assert (found.backing_filename, found.backing_filename_format) == (str(base), "qcow2")
    unnamed(top)
    with pytest.raises(StorageError, match="backing file"):
        asyncio.run(images.info(top, "qcow2"))


def unnamed(image: Path) -> None:
    """Take the name of the backing file's format (header extension 0xe2792aca) out of a qcow2 image."""
    data = bytearray(image.read_bytes())
    place = data.index(struct.pack(">I", 0xE2792ACA))
    data[place : place + 4] = struct.pack(">I", 0x12345678)  # unknown extensions are skipped
    image.write_bytes(data)


def test_data_in_another_file_is_refused(tmp_path: Path) -> None:
    path, data = tmp_path / "a.qcow2", tmp_path / "data"
    command = ["/usr/bin/qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={data}", str(path), "1M"]
    subprocess.run(command, check=True)
    with pytest.raises(StorageError, match="another file"):
        asyncio.run(images.info(path, "qcow2"))


@pytest.fixture
def open_folder(tmp_path: Path) -> Path:
    """A folder that the unprivileged user can reach."""
    for folder in (tmp_path, *list(tmp_path.parents)[:2]):
        folder.chmod(0o755)
    return tmp_path


@needs_root
def test_an_image_of_roots_is_given(open_folder: Path) -> None:
    path = open_folder / "a.raw"
    asyncio.run(images.create(path, "raw", MIB))
    assert not access.may(path, USER, write=False)
    images.grant(path, USER, read_only=False)
    assert path.stat().st_uid == pwd.getpwnam(USER).pw_uid
    assert access.may(path, USER, write=True)
    images.grant(path, USER, read_only=False)


@needs_root
def test_on_a_share_only_a_new_image_is_given(open_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mounts, "find", lambda _: mounts.Mount("nfs4", "nas:/images"))
    path = open_folder / "a.qcow2"
    asyncio.run(images.create(path, "qcow2", MIB))
    with pytest.raises(StorageError, match="may not write") as caught:
        images.grant(path, USER, read_only=False)
    assert "other hosts" in caught.value.why
    access.give_new(path, USER)
    images.grant(path, USER, read_only=False)
    assert (path.stat().st_uid, path.stat().st_mode & 0o777) == (pwd.getpwnam(USER).pw_uid, 0o600)


def test_a_share_with_mandatory_locks_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.qcow2"
    monkeypatch.setattr(mounts, "find", lambda _: mounts.Mount("cifs", "//nas/images"))
    with pytest.raises(StorageError, match="cannot create") as caught:
        asyncio.run(images.create(path, "qcow2", MIB))
    assert "nobrl" in caught.value.todo
    assert not path.exists()
    monkeypatch.setattr(mounts, "find", lambda _: mounts.Mount("cifs", "//nas/images", frozenset({"nobrl"})))
    asyncio.run(images.create(path, "qcow2", MIB))
    assert path.exists()


@needs_root
def test_files_that_are_not_given(open_folder: Path) -> None:
    secret = open_folder / "secret"
    secret.write_bytes(b"x")
    secret.chmod(0o600)
    alias = open_folder / "alias"
    os.link(secret, alias)
    others = open_folder / "others"
    others.write_bytes(b"x")
    others.chmod(0o600)
    os.chown(others, 1, 1)
    for path, read_only in ((alias, False), (others, False), (Path("/etc/shadow"), False), (secret, True)):
        before = path.stat()
        with pytest.raises(StorageError, match="may not") as caught:
            images.grant(path, USER, read_only=read_only)
        assert caught.value.why
        assert caught.value.todo
        assert (path.stat().st_uid, path.stat().st_mode) == (before.st_uid, before.st_mode)


@needs_root
def test_what_limosa_runs_from_or_believes_is_not_given(open_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be for the guest to write."""
    monkeypatch.setattr(access, "_PROGRAM", (open_folder / "venv",))
    (open_folder / "state").mkdir()
    link = open_folder / "link"
    link.symlink_to("state")
    files = Files(link, open_folder / "run")
    for path in (open_folder / "venv" / "lib" / "a.pth", files.settings, files.vm("web1") / "vm.toml"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
        with pytest.raises(StorageError, match="may not write") as caught:
            images.grant(path, USER, read_only=False, own=files.own)
        assert caught.value.why == "it lies where Limosa has files of its own"
        access.give_new(path, USER, files.own)
        assert path.stat().st_uid == 0
    files.images.mkdir()
    image = files.images / "a.raw"
    image.write_bytes(b"x")
    images.grant(image, USER, read_only=False, own=files.own)
    assert image.stat().st_uid == pwd.getpwnam(USER).pw_uid


@pytest.mark.parametrize("folder", [sys.prefix, str(Path(limosa.__file__).parent), "/opt/limosa"])
def test_which_folders_are_a_program_s(folder: str) -> None:
    path = Path(folder).resolve() / "any.raw"
    assert any(path.is_relative_to(one) for one in (*map(Path, access._SYSTEM), *access._PROGRAM))


@needs_root
def test_a_closed_folder_is_named(open_folder: Path) -> None:
    closed = open_folder / "closed"
    closed.mkdir(mode=0o700)
    (closed / "a.raw").write_bytes(b"x")
    with pytest.raises(StorageError, match=f"enter the folder {closed}") as caught:
        images.grant(closed / "a.raw", USER, read_only=True)
    assert caught.value.todo.endswith(f"setfacl -m u:{USER}:x {closed}")


@needs_root
@pytest.mark.parametrize("closed", [True, False])
def test_what_its_owner_could_not_write_either_stays_as_it_was(open_folder: Path, *, closed: bool) -> None:
    folder = open_folder / "folder"
    folder.mkdir(mode=0o700 if closed else 0o755)
    path = folder / "a.raw"
    path.write_bytes(b"x")
    path.chmod(0o600 if closed else 0o400)
    with pytest.raises(StorageError, match="may not write") as caught:
        images.grant(path, USER, read_only=False)
    assert (f"enter the folder {folder}" if closed else "does not let its owner write it") in caught.value.why
    assert (path.stat().st_uid, path.stat().st_gid) == (0, 0)


def test_a_missing_file_cannot_be_given(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no file"):
        images.grant(tmp_path / "a", None, read_only=True)
