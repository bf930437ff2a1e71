"""QEMU's command line for one VM. Pure: a :class:`Launch` in, a list of arguments out.

Nothing a user writes can become an option: disks, devices, objects and networks are given as JSON, paths in the few
places that know only ``key=value`` have their commas doubled, everything else is a whole argument of its own.

Every device has a fixed PCI address, made from what it is called and never from what else there is, because source and
destination must agree on all of them, also after devices were plugged or unplugged while the VM ran:

=========  =====================================================================================
``00``     the q35 host bridge
``01``     VGA
``02-09``  NICs, in order
``0a-16``  disks, two functions each: ``vda`` to ``vdm`` are the first, ``vdn`` to ``vdz`` the second
``17-1a``  reserved for ports into which devices can be plugged
``1b``     virtio-rng, if it is asked for
``1c``     the USB controller, if a USB device of the host is handed through
``1d``     root ports with PCI devices of the host, one function each
``1f``     the ICH9: ISA bridge, and AHCI where there is a CD-ROM
=========  =====================================================================================

No root ports without need: loading one costs the destination about 0.7 ms while the guest stands still (eight of them
doubled the blackout of a small guest: 12.7 ms instead of 5.9) and 4 ms of every boot. No virtio device without need
either: each is saved and loaded with 1024 queues, whatever it has, which takes 1 ms. A change of this layout breaks
migration of running VMs between releases: add, do not move.

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

_VGA_SLOT, _NIC_SLOT, _DISK_SLOT, _RNG_SLOT, _USB_SLOT, _HOST_DEVICE_SLOT = 0x01, 0x02, 0x0A, 0x1B, 0x1C, 0x1D
_DISK_SLOTS = 13


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
    #: disks that are block devices and no files, by path
    block_devices: frozenset[str] = frozenset()
    #: disks whose file system's locks do not reach other hosts, by path
    unlocked: frozenset[str] = frozenset()


def build(launch: Launch) -> list[str]:
    """QEMU's arguments, without the program. Raises :class:`InvalidInput` for what cannot be built."""
    config = launch.config
    if "q35" not in config.machine:
        raise InvalidInput(
            f"VM '{config.name}' cannot use machine type '{config.machine}'",
            why="Limosa supports q35 machines only",
            todo="choose one of the pc-q35-* machine types",
            vm=config.name,
        )
    _check_disks(config)
    if len(launch.tap_fds) != len(config.nics):
        raise ValueError("one tap for each NIC")
    return [
        *_process(launch),
        *_machine(launch),
        *_boot(config),
        *_channels(launch),
        *_disks(launch),
        *_seed(launch.seed),
        *_nics(config.nics, launch.tap_fds),
        *_host_devices(config.host_devices),
        *(_rng() if config.rng else ()),
        *_device("VGA", id="vga", addr=_address(_VGA_SLOT)),
    ]


