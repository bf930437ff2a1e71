"""A disk that moves along meets trouble: the guest goes on where it was, with everything it was told is durable."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from harness.commands import limosa
from harness.crashes import disks_of
from harness.disks import Listener, assert_keeps, goes_on, number
from harness.guests import LanClient
from harness.hosts import settled, wait_until
from harness.images import MIB, SIZE_MIB, add_location, images, numbering
from harness.labs import LabHost, running_lab, set_links
from harness.qmp import assert_no_copies
from harness.steering import change, follow, looking, move, settings
from limosa.lab import daemons, namespaces
from limosa.model.migration import Migration, Outcome, Phase
from limosa.wire import api, endpoints

pytestmark = [pytest.mark.qemu, pytest.mark.lab]

#: The copy of the disk takes minutes.
BRAKE = {"storage_bandwidth_mbit_per_s": 4}
#: A lost session is noticed by its pings; what was begun is undone at once then.
UNDONE_WITHIN_S = 30.0
CANCEL_WITHIN_S = 2.0


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[LabHost]]:
    with running_lab() as made:
        yield made


@pytest.fixture(scope="module")
def client(hosts: list[LabHost]) -> LanClient:
    """A client of the guest ``web``, which numbers a disk only the first host sees."""
    return numbering(hosts[0])


@pytest.fixture(autouse=True)
def as_before(hosts: list[LabHost], client: LanClient) -> Iterator[None]:
    """The guest is on the first host, where it was, and nothing is anywhere else."""
    before = disks_of(hosts[0], "web")
    yield
    goes_on(client)
    assert disks_of(hosts[0], "web") == before
    wait_until(lambda: settled(hosts), "every move has ended")
    hosts[1].wait_until_bare()
    assert images(hosts[0]) == before
    assert images(hosts[1]) == []
    assert_keeps(hosts[0], "web", number(client))
    assert_no_copies(hosts[0])


def copying(view: Migration) -> bool:
    return view.phase is Phase.STORAGE and any(disk.copied_bytes for disk in view.progress.disks)


@contextmanager
def in_the_copy(source: LabHost, destination: LabHost) -> Iterator[str]:
    """A move that copies its disk and will for minutes."""
    with settings(source, BRAKE):
        migration = source.move("web", destination.name).id
        follow(source, migration, copying)
        yield migration


def fails(host: LabHost, migration: str, code: str) -> None:
    """It ends in time, and says why."""
    begun = time.monotonic()
    ended = host.outcome(migration)
    assert time.monotonic() - begun < UNDONE_WITHIN_S
    assert ended.outcome is Outcome.FAILED
    assert ended.fault is not None
    assert ended.fault.code == code, ended.fault


def test_the_network_is_cut(hosts: list[LabHost], client: LanClient) -> None:
    source, destination = hosts
    with in_the_copy(source, destination) as migration:
        set_links(destination, "down")
        try:
            fails(source, migration, "destination-lost")
            goes_on(client)
        finally:
            set_links(destination, "up")


def test_the_destinations_daemon_dies(hosts: list[LabHost]) -> None:
    source, destination = hosts
    with in_the_copy(source, destination) as migration:
        destination.kill()
        try:
            fails(source, migration, "destination-lost")
        finally:
            destination.start()


def test_the_destinations_qemu_dies(hosts: list[LabHost]) -> None:
    source, destination = hosts
    with in_the_copy(source, destination) as migration:
        (pid,) = destination.qemus()
        os.kill(pid, signal.SIGKILL)
        fails(source, migration, "destination-lost")


def test_the_destinations_qemu_hangs(hosts: list[LabHost]) -> None:
    source, destination = hosts
    with in_the_copy(source, destination):
        (pid,) = destination.qemus()
        os.kill(pid, signal.SIGSTOP)
        cancels(source)


def test_the_destinations_qemu_hangs_before_it_has_answered(hosts: list[LabHost], client: LanClient) -> None:
    """The source's QEMU waits for the other to greet it. The guest must not wait with it for long."""
    source, destination = hosts
    destination.restart({"LIMOSA_TEST_BREAK": "destination:exported:after:hang"})
    listener = Listener(client)
    migration = source.move("web", destination.name).id
    wait_until(lambda: source.client.call(endpoints.SHOW_MIGRATION, migration=migration).phase is Phase.STORAGE, "it")
    with looking(listener.ask, pause_s=0.05):
        cancels(source)
    destination.start()


