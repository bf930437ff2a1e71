"""Real host daemons for tests: processes of their own on loopback addresses, with real QEMUs."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import tomli_w

from limosa.cli.main import main as limosa
from limosa.client.host import HostClient
from limosa.errors import LimosaError
from limosa.migration.ownership import DESTINATION_ENDED, SOURCE_ENDED
from limosa.model.migration import Migration
from limosa.model.vm import Vm, VmState
from limosa.security import ca
from limosa.wire import api, endpoints

START_WITHIN_S = 40.0
SETTLE_WITHIN_S = 40.0


class Host:
    """One host daemon. It can be killed and started again on the same state."""

    def __init__(self, folder: Path, name: str, address: str) -> None:
        self.folder = folder
        self.name = name
        self.address = address
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def state(self) -> Path:
        return self.folder / "state"

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def client(self) -> HostClient:
        return HostClient(str(self.run / "api.sock"))

    def command(self) -> list[str]:
        """What starts the daemon."""
        return [sys.executable, str(Path(__file__).with_name("daemon.py")), str(self.folder / "host.toml")]

    def start(self, plan: str = "") -> None:
        """Start the daemon and wait until it says that it is ready; ``plan`` is for ``daemon.py``."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready, (self.folder / "log").open("ab") as log:
            path = self.folder / "notify"
            path.unlink(missing_ok=True)
            ready.bind(str(path))
            ready.settimeout(START_WITHIN_S)
            environment = {**os.environ, "NOTIFY_SOCKET": str(path), "LIMOSA_TEST_BREAK": plan}
            self.process = subprocess.Popen(
                self.command(), stdout=log, stderr=log, env=environment, start_new_session=True
            )
            assert ready.recv(64).startswith(b"READY=1")

    def refusal(self) -> tuple[int, str]:
        """Exit code and words with which ``limosa host serve`` refuses to start."""
        words = self.folder / "refusal"
        # A fork, because everything is loaded here already.
        child = multiprocessing.get_context("fork").Process(target=self._serve, args=(words,))
        child.start()
        child.join(START_WITHIN_S)
        child.kill()
        child.join()
        assert child.exitcode is not None
        return child.exitcode, words.read_text()

    def _serve(self, words: Path) -> None:
        os.dup2(os.open(words, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), 2)
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115 - pytest's would keep the words
        code = limosa(["host", "serve", "--settings", str(self.folder / "host.toml")])
        sys.stderr.flush()
        os._exit(code)

    def kill(self) -> None:
        """kill -9, as a crash does."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def stop(self, within_s: float = START_WITHIN_S) -> None:
        """Have the daemon end, as systemd does."""
        assert self.process is not None
        self.process.terminate()
        assert self.process.wait(within_s) == 0
        self.process = None

    def wait_for_death(self, within_s: float = 20.0) -> None:
        """Wait until the daemon has died of its plan."""
        assert self.process is not None
        assert self.process.wait(within_s) == -signal.SIGKILL
        self.process = None

    def vm(self, name: str) -> Vm | None:
        """The VM as this host sees it, None if it has none of that name."""
        return next((vm for vm in self.client.call(endpoints.LIST_VMS).vms if vm.config.name == name), None)

    def show(self, name: str) -> Vm:
        """The VM as this host sees it. Raises ``NotFound``."""
        return self.client.call(endpoints.SHOW_VM, vm=name)

    def create(self, new: api.NewVm) -> None:
        """Create and start a VM."""
        self.client.call(endpoints.CREATE_VM, new)
        self.client.call(endpoints.START_VM, vm=new.name)

    def move(self, vm: str, to: str) -> Migration:
        """Begin a move."""
        return self.client.call(endpoints.MOVE, api.MoveRequest(vm=vm, destination=to))

    def outcome(self, migration: str) -> Migration:
        """Follow a move until it has ended."""
        return list(self.client.stream(endpoints.WATCH_MIGRATION, migration=migration))[-1]

    def qemus(self) -> list[int]:
        """Pids of QEMUs whose run folder is this host's."""
        mark = str(self.run).encode()
        found = []
        for process in Path("/proc").iterdir():
            try:
                command = (process / "cmdline").read_bytes()
            except OSError:
                continue
            if command.startswith(b"/usr/bin/qemu-system") and mark in command:
                found.append(int(process.name))
        return found

    def end(self) -> None:
        """Kill everything of this host."""
        self.kill()
        for pid in self.qemus():
            os.kill(pid, signal.SIGKILL)


def make_hosts(folder: Path, *names: str, first: int = 2) -> list[Host]:
    """Hosts that trust and know each other, not started. ``first`` is where their addresses begin to count."""
    folder.chmod(0o711)
    ca.create_authority(folder / "ca")
    hosts = [
        Host(folder / name, name, f"127.0.{os.getpid() % 250 + 1}.{number}") for number, name in enumerate(names, first)
    ]
    for host in hosts:
        host.folder.mkdir()
        host.folder.chmod(0o711)
        ca.issue_host(folder / "ca", host.name, [host.address], host.folder / "pki")
        settings = {
            "name": host.name,
            "listen": [host.address],
            "certificates": str(host.folder / "pki"),
            "state_dir": str(host.state),
            "run_dir": str(host.run),
        }
        (host.folder / "host.toml").write_text(tomli_w.dumps(settings))
        host.state.mkdir(mode=0o711)
        peers = {other.name: other.address for other in hosts}
        (host.state / "settings.toml").write_text(tomli_w.dumps({"peers": peers, "transport": "tcp"}))
    return hosts


@contextmanager
def running_hosts(*names: str) -> Iterator[list[Host]]:
    """Started hosts in a short folder of their own (Unix sockets have short paths), gone afterwards."""
    folder = Path(f"/tmp/lt{os.getpid()}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    hosts = make_hosts(folder, *names)
    try:
        for host in hosts:
            host.start()
        yield hosts
    finally:
        for host in hosts:
            host.end()
        shutil.rmtree(folder, ignore_errors=True)


def tiny(name: str) -> api.NewVm:
    """A VM that needs nothing and starts at once: its firmware finds nothing to boot and waits."""
    return api.NewVm(name=name, memory_mib=32, accelerator="tcg")


def wait_until(what: Callable[[], bool], description: str, within_s: float = SETTLE_WITHIN_S) -> None:
    """Wait for a condition that only asking can tell."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            if what():
                return
        except LimosaError:
            pass
        time.sleep(0.05)
    raise AssertionError(f"not within {within_s:g} s: {description}")


def runners(hosts: Sequence[Host], vm: str) -> list[str]:
    """Names of the hosts on which the VM runs, as their daemons say."""
    views = {host.name: host.vm(vm) for host in hosts}
    return [name for name, view in views.items() if view is not None and view.state is VmState.RUNNING]


def settled(hosts: Sequence[Host]) -> bool:
    """Whether every journal has come to its end."""
    ended = {*SOURCE_ENDED, *DESTINATION_ENDED}
    return all(
        json.loads(path.read_bytes().splitlines()[-1]).get("step") in ended
        for host in hosts
        for path in (host.state / "migrations").glob("*.jsonl")
    )
