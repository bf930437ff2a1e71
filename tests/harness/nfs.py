"""A real NFS server in user space (NFS-Ganesha) with one export, for NFS 4 only, in a network namespace."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from limosa.lab import namespaces

EXPORT = "/vms"
#: After this time the server lets go of what a client had that is not heard of any more.
LEASE_S = 10
_SERVER = """NFS_CORE_PARAM {{
    Protocols = 4;
    Bind_addr = {address};
    Enable_NLM = false;
    Enable_RQUOTA = false;
    Enable_UDP = false;
}}
NFSv4 {{
    Minor_Versions = 1, 2;
    Lease_Lifetime = {lease};
    Grace_Period = {lease};
    Graceless = true;
    Only_Numeric_Owners = true;
    RecoveryRoot = {state};
}}
EXPORT {{
    Export_Id = 1;
    Path = {folder};
    Pseudo = {export};
    Access_Type = RW;
    Squash = No_Root_Squash;
    SecType = sys;
    FSAL {{ Name = VFS; }}
}}
"""


def skip_without_ganesha() -> None:
    """Say why, where it is not installed."""
    if shutil.which("ganesha.nfsd") is None:
        pytest.skip("nfs-ganesha not installed: run scripts/setup --lab-vms")


@contextmanager
def served(folder: Path, namespace: str, address: str) -> Iterator[Path]:
    """A server that exports ``folder``/served, which it gives, as :data:`EXPORT`."""
    export, state = folder / "served", folder / "server"
    for path in (export, state):
        path.mkdir(parents=True, mode=0o755)
    text = _SERVER.format(address=address, lease=LEASE_S, state=state, folder=export, export=EXPORT)
    (state / "ganesha.conf").write_text(text)
    command = ["ganesha.nfsd", "-F", "-f", "ganesha.conf", "-L", "log", "-p", "pid", "-N", "EVENT"]
    server = namespaces.inside(
        namespace,
        lambda: subprocess.Popen(
            command, cwd=state, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ),
    )
    try:
        yield export
    finally:
        server.kill()
        server.wait()
