"""What tests draw from: valid values of the model, and ways to spoil data that was valid."""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import strategies as st

from limosa.model.base import NAME_PATTERN, is_clean_path
from limosa.model.storage import Place
from limosa.model.vm import CloudInit, DirectBoot, Disk, HostDevice, Nic, VmConfig
from limosa.settings.host import ConvergencePolicy, HostSettings

LETTERS = "abcdefghijklmnopqrstuvwxyz"
NAMES = st.from_regex(NAME_PATTERN)
ADDRESSES = st.one_of(
    st.from_regex(r"\A[a-z0-9]([a-z0-9.-]{0,20}[a-z0-9])?(:[1-9][0-9]{0,3})?\Z").filter(lambda text: ".." not in text),
    st.ip_addresses(v=4).map(str),
    st.ip_addresses(v=6).map(str),
    st.tuples(st.ip_addresses(v=6), st.integers(1, 65535)).map(lambda pair: f"[{pair[0]}]:{pair[1]}"),
)
_PATH_CHARACTERS = st.characters(exclude_categories=["Cc", "Cs"])
PATHS = (
    st.text(st.one_of(st.sampled_from("/,=-:\"'\\%$ {}"), _PATH_CHARACTERS), min_size=1, max_size=60)
    .map(lambda text: f"/{text}")
    .filter(is_clean_path)
)
#: Text as TOML and JSON can hold it: anything but lone surrogates.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
MACS = st.from_regex(r"\A[0-9a-f][02468ace](:[0-9a-f]{2}){5}\Z")
COMMAND_LINES = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=60)
HOST_DEVICES = st.one_of(
    st.builds(
        HostDevice, kind=st.just("pci"), address=st.from_regex(r"\A[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]\Z")
    ),
    st.builds(HostDevice, kind=st.just("usb"), address=st.from_regex(r"\A[0-9a-f]{4}:[0-9a-f]{4}\Z")),
)
DIRECT_BOOTS = st.builds(DirectBoot, kernel=PATHS, initrd=st.none() | PATHS, command_line=COMMAND_LINES)


@st.composite
def vm_configs(draw: st.DrawFn) -> VmConfig:
    """Any VM that can be started: q35, disks without gaps."""
    paths = draw(st.lists(PATHS, unique=True, max_size=4))
    boot = draw(st.none() | DIRECT_BOOTS)
    return VmConfig(
        name=draw(NAMES),
        uuid=str(draw(st.uuids())),
        memory_mib=draw(st.integers(16, 16 * 1024 * 1024)),
        cpus=draw(st.integers(1, 255)),
        machine=draw(st.from_regex(r"\Apc-q35-[a-z0-9._+-]{0,20}\Z")),
        cpu=draw(st.sampled_from(["x86-64-v2", "x86-64-v3", "max", "Nehalem,+aes,-pcid"])),
        accelerator=draw(st.sampled_from(["auto", "kvm", "tcg"])),
        firmware="bios" if boot else draw(st.sampled_from(["bios", "uefi"])),
        boot=boot,
        disks=tuple(
            Disk(
                name=f"vd{letter}",
                path=path,
                format=draw(st.sampled_from(["qcow2", "raw"])),
                read_only=draw(st.booleans()),
            )
            for letter, path in zip(LETTERS, paths, strict=False)
        ),
        nics=tuple(
            Nic(switch=draw(st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9_.-]{0,14}\Z")), mac=mac)
            for mac in draw(st.lists(MACS, unique=True, max_size=3))
        ),
        cloud_init=draw(st.none() | st.builds(CloudInit, user_data=TEXT, meta_data=TEXT, network_config=TEXT)),
        host_devices=tuple(draw(st.lists(HOST_DEVICES, max_size=3))),
        on_crash=draw(st.sampled_from(["stop", "restart"])),
    )


@st.composite
def host_settings(draw: st.DrawFn) -> HostSettings:
    """Any settings page."""
    first, last = sorted(draw(st.tuples(st.integers(1024, 65535), st.integers(1024, 65535))))
    least, most = sorted(draw(st.tuples(st.floats(1, 2000), st.floats(1, 2000))))
    return HostSettings(
        live_migration=draw(st.booleans()),
        max_outgoing=draw(st.integers(1, 64)),
        migration_networks=tuple(draw(st.lists(st.sampled_from(["10.0.0.0/24", "fd00::/64", "192.0.2.0/30"])))),
        migration_ports=(first, last),
        bandwidth_mbit_per_s=draw(st.integers(0, 1_000_000)),
        convergence=ConvergencePolicy(
            first_downtime_ms=least,
            blackout_budget_ms=most,
            slow_writes=draw(st.booleans()),
            least_write_kib_per_s=draw(st.integers(1, 2**20)),
            patience_s=draw(st.floats(1, 86400)),
        ),
        peers=draw(st.dictionaries(NAMES, ADDRESSES, max_size=3)),
        locations=draw(st.dictionaries(NAMES, st.builds(Place, path=PATHS, shared=st.booleans()), max_size=3)),
    )


#: Plain data of every kind and size, such as nobody asked for.
JUNK: st.SearchStrategy[Any] = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.sampled_from([-1, 0, 2**63, 2**64, 10**30]),
        st.floats(allow_nan=False, allow_infinity=False),
        TEXT,
        st.sampled_from(["", ".", "..", "../../etc/passwd", "a/b", "\0", "x" * 5000, "-rf", "a,b=c", "%s%n"]),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def spoilt(draw: st.DrawFn, value: Any) -> Any:
    """Plain data with one thing wrong, or merely other: a value replaced, removed, or one added."""
    data = msgspec.json.decode(msgspec.json.encode(value))
    table, key = draw(st.sampled_from(list(_places({"": data}))))
    act = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
    if act == "replace":
        table[key] = draw(JUNK)
    elif act == "remove" and key != "":
        del table[key]
    elif isinstance(table[key], dict):
        table[key][draw(TEXT)] = draw(JUNK)
    return data if key != "" else table[""]


def _places(value: Any) -> Any:
    """Every (container, key) below, outermost first."""
    keys = value.keys() if isinstance(value, dict) else range(len(value))
    for key in list(keys):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])
