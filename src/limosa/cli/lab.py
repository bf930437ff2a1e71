"""``limosa lab``: hosts as network namespaces on this machine, to try, test and measure with."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from limosa.cli.arguments import Commands, add_command, add_noun
from limosa.cli.output import say, say_json, say_table
from limosa.errors import InvalidInput, NotFound
from limosa.lab.hosts import DEFAULT_LAB

if TYPE_CHECKING:
    from limosa.lab.lifecycle import LabState

_NOTES = """\
A lab's hosts share this machine's memory and disks, and each has a daemon, a virtual
switch 'lan' and migration NICs of its own. Name one with --host: 'limosa --host host1 ...',
or 'limosa --host LAB-host1 ...' where several labs have one. '--to host2' and '--to LAB-host2'
mean the same host of the lab, as does '--host host2' inside one of the lab's hosts."""


def register(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add ``lab`` and its verbs."""
    verbs = add_noun(commands, "lab", "hosts in network namespaces of this machine, to try things out")
    _register_up(verbs)
    listing = add_command(verbs, "status", "show labs and their hosts", _status, examples=["lab status"], local=True)
    listing.add_argument("--name", metavar="LAB", help="only this lab")
    removal = add_command(
        verbs,
        "down",
        "remove a lab: its processes, namespaces and folders",
        _down,
        examples=["lab down", "lab down --name test1"],
        notes="Also works after a crash, and does nothing if there is no lab.",
        local=True,
    )
    restart = add_command(
        verbs,
        "restart",
        "restart the daemon of a host",
        _restart,
        examples=["lab restart host1"],
        notes="The host's VMs keep running and the new daemon takes them over.",
        local=True,
    )
    shell = add_command(
        verbs,
        "enter",
        "open a shell on a host, the client or the wire",
        _enter,
        examples=["lab enter host1"],
        local=True,
    )
    command = add_command(
        verbs,
        "exec",
        "run a command on a host, the client or the wire",
        _exec,
        examples=["lab exec host1 -- ip -brief address", "lab exec client -- curl http://10.77.0.101/"],
        local=True,
    )
    for parser in (restart, shell, command):
        parser.add_argument("place", metavar="HOST", help="host1 and so on, 'client' or 'wire'; or LAB-host1")
    command.add_argument("command", metavar="COMMAND", nargs=argparse.REMAINDER, help="the command, after '--'")
    for parser in (removal, restart, shell, command):
        parser.add_argument("--name", metavar="LAB", default=DEFAULT_LAB, help=f"the lab ({DEFAULT_LAB})")


def _register_up(verbs: Commands[argparse.ArgumentParser]) -> None:
    parser = add_command(
        verbs,
        "up",
        "build a lab and start its daemons",
        _up,
        examples=["lab up", "lab up --hosts 2 --nics 2 --speed 500,100", "lab up --name test1 --speed 0"],
        notes=_NOTES,
        local=True,
    )
    parser.add_argument("--hosts", type=int, default=3, metavar="N", help="how many hosts (3)")
    parser.add_argument("--nics", type=int, default=1, metavar="N", help="migration NICs of each host (1)")
    parser.add_argument(
        "--speed",
        type=_speeds,
        default=1000,
        metavar="MBIT[,MBIT...]",
        help="their speed in Mbit/s, or one for each NIC; 0 for no limit (1000)",
    )
    parser.add_argument("--name", metavar="LAB", default=DEFAULT_LAB, help=f"the lab's name ({DEFAULT_LAB})")


def _speeds(text: str) -> int | list[int]:
    """One speed, or one for each NIC. Raises ``ArgumentTypeError``."""
    try:
        speeds = [int(part) for part in text.split(",")]
    except ValueError as fault:
        raise argparse.ArgumentTypeError(f"'{text}' is neither a whole number nor several with commas") from fault
    return speeds[0] if len(speeds) == 1 else speeds


def _up(arguments: argparse.Namespace) -> int:
    from limosa.lab import lifecycle  # noqa: PLC0415 - loads pyroute2

    lab = lifecycle.plan(arguments.name, arguments.hosts, arguments.nics, arguments.speed)
    state = lifecycle.up(lab)
    if arguments.json:
        say_json(state)
    else:
        _show(state)
        example = state.hosts[0].host if lab.name == DEFAULT_LAB else state.hosts[0].namespace
        say("")
        say(f"Try: limosa --host {example} host status")
    return 0


def _status(arguments: argparse.Namespace) -> int:
    from limosa.lab import lifecycle  # noqa: PLC0415 - loads pyroute2

    names = lifecycle.labs() if arguments.name is None else [arguments.name]
    states = [lifecycle.status(lifecycle.load(name)) for name in names]
    if not states and not arguments.json:
        say("there is no lab; build one with 'limosa lab up'")
    for state in states:
        if arguments.json:
            say_json(state)
        else:
            _show(state)
    return 0


def _show(state: LabState) -> None:
    speeds = state.speeds_mbit_per_s[:1] if len(set(state.speeds_mbit_per_s)) == 1 else state.speeds_mbit_per_s
    speed = ", ".join(f"{one} Mbit/s" if one else "no speed limit" for one in speeds)
    nics = f"{state.nics} migration NIC{'' if state.nics == 1 else 's'} each" + (f" ({speed})" if speed else "")
    hosts = f"{len(state.hosts)} host{'' if len(state.hosts) == 1 else 's'}"
    say(f"lab {state.lab}: {hosts}, {nics}{'' if state.complete else '; INCOMPLETE, take it down'}")
    rows = [
        (host.host, host.address, " ".join(host.migration_addresses) or "-", _daemon(host.daemon), host.namespace)
        for host in state.hosts
    ]
    say_table(("HOST", "ADDRESS", "MIGRATION", "DAEMON", "NAMESPACE"), rows)


def _daemon(pid: int | None) -> str:
    return "not running" if pid is None else f"process {pid}"


def _down(arguments: argparse.Namespace) -> int:
    from limosa.lab import lifecycle  # noqa: PLC0415 - loads pyroute2

    removed = lifecycle.down(arguments.name)
    if arguments.json:
        say_json(removed)
    elif not removed.namespaces and not removed.folders:
        say(f"there is no lab '{removed.lab}'; nothing to remove")
    else:
        say(f"lab {removed.lab} removed: {removed.processes} processes, {len(removed.namespaces)} namespaces")
    return 0


def _restart(arguments: argparse.Namespace) -> int:
    from limosa.lab import daemons, lifecycle  # noqa: PLC0415 - loads pyroute2

    name, host = _place(arguments)
    lab = lifecycle.load(name)
    if host not in lab.host_names:
        raise NotFound(f"there is no host '{host}' in the lab '{lab.name}'", todo=f"choose {', '.join(lab.host_names)}")
    daemons.stop(lab, host)
    daemons.start(lab, [host])
    pid = daemons.pid_of(lab, host)
    if arguments.json:
        say_json({"host": host, "daemon": pid})
    else:
        say(f"{host}: daemon is {_daemon(pid)}")
    return 0


def _enter(arguments: argparse.Namespace) -> int:
    return _run_at(arguments, [os.environ.get("SHELL") or "/bin/sh"])


def _exec(arguments: argparse.Namespace) -> int:
    command: list[str] = arguments.command
    if command[:1] == ["--name"] and len(command) > 1:  # argparse leaves to the command what stands behind the host
        arguments.name, command = command[1], command[2:]
    command = command[1:] if command[:1] == ["--"] else command
    if not command:
        raise InvalidInput("there is no command to run", todo="write it after '--'")
    return _run_at(arguments, command)


def _place(arguments: argparse.Namespace) -> tuple[str, str]:
    """The lab, and the place in it, of ``HOST`` or ``LAB-HOST``, as --host takes both."""
    lab, _, place = arguments.place.rpartition("-")
    return lab or arguments.name, place


def _run_at(arguments: argparse.Namespace, command: list[str]) -> int:
    """Become ``command`` inside a namespace of the lab."""
    from limosa.lab import lifecycle, namespaces  # noqa: PLC0415

    name, place = _place(arguments)
    namespace, environment = lifecycle.place(lifecycle.load(name), place)
    # Who has called this program by its path, as it is not installed, finds it by its name there.
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])
    namespaces.enter(namespace)
    try:
        os.execvpe(command[0], command, {**os.environ, "PATH": path, **environment})
    except OSError as fault:
        raise NotFound(f"cannot run '{command[0]}'", why=fault.strerror or str(fault)) from fault
