"""Whatever is read, the outcome is a valid value or an error that says what is wrong; what is written reads back."""

from __future__ import annotations

import asyncio
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import jsonschema
import msgspec
import pytest
from hypothesis import assume
from hypothesis import strategies as st

from harness import values
from harness.fuzz import fuzz
from limosa.cli import program, vm_options
from limosa.client.host import HostClient, error_of, fill_path
from limosa.errors import InvalidInput, LimosaError, StateError, every_error, from_fault
from limosa.host import disk_plans
from limosa.host.goodput import Goodputs
from limosa.host.neighbours import Met, met
from limosa.host.openapi import document
from limosa.host.page import Page
from limosa.host.process_records import ProcessRecord
from limosa.host.views import Views
from limosa.lab.daemons import DaemonRecord
from limosa.lab.plan import Lab
from limosa.migration.journal import Header, Journal
from limosa.migration.journal import Record as JournalRecord
from limosa.migration.ownership import SourceStep
from limosa.model import reading
from limosa.model.base import Model, is_clean_path, is_name
from limosa.model.migration import Migration, Side
from limosa.model.network import Carried
from limosa.model.units import parse_size
from limosa.model.vm import VmConfig
from limosa.qemu.arguments import Launch, build
from limosa.qemu.capabilities import QemuCapabilities
from limosa.settings import toml
from limosa.settings.address import parse_address, split_address
from limosa.settings.daemon import DaemonSettings
from limosa.settings.host import HostSettings
from limosa.storage.leases import Lease
from limosa.storage.marks import Mark
from limosa.transport import endpoints
from limosa.wire import peer as say
from limosa.wire.api import NewVm
from limosa.wire.encoding import encode
from limosa.wire.endpoints import CREATE_VM, ENDPOINTS
from limosa.wire.parsing import parse

FILES: tuple[type[Model], ...] = (DaemonSettings, HostSettings, VmConfig)
SOURCE_DECODER = msgspec.json.Decoder(say.FromSource)
DESTINATION_DECODER = msgspec.json.Decoder(say.FromDestination)
T = TypeVar("T", bound=Exception)
V = TypeVar("V")
DEEP = b"[" * 100_000


def attempt(error: type[T], read: Callable[[], V]) -> tuple[V | None, T | None]:
    """What was read, or how it was refused. Nothing but ``error`` may be raised."""
    try:
        return read(), None
    except error as refusal:
        return None, refusal


# Sizes, names, addresses ----------------------------------------------------------------------------------------------


@fuzz(st.text() | st.from_regex(r"\A[0-9]{1,40}(\.[0-9]{1,40})?[KMGTkmgt]?(iB|B)?\Z"))
def test_a_size_is_a_number_of_bytes_or_refused(text: str) -> None:
    size, _ = attempt(ValueError, lambda: parse_size(text))
    assert size is None or 1 <= size <= 2**60


@fuzz(st.integers(1, 2**20), st.sampled_from("KMGT"), st.sampled_from(["", "B", "iB", "ib"]))
def test_a_size_means_powers_of_1024(count: int, unit: str, suffix: str) -> None:
    assert parse_size(f" {count}{unit}{suffix} ") == count * 1024 ** ("KMGT".index(unit) + 1)


@fuzz(st.text() | values.NAMES)
def test_a_name_has_no_way_into_anything_else(text: str) -> None:
    if is_name(text):
        assert not set(text) & set("/,=:\\\0\n\x1b \"'$`;|&<>*?[]{}()")
        assert text not in (".", "..")
        assert not text.startswith("-")


@fuzz(st.text() | values.PATHS)
def test_a_clean_path_stays_below_its_folders(text: str) -> None:
    if is_clean_path(text):
        assert Path(f"/root{text}").resolve(strict=False).is_relative_to("/root") or Path(text).is_symlink()
        assert str(Path(text)) == text


