"""Building a lab and taking it away without a trace.

``up`` writes the plan down before it makes anything. ``down`` needs no more than the lab's name: it kills whatever is
in the lab's namespaces, wherever it came from, then takes away the namespaces and both folders. So it works after a
crash of anything at any moment, of an earlier ``down`` too, and where nothing is it has nothing to do.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from limosa.client.route import KnownHosts
from limosa.errors import Conflict, InvalidInput, NotFound, NotPermitted, StateError
from limosa.lab import daemons, namespaces, wiring
from limosa.lab.hosts import RUN, STATE
from limosa.lab.plan import SWITCH, Lab, check_name
from limosa.model import reading
from limosa.model.base import Model
from limosa.security import ca
from limosa.settings import toml
from limosa.settings.daemon import DaemonSettings
from limosa.settings.host import HostSettings
from limosa.wire.endpoints import Role


class Removed(Model, frozen=True):
    """What ``down`` took away."""

    lab: str
    processes: int
    namespaces: tuple[str, ...]
    folders: tuple[str, ...]


class HostState(Model, frozen=True):
    """A host of a lab as it is now; ``daemon`` is its process, null if none runs."""

    host: str
    namespace: str
    address: str
    migration_addresses: tuple[str, ...]
    socket: str
    log: str
    daemon: int | None


class LabState(Model, frozen=True):
    """A lab as it is now. ``complete`` is false if building it was interrupted."""

    lab: str
    nics: int
    #: of each migration NIC, 0 if it is not limited
    speeds_mbit_per_s: tuple[int, ...]
    switch: str
    complete: bool
    hosts: tuple[HostState, ...]


def plan(name: str, hosts: int, nics: int, speed_mbit_per_s: int | Sequence[int]) -> Lab:
    """A lab as a person asks for it: one speed for all NICs, or one for each. Raises :class:`InvalidInput`."""
    raw = {"name": name, "hosts": hosts, "nics": nics, "speed_mbit_per_s": speed_mbit_per_s}
    return toml.convert(raw, Lab, where="the lab")


def up(lab: Lab, *, daemon: Sequence[str] | None = None) -> LabState:
    """Build the lab and start its daemons (``daemon`` is another command to start them with).

    Raises :class:`Conflict` if there is one of that name, and whatever stands in the way; then nothing is left of it.
    """
    _need_root()
    if present := _namespaces_of(lab.name):
        raise _exists(lab, f"there are network namespaces of that name: {', '.join(present)}")
    _reserve(lab)
    try:
        wiring.wire(lab)
        _furnish(lab)
        daemons.start(lab, lab.host_names, daemon)
    except BaseException:
        down(lab.name)
        raise
    return status(lab)


def down(name: str) -> Removed:
    """Take a lab away, whatever is left of it; returns what was there.

    Raises :class:`InvalidInput` and :class:`StateError` (a process that cannot be killed); call it again then.
    """
    _need_root()
    check_name(name)
    names = _namespaces_of(name)
    inodes = {inode for inode in map(namespaces.inode, names) if inode is not None} | _inodes_of_daemons(name)
    if namespaces.inode_of_process(os.getpid()) in inodes:
        raise InvalidInput("a lab cannot be taken down from inside", todo="leave its hosts first")
    killed = namespaces.kill_all_in(inodes)
    for namespace in names:
        namespaces.remove(namespace)
    folders = [folder for folder in (RUN / name, STATE / name) if folder.exists()]
    for folder in folders:
        _remove_folder(folder)
    return Removed(lab=name, processes=killed, namespaces=tuple(names), folders=tuple(map(str, folders)))


def labs() -> list[str]:
    """Names of all labs of this machine, sorted."""
    return sorted(path.parent.name for path in STATE.glob("*/lab.json"))


def load(name: str) -> Lab:
    """The plan of a lab. Raises :class:`InvalidInput`, :class:`NotFound` and :class:`StateError`."""
    check_name(name)
    path = STATE / name / "lab.json"
    try:
        return reading.decode(path.read_bytes(), Lab)
    except FileNotFoundError as fault:
        raise NotFound(f"there is no lab '{name}'", todo="build it with 'limosa lab up'") from fault
    except PermissionError as fault:
        raise NotPermitted("the lab belongs to root", todo="use sudo") from fault
    except (OSError, msgspec.DecodeError) as fault:
        raise StateError(f"cannot read {path}", why=str(fault), todo=f"'limosa lab down --name {name}'") from fault


def status(lab: Lab) -> LabState:
    """How a lab is now."""
    return LabState(
        lab=lab.name,
        nics=lab.nics,
        speeds_mbit_per_s=lab.speeds,
        switch=SWITCH,
        complete=set(lab.namespaces) == set(_namespaces_of(lab.name)),
        hosts=tuple(_state_of(lab, host) for host in lab.host_names),
    )


def place(lab: Lab, name: str) -> tuple[str, dict[str, str]]:
    """The namespace of a host, ``client`` or ``wire``, and what the environment has to say there.

    Raises :class:`NotFound`.
    """
    if name in lab.host_names:
        return lab.namespace(name), {"LIMOSA_SOCKET": str(lab.socket(name))}
    if name == "client":
        return lab.client, {"XDG_CONFIG_HOME": str(lab.state / "client")}
    if name == "wire":
        return lab.wire, {}
    raise NotFound(
        f"there is no host '{name}' in the lab '{lab.name}'",
        todo=f"choose {', '.join([*lab.host_names, 'client'])} or wire",
    )


def _state_of(lab: Lab, host: str) -> HostState:
    return HostState(
        host=host,
        namespace=lab.namespace(host),
        address=lab.address(host),
        migration_addresses=lab.migration_addresses(host),
        socket=str(lab.socket(host)),
        log=str(daemons.log_of(lab, host)),
        daemon=daemons.pid_of(lab, host),
    )


def _reserve(lab: Lab) -> None:
    """Take the lab's name and write its plan. Raises :class:`Conflict` if another has it."""
    for folder in (STATE, RUN):
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    try:
        lab.state.mkdir(mode=0o711)
    except FileExistsError as fault:
        raise _exists(lab, f"there is {lab.state}") from fault
    toml.write_atomically(lab.state / "lab.json", msgspec.json.format(msgspec.json.encode(lab)) + b"\n")


