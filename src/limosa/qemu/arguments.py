"""QEMU's command line for one VM. Pure: a :class:`Launch` in, a list of arguments out.

Nothing a user writes can become an option: disks, devices, objects and networks are given as JSON, paths in the few
places that know only ``key=value`` have their commas doubled, everything else is a whole argument of its own.

Every device has a fixed PCI address, made from what it is called and never from what else there is, because source and
destination must agree on all of them, also after devices were plugged or unplugged while the VM ran:

==========  =====================================================================================
``00.0``    the q35 host bridge
``01.0``    VGA
``02.*``    root ports ``nic0`` to ``nic7``; the first four always exist
``03-06.*`` root ports ``vda`` to ``vdz``, eight to a slot; the first four always exist
``07.*``    root ports ``hostdev0`` to ``hostdev7``
``08.0``    virtio-rng
``09.0``    the USB controller, if a USB device of the host is handed through
``1f.*``    the ICH9: ISA bridge, and AHCI where there is a CD-ROM
==========  =====================================================================================

The spare ports are there so that a disk or NIC can be plugged later; each costs the firmware about 4 ms at boot under
emulation. A change of this layout breaks migration of running VMs between releases: add, do not move.

Firmware for network boot is left out (``romfile`` empty): it would be loaded at each start and sent in each move.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limosa.errors import InvalidInput
from limosa.model.vm import Accelerator, Disk, HostDevice, Nic, VmConfig
from limosa.qemu import cpu

SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"

_NIC_SLOT, _DISK_SLOT, _HOST_DEVICE_SLOT = 0x02, 0x03, 0x07
_SPARE_PORTS = 4
_PORTS_OF_A_SLOT = 8


@dataclass(frozen=True)
class Launch:
    """A VM and everything of this host it is started with."""

    config: VmConfig
    accelerator: Accelerator
    #: wait for the state of a VM that runs elsewhere
    incoming: bool
    #: one for each NIC, in order
    tap_fds: tuple[int, ...]
    #: listening Unix sockets
    qmp_fd: int
    console_fd: int
    console_log: Path
    vnc_socket: Path
    firmware_code: Path | None
    #: this VM's own copy of the UEFI variables
    firmware_vars: Path | None
    #: the cloud-init ISO
    seed: Path | None
    #: disks whose file system cannot do direct I/O, by path
    buffered: frozenset[str] = frozenset()


def build(launch: Launch) -> list[str]:
    """QEMU's arguments, without the program. Raises :class:`InvalidInput` for what cannot be built."""
    config = launch.config
    if "q35" not in config.machine:
        raise InvalidInput(
            f"VM '{config.name}' cannot use machine type '{config.machine}'",
            why="Limosa lays devices out for q35",
            todo="choose one of the pc-q35-* machine types",
            vm=config.name,
        )
    if len(launch.tap_fds) != len(config.nics):
        raise ValueError("one tap for each NIC")
    return [
        *_process(launch),
        *_machine(launch),
        *_boot(config),
        *_ports(config),
        *_channels(launch),
        *_disks(launch),
        *_seed(launch.seed),
        *_nics(config.nics, launch.tap_fds),
        *_host_devices(config.host_devices),
        *_device("virtio-rng-pci", id="rng0", rng="rng", bus="pcie.0", addr="8"),
        *_device("VGA", id="vga", bus="pcie.0", addr="1"),
    ]


def _process(launch: Launch) -> Iterable[str]:
    yield from ("-name", f"guest={launch.config.name},debug-threads=on")
    yield from ("-sandbox", SANDBOX)
    yield from ("-no-user-config", "-nodefaults", "-S")
    yield from ("-msg", "timestamp=on")
    if launch.incoming:
        yield from ("-incoming", "defer")


def _machine(launch: Launch) -> Iterable[str]:
    config = launch.config
    options = {
        "accel": launch.accelerator,
        "memory-backend": "ram",
        "dump-guest-core": "off",
        "smbus": "off",
        "sata": "on" if launch.seed else "off",
    }
    if config.firmware == "uefi":
        options |= {"pflash0": "firmware-code", "pflash1": "firmware-vars"}
        yield from _firmware(launch)
    yield from ("-machine", ",".join([config.machine, *(f"{key}={value}" for key, value in options.items())]))
    yield from ("-uuid", config.uuid)
    yield from ("-cpu", cpu.argument(config.cpu))
    yield from ("-smp", f"cpus={config.cpus},sockets=1,cores={config.cpus},threads=1")
    yield from ("-m", f"{config.memory_mib}M")
    yield from _json(
        "-object", {"qom-type": "memory-backend-ram", "id": "ram", "size": config.memory_mib * 1024 * 1024}
    )
    yield from _json("-object", {"qom-type": "rng-builtin", "id": "rng"})
    yield from ("-overcommit", "mem-lock=off")


def _firmware(launch: Launch) -> Iterable[str]:
    if launch.firmware_code is None or launch.firmware_vars is None:
        raise ValueError("UEFI needs its code and this VM's variables")
    yield from _blockdev("firmware-code", "raw", str(launch.firmware_code), read_only=True)
    yield from _blockdev("firmware-vars", "raw", str(launch.firmware_vars))