@fuzz(st.text() | st.text(st.sampled_from("abc019.:[]-_%/@ "), max_size=30) | values.ADDRESSES)
def test_an_address_is_a_host_and_a_port_or_refused(text: str) -> None:
    address, refusal = attempt(InvalidInput, lambda: split_address(text))
    if address is None:
        assert refusal is not None
        assert refusal.why
        return
    name, port = address
    assert re.fullmatch(r"[A-Za-z0-9._:-]+", name)
    assert port is None or 0 < port < 65536
    again = f"[{name}]" if ":" in name else name
    assert split_address(again if port is None else f"{again}:{port}") == (name, port)


@fuzz(values.ADDRESSES)
def test_the_addresses_people_write_are_read(text: str) -> None:
    name, port = parse_address(text)
    assert name in text
    assert port is None or text.endswith(f":{port}")


# TOML files -----------------------------------------------------------------------------------------------------------


@fuzz(values.vm_configs() | values.host_settings())
def test_a_file_that_was_written_reads_back_the_same(value: Model) -> None:
    assert toml.decode(toml.encode(value), type(value), where="it") == value


@pytest.mark.parametrize("settings", [DaemonSettings(name="host1"), DaemonSettings(name="a", listen=("[::]:1", "b:2"))])
def test_the_daemons_own_file_reads_back_the_same(settings: DaemonSettings) -> None:
    assert toml.decode(toml.encode(settings), DaemonSettings, where="it") == settings


@fuzz(
    st.text() | st.from_regex(r"\A([a-z_.\[\]\"]{1,12} ?= ?[\[{\"'0-9a-z+.\n:-]{0,20}\n){0,4}\Z"),
    st.sampled_from(FILES),
)
def test_any_text_is_a_file_or_refused_by_name(text: str, cls: type[Model]) -> None:
    _, refusal = attempt(InvalidInput, lambda: toml.decode(text, cls, where="the file"))
    assert refusal is None or (refusal.what.startswith("the file") and refusal.why)


@fuzz(st.binary() | st.text().map(str.encode), st.sampled_from(FILES))
def test_any_bytes_are_a_file_or_refused_by_name(data: bytes, cls: type[Model]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "some.toml")
        path.write_bytes(data)
        _, refusal = attempt(StateError, lambda: toml.read(path, cls, error=StateError))
        assert refusal is None or str(path) in refusal.what
        assert path.read_bytes() == data


@fuzz(st.one_of(values.spoilt(DaemonSettings(name="a")), *map(values.spoilt, [HostSettings()])), st.sampled_from(FILES))
def test_any_data_is_valid_or_refused(data: Any, cls: type[Model]) -> None:
    _, refusal = attempt(InvalidInput, lambda: toml.convert(data, cls, where="it"))
    assert refusal is None or refusal.why


@fuzz(values.vm_configs().flatmap(values.spoilt))
def test_a_spoilt_vm_is_valid_or_refused(data: Any) -> None:
    config, _ = attempt(StateError, lambda: toml.convert(data, VmConfig, where="it", error=StateError))
    if config is not None:
        assert toml.decode(toml.encode(config), VmConfig, where="it") == config


@pytest.mark.parametrize(
    "text",
    ["a = " + "9" * 5000, "a = " + "[" * 5000, "name = 'a'\nname = 'b'", "name = '\\ud800'", "a = 9999-99-99", "\x00"],
)
def test_what_toml_readers_stumble_over_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput):
        toml.decode(text, DaemonSettings, where="it")


@pytest.mark.parametrize(
    "text",
    [
        'listen = ["a b"]',
        'listen = ["a:0"]',
        'listen = ["a:99999"]',
        'listen = ["[a]:1"]',
        "run_dir = '/%s'" % ("x" * 60),
    ],
)
def test_addresses_and_paths_of_the_daemon_are_checked_when_it_is_read(text: str) -> None:
    with pytest.raises(InvalidInput):
        toml.decode("name = 'a'\n" + text, DaemonSettings, where="it")