def image_nodes(
    name: str,
    image_format: str,
    path: str,
    *,
    driver: str = "file",
    read_only: bool = False,
    direct: bool = False,
    thick: bool = False,
    locks: bool = True,
    size_bytes: int | None = None,
    look_for_zeroes: bool = False,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """QEMU's description of an open image: the file ``NAME-file`` and above it the format node ``NAME``.

    The format is said, never guessed from the contents. A ``thick`` image keeps its space whatever the guest discards.
    Without ``locks`` QEMU takes none of its own on the file. ``size_bytes``: what of a raw image is the disk, if not
    all; ``look_for_zeroes``: make holes where zeroes are written, which must be looked for, unless it is ``thick``.
    """
    shared = {"read-only": read_only, "discard": "ignore" if thick else "unmap", "cache": {"direct": direct}}
    file: dict[str, Any] = {"driver": driver, "node-name": f"{name}-file", "filename": path}
    if not locks:
        file["locking"] = "off"
    image: dict[str, Any] = {"driver": image_format, "node-name": name, "file": f"{name}-file"}
    if size_bytes is not None:
        image["size"] = size_bytes
    if look_for_zeroes and not thick:
        image["detect-zeroes"] = "unmap"
    return file | shared, image | shared


def without_guest(run_dir: Path, qmp_fd: int) -> list[str]:
    """QEMU's arguments to work with images and nothing else. The second one tells it from all others."""
    return [
        *("-name", f"guest=disks of {_escaped(run_dir)}"),
        *("-sandbox", SANDBOX),
        *("-no-user-config", "-nodefaults", "-S"),
        *("-machine", "none", "-m", "1M", "-display", "none"),
        *("-msg", "timestamp=on"),
        *("-chardev", f"socket,id=qmp,fd={qmp_fd},server=on,wait=off"),
        *("-mon", "chardev=qmp,mode=control"),
    ]


def vnc_argument(socket: Path) -> str:
    """The argument by which a QEMU can be told from all others: its VNC socket."""
    return f"unix:{_escaped(socket)}"


def _check_disks(config: VmConfig) -> None:
    """A guest looks at a slot only if its function 0 is there."""
    addresses = {_disk_address(disk): disk.name for disk in config.disks}
    for address, name in addresses.items():
        if f"{address[:-1]}0" not in addresses:
            raise InvalidInput(
                f"VM '{config.name}' has a disk {name} without the one whose PCI slot it shares",
                todo="name disks vda, vdb and so on, without gaps",
                vm=config.name,
            )


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


def _channels(launch: Launch) -> Iterable[str]:
    yield from ("-display", "none", "-vnc", vnc_argument(launch.vnc_socket))
    yield from ("-chardev", f"socket,id=qmp,fd={launch.qmp_fd},server=on,wait=off")
    yield from ("-mon", "chardev=qmp,mode=control")
    log = f"logfile={_escaped(launch.console_log)},logappend=on"
    yield from ("-chardev", f"socket,id=console,fd={launch.console_fd},server=on,wait=off,{log}")
    yield from _device("isa-serial", id="serial0", chardev="console")


def _disks(launch: Launch) -> Iterable[str]:
    for order, disk in enumerate(launch.config.disks, start=1):
        yield from _blockdev(
            disk.name,
            disk.format,
            disk.path,
            driver="host_device" if disk.path in launch.block_devices else "file",
            read_only=disk.read_only,
            direct=disk.path not in launch.buffered,
            thick=disk.thick,
            locks=disk.path not in launch.unlocked,
            size_bytes=disk.size_bytes,
        )
        yield from _virtio(
            "blk",
            id=f"{disk.name}-device",
            drive=disk.name,
            addr=_disk_address(disk),
            multifunction=True,
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
        yield from _virtio(
            "net",
            id=f"nic{index}",
            netdev=f"net{index}",
            mac=nic.mac,
            addr=_address(_NIC_SLOT + index),
            romfile="",
        )


def _rng() -> Iterable[str]:
    yield from _json("-object", {"qom-type": "rng-builtin", "id": "rng"})
    # Without MSI-X: it interrupts once in minutes, and one region less is there to be mapped anew in the blackout.
    yield from _virtio("rng", id="rng0", rng="rng", vectors=0, addr=_address(_RNG_SLOT))


def _host_devices(devices: tuple[HostDevice, ...]) -> Iterable[str]:
    if any(device.kind == "usb" for device in devices):
        yield from _device("qemu-xhci", id="usb", addr=_address(_USB_SLOT))
    # A guest looks at a slot only if its function 0 is there, so PCI devices come first and without a gap.
    for index, device in enumerate(sorted(devices, key=lambda device: device.kind)):
        name = f"hostdev{index}"
        if device.kind == "pci":
            yield from _root_port(f"{name}-port", index)
            yield from _device("vfio-pci", id=name, host=device.address, bus=f"{name}-port")
        else:
            vendor, product = (int(part, 16) for part in device.address.split(":"))
            yield from _device("usb-host", id=name, vendorid=vendor, productid=product, bus="usb.0")


def _root_port(name: str, index: int) -> Iterable[str]:
    address = _address(_HOST_DEVICE_SLOT, index)
    return _device("pcie-root-port", id=name, addr=address, multifunction=True, chassis=index + 1)


def _blockdev(name: str, image_format: str, path: str, **how: Any) -> Iterable[str]:
    for node in image_nodes(name, image_format, path, **how):
        yield from _json("-blockdev", node)


def _disk_address(disk: Disk) -> str:
    function, slot = divmod(ord(disk.name[2]) - ord("a"), _DISK_SLOTS)
    return _address(_DISK_SLOT + slot, function)


def _address(slot: int, function: int = 0) -> str:
    return f"{slot:x}.{function}"


def _virtio(kind: str, **properties: object) -> Iterable[str]:
    """A virtio device without the registers of before virtio 1.0 (2016).

    They are a region of their own in the PCI address space, and each costs time when the destination loads the device:
    with two devices the blackout of an emulated guest went from 7.0 to 5.1 ms at its best.
    """
    return _device(f"virtio-{kind}-pci", **{"disable-legacy": "on"}, **properties)


def _device(driver: str, **properties: object) -> Iterable[str]:
    if "addr" in properties:
        properties["bus"] = "pcie.0"
    return _json("-device", {"driver": driver, **properties})


def _json(option: str, value: dict[str, Any]) -> tuple[str, str]:
    return option, json.dumps(value, separators=(",", ":"))


def _escaped(path: Path) -> str:
    return str(path).replace(",", ",,")