@pytest.mark.parametrize("hangs", [False, True])
@pytest.mark.parametrize("step", ["whole", "continued"])
def test_cancelled_in_the_switchover(hosts: list[LabHost], tmp_path: Path, step: str, hangs: bool) -> None:
    """The guest stands still: copies are about to be made whole, or memory has to follow them; and the destination's
    QEMU takes nothing any more."""
    source, destination = hosts
    mark = tmp_path / "held"
    source.restart({"LIMOSA_TEST_BREAK": f"source:{step}:before:hold", "LIMOSA_TEST_HOLD": str(mark)})
    source.move("web", destination.name)
    wait_until(mark.exists, "it is held in its switchover")
    if hangs:
        (pid,) = destination.qemus()
        os.kill(pid, signal.SIGSTOP)
        mark.unlink()
    cancels(source)


def cancels(host: LabHost) -> None:
    begun = time.monotonic()
    said = limosa(host, "migration", "cancel", "web", "--json")
    assert time.monotonic() - begun < CANCEL_WITHIN_S
    assert (said.code, said.object["outcome"]) == (0, "cancelled")


@pytest.fixture
def small(hosts: list[LabHost]) -> Iterator[Path]:
    """A location ``small`` of the destination, on a file system with little more room than the disk needs; as its
    daemon sees it, in mounts of its own."""
    folder = add_location(hosts[1], "small")
    with own_folder(hosts[1], folder, size_mib=SIZE_MIB + 4):
        yield Path(f"/proc/{daemons.pid_of(hosts[1].lab, hosts[1].name)}/root{folder}")
    change(hosts[1], {"locations.small": None})
    folder.rmdir()


#: Starts a daemon that has a file system of its own in place of a folder, readable for QEMU's user.
ELSEWHERE = 'mount -t tmpfs -o mode=711,size="$1" none "$0" && shift && exec "$@"'


@contextmanager
def own_folder(host: LabHost, folder: Path, size_mib: int) -> Iterator[None]:
    daemon = [sys.executable, str(Path(__file__).parents[1] / "harness" / "daemon.py")]
    host.restart_as(["unshare", "--mount", "sh", "-c", ELSEWHERE, str(folder), f"{size_mib}m", *daemon])
    try:
        yield
    finally:
        host.start()


def to_small(source: LabHost) -> str:
    options = api.MoveOptions(storage={"vda": "small"})
    return source.client.call(endpoints.MOVE, api.MoveRequest(vm="web", destination="host2", options=options)).id


def test_the_destinations_disk_runs_full(hosts: list[LabHost], small: Path) -> None:
    source, _ = hosts
    with settings(source, BRAKE):
        migration = to_small(source)
        follow(source, migration, copying)
        fill(small)
        change(source, {"storage_bandwidth_mbit_per_s": 0})
        fails(source, migration, "migration-failed")
    wait_until(lambda: [path.name for path in small.iterdir()] == ["filler"], "the copy is gone")


def fill(folder: Path) -> None:
    """Leave no room in a file system."""
    with (folder / "filler").open("wb", buffering=0) as filler, suppress(OSError):
        while True:
            filler.write(bytes(MIB))


def test_a_full_destination_is_not_begun_with(hosts: list[LabHost], small: Path) -> None:
    source, destination = hosts
    (small / "filler").write_bytes(bytes(16 * MIB))
    ended = source.outcome(to_small(source))
    assert ended.fault is not None
    assert [finding.code for finding in ended.fault.findings] == ["space-short"]
    assert not list((destination.state / "migrations").glob(f"{ended.id}*")), "it was not asked to prepare"