# The settings page ----------------------------------------------------------------------------------------------------

KEYS = st.sampled_from(
    [
        *HostSettings.__struct_fields__,
        "convergence.post_copy",
        "convergence.first_downtime_ms",
        "convergence",
        "peers.host2",
        "peers.host2.example.org",
        "locations.",
        ".",
        "",
        "convergence.post_copy.x",
    ]
)
SETTING_VALUES = st.one_of(
    values.JUNK, st.booleans(), st.integers(0, 70000), st.sampled_from(["host2:7411", "a b", "tcp", [1024, 1025]])
)


@fuzz(st.lists(st.dictionaries(KEYS | values.TEXT, SETTING_VALUES, max_size=3), max_size=4))
def test_a_change_of_settings_is_whole_or_nothing(changes: list[dict[str, Any]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "settings.toml")
        page = Page(path)
        heard: list[HostSettings] = []
        page.on_change(lambda: heard.append(page.now))
        for change in changes:
            before, file, told = page.now, path.read_bytes() if path.exists() else None, len(heard)
            after, _ = attempt(InvalidInput, partial(asyncio.run, page.change(change)))
            if after is None:
                assert page.now is before
                assert (path.read_bytes() if path.exists() else None) == file
                assert len(heard) == told
            else:
                assert page.now is after is heard[-1]
                assert Page(path).now == after
        assert [name.name for name in Path(folder).iterdir()] in ([], ["settings.toml"])


def test_one_peer_with_dots_in_its_name_can_be_set_and_reset(tmp_path: Path) -> None:
    page = Page(tmp_path / "settings.toml")
    assert asyncio.run(page.change({"peers.a.example.org": "10.0.0.1"})).peers == {"a.example.org": "10.0.0.1"}
    assert asyncio.run(page.change({"peers.a.example.org": None})).peers == {}


# Journals -------------------------------------------------------------------------------------------------------------


def journal_bytes() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        vm = VmConfig(
            name="a", uuid="7b0b7d3c-57b8-4f5c-9d5e-2d2f3f1e2a10", memory_mib=64, cpus=1, machine="q", cpu="c"
        )
        header = Header(
            migration="abcdefghijkl",
            side=Side.SOURCE,
            vm=vm,
            accelerator="tcg",
            source="a",
            destination="b",
            address="b",
            accepted_at=1.0,
            boot="b",
        )
        journal = Journal.begin(Path(folder), header)
        journal.record(SourceStep.PREPARING, 2.0)
        journal.record(SourceStep.MIGRATING, 3.0)
        journal.close()
        return journal.path.read_bytes()


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """Data with a piece replaced, cut out or put in."""
    begin, end = sorted(draw(st.tuples(st.integers(0, len(data)), st.integers(0, len(data)))))
    end = min(end, begin + 8)
    return data[:begin] + draw(st.binary(max_size=8)) + data[end:]


@fuzz(st.binary() | damaged(journal_bytes()))
def test_a_journal_is_read_or_refused_and_left(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "abcdefghijkl.source.jsonl")
        path.write_bytes(data)
        journal, refusal = attempt(StateError, lambda: Journal.load(path))
        if journal is None:
            assert str(path) in str(refusal)
            assert path.read_bytes() == data
        else:
            # At most a last line without its end was taken away: it never took effect.
            assert data.startswith(path.read_bytes())
            assert b"\n" not in data[len(path.read_bytes()) :]
            assert len(journal.records) == path.read_bytes().count(b"\n") - 1


# Other state files ----------------------------------------------------------------------------------------------------

STATE_FILES: tuple[Any, ...] = (
    Header,
    JournalRecord,
    Met,
    Migration,
    disk_plans.Record,
    ProcessRecord,
    tuple[Carried, ...],
    endpoints.Record,
    QemuCapabilities,
    Lease,
    Mark,
    Lab,
    DaemonRecord,
    dict,
    object,
)
STUMBLED_OVER = [DEEP, b'{"x":' + DEEP, b'[{"here":"\xff"}]', b'{"\xff":1}', b'{"vm":"\xff"}', b'{"x":' + b"9" * 9999]


@fuzz(st.binary() | values.JUNK.map(json.dumps).map(str.encode).flatmap(damaged), st.sampled_from(STATE_FILES))
def test_any_bytes_are_a_state_file_or_refused(data: bytes, kind: Any) -> None:
    attempt(msgspec.DecodeError, lambda: reading.decode(data, kind))


@pytest.mark.parametrize("kind", STATE_FILES, ids=str)
@pytest.mark.parametrize("data", STUMBLED_OVER, ids=range(len(STUMBLED_OVER)))
def test_a_state_file_that_json_readers_stumble_over_is_refused(data: bytes, kind: Any) -> None:
    attempt(msgspec.DecodeError, lambda: reading.decode(data, kind))


@pytest.mark.parametrize("data", STUMBLED_OVER, ids=range(len(STUMBLED_OVER)))
def test_files_that_only_remember_may_hold_anything(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "abcdefghijkl.view.json"
    path.write_bytes(data)
    views = Views("here", tmp_path)
    views.recall("abcdefghijkl")
    assert views.list() == []
    assert Goodputs(path).known == ()
    assert met(path) is None
    asyncio.run(endpoints.Endpoints(cast(Any, None), path).clean())
    assert path.read_bytes() == data


# Messages -------------------------------------------------------------------------------------------------------------

PREPARES = st.builds(
    say.Prepare,
    migration=st.from_regex(r"\A[a-z0-9]{12}\Z"),
    vm=values.vm_configs(),
    accelerator=st.sampled_from(["kvm", "tcg"]),
    transport=values.TEXT,
    credentials=st.none()
    | st.builds(say.StreamCredentials, authority=values.TEXT, certificate=values.TEXT, key=values.TEXT),
    post_copy=st.booleans(),
    running=st.booleans(),
    files=st.dictionaries(values.NAMES, values.TEXT, max_size=2),
)
MESSAGES = st.one_of(
    PREPARES,
    st.builds(say.Hello, host=values.NAMES, oldest=st.integers(-(2**60), 2**60), newest=st.integers(-(2**60), 2**60)),
    st.builds(say.Inspect, vm=values.vm_configs(), accelerator=st.just("tcg")),
    st.builds(say.Attach, migration=st.from_regex(r"\A[a-z0-9]{12}\Z")),
    st.builds(say.Abort, reason=values.TEXT),
    st.just(say.TakeOver()),
)


@fuzz(MESSAGES)
def test_a_message_reads_back_the_same(message: say.FromSource) -> None:
    assert parse(encode(message), SOURCE_DECODER, "it") == message


@fuzz(st.binary() | MESSAGES.flatmap(values.spoilt).map(msgspec.json.encode), st.booleans())
def test_any_bytes_are_a_message_or_refused(data: bytes, from_source: bool) -> None:
    decoder: msgspec.json.Decoder[Any] = SOURCE_DECODER if from_source else DESTINATION_DECODER
    _, refusal = attempt(InvalidInput, lambda: parse(data, decoder, "the message"))
    assert refusal is None or (refusal.what == "the message is not valid" and refusal.why)


@pytest.mark.parametrize(
    "data", [DEEP, b'{"x":' + DEEP, b'{"type":"abort","reason":"\xff"}', b'{"type":' + b"9" * 9999]
)
def test_what_json_readers_stumble_over_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidInput):
        parse(data, SOURCE_DECODER, "it")


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "..", ".", "a/b", "", "a\0b", "x" * 64])
def test_a_file_that_comes_along_has_a_name_and_no_path(name: str) -> None:
    message = {"type": "prepare", "files": {name: ""}}
    with pytest.raises(InvalidInput, match=r"files|required"):
        parse(msgspec.json.encode(message), SOURCE_DECODER, "it")


