"""The options of ``limosa vm create``, and the new VM they, or a TOML file, describe.

The file may be a host's ``vm.toml`` or anything shorter that the API accepts for a new VM; paths in it are relative to
the file. Everything is validated by the same struct that the daemon decodes.
"""

from __future__ import annotations

import argparse
import os
import tomllib
from pathlib import Path
from typing import Any

from limosa.cli.arguments import absolute
from limosa.errors import InvalidInput
from limosa.model.units import MIB, parse_size
from limosa.settings import toml
from limosa.wire.api import NewVm


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options. What is not given stays ``None`` and is left to the daemon."""
    parser.add_argument("name", metavar="NAME", nargs="?", help="the VM's name")
    parser.add_argument("--file", metavar="FILE", help="read everything from a TOML file instead")
    parser.add_argument("--start", action="store_true", help="also start it")
    add = parser.add_argument_group("the machine").add_argument
    add("--memory", metavar="SIZE", help="guest memory, such as 512M or 2G; a bare number is MiB")
    add("--cpus", metavar="N", type=int, help="virtual processors (1)")
    add("--cpu", metavar="MODEL", help="x86-64-v2 (default), x86-64-v3, or a QEMU model with +feature,-feature")
    add("--machine", metavar="TYPE", help="a versioned QEMU machine type, such as pc-q35-10.0")
    add("--accelerator", choices=("auto", "kvm", "tcg"), help="auto (default) probes whether KVM can run a guest")
    add("--rng", action="store_true", help="add a virtio-rng, for old guests; it makes each blackout 1 ms longer")
    add("--on-crash", choices=("stop", "restart"), help="what to do when its QEMU dies or its host crashes (stop)")
    add = parser.add_argument_group("disks and network").add_argument
    add(
        "--disk",
        metavar="PATH[,KEY=VALUE...]",
        dest="disks",
        action="append",
        help="an image; keys: size (makes a new one), format (qcow2, raw), name (vda...), read-only",
    )
    add("--switch", metavar="NAME[,mac=MAC]", dest="nics", action="append", help="a network card on that switch")
    add(
        "--device",
        metavar="KIND:ADDRESS",
        dest="devices",
        action="append",
        help="pass through pci:ADDRESS or usb:ID; such a VM cannot move",
    )
    add = parser.add_argument_group("booting").add_argument
    add("--uefi", action="store_true", help="UEFI firmware instead of BIOS")
    add("--kernel", metavar="FILE", help="boot this kernel directly")
    add("--initrd", metavar="FILE", help="with --kernel")
    add("--append", metavar="TEXT", help="kernel command line, with --kernel")
    add("--cloud-init", metavar="FILE", help="user-data for cloud-init")
    add("--network-config", metavar="FILE", help="network-config for cloud-init, with --cloud-init")


#: Arguments that say nothing about the VM.
_NOT_OF_THE_VM = ("file", "start", "host", "json", "run")


def new_vm(arguments: argparse.Namespace) -> NewVm:
    """The VM to create. Raises :class:`InvalidInput`."""
    given = {key: value for key, value in vars(arguments).items() if key not in _NOT_OF_THE_VM and value}
    if arguments.file is not None:
        if given:
            raise InvalidInput(
                "--file describes the whole VM", why=f"there is also {', '.join(given)}", todo="write it into the file"
            )
        return _from_file(Path(arguments.file))
    if "name" not in given or "memory" not in given:
        raise InvalidInput("a VM needs a name and --memory", todo="or describe it in a file, with --file")
    return toml.convert(_from_options(arguments), NewVm, where="the VM")


def _from_options(arguments: argparse.Namespace) -> dict[str, Any]:
    raw: dict[str, Any] = {
        "name": arguments.name,
        "memory_mib": _mib(arguments.memory, "--memory"),
        "disks": [_disk(text) for text in arguments.disks or ()],
        "nics": [_nic(text) for text in arguments.nics or ()],
        "host_devices": [_device(text) for text in arguments.devices or ()],
        "firmware": "uefi" if arguments.uefi else "bios",
        "boot": _boot(arguments),
        "cloud_init": _cloud_init(arguments),
        "rng": arguments.rng,
    }
    for name in ("cpus", "cpu", "machine", "accelerator", "on_crash"):
        if getattr(arguments, name) is not None:
            raw[name] = getattr(arguments, name)
    return raw


def _mib(text: str, option: str) -> int:
    try:
        size = parse_size(text, default_unit="M")
    except ValueError as fault:
        raise InvalidInput(f"{option} is not valid", why=str(fault)) from fault
    if size % MIB:
        raise InvalidInput(f"{option} is not valid", why=f"'{text}' is not a whole number of MiB")
    return size // MIB


def _disk(text: str) -> dict[str, Any]:
    path, options = _split(text, "--disk", {"size", "format", "name", "read-only"})
    raw: dict[str, Any] = {"path": _absolute(path), "read_only": options.pop("read-only", "no") in ("", "on", "yes")}
    if "size" in options:
        raw["size_mib"] = _mib(options.pop("size"), "the disk's size")
    return raw | options


def _nic(text: str) -> dict[str, Any]:
    switch, options = _split(text, "--switch", {"mac"})
    return {"switch": switch, **{key: value.lower() for key, value in options.items()}}


def _device(text: str) -> dict[str, Any]:
    kind, _, address = text.partition(":")
    return {"kind": kind, "address": address}


def _split(text: str, option: str, known: set[str]) -> tuple[str, dict[str, str]]:
    first, *rest = text.split(",")
    options = {key: value for key, _, value in (part.partition("=") for part in rest)}
    if unknown := options.keys() - known:
        raise InvalidInput(
            f"{option} has no '{min(unknown)}'",
            why=f"the keys are {', '.join(sorted(known))}",
            todo="a path with a comma can be given in a file, with --file",
        )
    return first, options


def _boot(arguments: argparse.Namespace) -> dict[str, Any] | None:
    if arguments.kernel is None:
        if arguments.initrd is not None or arguments.append is not None:
            raise InvalidInput("--initrd and --append need --kernel")
        return None
    return {
        "kernel": _absolute(arguments.kernel),
        "initrd": None if arguments.initrd is None else _absolute(arguments.initrd),
        "command_line": arguments.append or "",
    }


def _cloud_init(arguments: argparse.Namespace) -> dict[str, Any] | None:
    if arguments.cloud_init is None:
        if arguments.network_config is not None:
            raise InvalidInput("--network-config needs --cloud-init")
        return None
    network = arguments.network_config
    return {"user_data": _text(arguments.cloud_init), "network_config": "" if network is None else _text(network)}


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as fault:
        raise InvalidInput(f"cannot read {path}", why=toml.why_unreadable(fault), todo="name another file") from fault


def _absolute(path: str, base: str = "") -> str:
    return absolute(os.path.join(base, path)) if path else path


def _from_file(path: Path) -> NewVm:
    try:
        raw = tomllib.loads(_text(str(path)))
    except (tomllib.TOMLDecodeError, RecursionError) as fault:
        raise InvalidInput(f"{path} is not valid TOML", why=str(fault), todo="fix the file") from fault
    _make_absolute(raw.get("boot"), ("kernel", "initrd"), str(path.parent))
    disks = raw.get("disks")
    for disk in disks if isinstance(disks, list) else ():
        _make_absolute(disk, ("path",), str(path.parent))
    return toml.convert(raw, NewVm, where=str(path))


def _make_absolute(table: Any, keys: tuple[str, ...], base: str) -> None:
    """Paths in a table of the file; what is not of the right type is left for the struct to refuse."""
    if isinstance(table, dict):
        table.update({key: _absolute(table[key], base) for key in keys if isinstance(table.get(key), str)})