def _boot(config: VmConfig) -> Iterable[str]:
    yield from ("-boot", "menu=off,strict=on")
    if config.boot is None:
        return
    yield from ("-kernel", config.boot.kernel)
    if config.boot.initrd is not None:
        yield from ("-initrd", config.boot.initrd)
    if config.boot.command_line:
        yield from ("-append", config.boot.command_line)


def _ports(config: VmConfig) -> Iterable[str]:
    pci = [index for index, device in enumerate(config.host_devices) if device.kind == "pci"]
    disks = {_disk_index(disk) for disk in config.disks}
    yield from _root_ports("nic", _NIC_SLOT, {*range(_SPARE_PORTS), *range(len(config.nics))})
    yield from _root_ports("vd", _DISK_SLOT, {*range(_SPARE_PORTS), *disks})
    yield from _root_ports("hostdev", _HOST_DEVICE_SLOT, set(pci))


def _root_ports(kind: str, first_slot: int, wanted: set[int]) -> Iterable[str]:
    """Root ports for the devices numbered ``wanted``. A guest looks at a slot only if its function 0 is there."""
    leaders = {index - index % _PORTS_OF_A_SLOT for index in wanted}
    for index in sorted(wanted | leaders):
        slot, function = first_slot + index // _PORTS_OF_A_SLOT, index % _PORTS_OF_A_SLOT
        yield from _device(
            "pcie-root-port",
            id=f"port-{_port_name(kind, index)}",
            bus="pcie.0",
            addr=f"{slot:x}.{function}",
            multifunction=True,
            chassis=slot * _PORTS_OF_A_SLOT + function,
        )


def _channels(launch: Launch) -> Iterable[str]:
    yield from ("-display", "none", "-vnc", f"unix:{_escaped(launch.vnc_socket)}")
    yield from ("-chardev", f"socket,id=qmp,fd={launch.qmp_fd},server=on,wait=off")
    yield from ("-mon", "chardev=qmp,mode=control")
    log = f"logfile={_escaped(launch.console_log)},logappend=on"
    yield from ("-chardev", f"socket,id=console,fd={launch.console_fd},server=on,wait=off,{log}")
    yield from _device("isa-serial", id="serial0", chardev="console")


def _disks(launch: Launch) -> Iterable[str]:
    for order, disk in enumerate(launch.config.disks, start=1):
        yield from _blockdev(
            disk.name, disk.format, disk.path, read_only=disk.read_only, direct=disk.path not in launch.buffered
        )
        yield from _device(
            "virtio-blk-pci",
            id=f"{disk.name}-device",
            drive=disk.name,
            bus=f"port-{disk.name}",
            addr="0",
            serial=disk.name,
            bootindex=order,
        )


def _seed(seed: Path | None) -> Iterable[str]:
    if seed is None:
        return
    yield from _blockdev("seed", "raw", str(seed), read_only=True)
    yield from _device("ide-cd", id="seed-device", drive="seed", bus="ide.0")


def _nics(nics: tuple[Nic, ...], tap_fds: tuple[int, ...]) -> Iterable[str]:
    for index, (nic, fd) in enumerate(zip(nics, tap_fds, strict=True)):
        yield from _json("-netdev", {"type": "tap", "id": f"net{index}", "fd": str(fd), "vhost": False})
        yield from _device(
            "virtio-net-pci",
            id=f"nic{index}",
            netdev=f"net{index}",
            mac=nic.mac,
            bus=f"port-nic{index}",
            addr="0",
            romfile="",
        )


def _host_devices(devices: tuple[HostDevice, ...]) -> Iterable[str]:
    if any(device.kind == "usb" for device in devices):
        yield from _device("qemu-xhci", id="usb", bus="pcie.0", addr="9")
    for index, device in enumerate(devices):
        name = f"hostdev{index}"
        if device.kind == "pci":
            yield from _device("vfio-pci", id=name, host=device.address, bus=f"port-{name}", addr="0")
        else:
            vendor, product = (int(part, 16) for part in device.address.split(":"))
            yield from _device("usb-host", id=name, vendorid=vendor, productid=product, bus="usb.0")


def _blockdev(
    name: str, image_format: str, path: str, *, read_only: bool = False, direct: bool = False
) -> Iterable[str]:
    """A protocol node and above it the format node ``name``: the format is said, never guessed from the contents."""
    file = {
        "driver": "host_device" if path.startswith("/dev/") else "file",
        "node-name": f"{name}-file",
        "filename": path,
        "read-only": read_only,
        "discard": "unmap",
        "cache": {"direct": direct},
    }
    node = {"driver": image_format, "node-name": name, "file": f"{name}-file", "read-only": read_only}
    yield from _json("-blockdev", file)
    yield from _json("-blockdev", node | {"discard": "unmap", "cache": {"direct": direct}})


def _disk_index(disk: Disk) -> int:
    return ord(disk.name[2]) - ord("a")


def _port_name(kind: str, index: int) -> str:
    return f"vd{chr(ord('a') + index)}" if kind == "vd" else f"{kind}{index}"


def _device(driver: str, **properties: object) -> Iterable[str]:
    return _json("-device", {"driver": driver, **properties})


def _json(option: str, value: dict[str, Any]) -> tuple[str, str]:
    return option, json.dumps(value, separators=(",", ":"))


def _escaped(path: Path) -> str:
    return str(path).replace(",", ",,")