@fuzz(st.integers(100, 599), st.binary())
def test_a_refusal_of_any_form_is_an_error(status: int, data: bytes) -> None:
    assert isinstance(error_of(status, data), LimosaError)


@pytest.mark.parametrize("error", every_error())
def test_an_error_crosses_a_wire(error: type[LimosaError]) -> None:
    sent = error.__new__(error)
    LimosaError.__init__(sent, "what", why="why", todo="todo", vm="vm", host="host")
    received = from_fault(sent.fault())
    assert type(received) is error
    assert received.fault() == sent.fault()


def test_words_that_are_no_utf_8_are_refused_before_anything_is_sent() -> None:
    """Python keeps such bytes of a command line as lone surrogates."""
    new = parsed("vm", "--memory=64M", "--disk=/images/\udcff.raw")
    with pytest.raises(InvalidInput, match="UTF-8"):
        HostClient("/nowhere").call(CREATE_VM, new)


@fuzz(st.text())
def test_a_parameter_stays_in_its_place(value: str) -> None:
    path, _ = attempt(InvalidInput, lambda: fill_path("/v1/vms/{vm}/start", {"vm": value}))
    if path is None:
        return
    assert re.fullmatch(r"/v1/vms/[A-Za-z0-9_.~%-]+/start", path)
    assert "/../" not in path


