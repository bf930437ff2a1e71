"""``limosa vm``: create, start, stop, look at and sit at VMs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial

from limosa.cli.arguments import Commands, Run, add_command, add_noun
from limosa.cli.connection import client_of, route_of
from limosa.cli.output import on_each, say, say_json, say_table, warn
from limosa.client.host import HostClient
from limosa.errors import Conflict, LimosaError
from limosa.model.units import format_seconds
from limosa.model.vm import Vm, VmState
from limosa.wire import endpoints
from limosa.wire.api import Empty
from limosa.wire.endpoints import Endpoint

#: verb, endpoint, help, example
_ACTIONS: tuple[tuple[str, Endpoint[Empty, Vm], str, str], ...] = (
    ("start", endpoints.START_VM, "start VMs", "web1 web2"),
    ("stop", endpoints.STOP_VM, "stop VMs at once, as a power cut would", "web1"),
    ("pause", endpoints.PAUSE_VM, "pause VMs; they stay in memory", "web1"),
    ("resume", endpoints.RESUME_VM, "resume paused VMs", "web1"),
)


def register(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add ``vm`` and its verbs."""
    verbs = add_noun(commands, "vm", "virtual machines: create, start, stop, show, console")
    _register_create(verbs)
    for verb, endpoint, help_text, example in _ACTIONS:
        action = add_command(verbs, verb, help_text, _for_each(_act_on(endpoint)), examples=[f"vm {verb} {example}"])
        _add_names(action)
    shutdown = add_command(
        verbs,
        "shutdown",
        "press the VMs' power button, which asks the guests to shut down",
        _for_each(_shut_down),
        examples=["vm shutdown web1"],
    )
    _add_names(shutdown)
    reset = add_command(
        verbs,
        "reset",
        "press the VMs' reset button; data that a guest has not yet written to its disks is lost",
        _for_each(_reset),
        examples=["vm reset web1"],
        notes="If a guest still responds, reboot it from inside instead.",
    )
    _add_names(reset)
    delete = add_command(
        verbs,
        "delete",
        "forget stopped VMs; disks are kept, UEFI variables are not",
        _for_each(_delete),
        examples=["vm delete web1"],
    )
    _add_names(delete)
    add_command(
        verbs,
        "list",
        "list the host's VMs",
        _list,
        examples=["vm list", "--host host2 vm list", "vm list --json"],
        also=["ls"],
    )
    show = add_command(
        verbs, "show", "show one VM", _show, examples=["vm show web1", "vm show web1 --toml > web1.toml"]
    )
    show.add_argument("vm", metavar="NAME")
    show.add_argument("--toml", action="store_true", help="as the TOML file that 'vm create --file' reads")
    console = add_command(
        verbs,
        "console",
        "attach to a VM's serial console",
        _console,
        examples=["vm console web1"],
        notes="Ctrl-] detaches. Everything else goes to the guest.",
    )
    console.add_argument("vm", metavar="NAME")


def _register_create(verbs: Commands[argparse.ArgumentParser]) -> None:
    from limosa.cli import vm_options  # noqa: PLC0415 - needed only by this verb, whose options are many

    create = add_command(
        verbs,
        "create",
        "create a VM",
        _create,
        examples=[
            "vm create web1 --memory 2G --cpus 2 --disk web1.qcow2 --switch lan --start",
            "vm create web2 --memory 4G --disk /srv/web2.qcow2 --uefi --cloud-init user-data",
            "vm create tiny --memory 256M --kernel vmlinuz --initrd initrd.img --append console=ttyS0",
            "vm create --file web1.toml",
        ],
        notes="Relative paths start from the current folder here and must mean the same files on the host.\n"
        "What is left out is chosen once and then fixed: the machine type, for one, is pinned\n"
        "to the host's newest version.",
    )
    vm_options.add(create)