def test_a_location_that_has_vanished(hosts: list[LabHost]) -> None:
    for host in hosts:
        add_location(host, "gone").rmdir()
    source, _ = hosts
    try:
        options = api.MoveOptions(storage={"vda": "gone"})
        request = api.MoveRequest(vm="web", destination="host2", options=options)
        ended = source.outcome(source.client.call(endpoints.MOVE, request).id)
        assert ended.fault is not None
        # What lay in the source's may lie above the image that would be deleted.
        assert [finding.code for finding in ended.fault.findings] == ["location-unusable", "image-needed"]
        said = limosa(source, "storage", "move", "web", "--to", "gone", "--json")
        assert (said.code, said.object["error"]["code"]) == (6, "preflight-refused")
    finally:
        for host in hosts:
            change(host, {"locations.gone": None})


NBD_MAGIC, OPTION_MAGIC = b"NBDMAGIC", b"IHAVEOPT"
FIXED_NEWSTYLE, OPT_EXPORT_NAME, OPT_LIST, OPT_STARTTLS, REPLY_ACK = 1, 1, 3, 5, 1


class TestStrangers:
    """Who finds the port of the copy and is not the source."""

    def test_nobody_gets_in_or_in_the_way(self, hosts: list[LabHost], client: LanClient) -> None:
        source, destination = hosts
        with in_the_copy(source, destination) as migration, ExitStack() as held:
            for address in listeners(destination):
                for _ in range(4):
                    held.enter_context(connected(destination, address))  # says nothing
                    garbage = held.enter_context(connected(destination, address))
                    garbage.sendall(os.urandom(4096))
                without_tls(connected(destination, address))
                without_certificate(connected(destination, address))
            change(source, {"storage_bandwidth_mbit_per_s": 0})
            ended = source.outcome(migration)
            assert ended.outcome is Outcome.COMPLETED, ended.fault
        goes_on(client)
        assert_keeps(destination, "web", number(client))
        assert listeners(destination) == []
        move(destination, "web", source)

    @pytest.fixture(autouse=True)
    def as_before(self) -> None:
        """The image has another name afterwards."""


def listeners(host: LabHost) -> list[tuple[str, int]]:
    """Addresses at which the host's QEMU listens."""
    (pid,) = host.qemus()
    held = {os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()}
    found = []
    for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A" and f"socket:[{fields[9]}]" in held:
            address, port = fields[1].split(":")
            found.append((socket.inet_ntoa(struct.pack("<I", int(address, 16))), int(port, 16)))
    return found


def connected(host: LabHost, address: tuple[str, int]) -> socket.socket:
    return namespaces.inside(host.namespace, lambda: socket.create_connection(address, timeout=5))


def greeted(stream: socket.socket) -> None:
    """Up to where options are asked for."""
    assert exactly(stream, 18)[:16] == NBD_MAGIC + OPTION_MAGIC
    stream.sendall(struct.pack(">I", FIXED_NEWSTYLE))


def option(stream: socket.socket, number: int, data: bytes = b"") -> int:
    """Ask for one; the kind of the reply."""
    stream.sendall(OPTION_MAGIC + struct.pack(">II", number, len(data)) + data)
    _, _, kind, length = struct.unpack(">QIII", exactly(stream, 20))
    exactly(stream, length)
    return int(kind)


def exactly(stream: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = stream.recv(count - len(data))
        if not more:
            raise EOFError
        data += more
    return data


def without_tls(stream: socket.socket) -> None:
    with stream:
        greeted(stream)
        assert option(stream, OPT_LIST) != REPLY_ACK
        with pytest.raises((EOFError, OSError)):
            option(stream, OPT_EXPORT_NAME, b"vda")


def without_certificate(stream: socket.socket) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with stream:
        greeted(stream)
        assert option(stream, OPT_STARTTLS) == REPLY_ACK
        with pytest.raises((EOFError, OSError)), context.wrap_socket(stream) as wrapped:
            option(wrapped, OPT_LIST)
