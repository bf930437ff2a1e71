"""The command line: fixed addresses, nothing injectable. Pure."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from limosa.errors import InvalidInput
from limosa.model.base import is_clean_path
from limosa.model.vm import CloudInit, DirectBoot, Disk, HostDevice, Nic, VmConfig
from limosa.qemu import cpu
from limosa.qemu.arguments import Launch, build, image_nodes

LETTERS = "abcdefghijklmnopqrstuvwxyz"
JSON_OPTIONS = ("-device", "-blockdev", "-object", "-netdev")


def config(**changes: Any) -> VmConfig:
    raw: dict[str, Any] = {
        "name": "web1",
        "uuid": "5c7a2b9e-0f0e-4c06-8a0b-6d4b7b6f2a11",
        "memory_mib": 64,
        "cpus": 2,
        "machine": "pc-q35-10.0",
        "cpu": "x86-64-v2",
    }
    return VmConfig(**raw | changes)


def launch(vm: VmConfig, **changes: Any) -> Launch:
    plain = Launch(
        config=vm,
        accelerator="tcg",
        incoming=False,
        tap_fds=tuple(range(20, 20 + len(vm.nics))),
        qmp_fd=3,
        console_fd=4,
        console_log=Path("/var/lib/limosa/web1/console.log"),
        vnc_socket=Path("/run/limosa/web1/vnc.sock"),
        firmware_code=None,
        firmware_vars=None,
        seed=None,
    )
    return dataclasses.replace(plain, **changes)


def options(arguments: list[str], name: str) -> list[str]:
    return [value for option, value in itertools.pairwise(arguments) if option == name]


def parsed(arguments: list[str], name: str) -> list[dict[str, Any]]:
    return [json.loads(value) for value in options(arguments, name)]


def devices(arguments: list[str]) -> dict[str, dict[str, Any]]:
    return {device["id"]: device for device in parsed(arguments, "-device") if "id" in device}


def disk(letter: str, **changes: Any) -> Disk:
    return Disk(name=f"vd{letter}", path=f"/images/{letter}.qcow2", format="qcow2", **changes)


def test_every_machine_waits_sandboxed_and_without_defaults() -> None:
    arguments = build(launch(config()))
    assert {"-S", "-nodefaults", "-no-user-config"} <= set(arguments)
    assert options(arguments, "-sandbox") == ["on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]
    assert "-incoming" not in arguments
    assert options(build(launch(config(), incoming=True)), "-incoming") == ["defer"]


def test_only_the_incoming_option_differs_between_source_and_destination() -> None:
    vm = config(disks=(disk("a"),), nics=(Nic(switch="lan", mac="52:54:00:00:00:01"),))
    ours, theirs = build(launch(vm)), build(launch(vm, incoming=True))
    theirs.remove("-incoming")
    theirs.remove("defer")
    assert ours == theirs


@given(st.sets(st.sampled_from(LETTERS[:13])), st.sets(st.sampled_from(LETTERS)), st.integers(0, 8))
def test_a_device_keeps_its_address_whatever_else_there_is(few: set[str], more: set[str], nics: int) -> None:
    more = more | few | {LETTERS[LETTERS.index(letter) - 13] for letter in more if letter >= "n"}
    cards = tuple(Nic(switch="lan", mac=f"52:54:00:00:00:{number:02x}") for number in range(nics))
    small = devices(build(launch(config(disks=tuple(map(disk, sorted(few)))))))
    large = devices(build(launch(config(disks=tuple(map(disk, sorted(more))), nics=cards, rng=True))))
    for name, device in small.items():
        assert large[name].get("addr") == device.get("addr")
    addresses = [(device["bus"], device["addr"]) for device in large.values() if "addr" in device]
    assert len(set(addresses)) == len(addresses)


def test_a_disk_that_the_guest_could_not_see_is_refused() -> None:
    assert build(launch(config(disks=(disk("a"), disk("n")))))
    with pytest.raises(InvalidInput, match="vdn"):
        build(launch(config(disks=(disk("n"),))))


def test_a_machine_type_without_a_layout_is_refused() -> None:
    with pytest.raises(InvalidInput, match="q35"):
        build(launch(config(machine="pc-i440fx-10.0")))


def test_disks_say_their_format_and_boot_in_order() -> None:
    vm = config(disks=(disk("a"), Disk(name="vdb", path="/dev/mapper/b", format="raw", read_only=True)))
    arguments = build(launch(vm, buffered=frozenset({"/images/a.qcow2"}), block_devices=frozenset({"/dev/mapper/b"})))
    nodes = {node["node-name"]: node for node in parsed(arguments, "-blockdev")}
    assert nodes["vda"]["driver"] == "qcow2"
    assert nodes["vda-file"]["driver"] == "file"
    assert nodes["vda-file"]["cache"] == {"direct": False}
    assert nodes["vdb"]["driver"] == "raw"
    assert nodes["vdb-file"]["driver"] == "host_device"
    assert nodes["vdb-file"]["cache"] == {"direct": True}
    assert nodes["vdb-file"]["read-only"] is True
    found = devices(arguments)
    assert [found[name]["bootindex"] for name in ("vda-device", "vdb-device")] == [1, 2]


def test_a_disk_may_be_a_part_of_its_device() -> None:
    vm = config(disks=(Disk(name="vda", path="/dev/vg0/a", format="raw", size_bytes=1536),))
    nodes = {node["node-name"]: node for node in parsed(build(launch(vm)), "-blockdev")}
    assert nodes["vda"]["size"] == 1536
    assert "size" not in nodes["vda-file"]


@pytest.mark.parametrize(("thick", "discard"), [(False, "unmap"), (True, "ignore")])
def test_a_thick_disk_keeps_its_space(thick: bool, discard: str) -> None:
    vm = config(disks=(Disk(name="vda", path="/a", format="raw", thick=thick),))
    nodes = parsed(build(launch(vm)), "-blockdev")
    assert {node["discard"] for node in nodes} == {discard}


def test_zeroes_are_looked_for_unless_space_is_to_be_kept() -> None:
    _, image = image_nodes("vda.x", "raw", "/a", look_for_zeroes=True)
    assert (image["detect-zeroes"], image["discard"]) == ("unmap", "unmap")
    _, thick = image_nodes("vda.x", "raw", "/a", look_for_zeroes=True, thick=True)
    assert "detect-zeroes" not in thick
    assert "detect-zeroes" not in image_nodes("vda.x", "raw", "/a")[1]


def test_each_nic_is_given_its_tap() -> None:
    cards = tuple(Nic(switch="lan", mac=f"52:54:00:00:00:{number:02x}") for number in range(2))
    arguments = build(launch(config(nics=cards), tap_fds=(31, 30)))
    assert [net["fd"] for net in parsed(arguments, "-netdev")] == ["31", "30"]
    found = devices(arguments)
    assert [(found[f"nic{index}"]["mac"], found[f"nic{index}"]["netdev"]) for index in range(2)] == [
        ("52:54:00:00:00:00", "net0"),
        ("52:54:00:00:00:01", "net1"),
    ]


def test_random_numbers_come_from_a_device_only_if_they_are_asked_for() -> None:
    assert "rng0" not in devices(build(launch(config())))
    device = devices(build(launch(config(rng=True))))["rng0"]
    assert device["rng"] in [made["id"] for made in parsed(build(launch(config(rng=True))), "-object")]


def test_uefi_has_its_code_and_this_machines_variables() -> None:
    arguments = build(launch(config(firmware="uefi"), firmware_code=Path("/code"), firmware_vars=Path("/vars")))
    nodes = {node["node-name"]: node for node in parsed(arguments, "-blockdev")}
    assert nodes["firmware-code-file"]["read-only"] is True
    assert nodes["firmware-vars-file"]["read-only"] is False
    assert "pflash0=firmware-code,pflash1=firmware-vars" in options(arguments, "-machine")[0]


def test_a_seed_is_a_read_only_cd() -> None:
    arguments = build(launch(config(cloud_init=CloudInit(user_data="#cloud-config\n")), seed=Path("/seed.iso")))
    assert devices(arguments)["seed-device"]["driver"] == "ide-cd"
    assert "sata=on" in options(arguments, "-machine")[0]
    assert "sata=off" in options(build(launch(config())), "-machine")[0]


def test_devices_of_the_host() -> None:
    handed = (HostDevice(kind="usb", address="1d6b:0002"), HostDevice(kind="pci", address="0000:01:00.0"))
    found = devices(build(launch(config(host_devices=handed))))
    assert found["hostdev0"]["host"] == "0000:01:00.0"
    assert found["hostdev0-port"]["addr"] == "1d.0"
    assert (found["hostdev1"]["vendorid"], found["hostdev1"]["productid"]) == (0x1D6B, 2)


HOSTILE = st.text(st.characters(exclude_characters="\0/", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=40)


@given(
    HOSTILE.filter(lambda name: is_clean_path(f"/{name}")), st.text(st.characters(min_codepoint=32, max_codepoint=126))
)
def test_nothing_a_user_writes_becomes_an_option(name: str, command_line: str) -> None:
    """Compared with a harmless twin, only the values differ that are meant to, and as wholes."""
    path, words = f"/{name}", command_line or "quiet"
    plain = build(launch(full_vm("/image", "/kernel", "console=ttyS0"), **files("/file")))
    hostile = build(launch(full_vm(path, path, words), **files(path)))
    assert len(hostile) == len(plain)
    option = ""
    for ours, theirs in zip(plain, hostile, strict=True):
        assert meaning(option, theirs) == meaning(option, ours) | changed(option, ours, path, words)
        option = ours


def meaning(option: str, value: str) -> dict[str, Any]:
    """An argument as QEMU understands it, given the one before it."""
    if option in JSON_OPTIONS:
        return dict(json.loads(value))
    if option in ("-chardev", "-vnc"):
        return qemu_options(value.replace("unix:", "unix=", 1))
    return {"": value}


def changed(option: str, plain: str, path: str, command_line: str) -> dict[str, Any]:
    """What may differ in the hostile twin."""
    own = {"-kernel": {"": path}, "-initrd": {"": path}, "-append": {"": command_line}}
    if option in own:
        return own[option]
    return {key: path for key in meaning(option, plain) if key in ("filename", "logfile", "unix")}


def full_vm(image: str, kernel: str, command_line: str) -> VmConfig:
    return config(
        disks=(Disk(name="vda", path=image, format="raw"),),
        boot=DirectBoot(kernel=kernel, initrd=kernel, command_line=command_line),
    )


def files(path: str) -> dict[str, Path]:
    return {"console_log": Path(path), "vnc_socket": Path(path)}


def qemu_options(text: str) -> dict[str, str]:
    """A value as QEMU's own parser splits it: at single commas; doubled ones are part of a value."""
    parts = text.replace(",,", "\0").split(",")
    return {part.partition("=")[0]: part.partition("=")[2].replace("\0", ",") for part in parts}


@pytest.mark.parametrize(
    ("text", "argument"),
    [
        ("max", "max,enforce=on"),
        ("Nehalem,+aes,-pcid", "Nehalem,aes=on,pcid=off,enforce=on"),
        ("qemu64,+aes,-aes", "qemu64,aes=off,enforce=on"),
    ],
)
def test_a_processor(text: str, argument: str) -> None:
    assert cpu.argument(text) == argument


def test_the_baselines_grow() -> None:
    two, three = (cpu.parse(f"x86-64-v{level}") for level in (2, 3))
    assert two[0] == three[0] == "qemu64"
    assert two[1].items() < three[1].items()
    assert cpu.parse("x86-64-v3,-avx2")[1]["avx2"] is False


def test_every_config_a_file_can_hold_is_built_or_refused() -> None:
    vm = msgspec.convert(msgspec.to_builtins(config(disks=(disk("a"),))), VmConfig)
    assert build(launch(vm)) == build(launch(config(disks=(disk("a"),))))
