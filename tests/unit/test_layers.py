"""Files below disks: what tells two chains apart, how a layer is named and made, and how its bytes travel."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limosa.errors import Conflict, LimosaError, NetworkError, StorageError
from limosa.migration.layers import sent_beside
from limosa.security.stream import make_credentials
from limosa.security.tls import stream_context
from limosa.storage import chains, layers, marks, qcow2
from limosa.transport import layers as transport
from limosa.transport.layers import Receiver, Sender, pieces

MIB = 1024 * 1024
TAG = "abcdefabcdef"
TCP_REPAIR = 19  # linux/tcp.h
MARK = marks.Mark(host="host2", at=7.0)


def qemu_img(*words: object) -> str:
    return subprocess.run(["qemu-img", *map(str, words)], check=True, capture_output=True, text=True).stdout


def overlay(path: Path, below: Path, below_format: str, *options: str) -> Path:
    qemu_img("create", "-q", "-f", "qcow2", *options, "-b", below, "-F", below_format, path)
    return path


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    path = tmp_path / "golden.raw"
    path.write_bytes(random.Random(1).randbytes(MIB) + bytes(3 * MIB))
    return path


class TestTheDigest:
    """It stands for all that shows through a file."""

    def test_what_is_below_may_be_called_otherwise(self, tmp_path: Path, golden: Path) -> None:
        other = tmp_path / "a" / "quite" / "another-name.img"
        other.parent.mkdir(parents=True)
        other.write_bytes(golden.read_bytes())
        one, two = tmp_path / "one.qcow2", tmp_path / "two.qcow2"
        two.write_bytes(overlay(one, golden, "raw").read_bytes())
        with two.open("r+b") as stream:
            renamed = qcow2.below_called(stream.read(65536), str(other))
            stream.seek(0)
            stream.write(renamed)
        assert chains.digest(str(one), "qcow2") == chains.digest(str(two), "qcow2")
        assert json.loads(qemu_img("info", "--output=json", two))["full-backing-filename"] == str(other)

    def test_what_is_below_may_not_be_otherwise(self, tmp_path: Path, golden: Path) -> None:
        one = overlay(tmp_path / "one.qcow2", golden, "raw")
        before = chains.digest(str(one), "qcow2")
        with golden.open("r+b") as stream:
            stream.write(b"x")
        assert chains.digest(str(one), "qcow2") != before

    def test_what_is_in_it_may_not_be_otherwise(self, tmp_path: Path, golden: Path) -> None:
        one = overlay(tmp_path / "one.qcow2", golden, "raw")
        before = chains.digest(str(one), "qcow2")
        subprocess.run(["qemu-io", "-c", "write 0 64k", str(one)], check=True, stdout=subprocess.DEVNULL)
        assert chains.digest(str(one), "qcow2") != before

    def test_the_format_below_counts(self, tmp_path: Path) -> None:
        """The bytes of a qcow2 image can be meant as a raw disk, too."""
        below = tmp_path / "below"
        qemu_img("create", "-q", "-f", "qcow2", below, "4M")
        one = overlay(tmp_path / "one.qcow2", below, "qcow2")
        two = tmp_path / "two.qcow2"
        qemu_img("create", "-q", "-f", "qcow2", "-b", below, "-F", "raw", two, "4M")
        assert chains.digest(str(one), "qcow2") != chains.digest(str(two), "qcow2")

    def test_a_lowest_file_is_its_bytes(self, golden: Path) -> None:
        said = subprocess.run(["sha256sum", str(golden)], check=True, capture_output=True, text=True).stdout
        assert chains.digest(str(golden), "raw") == said.split()[0]

    def test_what_is_not_there(self, tmp_path: Path, golden: Path) -> None:
        one = overlay(tmp_path / "one.qcow2", golden, "raw")
        golden.unlink()
        with pytest.raises(StorageError):
            chains.digest(str(one), "qcow2")

    @pytest.mark.parametrize("cluster", [512, 65536, 2 * MIB])
    def test_every_size_of_cluster(self, tmp_path: Path, golden: Path, cluster: int) -> None:
        one = overlay(tmp_path / "one.qcow2", golden, "raw", "-o", f"cluster_size={cluster}")
        name = "/" + "n" * 20 if cluster == 512 else "/" + "n" * 1022
        renamed = qcow2.below_called(one.read_bytes(), name)
        assert len(renamed) == one.stat().st_size
        assert qcow2.parse(renamed[:65536]).backing == name
        assert qcow2.below_called(renamed, str(golden)) == one.read_bytes()

    def test_no_room_for_a_name(self, tmp_path: Path, golden: Path) -> None:
        one = overlay(tmp_path / "one.qcow2", golden, "raw", "-o", "cluster_size=512")
        with pytest.raises(ValueError, match="no room"):
            qcow2.below_called(one.read_bytes(), "/" + "n" * 511)
        with pytest.raises(StorageError, match="cannot have the backing file"):
            layers.finish(one, "/" + "n" * 511, None)

    @given(at=st.integers(0, 2**64 - 1), bits=st.integers(0, 2**32 - 1), length=st.integers(0, 4096))
    def test_a_header_that_lies_harms_nobody(self, at: int, bits: int, length: int) -> None:
        header = qcow2._HEAD.pack(qcow2.MAGIC, 3, at, 0, bits, 0, 0, 0, 0, 0, 0, 0, 0)[:length].ljust(length, b"\0")
        with contextlib.suppress(ValueError):
            assert len(qcow2.below_called(header, "/x")) == length


class TestNames:
    """They tell where to look, and are nobody else's."""

    @pytest.mark.parametrize(
        ("origin", "name"),
        [
            ("/srv/golden.raw", "golden.abcdefabcdef-1.raw"),
            ("/srv/golden.k3v9x0p2m7aq-12.raw", "golden.abcdefabcdef-1.raw"),
            ("/srv/debian-12.5.qcow2", "debian-12.5.abcdefabcdef-1.raw"),
            ("/srv/a b\n;$(x).raw", "a-b----x.abcdefabcdef-1.raw"),
            ("/srv/" + "n" * 300, "n" * 100 + ".abcdefabcdef-1.raw"),
            ("/srv/....", "layer.abcdefabcdef-1.raw"),
        ],
    )
    def test_of_a_copy(self, origin: str, name: str) -> None:
        assert layers.name(origin, TAG, 1, "raw") == name

    def test_a_copy_and_its_original_are_known_to_belong_together(self) -> None:
        copy = layers.name("/srv/golden.raw", TAG, 3, "raw")
        assert layers.stem(copy) == layers.stem("/elsewhere/golden.raw") == "golden"
        assert layers.stem(layers.name(copy, "bcdefabcdefa", 1, "raw")) == "golden"

    def test_nobody_writes_it(self, tmp_path: Path, golden: Path) -> None:
        layers.finish(golden, "", None)
        assert golden.stat().st_mode & 0o777 == 0o440

    def test_it_is_made_beside_its_mark(self, tmp_path: Path, golden: Path) -> None:
        made = tmp_path / layers.name("/srv/golden.raw", TAG, 1, "raw")
        layers.make(made, MARK)
        assert made.stat().st_size == 0
        assert marks.find(tmp_path) == [marks.Marked(made, MARK)]
        with pytest.raises(StorageError, match="exists"):
            layers.make(golden, MARK)
        assert not marks.has(str(golden)), "it is somebody's"
        with pytest.raises(StorageError):
            layers.make(tmp_path / "gone" / made.name, MARK)

    def test_what_lies_below_a_vm_is_no_unfinished_copy(self, tmp_path: Path, golden: Path) -> None:
        middle = overlay(tmp_path / "middle.qcow2", golden, "raw")
        disk = overlay(tmp_path / "disk.qcow2", middle, "qcow2")
        for path in (golden, middle, disk):
            marks.begin(str(path), MARK)
        layers.claim_below(str(disk), "qcow2", marks.claim, {str(middle)})
        assert [marks.has(str(path)) for path in (golden, middle, disk)] == [False, True, True]
        marks.condemn(str(middle))
        with pytest.raises(Conflict, match="is being removed"):
            layers.claim_below(str(disk), "qcow2", marks.claim, ())