def _exists(lab: Lab, why: str) -> Conflict:
    return Conflict(
        f"there is a lab '{lab.name}' already",
        why=why,
        todo=f"use it, take it away with 'limosa lab down --name {lab.name}', or give this one another name",
    )


def _furnish(lab: Lab) -> None:
    """Folders, certificates and settings of all hosts, and what a client needs to speak to them from outside."""
    for folder in (
        lab.run,
        *(folder for host in lab.host_names for folder in (lab.host_run(host), lab.host_state(host))),
    ):
        # QEMU's user may pass through, nobody may look around.
        folder.mkdir(mode=0o711, exist_ok=True)
    authority, client = lab.state / "ca", lab.state / "client" / "limosa"
    ca.create_authority(authority, f"Limosa lab {lab.name}")
    ca.issue_person(authority, "lab", Role.OPERATOR, client)
    peers = {host: lab.address(host) for host in lab.host_names}
    toml.write(client / "hosts.toml", KnownHosts(hosts=peers))
    for host in lab.host_names:
        pki = lab.host_state(host) / "pki"
        ca.issue_host(authority, host, lab.addresses(host), pki)
        toml.write(lab.host_state(host) / "host.toml", _daemon_settings(lab, host, pki))
        (lab.host_state(host) / "state").mkdir(mode=0o711)
        page = HostSettings(peers=peers, migration_networks=lab.migration_networks)
        toml.write(lab.host_state(host) / "state" / "settings.toml", page)


def _daemon_settings(lab: Lab, host: str, pki: Path) -> DaemonSettings:
    return DaemonSettings(
        name=host,
        listen=(lab.address(host),),
        certificates=str(pki),
        state_dir=str(lab.host_state(host) / "state"),
        run_dir=str(lab.host_run(host)),
    )


def _remove_folder(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as fault:
        raise StateError(f"cannot remove {fault.filename}", why=fault.strerror or str(fault)) from fault
    with suppress(OSError):
        folder.parent.rmdir()  # not empty while there are other labs


def _namespaces_of(name: str) -> list[str]:
    return namespaces.names(re.compile(rf"\A{re.escape(name)}-(wire|client|host[0-9]+)\Z"))


def _inodes_of_daemons(name: str) -> set[int]:
    """Namespaces of daemons that run, in case someone took a namespace's name away under them."""
    try:
        lab = load(name)
    except (NotFound, StateError):
        return set()
    pids = [pid for pid in (daemons.pid_of(lab, host) for host in lab.host_names) if pid is not None]
    inodes = {inode for inode in map(namespaces.inode_of_process, pids) if inode is not None}
    return inodes - {namespaces.inode_of_process(os.getpid())}


def _need_root() -> None:
    if os.geteuid() != 0:
        raise NotPermitted("a lab is made of network namespaces, which only root may make", todo="use sudo")