# The command line -----------------------------------------------------------------------------------------------------


def parsed(*words: str) -> NewVm:
    return vm_options.new_vm(program.parse(["vm", "create", *words]))


SPECS = st.text() | st.text(st.sampled_from("/a.,=:sizefrmatnd-only0912GMK "), max_size=40)


@fuzz(SPECS, st.sampled_from(["--disk", "--switch", "--device", "--memory", "--kernel", "--cpu", "--machine"]))
def test_any_option_of_a_new_vm_is_understood_or_refused(text: str, option: str) -> None:
    assume(text != "--")  # which is refused before it is an option
    attempt(LimosaError, lambda: parsed("vm", "--memory=64M", f"{option}={text}"))


@fuzz(values.PATHS, st.integers(1, 10**6), st.sampled_from(["qcow2", "raw"]), st.booleans())
def test_a_disk_means_what_it_says(path: str, size_mib: int, image_format: str, read_only: bool) -> None:
    assume("," not in path)
    extra = ",read-only" if read_only else ""
    disk = parsed("vm", "--memory=64M", f"--disk={path},size={size_mib}M,format={image_format}{extra}").disks[0]
    assert (disk.path, disk.size_mib, disk.format, disk.read_only) == (path, size_mib, image_format, read_only)


# QEMU's command line --------------------------------------------------------------------------------------------------

FLAGS = {"-no-user-config", "-nodefaults", "-S"}
WORD = r"[A-Za-z0-9_.+-]+"
#: What may follow an option whose value has no free text.
FIXED = {
    "-sandbox": r"[a-z]+(,[a-z]+=deny)+",
    "-msg": r"timestamp=on",
    "-machine": rf"{WORD}(,[a-z0-9-]+=[a-z0-9-]+)+",
    "-uuid": r"[0-9a-f-]{36}",
    "-cpu": rf"{WORD}(,{WORD}=(on|off))*",
    "-smp": r"cpus=\d+,sockets=1,cores=\d+,threads=1",
    "-m": r"\d+M",
    "-overcommit": r"mem-lock=off",
    "-boot": r"menu=off,strict=on",
    "-display": r"none",
    "-mon": r"chardev=qmp,mode=control",
    "-incoming": r"defer",
}
JSON_VALUED = {"-object", "-blockdev", "-device", "-netdev"}