class TestWhoSaysWhy:
    """A destination that says why files cannot be sent is believed; one that says nothing is not waited for long."""

    def test_it_goes_well(self) -> None:
        async def scenario() -> None:
            assert await sent_beside(asyncio.sleep(0), asyncio.sleep(0.01, "answer")) == "answer"
            assert await sent_beside(asyncio.sleep(0.01), asyncio.sleep(0, "answer")) == "answer"

        asyncio.run(scenario())

    @pytest.mark.parametrize(("says", "raised"), [(True, StorageError), (False, NetworkError)])
    def test_it_fails(self, monkeypatch: pytest.MonkeyPatch, *, says: bool, raised: type[LimosaError]) -> None:
        if not says:
            monkeypatch.setattr("limosa.migration.layers.SAYS_WHY_WITHIN_S", 0.01)

        async def scenario() -> None:
            has_broken = asyncio.Event()

            async def broken() -> None:
                has_broken.set()
                raise NetworkError("connection reset")

            async def answer() -> None:
                await (has_broken if says else asyncio.Event()).wait()
                raise StorageError("the disk is full")

            async with asyncio.timeout(5):
                with pytest.raises(raised):
                    await sent_beside(broken(), answer())

        asyncio.run(scenario())


def over_a_wire(
    scenario: Callable[[socket.socket, socket.socket, Any, Any], Coroutine[Any, Any, None]], *, tls: bool = False
) -> None:
    one, other = socket.socketpair()
    server, client = make_credentials()
    contexts: list[ssl.SSLContext | None] = [None, None]
    if tls:
        contexts = [stream_context(client, server=False), stream_context(server, server=True)]

    async def within_time() -> None:
        async with asyncio.timeout(20):
            await scenario(one, other, *contexts)

    with one, other:
        asyncio.run(within_time())


