"""A daemon whose files, ports, disks and neighbours are not as they should be.

What is wrong is named, with a code; what is not concerned works; nothing is lost, and what was in the way can be taken
away and everything works again.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import shutil
import socket
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from resource import RLIM_INFINITY, RLIMIT_FSIZE, prlimit
from typing import Any

import pytest
import tomli_w

from harness.hosts import Host, make_hosts, runners, running_hosts, tiny, wait_until
from harness.raw import nothing_landed
from harness.steering import does_not_fit
from limosa.client.host import HostClient
from limosa.client.route import TlsRoute
from limosa.errors import (
    Conflict,
    HostNotTrusted,
    InvalidInput,
    LimosaError,
    OwnerUnknown,
    QemuError,
    StateError,
    StorageError,
)
from limosa.model.migration import Migration, Outcome, Phase, Side
from limosa.model.vm import CloudInit, DirectBoot, VmState
from limosa.security import ca
from limosa.settings.daemon import DEFAULT_PORT
from limosa.wire import api, endpoints
from limosa.wire.endpoints import Endpoint, Role

pytestmark = [pytest.mark.qemu, pytest.mark.lab]


@pytest.fixture
def fresh() -> Iterator[Host]:
    """A host that was never started."""
    folder = Path(f"/tmp/lf{os.getpid()}")
    folder.mkdir()
    host = make_hosts(folder, "solo", first=10)[0]
    yield host
    host.end()
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[Host]]:
    with running_hosts("alpha", "beta") as made:
        yield made


@pytest.fixture
def pair(hosts: list[Host]) -> Iterator[list[Host]]:
    """Two hosts without VMs, before and after."""
    yield hosts
    for host in hosts:
        forget_all(host)
    for host in hosts:
        wait_until(partial(nothing_landed, host), "nothing is left")


def forget_all(host: Host) -> None:
    for vm in host.client.call(endpoints.LIST_VMS).vms:
        if vm.pid is not None:
            host.client.call(endpoints.STOP_VM, vm=vm.config.name)
        host.client.call(endpoints.DELETE_VM, vm=vm.config.name)


# What keeps a daemon from starting ------------------------------------------------------------------------------------


def set_option(host: Host, **options: Any) -> None:
    path = host.folder / "host.toml"
    path.write_text(tomli_w.dumps(tomllib.loads(path.read_text()) | options))


def damage(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def expire(host: Host) -> None:
    life = datetime.timedelta(minutes=-1)
    ca.issue_host(host.folder.parent / "ca", host.name, [host.address], host.folder / "pki", life=life)


DAMAGE: list[tuple[str, Callable[[Host], object], int, str]] = [
    ("settings.toml is no TOML", lambda host: damage(host.state / "settings.toml", b"[[["), 14, "settings.toml"),
    ("settings.toml is cut", lambda host: damage(host.state / "settings.toml", b'[peers]\na = "'), 14, "settings.toml"),
    ("settings.toml is binary", lambda host: damage(host.state / "settings.toml", b"\xff\0"), 14, "settings.toml"),
    ("unknown setting", lambda host: damage(host.state / "settings.toml", b"max_outgoin = 1"), 14, "max_outgoin"),
    ("wrong setting", lambda host: damage(host.state / "settings.toml", b"max_outgoing = 0"), 14, "max_outgoing"),
    ("host.toml is no TOML", lambda host: damage(host.folder / "host.toml", b"name ="), 2, "host.toml"),
    ("host.toml has no name", lambda host: damage(host.folder / "host.toml", b""), 2, "name"),
    ("unknown option", lambda host: set_option(host, colour="red"), 2, "colour"),
    ("no address", lambda host: set_option(host, listen=["a b"]), 2, "listen"),
    ("not our address", lambda host: set_option(host, listen=["192.0.2.1"]), 13, "192.0.2.1"),
    ("no QEMU", lambda host: set_option(host, qemu="/nowhere/qemu"), 11, "/nowhere/qemu"),
    ("no user for QEMU", lambda host: set_option(host, qemu_user="limosa-qmu"), 2, "limosa-qmu"),
    ("QEMU is another program", lambda host: set_option(host, qemu="/bin/true"), 11, "/bin/true"),
    ("no certificates", lambda host: set_option(host, certificates="/nowhere"), 14, "/nowhere/ca.pem"),
    ("damaged key", lambda host: damage(host.folder / "pki" / "host.key", b"rubbish"), 14, "host.key"),
    (
        "state folder is a file",
        lambda host: set_option(host, state_dir=str(host.folder / "host.toml")),
        14,
        "host.toml",
    ),
    ("socket is a folder", lambda host: (host.run / "api.sock").mkdir(parents=True), 13, "api.sock"),
]


@pytest.mark.parametrize(("spoil", "code", "named"), [pytest.param(*case[1:], id=case[0]) for case in DAMAGE])
def test_a_daemon_that_cannot_work_says_why_and_changes_nothing(
    fresh: Host, spoil: Callable[[Host], object], code: int, named: str
) -> None:
    spoil(fresh)
    before = contents(fresh.folder)
    exit_code, words = fresh.refusal()
    assert (exit_code, named in words) == (code, True), words
    assert "Traceback" not in words
    after = contents(fresh.folder)
    assert {path: after.get(path) for path in before} == before


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_daemon_whose_certificate_has_expired_works_here_and_takes_a_new_one(fresh: Host) -> None:
    expire(fresh)
    fresh.start()
    assert "host.pem has expired" in (fresh.folder / "log").read_text()
    fresh.create(tiny("vm"))
    assert runners([fresh], "vm") == ["solo"]
    findings = fresh.client.call(endpoints.ADVICE).findings
    assert "certificate-expires" in {finding.code for finding in findings}
    until = fresh.client.call(endpoints.HOST).certificate_until
    assert until is not None
    assert until < time.time()
    authority, alice = fresh.folder.parent / "ca", fresh.folder / "alice"
    ca.issue_person(authority, "alice", Role.OPERATOR, alice)
    with HostClient(TlsRoute("solo", fresh.address, DEFAULT_PORT, alice, "client")) as remote:
        with pytest.raises(HostNotTrusted, match=r"certificate of host 'solo' .* has expired"):
            remote.call(endpoints.HOST)
        ca.issue_host(authority, "solo", [fresh.address], fresh.folder / "pki")
        assert (remote.call(endpoints.HOST).certificate_until or 0) > time.time()
    assert runners([fresh], "vm") == ["solo"]


def test_a_port_that_is_taken_is_named(fresh: Host) -> None:
    with socket.create_server((fresh.address, DEFAULT_PORT)):
        code, words = fresh.refusal()
    assert code == 13
    assert fresh.address in words
    fresh.start()


def test_there_is_one_daemon_for_each_folder_and_a_dead_ones_socket_is_no_hindrance(fresh: Host) -> None:
    fresh.start()
    fresh.create(tiny("vm"))
    code, words = fresh.refusal()
    assert code == 5
    assert str(fresh.state) in words
    options = (fresh.folder / "host.toml").read_text()
    set_option(fresh, state_dir=str(fresh.folder / "other"))
    code, words = fresh.refusal()
    assert code == 13
    assert "api.sock" in words
    (fresh.folder / "host.toml").write_text(options)
    assert runners([fresh], "vm") == ["solo"]
    fresh.kill()
    assert fresh.run.joinpath("api.sock").is_socket()
    fresh.state.chmod(0o777)
    fresh.start()
    assert runners([fresh], "vm") == ["solo"]
    for path, mode in {fresh.state: 0o711, fresh.run: 0o711, fresh.run / "api.sock": 0o600}.items():
        assert path.stat().st_mode & 0o777 == mode


# Damaged files of VMs and moves ---------------------------------------------------------------------------------------

JOURNAL = "abcdefghijkl.source.jsonl"


@pytest.fixture(scope="module")
def damaged() -> Iterator[tuple[Host, dict[Path, bytes]]]:
    """A host restarted over damaged files of every kind, and what was in them."""
    folder = Path(f"/tmp/ld{os.getpid()}")
    folder.mkdir()
    host = make_hosts(folder, "solo", first=20)[0]
    try:
        host.start()
        for name in ("whole", "cut", "other", "binary", "copied", "twin", "folder", "record", "dead"):
            host.client.call(endpoints.CREATE_VM, tiny(name))
        for name in ("whole", "cut", "record", "dead"):
            host.client.call(endpoints.START_VM, vm=name)
        host.kill()
        yield host, spoil_all(host)
    finally:
        host.end()
        shutil.rmtree(folder)


def spoil_all(host: Host) -> dict[Path, bytes]:
    vms = host.state / "vms"
    good = (vms / "whole" / "vm.toml").read_bytes()
    spoilt = {
        vms / "cut" / "vm.toml": (vms / "cut" / "vm.toml").read_bytes()[:50],
        vms / "other" / "vm.toml": (vms / "other" / "vm.toml").read_bytes() + b"colour = 'red'\n",
        vms / "binary" / "vm.toml": b"\xff\xfe\0",
        vms / "copied" / "vm.toml": good,
        vms / "twin" / "vm.toml": good.replace(b'"whole"', b'"twin"'),
        vms / "record" / "process.json": b'{"pid": 1',
        vms / "dead" / "process.json": b"",
        host.state / "qemu.json": b"\xff[[[",
        host.state / "migrations" / JOURNAL: b'{"migration":"abcdefghijkl"}\n',
        host.state / "migrations" / "abcdefghijkl.destination.jsonl": b"\n\n\n",
        host.state / "migrations" / "abcdefghijkl.view.json": b"{",
    }
    for pid in host.qemus():
        if json.loads((vms / "dead" / "process.json").read_bytes())["pid"] == pid:
            os.kill(pid, 9)
            wait_until(lambda: len(host.qemus()) == 3, "QEMU has ended")
    for path, data in spoilt.items():
        path.write_bytes(data)
    (vms / "folder" / "vm.toml").unlink()
    (vms / "folder" / "vm.toml").mkdir()
    (vms / "stray").touch()
    (vms / "empty").mkdir()
    host.start()
    return {path: data for path, data in spoilt.items() if path.name != "qemu.json"}


def test_damaged_files_are_left_as_they_are_and_named(damaged: tuple[Host, dict[Path, bytes]]) -> None:
    host, files = damaged
    assert {path: path.read_bytes() for path in files} == files
    log = (host.folder / "log").read_text()
    assert "Traceback" not in log
    for path in files:
        assert path.name == "abcdefghijkl.view.json" or str(path) in log


def test_vms_that_are_not_damaged_work(damaged: tuple[Host, dict[Path, bytes]]) -> None:
    host, _ = damaged
    states = {vm.config.name: vm.state for vm in host.client.call(endpoints.LIST_VMS).vms}
    assert states == {"whole": VmState.RUNNING, "record": VmState.RUNNING, "dead": VmState.CRASHED}
    for name in ("whole", "record"):
        host.client.call(endpoints.PAUSE_VM, vm=name)
        host.client.call(endpoints.RESUME_VM, vm=name)
    host.client.call(endpoints.STOP_VM, vm="whole")
    host.client.call(endpoints.START_VM, vm="whole")
    with pytest.raises(OwnerUnknown, match=JOURNAL):
        host.client.call(endpoints.START_VM, vm="dead")


@pytest.mark.parametrize("name", ["cut", "other", "binary", "copied", "twin", "folder"])
def test_a_damaged_vm_is_explained_and_its_name_kept(damaged: tuple[Host, dict[Path, bytes]], name: str) -> None:
    host, files = damaged
    acts: tuple[Endpoint[Any, Any], ...] = (endpoints.SHOW_VM, endpoints.START_VM, endpoints.DELETE_VM)
    for act in acts:
        with pytest.raises(StateError, match=f"{name}/vm.toml"):
            host.client.call(act, vm=name)
    with pytest.raises(Conflict):
        host.client.call(endpoints.CREATE_VM, tiny(name))
    path = host.state / "vms" / name / "vm.toml"
    assert path.is_dir() or path.read_bytes() == files[path]


def test_what_a_crash_left_of_a_vm_is_not_in_the_way(damaged: tuple[Host, dict[Path, bytes]]) -> None:
    host, _ = damaged
    (host.state / "vms" / "empty" / "seed.iso").write_bytes(b"of another VM")
    host.client.call(endpoints.CREATE_VM, tiny("empty"))
    assert [path.name for path in (host.state / "vms" / "empty").iterdir()] == ["vm.toml"]


@pytest.mark.parametrize(("lives", "born_later"), [(True, 0), (False, 1)])
def test_a_name_is_held_by_a_qemu_nobody_knows_only_as_long_as_that_runs(
    damaged: tuple[Host, dict[Path, bytes]], lives: bool, born_later: int
) -> None:
    host, _ = damaged
    record = json.loads((host.state / "vms" / "whole" / "process.json").read_bytes())
    folder = host.state / "vms" / "ghost"
    folder.mkdir(exist_ok=True)
    (folder / "process.json").write_text(json.dumps(record | {"start_time": record["start_time"] + born_later}))
    if lives:
        with pytest.raises(StateError, match="belongs to a VM that this daemon does not know"):
            host.client.call(endpoints.CREATE_VM, tiny("ghost"))
    else:
        host.client.call(endpoints.CREATE_VM, tiny("ghost"))
        host.client.call(endpoints.DELETE_VM, vm="ghost")


def test_a_vm_that_was_mended_is_there_after_a_restart(damaged: tuple[Host, dict[Path, bytes]]) -> None:
    host, _ = damaged
    path = host.state / "vms" / "other" / "vm.toml"
    path.write_bytes(path.read_bytes().replace(b"colour = 'red'\n", b""))
    for journal in host.state.glob("migrations/*.jsonl"):
        journal.unlink()
    host.kill()
    host.start()
    host.client.call(endpoints.START_VM, vm="other")
    host.client.call(endpoints.START_VM, vm="dead")


def test_a_vm_that_may_run_elsewhere_is_not_resumed_or_started_while_its_journal_is_damaged(pair: list[Host]) -> None:
    alpha, beta = pair
    alpha.kill()
    alpha.start("source:handing-over:after:daemon")
    alpha.create(tiny("vm"))
    migration = alpha.move("vm", "beta").id
    alpha.wait_for_death()
    journal = alpha.state / "migrations" / f"{migration}.source.jsonl"
    journal.write_bytes(journal.read_bytes()[20:])
    alpha.start()
    with pytest.raises(OwnerUnknown, match=journal.name):
        alpha.client.call(endpoints.RESUME_VM, vm="vm")
    wait_until(lambda: unresolved(beta, migration), "beta holds the VM")
    beta.client.call(endpoints.RESOLVE_MIGRATION, api.ResolveRequest(owner=Side.DESTINATION), migration=migration)
    assert runners(pair, "vm") == ["beta"]
    alpha.client.call(endpoints.STOP_VM, vm="vm")
    with pytest.raises(OwnerUnknown, match=journal.name):
        alpha.client.call(endpoints.START_VM, vm="vm")
    assert runners(pair, "vm") == ["beta"]
    alpha.client.call(endpoints.DELETE_VM, vm="vm")
    journal.unlink()
    alpha.kill()
    alpha.start()


def unresolved(host: Host, migration: str) -> bool:
    """Whether the landing waits for a word."""
    return show(host, migration).outcome is Outcome.UNRESOLVED


# A full disk ----------------------------------------------------------------------------------------------------------


class CrampedHost(Host):
    """A host whose state folder is a small file system of its own, which vanishes with its processes."""

    def command(self) -> list[str]:
        mount = 'mount -t tmpfs -o size=4m,mode=711 limosa-test "$0" && exec "$@"'
        return ["unshare", "--mount", "sh", "-c", mount, str(self.folder / "state"), *super().command()]

    @property
    def state(self) -> Path:
        """The folder as the daemon sees it."""
        own = self.folder / "state"
        return Path(f"/proc/{self.process.pid}/root{own}") if self.process is not None else own

    @contextmanager
    def full(self) -> Iterator[None]:
        """Leave no byte free."""
        ballast = self.state / "ballast"
        try:
            with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as stream:
                while True:
                    stream.write(b"\0" * 4096)
            yield
        finally:
            ballast.unlink()


@pytest.fixture(scope="module")
def cramped_pair() -> Iterator[list[Host]]:
    folder = Path(f"/tmp/lc{os.getpid()}")
    folder.mkdir()
    made = make_hosts(folder, "wide", "narrow", first=30)
    wide, narrow = made[0], CrampedHost(made[1].folder, "narrow", made[1].address)
    try:
        for host, other in ((wide, narrow), (narrow, wide)):
            host.start()
            change = api.SettingsChange(values={f"peers.{other.name}": other.address})
            host.client.call(endpoints.CHANGE_SETTINGS, change)
        yield [wide, narrow]
    finally:
        for host in (wide, narrow):
            host.end()
        shutil.rmtree(folder)


@pytest.fixture
def cramped(cramped_pair: list[Host]) -> Iterator[tuple[Host, CrampedHost]]:
    wide, narrow = cramped_pair
    assert isinstance(narrow, CrampedHost)
    yield wide, narrow
    for host in cramped_pair:
        forget_all(host)
    for host in cramped_pair:
        wait_until(partial(nothing_landed, host), "nothing is left")


def let_through(folder: Path) -> None:
    """Have QEMU's user reach a test's own folder."""
    for one in (folder, *folder.parents[:3]):
        if one.is_relative_to("/tmp") and one != Path("/tmp"):
            one.chmod(0o755)


def test_a_vm_is_created_whole_or_not_at_all(cramped: tuple[Host, CrampedHost], tmp_path: Path) -> None:
    _, narrow = cramped
    let_through(tmp_path)
    new = api.NewVm(name="vm", memory_mib=32, disks=(api.NewDisk(path=str(tmp_path / "disk.qcow2"), size_mib=8),))
    with narrow.full():
        with pytest.raises(StateError, match="No space"):
            narrow.client.call(endpoints.CREATE_VM, new)
        assert nothing_landed(narrow)
        assert not list(tmp_path.iterdir())
    narrow.client.call(endpoints.CREATE_VM, new)
    assert (tmp_path / "disk.qcow2").exists()


def test_a_vm_starts_or_stays_stopped(cramped: tuple[Host, CrampedHost]) -> None:
    _, narrow = cramped
    seeded = api.NewVm(name="seeded", memory_mib=32, cloud_init=CloudInit(user_data="#cloud-config"))
    uefi = api.NewVm(name="uefi", memory_mib=64, firmware="uefi")
    names = ("plain", "seeded", "uefi")
    for new in (tiny("plain"), seeded, uefi):
        narrow.client.call(endpoints.CREATE_VM, new)
    with narrow.full():
        for name in names:
            with pytest.raises((StateError, QemuError), match="No space"):
                narrow.client.call(endpoints.START_VM, vm=name)
            assert narrow.show(name).state is VmState.STOPPED
        assert not narrow.qemus()
    for name in names:
        narrow.client.call(endpoints.START_VM, vm=name)
    vms = narrow.state / "vms"
    assert (vms / "seeded" / "seed.iso").stat().st_size > 40_000
    template = Path("/usr/share/OVMF/OVMF_VARS_4M.fd")
    assert (vms / "uefi" / "nvram.fd").stat().st_size == template.stat().st_size


def test_settings_change_or_stay(cramped: tuple[Host, CrampedHost]) -> None:
    _, narrow = cramped
    before = narrow.client.call(endpoints.SETTINGS)
    large = {f"peers.host{number}": "10.0.0.1" for number in range(300)}
    with narrow.full():
        with pytest.raises(StateError, match="No space"):
            narrow.client.call(endpoints.CHANGE_SETTINGS, api.SettingsChange(values=large))
        assert narrow.client.call(endpoints.SETTINGS) == before
    assert len(narrow.client.call(endpoints.CHANGE_SETTINGS, api.SettingsChange(values=large)).settings.peers) > 300
    narrow.client.call(endpoints.CHANGE_SETTINGS, api.SettingsChange(values=dict.fromkeys(large)))


def test_a_move_from_a_full_host_does_not_begin(cramped: tuple[Host, CrampedHost]) -> None:
    wide, narrow = cramped
    narrow.create(tiny("vm"))
    with narrow.full():
        with pytest.raises(StateError, match="No space"):
            narrow.move("vm", "wide")
        view = narrow.show("vm")
        assert (view.state, view.migration) == (VmState.RUNNING, None)
    assert nothing_landed(wide)
    assert narrow.outcome(narrow.move("vm", "wide").id).outcome is Outcome.COMPLETED


def test_a_move_to_a_full_host_fails_and_the_vm_goes_on(cramped: tuple[Host, CrampedHost]) -> None:
    wide, narrow = cramped
    wide.create(tiny("vm"))
    with narrow.full():
        ended = wide.outcome(wide.move("vm", "narrow").id)
        assert (ended.outcome, fault_code(ended)) == (Outcome.FAILED, "state-error")
        assert runners([wide, narrow], "vm") == ["wide"]
        assert nothing_landed(narrow)
    wait_until(lambda: wide.show("vm").migration is None, "the VM is free")
    ended = wide.outcome(wide.move("vm", "narrow").id)
    assert ended.outcome is Outcome.COMPLETED, ended.fault


def fault_code(migration: Migration) -> str:
    return migration.fault.code if migration.fault is not None else ""


@contextmanager
def broken_disk(host: Host, plan: str) -> Iterator[None]:
    """A daemon that can write no file from the step of the plan on, until the block ends."""
    host.kill()
    host.start(plan)
    assert host.process is not None
    try:
        yield
    finally:
        prlimit(host.process.pid, RLIMIT_FSIZE, (RLIM_INFINITY, RLIM_INFINITY))


def test_a_destination_insists_on_making_a_landed_vm_durable(pair: list[Host]) -> None:
    alpha, beta = pair
    with broken_disk(beta, "destination:continuing:after:disk"):
        alpha.create(tiny("vm"))
        migration = alpha.move("vm", "beta").id
        wait_until(lambda: show(alpha, migration).phase is Phase.TEAR_DOWN, "the guest runs at beta")
        assert show(alpha, migration).outcome is Outcome.UNDER_WAY
        assert not (beta.state / "vms" / "vm" / "vm.toml").exists()
    assert alpha.outcome(migration).outcome is Outcome.COMPLETED
    assert runners([alpha, beta], "vm") == ["beta"]


def show(host: Host, migration: str) -> Migration:
    return host.client.call(endpoints.SHOW_MIGRATION, migration=migration)


@pytest.mark.parametrize("step", ["preparing:before", "migrating:before"])
def test_a_source_that_cannot_write_keeps_the_vm_and_settles_later(pair: list[Host], step: str) -> None:
    alpha, beta = pair
    with broken_disk(alpha, f"source:{step}:disk"):
        alpha.create(tiny("vm"))
        migration = alpha.move("vm", "beta").id
        ended = alpha.outcome(migration)
        assert fault_code(ended) == "state-error"
        assert runners(pair, "vm") == ["alpha"]
    wait_until(lambda: show(alpha, migration).outcome is Outcome.FAILED, "it is settled")
    wait_until(lambda: nothing_landed(beta), "nothing is left at beta")
    assert alpha.outcome(alpha.move("vm", "beta").id).outcome is Outcome.COMPLETED


# What VMs are made of -------------------------------------------------------------------------------------------------


@pytest.fixture
def odd_paths(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
    odd = {name: str(tmp_path / name) for name in ("folder", "fifo", "link", "socket", "nowhere")}
    return odd | {"device": "/dev/zero", "long": "/" + "x" * 300, "below a file": "/etc/hostname/x"}


def test_paths_that_are_no_images_are_refused_at_the_latest_when_it_starts(
    pair: list[Host], odd_paths: dict[str, str]
) -> None:
    alpha, _ = pair
    for number, path in enumerate(odd_paths.values()):
        disk = api.NewVm(name=f"disk{number}", memory_mib=32, disks=(api.NewDisk(path=path, format="raw"),))
        kernel = api.NewVm(name=f"kernel{number}", memory_mib=32, boot=DirectBoot(kernel=path))
        for new in (disk, kernel):
            with pytest.raises(StorageError, match=r"file|folder|look"):
                alpha.create(new)
            created = alpha.vm(new.name)
            assert created is None or created.state is VmState.STOPPED
        with pytest.raises(StorageError):
            alpha.client.call(
                endpoints.CREATE_VM, api.NewVm(name="new", memory_mib=32, disks=(api.NewDisk(path=path),))
            )
    assert not alpha.qemus()


def test_a_disk_that_a_running_vm_uses_is_refused(pair: list[Host], tmp_path: Path) -> None:
    alpha, _ = pair
    disk = str(tmp_path / "disk.qcow2")
    let_through(tmp_path)
    first = api.NewVm(name="first", memory_mib=32, disks=(api.NewDisk(path=disk, size_mib=8),))
    second = api.NewVm(name="second", memory_mib=32, disks=(api.NewDisk(path=disk),))
    alpha.create(first)
    alpha.client.call(endpoints.CREATE_VM, second)
    with pytest.raises(LimosaError, match=r"lock|in use|uses") as refusal:
        alpha.client.call(endpoints.START_VM, vm="second")
    assert refusal.value.code in ("qemu-error", "storage-error", "conflict")
    assert runners([alpha], "first") == ["alpha"]
    alpha.client.call(endpoints.STOP_VM, vm="first")
    alpha.client.call(endpoints.START_VM, vm="second")


def test_names_and_uuids_are_unique_on_a_host(pair: list[Host]) -> None:
    alpha, beta = pair
    created = alpha.client.call(endpoints.CREATE_VM, tiny("vm"))
    with pytest.raises(Conflict, match="name"):
        alpha.client.call(endpoints.CREATE_VM, tiny("vm"))
    twin = api.NewVm(name="twin", memory_mib=32, uuid=created.config.uuid)
    with pytest.raises(Conflict, match="UUID"):
        alpha.client.call(endpoints.CREATE_VM, twin)
    alpha.client.call(endpoints.START_VM, vm="vm")
    beta.client.call(endpoints.CREATE_VM, tiny("vm"))
    assert refused(alpha, "beta") == {"name-taken"}
    beta.client.call(endpoints.DELETE_VM, vm="vm")
    beta.client.call(endpoints.CREATE_VM, twin)
    assert refused(alpha, "beta") == {"uuid-taken"}


# Moves that cannot be -------------------------------------------------------------------------------------------------


def refused(host: Host, to: str) -> set[str]:
    """The findings of a check, which are also those with which the move is refused; the VM goes on."""
    report = host.client.call(endpoints.CHECK, api.CheckRequest(vm="vm", destination=to))
    assert not report.possible
    codes = {finding.code for finding in report.findings}
    ended = host.outcome(host.move("vm", to).id)
    assert ended.outcome is Outcome.FAILED
    assert ended.fault is not None
    assert ended.fault.code == "preflight-refused" or {ended.fault.code} == codes
    assert ended.fault.code != "preflight-refused" or {finding.code for finding in ended.fault.findings} == codes
    assert runners([host], "vm") == [host.name]
    return codes


def test_every_port_taken_is_a_finding(pair: list[Host]) -> None:
    alpha, beta = pair
    alpha.create(tiny("vm"))
    beta.client.call(endpoints.CHANGE_SETTINGS, api.SettingsChange(values={"migration_ports": [49300, 49301]}))
    try:
        with socket.create_server((beta.address, 49300)), socket.create_server((beta.address, 49301)):
            assert refused(alpha, "beta") == {"ports-taken"}
        assert alpha.outcome(alpha.move("vm", "beta").id).outcome is Outcome.COMPLETED
    finally:
        beta.client.call(endpoints.CHANGE_SETTINGS, api.SettingsChange(values={"migration_ports": None}))


def test_a_move_has_another_host_as_its_destination(pair: list[Host]) -> None:
    alpha, _ = pair
    alpha.create(tiny("vm"))
    assert "same-host" in refused(alpha, "alpha")
    assert refused(alpha, "nowhere.invalid") == {"host-unreachable"}
    assert refused(alpha, "127.0.0.1:9") <= {"host-unreachable", "host-not-trusted"}
    for nonsense in ("a..b", "[::1", "host:0", ":"):
        with pytest.raises(InvalidInput):
            alpha.move("vm", nonsense)


def test_acts_that_do_not_fit_the_state_are_refused(pair: list[Host]) -> None:
    alpha, _ = pair
    alpha.client.call(endpoints.CREATE_VM, tiny("vm"))
    with pytest.raises(Conflict):
        alpha.move("vm", "beta")
    does_not_fit(alpha, "vm", endpoints.STOP_VM, endpoints.SHUTDOWN_VM, endpoints.PAUSE_VM, endpoints.RESUME_VM)
    alpha.client.call(endpoints.START_VM, vm="vm")
    does_not_fit(alpha, "vm", endpoints.START_VM, endpoints.DELETE_VM)
    assert runners([alpha], "vm") == ["alpha"]