@fuzz(values.vm_configs(), values.PATHS, st.booleans())
def test_nothing_of_a_vm_becomes_an_option_of_qemus(config: VmConfig, file: str, incoming: bool) -> None:
    own = Path(file)
    launch = Launch(
        config=config,
        accelerator="tcg",
        incoming=incoming,
        tap_fds=tuple(range(20, 20 + len(config.nics))),
        qmp_fd=3,
        console_fd=4,
        console_log=own,
        vnc_socket=own,
        firmware_code=own,
        firmware_vars=own,
        seed=own if config.cloud_init else None,
    )
    files = {file, *(disk.path for disk in config.disks)}
    escaped = file.replace(",", ",,")
    free = {
        "-name": {f"guest={config.name},debug-threads=on"},
        "-vnc": {f"unix:{escaped}"},
        "-chardev": {
            "socket,id=qmp,fd=3,server=on,wait=off",
            f"socket,id=console,fd=4,server=on,wait=off,logfile={escaped},logappend=on",
        },
    }
    if config.boot is not None:
        free |= {"-kernel": {config.boot.kernel}, "-append": {config.boot.command_line}}
        free |= {"-initrd": {config.boot.initrd}} if config.boot.initrd else {}
    for option, value in pairs(build(launch)):
        if option in JSON_VALUED:
            check_json(json.loads(value), files)
        elif option in FIXED:
            assert re.fullmatch(FIXED[option], value), (option, value)
        else:
            assert value in free[option], (option, value)


def pairs(arguments: list[str]) -> Iterator[tuple[str, str]]:
    """Options with their values, as QEMU takes them one after the other."""
    rest = iter(arguments)
    for option in rest:
        if option not in FLAGS:
            yield option, next(rest)


def check_json(value: Any, files: set[str]) -> None:
    for key, inner in value.items():
        if isinstance(inner, dict):
            check_json(inner, files)
        elif key == "filename":
            assert inner in files
        elif isinstance(inner, str):
            assert re.fullmatch(r"[A-Za-z0-9_.:-]*", inner)


# The OpenAPI document -------------------------------------------------------------------------------------------------

DOCUMENT = document()


def test_the_document_is_openapi_with_valid_schemas() -> None:
    assert DOCUMENT["openapi"] == "3.1.0"
    assert DOCUMENT["info"].keys() >= {"title", "version"}
    for schema in DOCUMENT["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    for reference in references(DOCUMENT):
        assert reference.removeprefix("#/components/schemas/") in DOCUMENT["components"]["schemas"]


def test_every_operation_says_what_it_takes_and_gives() -> None:
    operations = {(method, path): it for path, item in DOCUMENT["paths"].items() for method, it in item.items()}
    assert len(operations) == len(ENDPOINTS)
    for (method, path), operation in operations.items():
        assert method in ("get", "post", "patch", "delete")
        named = {parameter["name"] for parameter in operation["parameters"]}
        assert named == set(re.findall(r"{(\w+)}", path))
        assert operation["responses"].keys() == {"200", "default"}
        assert operation["summary"]


def test_patterns_are_those_of_json_schema() -> None:
    found = [schema["pattern"] for schema in dictionaries(DOCUMENT) if "pattern" in schema]
    assert found
    for pattern in found:
        assert pattern.startswith("^")
        assert pattern.endswith("$")
        assert r"\A" not in pattern
        assert r"\Z" not in pattern


@fuzz(values.vm_configs() | values.host_settings())
def test_valid_values_are_valid_by_the_document_too(value: Model) -> None:
    name = type(value).__name__
    schema = {"$ref": f"#/components/schemas/{name}", "components": DOCUMENT["components"]}
    jsonschema.validate(msgspec.json.decode(msgspec.json.encode(value)), schema, cls=jsonschema.Draft202012Validator)


def dictionaries(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from dictionaries(inner)


def references(value: Any) -> Iterator[str]:
    return (inner["$ref"] for inner in dictionaries(value) if isinstance(inner.get("$ref"), str))