def _add_names(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("vms", metavar="NAME", nargs="+")


def _create(arguments: argparse.Namespace) -> int:
    from limosa.cli import vm_options  # noqa: PLC0415 - as above

    new = vm_options.new_vm(arguments)
    with client_of(arguments) as client:
        vm = client.call(endpoints.CREATE_VM, new)
        if arguments.start:
            try:
                vm = client.call(endpoints.START_VM, vm=vm.config.name)
            except LimosaError:
                warn(f"{vm.config.name}: created, but not started; 'limosa vm delete {vm.config.name}' removes it")
                raise
    _tell(arguments, vm)
    return 0


def _for_each(act: Callable[[HostClient, argparse.Namespace, str], None]) -> Run:
    """A command that acts on each VM named, also after one failed; the first failure gives the exit code."""

    def run(arguments: argparse.Namespace) -> int:
        with client_of(arguments) as client:
            return on_each(arguments.vms, partial(act, client, arguments), as_json=arguments.json)

    return run


def _act_on(endpoint: Endpoint[Empty, Vm]) -> Callable[[HostClient, argparse.Namespace, str], None]:
    def act(client: HostClient, arguments: argparse.Namespace, name: str) -> None:
        _tell(arguments, client.call(endpoint, vm=name))

    return act


def _shut_down(client: HostClient, arguments: argparse.Namespace, name: str) -> None:
    vm = client.call(endpoints.SHUTDOWN_VM, vm=name)
    if arguments.json:
        say_json(vm)
    else:
        say(f"{vm.config.name}: power button pressed; the guest is asked to shut down")


def _reset(client: HostClient, arguments: argparse.Namespace, name: str) -> None:
    vm = client.call(endpoints.RESET_VM, vm=name)
    if arguments.json:
        say_json(vm)
    else:
        say(f"{vm.config.name}: reset, {vm.state.value} on {vm.host}")


def _delete(client: HostClient, arguments: argparse.Namespace, name: str) -> None:
    client.call(endpoints.DELETE_VM, vm=name)
    if arguments.json:
        say_json({"deleted": name})
    else:
        say(f"{name}: deleted; its disks are kept")


def _tell(arguments: argparse.Namespace, vm: Vm) -> None:
    if arguments.json:
        say_json(vm)
    else:
        say(f"{vm.config.name}: {vm.state.value} on {vm.host}")


def _list(arguments: argparse.Namespace) -> int:
    with client_of(arguments) as client:
        vms = client.call(endpoints.LIST_VMS).vms
    if arguments.json:
        for vm in vms:
            say_json(vm)
        return 0
    rows = [
        (vm.config.name, vm.state.value, f"{vm.config.memory_mib} MiB", vm.config.cpus, vm.migration or "", vm.reason)
        for vm in vms
    ]
    say_table(("NAME", "STATE", "MEMORY", "CPUS", "MIGRATION", "REASON"), rows)
    return 0


def _show(arguments: argparse.Namespace) -> int:
    with client_of(arguments) as client:
        vm = client.call(endpoints.SHOW_VM, vm=arguments.vm)
    if arguments.json:
        say_json(vm)
    elif arguments.toml:
        from limosa.settings.toml import encode  # noqa: PLC0415 - loads the writer of TOML

        for field in vm.withheld:
            warn(f"'{field}' is empty here: only operators may see its contents")
        sys.stdout.write(encode(vm.config))
    else:
        for key, value in _facts(vm):
            if value not in (None, ""):
                say(f"{key + ':':<14} {value}")
    return 0


def _facts(vm: Vm) -> list[tuple[str, object]]:
    config, boot = vm.config, vm.config.boot
    return [
        ("name", config.name),
        ("state", vm.state.value + (f" ({vm.reason})" if vm.reason else "")),
        ("host", vm.host),
        ("running for", _age(vm)),
        ("uuid", config.uuid),
        ("memory", f"{config.memory_mib} MiB"),
        ("cpus", f"{config.cpus} ({config.cpu})"),
        ("machine", f"{config.machine}, {vm.accelerator or config.accelerator}"),
        ("boot", " ".join([boot.kernel, boot.initrd or "", boot.command_line]) if boot else config.firmware),
        *((f"disk {disk.name}", f"{disk.path} ({disk.format})") for disk in config.disks),
        *((f"nic {number}", f"{nic.switch} {nic.mac}") for number, nic in enumerate(config.nics)),
        *((f"device {number}", f"{one.kind} {one.address}") for number, one in enumerate(config.host_devices)),
        ("random numbers", "virtio-rng" if config.rng else ""),
        ("cloud-init", _cloud_init(vm)),
        ("on crash", config.on_crash),
        ("QEMU", f"process {vm.pid}" if vm.pid else ""),
        ("VNC", vm.vnc_socket),
        ("migration", vm.migration),
    ]


def _cloud_init(vm: Vm) -> str:
    if vm.config.cloud_init is None:
        return ""
    return "yes; only operators may see its contents" if "cloud_init" in vm.withheld else "yes"


def _age(vm: Vm) -> str:
    import time  # noqa: PLC0415 - needed only here

    return format_seconds(max(0.0, time.time() - vm.started_at)) if vm.started_at else ""


def _console(arguments: argparse.Namespace) -> int:
    from limosa.client.console import attach, open_console, run  # noqa: PLC0415 - WebSockets are needed only here

    with client_of(arguments) as client:
        vm = client.call(endpoints.SHOW_VM, vm=arguments.vm)
    if vm.state not in (VmState.RUNNING, VmState.PAUSED):
        raise Conflict(
            f"VM '{arguments.vm}' has no console now", why=f"it is {vm.state.value}", todo="'limosa vm start' starts it"
        )

    async def visit() -> str:
        async with open_console(route_of(arguments), arguments.vm) as session:
            print(f"console of {arguments.vm}; Ctrl-] detaches", file=sys.stderr)
            return await attach(session, sys.stdin.fileno(), sys.stdout.fileno())

    print(f"\n{run(visit())}", file=sys.stderr)
    return 0