class CountedWaits(threading.Event):
    """How often somebody has waited for it, to the end."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def wait(self, timeout: float | None = None) -> bool:
        is_set = super().wait(timeout)
        self.count += 1
        return is_set


class TestTheStream:
    """What comes is what was sent, and nothing but."""

    @pytest.mark.parametrize("tls", [False, True])
    def test_files_arrive_and_stay_sparse(self, tmp_path: Path, *, tls: bool) -> None:
        chance = random.Random(2)
        here = [tmp_path / name for name in ("a", "b", "empty", "hole")]
        here[0].write_bytes(chance.randbytes(3 * MIB + 17))
        with here[1].open("wb") as stream:
            stream.truncate(64 * MIB)
            for at in (0, 5 * MIB + 1, 63 * MIB):
                stream.seek(at)
                stream.write(chance.randbytes(100_000))
            stream.seek(20 * MIB)
            stream.write(bytes(4 * MIB))  # zeroes that take space
        here[2].touch()
        with here[3].open("wb") as stream:
            stream.truncate(MIB + 1)
        there = [path.with_suffix(".copy") for path in here]
        for path in there:
            path.touch()

        async def scenario(one: socket.socket, other: socket.socket, client: Any, server: Any) -> None:
            sender, receiver = Sender(one, client, 0), Receiver(other, server)
            files = [(str(path), from_.stat().st_size) for path, from_ in zip(there, here, strict=True)]
            await asyncio.gather(sender.send([str(path) for path in here]), receiver.receive(files))
            assert sender.sent_bytes < 3 * MIB + 4 * 110_000

        over_a_wire(scenario, tls=tls)
        assert [path.read_bytes() for path in there] == [path.read_bytes() for path in here]
        assert there[1].stat().st_blocks * 512 < MIB
        assert there[3].stat().st_blocks == 0

    @settings(max_examples=50)
    @given(st.lists(st.tuples(st.booleans(), st.integers(1, 300_000)), max_size=6))
    def test_pieces_make_the_file(self, parts: list[tuple[bool, int]]) -> None:
        whole = b"".join((b"x" if data else b"\0") * count for data, count in parts)
        path = Path("/dev/shm") / f"limosa-pieces-{os.getpid()}"
        try:
            path.write_bytes(whole)
            made = bytearray(len(whole))
            *found, end = pieces(str(path))
            assert end == (len(whole), b"")
            for at, piece in found:
                made[at : at + len(piece)] = piece
            assert made == whole
            assert not any(piece == bytes(len(piece)) for _, piece in found)
        finally:
            path.unlink(missing_ok=True)

    @pytest.mark.parametrize(
        "said",
        [
            transport._PIECE.pack(5, 1),
            transport._PIECE.pack(0, 0),
            transport._PIECE.pack(0, 11),
            transport._PIECE.pack(2**64 - 1, 2),
            transport._PIECE.pack(0, 4) + b"abcd" + transport._PIECE.pack(3, 1),
            transport._PIECE.pack(0, 4) + b"abc",
            b"",
        ],
    )
    def test_what_no_sender_says(self, tmp_path: Path, said: bytes) -> None:
        path = tmp_path / "a"
        path.touch()

        async def scenario(one: socket.socket, other: socket.socket, *_: Any) -> None:
            one.sendall(said)
            one.close()
            with pytest.raises(NetworkError):
                await Receiver(other, None).receive([(str(path), 5)])

        over_a_wire(scenario)
        assert path.stat().st_size <= 5

    def test_who_has_no_certificate(self, tmp_path: Path) -> None:
        path = tmp_path / "a"
        path.write_bytes(b"secret")
        _, stranger = make_credentials()

        async def scenario(one: socket.socket, other: socket.socket, _: Any, server: Any) -> None:
            context = stream_context(stranger, server=False)
            results = await asyncio.gather(
                Sender(one, context, 0).send([str(path)]),
                Receiver(other, server).receive([(str(tmp_path / "b"), 6)]),
                return_exceptions=True,
            )
            assert all(isinstance(result, NetworkError) for result in results)

        over_a_wire(scenario, tls=True)
        assert not (tmp_path / "b").exists()

    @pytest.mark.parametrize("which", ["sender", "receiver"])
    def test_who_is_cancelled_ends_at_once(self, tmp_path: Path, which: str) -> None:
        """The other end holds still meanwhile, so that both wait."""
        big, copy = tmp_path / "big", tmp_path / "copy"
        big.write_bytes(b"x" * 8 * MIB)
        copy.touch()

        async def scenario(one: socket.socket, other: socket.socket, *_: Any) -> None:
            if which == "sender":
                task = asyncio.ensure_future(Sender(one, None, 0).send([str(big)]))
                # The file has begun to come, and there is no room for all of it on the way.
                other.setblocking(False)
                assert await asyncio.get_running_loop().sock_recv(other, 1)
            else:
                task = asyncio.ensure_future(Receiver(other, None).receive([(str(copy), 8 * MIB)]))
                one.sendall(transport._PIECE.pack(0, 4) + b"abcd")
                while copy.stat().st_size < 4:  # noqa: ASYNC110 - it works in a thread
                    await asyncio.sleep(0.001)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        over_a_wire(scenario)

    @pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
    def test_a_sender_that_is_gone_without_a_word(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """As when a cable is pulled."""
        at_once = dict.fromkeys((socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT), 1)
        kept = [(level, option, at_once.get(option, value)) for level, option, value in transport._KEEP_ALIVE]
        monkeypatch.setattr(transport, "_KEEP_ALIVE", kept)
        copy = tmp_path / "copy"
        copy.touch()

        async def scenario() -> None:
            with socket.create_server(("127.0.0.1", 0)) as listener:
                one = socket.create_connection(listener.getsockname())
                other, _ = listener.accept()
            with one, other:
                one.sendall(transport._PIECE.pack(0, 4) + b"abcd")
                one.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
                one.close()  # sends nothing
                async with asyncio.timeout(20):
                    with pytest.raises(NetworkError):
                        await Receiver(other, None).receive([(str(copy), MIB)])

        asyncio.run(scenario())
        assert copy.read_bytes() == b"abcd"

    def test_a_cap_is_kept_and_can_be_lifted(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(transport, "_PAUSE_S", 0.001)
        path, copy = tmp_path / "a", tmp_path / "b"
        path.write_bytes(b"x" * 4 * MIB)
        copy.touch()

        async def scenario(one: socket.socket, other: socket.socket, *_: Any) -> None:
            sender = Sender(one, None, 1)
            pauses = sender._stopped = CountedWaits()
            both = asyncio.gather(sender.send([str(path)]), Receiver(other, None).receive([(str(copy), 4 * MIB)]))
            while pauses.count < 10:  # noqa: ASYNC110 - it works in a thread
                await asyncio.sleep(0.001)
            assert sender.sent_bytes == transport._PIECE_BYTES
            sender.bytes_per_s = 0
            await both

        over_a_wire(scenario)
        assert copy.read_bytes() == path.read_bytes()

    def test_a_file_that_cannot_be_read(self, tmp_path: Path) -> None:
        async def scenario(one: socket.socket, *_: Any) -> None:
            with pytest.raises(LimosaError, match="nowhere") as caught:
                await Sender(one, None, 0).send([str(tmp_path / "nowhere")])
            assert isinstance(caught.value, StorageError)

        over_a_wire(scenario)

    @pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
    def test_a_full_disk(self, tmp_path: Path) -> None:
        small = tmp_path / "small"
        small.mkdir()
        subprocess.run(["/bin/mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small], check=True)
        try:
            (small / "copy").touch()
            (tmp_path / "big").write_bytes(b"x" * MIB)

            async def scenario(one: socket.socket, other: socket.socket, *_: Any) -> None:
                results = await asyncio.gather(
                    Sender(one, None, 0).send([str(tmp_path / "big")]),
                    Receiver(other, None).receive([(str(small / "copy"), MIB)]),
                    return_exceptions=True,
                )
                assert isinstance(results[1], StorageError)
                assert results[1].why == "No space left on device"

            over_a_wire(scenario)
        finally:
            subprocess.run(["/bin/umount", str(small)], check=True)
