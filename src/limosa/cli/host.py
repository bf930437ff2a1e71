"""``limosa host``: the daemon, its status and its settings page."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from limosa.cli.arguments import Commands, add_command, add_noun
from limosa.cli.connection import client_of
from limosa.cli.output import say, say_findings, say_json, say_table
from limosa.errors import InvalidInput
from limosa.model.network import HostNetwork, HostNic
from limosa.settings.daemon import DEFAULT_FILE
from limosa.wire import endpoints
from limosa.wire.api import HostStatus, SettingsChange


def register(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add ``host`` and its verbs."""
    verbs = add_noun(commands, "host", "the host daemon: status, advise, settings, serve")
    add_command(
        verbs, "status", "show the host's status", _status, examples=["host status", "--host host2 host status"]
    )
    add_command(
        verbs,
        "advise",
        "say which transport suits the host's NICs, and what is misconfigured",
        _advise,
        examples=["host advise", "--host host2 host advise --json"],
    )
    settings = add_command(
        verbs,
        "settings",
        "show or change the host's settings",
        _settings,
        examples=[
            "host settings",
            "host settings max_outgoing 4",
            "host settings convergence.post_copy=on migration_networks=10.0.1.0/24,10.0.2.0/24",
            "host settings peers.host2=10.0.0.2:7411",
            "host settings --reset convergence.blackout_budget_ms",
        ],
        notes="Changes take effect immediately, all or none, and survive a restart.",
    )
    settings.add_argument("changes", metavar="KEY VALUE|KEY=VALUE", nargs="*", help="new values; lists with commas")
    settings.add_argument("--reset", metavar="KEY", action="append", default=[], help="restore the default")
    serve = add_command(
        verbs,
        "serve",
        "run the host daemon",
        _serve,
        examples=["host serve", "host serve --settings host1.toml"],
        notes="In the foreground, until SIGTERM. VMs keep running without it, and the next daemon takes them over.",
    )
    serve.add_argument("--settings", metavar="FILE", type=Path, default=Path(DEFAULT_FILE), help=f"({DEFAULT_FILE})")


def _status(arguments: argparse.Namespace) -> int:
    with client_of(arguments) as client:
        status = client.call(endpoints.HOST)
    if arguments.json:
        say_json(status)
    else:
        for key, value in _facts(status):
            say(f"{key + ':':<16} {value}")
        say_nics(status.network)
    return 0


def _facts(status: HostStatus) -> list[tuple[str, object]]:
    oldest, newest = status.protocol
    return [
        ("name", status.name),
        ("limosa", f"{status.limosa}, peer protocol {oldest} to {newest}"),
        ("QEMU", f"{status.qemu}, {status.accelerator}"),
        ("processors", status.cpus),
        ("memory", f"{status.memory_available_mib} MiB of {status.memory_total_mib} MiB available for VMs"),
        ("switches", ", ".join(status.switches) or "none"),
        ("addresses", ", ".join(status.addresses) or "none"),
        ("VMs", status.vms),
        ("moves", f"{status.outgoing} outgoing, {status.incoming} incoming"),
        ("certificate", _until(status)),
    ]


def _until(status: HostStatus) -> str:
    if status.certificate_until is None:
        return "none"
    return time.strftime("until %Y-%m-%d", time.gmtime(status.certificate_until))


def say_nics(network: HostNetwork) -> None:
    """A table of NICs but for loopback, and whether they can be used together. Nothing if none is known."""
    rows = [
        (
            nic.name,
            _kind(nic),
            "up" if nic.carrier else "no link" if nic.up else "down",
            f"{nic.speed_mbit_per_s} Mbit/s" if nic.speed_mbit_per_s else "-",
            nic.mtu,
            " ".join(f"{own.address}/{own.prefix}" for own in nic.addresses) or "-",
        )
        for nic in network.nics
        if nic.kind != "loopback"
    ]
    if rows:
        say("")
        say_table(("NIC", "KIND", "LINK", "SPEED", "MTU", "ADDRESSES"), rows)
        say(f"Multipath TCP is {'on' if network.mptcp else 'off'}")


def _kind(nic: HostNic) -> str:
    """``bond 802.3ad layer3+4 of eth0 eth1``, ``vlan on eth0``."""
    more = [part for part in (nic.bond_mode, nic.hash_policy) if part]
    members = ["of", *nic.members] if nic.members else []
    lower = ["on", nic.lower] if nic.lower else []
    return " ".join([nic.kind, *more, *members, *lower, *([f"({nic.rdma})"] if nic.rdma else [])])


def _advise(arguments: argparse.Namespace) -> int:
    with client_of(arguments) as client:
        advice = client.call(endpoints.ADVICE)
    if arguments.json:
        say_json(advice)
    else:
        say(f"for moves to a host with the same networks: {advice.transport} ({advice.why})")
        say_findings(advice.findings)
    return 0


def _settings(arguments: argparse.Namespace) -> int:
    from limosa.cli import settings_page  # noqa: PLC0415 - reads the help out of types, for this verb only

    changes = settings_page.parse_changes(_pairs(arguments.changes))
    changes |= settings_page.parse_resets(arguments.reset)
    with client_of(arguments) as client:
        if changes:
            page = client.call(endpoints.CHANGE_SETTINGS, SettingsChange(values=changes))
        else:
            page = client.call(endpoints.SETTINGS)
    if arguments.json:
        say_json(page.settings)
    elif changes:
        for key in changes:
            say(f"{key} = {settings_page.value_text(page.settings, key)}")
    else:
        settings_page.say_page(page.settings)
    return 0


def _pairs(words: list[str]) -> list[tuple[str, str]]:
    """``KEY=VALUE`` words, ``KEY VALUE`` pairs or ``KEY = VALUE`` as the page has it, in any mixture."""
    pairs = []
    rest = iter(words)
    for word in rest:
        key, equals, value = word.partition("=")
        if not equals:
            following = next(rest, None)
            if following == "=":
                following = next(rest, None)
            if following is None:
                raise InvalidInput(
                    f"there is no value for '{key}'",
                    todo="write KEY VALUE or KEY=VALUE; 'limosa host settings' alone shows all",
                )
            value = following
        pairs.append((key, value))
    return pairs


def _serve(arguments: argparse.Namespace) -> int:
    from limosa.host.serve import serve  # noqa: PLC0415 - the whole daemon

    serve(arguments.settings)
    return 0
