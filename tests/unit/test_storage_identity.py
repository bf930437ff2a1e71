"""Do two hosts mean the same file? A wrong yes would run a guest on another disk."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from limosa.model.facts import FileIdentity
from limosa.storage import leases, mounts
from limosa.storage.identity import identify, same_file, version
from limosa.storage.leases import Rule
from limosa.storage.mounts import Mount

HERE = FileIdentity(path="/images/a", machine="boot-1", device=1, inode=10)
NFS = "nfs4 nas:/images"
SSHFS = "fuse.sshfs nas:/images"


def like(identity: FileIdentity, **changes: object) -> FileIdentity:
    return msgspec.structs.replace(identity, **changes)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        # one kernel
        ({}, {"path": "/elsewhere/a"}, True),
        ({}, {"inode": 11}, False),
        ({}, {"device": 2}, False),
        ({"digest": "d"}, {"inode": 11, "digest": "d"}, True),
        # one kernel, local storage of two hosts that is named alike
        ({"location": "vms", "location_path": "a"}, {"inode": 11, "location": "vms", "location_path": "a"}, False),
        # one kernel, the same share mounted twice
        ({"share": NFS}, {"share": NFS, "device": 2}, True),
        ({"share": NFS}, {"share": NFS, "device": 2, "inode": 11}, False),
        (
            {"share": SSHFS, "location": "vms", "location_path": "a"},
            {"share": SSHFS, "device": 2, "inode": 99, "location": "vms", "location_path": "a"},
            True,
        ),
        # two machines
        ({}, {"machine": "boot-2"}, False),
        ({"share": NFS}, {"machine": "boot-2", "share": NFS, "device": 7}, True),
        ({"share": NFS}, {"machine": "boot-2", "share": NFS, "inode": 11}, False),
        ({"share": NFS}, {"machine": "boot-2", "share": "nfs4 other:/images"}, False),
        # one mounted a folder further down than the other
        (
            {"share": "nfs4 nas:/", "on_server": "nfs4 nas:/images/a"},
            {"machine": "boot-2", "share": NFS, "on_server": "nfs4 nas:/images/a", "device": 7},
            True,
        ),
        (
            {"share": "nfs4 nas:/", "on_server": "nfs4 nas:/images/a"},
            {"machine": "boot-2", "share": NFS, "on_server": "nfs4 nas:/images/a", "inode": 11},
            False,
        ),
        (
            {"share": "nfs4 nas:/", "on_server": "nfs4 nas:/a"},
            {"machine": "boot-2", "share": NFS, "on_server": "nfs4 nas:/images/a"},
            False,
        ),
        # NFS 3 and 4 do not call a folder alike
        (
            {"share": "nfs nas:/images", "on_server": "nfs nas:/images/a"},
            {"machine": "boot-2", "share": NFS, "on_server": "nfs4 nas:/images/a"},
            False,
        ),
        (
            {"share": SSHFS, "on_server": "fuse.sshfs nas:/images/a"},
            {"machine": "boot-2", "share": SSHFS, "on_server": "fuse.sshfs nas:/images/a"},
            False,
        ),
        # inode numbers of a FUSE share are made up by each host
        ({"share": SSHFS}, {"machine": "boot-2", "share": SSHFS}, False),
        # an administrator's word
        (
            {"location": "vms", "location_path": "a"},
            {"machine": "boot-2", "device": 7, "location": "vms", "location_path": "a"},
            True,
        ),
        (
            {"location": "vms", "location_path": "a"},
            {"machine": "boot-2", "location": "other", "location_path": "a"},
            False,
        ),
        (
            {"location": "vms", "location_path": "a"},
            {"machine": "boot-2", "location": "vms", "location_path": "b"},
            False,
        ),
        # copies
        ({"digest": "d"}, {"machine": "boot-2", "digest": "d"}, True),
        ({"digest": "d"}, {"machine": "boot-2", "digest": "e"}, False),
        # the server's inode numbers prove more than a name
        (
            {"share": NFS, "location": "vms", "location_path": "a"},
            {"machine": "boot-2", "share": NFS, "inode": 11, "location": "vms", "location_path": "a"},
            False,
        ),
    ],
)
def test_same_file(one: dict[str, object], other: dict[str, object], same: bool) -> None:
    assert same_file(like(HERE, **one), like(HERE, **other)) is same


CIFS, UNNUMBERED = "cifs //nas/vms", "cifs-noserverino //nas/vms"
HELD = "host1 boot-1 4c0b"


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        # a lease tells where inodes are made up: no two storages have the same one
        ({"share": SSHFS, "holder": HELD}, {"share": SSHFS, "inode": 99, "holder": HELD}, True),
        ({"share": SSHFS, "holder": HELD}, {"share": SSHFS, "holder": "host1 boot-0 4c0b"}, False),
        ({"share": SSHFS, "holder": HELD}, {"share": SSHFS}, False),
        ({"share": CIFS, "holder": HELD}, {"share": UNNUMBERED, "inode": 99, "holder": HELD}, True),
        ({"holder": HELD}, {"share": SSHFS, "inode": 99, "holder": HELD}, True),
        # without one the word does, unless the share is not mounted on one of them
        ({"share": SSHFS}, {"share": SSHFS, "inode": 99}, True),
        ({"share": SSHFS}, {}, False),
        ({"share": CIFS}, {}, False),
        ({"share": CIFS}, {"share": UNNUMBERED}, False),
        # one server by two names, and the server itself
        ({"share": NFS}, {"share": "nfs 10.0.0.1:/images", "device": 7}, True),
        ({"share": NFS}, {"share": "nfs4 10.0.0.1:/images", "inode": 11}, False),
        ({"share": CIFS}, {"share": "smb3 //10.0.0.1/vms"}, True),
        ({"share": CIFS}, {"share": "cifs //10.0.0.1/vms", "inode": 11}, False),
        ({}, {"share": NFS, "device": 7}, True),
        ({}, {"share": NFS, "inode": 11}, False),
        # local as the kernel says it, such as a cluster's file system that we do not know
        ({}, {"inode": 11}, False),
        # a block device, whose inode is that of a node in each host's /dev
        ({"device_bytes": 4096}, {"device_bytes": 4096, "inode": 11}, True),
        ({"device_bytes": 4096}, {"device_bytes": 8192}, False),
        ({"device_bytes": 4096}, {}, False),
    ],
)
def test_what_must_bear_out_the_word_of_two_administrators(
    one: dict[str, object], other: dict[str, object], same: bool
) -> None:
    here = like(HERE, location="vms", location_path="a")
    assert same_file(like(here, **one), like(here, machine="boot-2", **other)) is same
    assert not same_file(like(HERE, **one), like(HERE, machine="boot-2", **other))


IDENTITIES = st.builds(
    FileIdentity,
    path=st.just("/a"),
    machine=st.sampled_from(["boot-1", "boot-2"]),
    device=st.integers(1, 2),
    inode=st.integers(1, 2),
    device_bytes=st.integers(0, 2),
    holder=st.sampled_from(["", "host1 boot-1 vm", "host2 boot-2 vm"]),
    on_server=st.sampled_from(["", "nfs4 nas:/images/a"]),
    share=st.sampled_from(["", NFS, "nfs 10.0.0.1:/images", SSHFS, "cifs //nas/vms", "cifs-noserverino //nas/vms"]),
    location=st.sampled_from(["", "vms"]),
    location_path=st.sampled_from(["a", "b"]),
    digest=st.sampled_from(["", "d", "e"]),
)


@given(IDENTITIES, IDENTITIES)
def test_the_judgement_does_not_depend_on_who_asks(one: FileIdentity, other: FileIdentity) -> None:
    assert same_file(one, other) is same_file(other, one)
    assert same_file(one, one)


def test_what_is_found_out_about_a_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "kernel"
    path.parent.mkdir()
    path.write_bytes(b"vmlinuz")
    places = {"all": "/", "outer": str(tmp_path), "inner": str(path.parent), "sibling": str(tmp_path / "de")}
    found = identify(str(path), places, digest=True)
    assert found is not None
    status = path.stat()
    assert (found.device, found.inode, found.device_bytes) == (status.st_dev, status.st_ino, 0)
    assert (found.location, found.location_path) == ("inner", "kernel")
    assert found.digest == hashlib.sha256(b"vmlinuz").hexdigest()
    assert found.writable
    link = tmp_path / "link"
    link.symlink_to(path)
    through = identify(str(link), {}, digest=False)
    assert through is not None
    assert same_file(found, through)
    assert (through.location, through.digest) == ("", "")


@pytest.mark.parametrize("kind", ["ext4", "fuse.smbnetfs", "cifs", "cifs-noserverino"])
def test_an_image_that_grows_is_what_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    mount = (
        Mount("cifs", "//nas/vms") if kind == "cifs-noserverino" else Mount(kind, "//nas/vms", frozenset({"serverino"}))
    )
    monkeypatch.setattr(mounts, "find", lambda _: mount)
    path = tmp_path / "web.qcow2"
    path.write_bytes(b"")
    lease = leases.change(str(path), Rule(str(path), "host1", "boot-1", "4c0b").take)
    before = identify(str(path), {"vms": str(tmp_path)}, digest=False)
    with path.open("ab") as image:
        image.write(b"x" * 65536)
    after = identify(str(path), {"vms": str(tmp_path)}, digest=False)
    assert before is not None
    assert after is not None
    assert before.holder == f"{lease.host} {lease.boot} {lease.vm}"
    assert same_file(before, like(after, machine="boot-2", device=7))


def test_a_file_whose_lease_cannot_be_read_is_not_known(tmp_path: Path) -> None:
    path = tmp_path / "web.qcow2"
    path.write_bytes(b"")
    lease = leases.folder_of(str(path)) / "00000001"
    lease.mkdir(parents=True)
    (lease / "lease.json").write_text("{")
    assert identify(str(path), {"vms": str(tmp_path)}, digest=False) is None
    assert identify(str(path), {}, digest=False) is not None


def test_on_nfs_a_folder_is_not_looked_into_before_it_matters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "web.qcow2"
    path.write_bytes(b"")
    leases.change(str(path), Rule(str(path), "host1", "boot-1", "4c0b").take)
    monkeypatch.setattr(mounts, "find", lambda _: Mount("nfs4", "nas:/images"))
    found = identify(str(path), {"vms": str(tmp_path)}, digest=False)
    assert found is not None
    assert found.holder == ""


def test_a_file_has_its_name_on_the_server_whichever_folder_is_mounted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "vms" / "web.qcow2"
    path.parent.mkdir()
    path.touch()
    found = []
    for source, point in (("nas:/", tmp_path), ("nas:/vms", path.parent)):
        device = path.stat().st_dev
        line = f"30 22 {os.major(device)}:{os.minor(device)} / {point} rw - nfs4 {source} rw"
        with monkeypatch.context() as then:
            then.setattr(Path, "read_text", lambda *_, line=line: line)
            found.append(identify(str(path), {}, digest=False))
    above, below = found
    assert above is not None
    assert below is not None
    assert (above.share, below.share) == ("nfs4 nas:/", "nfs4 nas:/vms")
    assert same_file(above, like(below, machine="boot-2"))


def test_a_digest_follows_the_contents(tmp_path: Path) -> None:
    digests = set()
    for contents in (b"one", b"two", b"three"):
        path = tmp_path / "kernel"
        path.write_bytes(contents)
        found = identify(str(path), {}, digest=True)
        assert found is not None
        digests.add(found.digest)
    assert len(digests) == 3


@pytest.mark.parametrize("path", ["/nowhere/at/all", "/proc/self/mem/x"])
def test_no_such_file(path: str) -> None:
    assert identify(path, {}, digest=True) is None


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    found = identify(str(tmp_path / "pipe"), {}, digest=True)
    assert found is None or found.digest == ""


@pytest.mark.parametrize(
    ("mount", "share"),
    [
        (Mount("ext4", "/dev/sda1"), ""),
        (Mount("nfs4", "nas:/images"), "nfs4 nas:/images"),
        (Mount("fuse.glusterfs", "nas:vol"), "fuse.glusterfs nas:vol"),
        (Mount("fuse.sshfs", "nas:/"), "fuse.sshfs nas:/"),
        (Mount("cifs", "//nas/vms", frozenset({"rw", "serverino"})), "cifs //nas/vms"),
        (Mount("cifs", "//nas/vms", frozenset({"rw"})), "cifs-noserverino //nas/vms"),
    ],
)
def test_shares(mount: Mount, share: str) -> None:
    assert mount.share == share


def test_inodes_a_client_has_numbered_prove_nothing() -> None:
    share = Mount("cifs", "//nas/vms").share
    here = like(HERE, share=share)
    assert not same_file(here, like(here, machine="boot-2"))
    said = {"location": "vms", "location_path": "a"}
    assert same_file(like(here, **said), like(here, **said, machine="boot-2", inode=99))


def test_the_kernels_table_of_mounts() -> None:
    assert mounts.find(Path("/proc").stat().st_dev).kind == "proc"
    assert mounts.find(os.makedev(4000, 4000)) == mounts.UNKNOWN


def test_what_a_block_device_has_is_never_what_it_had(tmp_path: Path) -> None:
    """It does not tell when it was written, so nothing that was known of it counts."""
    file, device = tmp_path / "file", tmp_path / "device"
    file.touch()
    os.mknod(device, 0o600 | stat.S_IFBLK, os.makedev(253, 77))
    assert version(file.stat()) == version(file.stat())
    assert version(device.stat()) != version(device.stat())
