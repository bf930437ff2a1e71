"""A real Samba server with one share, and SMB clients that mount it: one for each host, so that it is as if they were
machines of their own.

The server and its clients are in a network namespace of their own, for port 445. The client is smbnetfs, which is SMB 3
in user space by Samba's own library, since not every kernel has CIFS. What one client locks no other sees, as with CIFS
that is mounted with ``nobrl``.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from pyroute2 import IPRoute

from harness.hosts import wait_until
from harness.labs import LabHost
from limosa.lab import namespaces

ADDRESS, SHARE = "127.0.0.1", "vms"
_SERVER = """[global]
security = user
map to guest = Bad User
guest account = root
bind interfaces only = yes
interfaces = {address}
smb ports = 445
disable netbios = yes
load printers = no
server min protocol = SMB3
server role = standalone server
lock directory = {state}
state directory = {state}
cache directory = {state}
private dir = {state}
pid directory = {state}
ncalrpc dir = {state}/ncalrpc
log file = {state}/log
[{share}]
path = {folder}
guest ok = yes
read only = no
force user = root
"""
_CLIENT = "[global]\nclient min protocol = SMB3\n"
#: Not asked for on the command line, where smbnetfs 0.6.3 does not know them.
_MOUNT = 'smb_query_browsers "false"\nneg_cache_timeout "200"\nstat_workaround_depth "0"\n'


def skip_without_samba() -> None:
    """Say why, where there is no Samba or no FUSE."""
    missing = [name for name in ("smbd", "smbnetfs") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: run scripts/setup")
    if not Path("/dev/fuse").exists():
        pytest.skip("this kernel has no FUSE, or this container may not use it")


class Share:
    """A share that a server serves at ``address``. ``folder`` is what the server itself sees of it."""

    def __init__(self, folder: Path, namespace: str, address: str = ADDRESS) -> None:
        self.folder = folder / "served"
        self._own = folder
        self._namespace = namespace
        self._address = address
        self._clients: dict[str, subprocess.Popen[bytes]] = {}

    @contextmanager
    def served(self) -> Iterator[None]:
        """The server runs."""
        state = self._own / "server"
        self.folder.mkdir(mode=0o755)
        state.mkdir(mode=0o755)
        text = _SERVER.format(address=self._address, state=state, share=SHARE, folder=self.folder)
        (state / "smb.conf").write_text(text)
        command = ["smbd", "--foreground", "--no-process-group", "-s", str(state / "smb.conf")]
        server = self._start(command, state, {})
        try:
            yield
        finally:
            server.terminate()  # it ends those that serve its clients
            server.wait()

    def seen(self, name: str) -> Path:
        """Where the client ``name`` shows the share."""
        return self._own / name / "all" / ADDRESS / SHARE

    @contextmanager
    def mounted(self, name: str) -> Iterator[Path]:
        """A client of its own. Gives the folder at which it shows the share."""
        own = self._own / name
        point, configuration = own / "all", own / ".smb"
        point.mkdir(parents=True)
        configuration.mkdir(mode=0o700)
        for file, text in {"smb.conf": _CLIENT, "smbnetfs.conf": _MOUNT}.items():
            (configuration / file).write_text(text)
            (configuration / file).chmod(0o600)
        options = f"allow_other,attr_timeout=0,entry_timeout=0,negative_timeout=0,fsname=//{ADDRESS}/{SHARE}"
        client = self._clients[name] = self._start(
            ["smbnetfs", str(point), "-f", "-o", options], own, {"HOME": str(own)}
        )
        try:
            seen = self.seen(name)
            wait_until(lambda: _is_served(seen), f"smbnetfs shows the share: see {own}/words")
            yield seen
        finally:
            self.answer(name)
            subprocess.run(["umount", "--lazy", str(point)], check=False, capture_output=True)
            client.kill()
            client.wait()

    def die(self, name: str) -> None:
        """From now on who works with what this client shows waits, as for a server that is gone."""
        self._clients[name].send_signal(signal.SIGSTOP)

    def answer(self, name: str) -> None:
        """The server is back."""
        self._clients[name].send_signal(signal.SIGCONT)

    def _start(self, command: list[str], folder: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        with (folder / "words").open("wb") as words:
            return namespaces.inside(
                self._namespace,
                lambda: subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=words,
                    stderr=words,
                    env={**os.environ, **environment},
                    start_new_session=True,  # smbd ends its whole process group with itself
                ),
            )


@contextmanager
def served() -> Iterator[Share]:
    """A share with its server, in a namespace of their own."""
    namespace = f"smb{secrets.token_hex(3)}"
    folder = Path(f"/tmp/{namespace}")
    folder.mkdir(mode=0o755)
    with ExitStack() as held:
        held.callback(shutil.rmtree, folder, ignore_errors=True)
        namespaces.create(namespace)
        held.callback(namespaces.remove, namespace)
        namespaces.inside(namespace, _raise_loopback)
        share = Share(folder, namespace)
        held.enter_context(share.served())
        yield share


@contextmanager
def shared(hosts: list[LabHost], point: Path) -> Iterator[Share]:
    """Hosts of a lab that each have a mount of one share at ``point``. Their daemons are started anew for that."""
    with ExitStack() as held:
        share = held.enter_context(served())
        point.mkdir(mode=0o755)
        for host in hosts:
            seen = held.enter_context(share.mounted(host.name))
            host.restart_as(daemon_with(seen, point))
        yield share


def daemon_with(seen: Path, point: Path) -> list[str]:
    """What starts a daemon in whose mount namespace ``seen`` is at ``point``."""
    script = 'mount --bind "$1" "$2" && shift 2 && exec "$@"'
    unshared = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", str(seen), str(point)]
    return [*unshared, sys.executable, str(Path(__file__).with_name("daemon.py"))]


def _raise_loopback() -> None:
    with IPRoute() as netlink:
        netlink.link("set", index=netlink.link_lookup(ifname="lo")[0], state="up")


def _is_served(folder: Path) -> bool:
    with suppress(OSError):
        return folder.is_dir() and os.listdir(folder) is not None
    return False
