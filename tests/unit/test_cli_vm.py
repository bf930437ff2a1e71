"""VMs and settings from the command line: what is sent for what was typed."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from standin import Answers, StandIn

from limosa.cli import settings_page, vm_options
from limosa.cli.main import main
from limosa.cli.program import build_parser
from limosa.errors import Conflict, InvalidInput, NotFound
from limosa.host.page import Page
from limosa.model.storage import Place
from limosa.model.vm import CloudInit, Disk, Vm, VmConfig, VmState
from limosa.settings import toml
from limosa.settings.host import ConvergencePolicy, HostSettings
from limosa.wire import endpoints
from limosa.wire.api import Empty, HostStatus, NewVm, SettingsChange, SettingsPage, VmList

CONFIG = VmConfig(
    name="web1",
    uuid="00000000-0000-0000-0000-000000000000",
    memory_mib=64,
    cpus=1,
    machine="pc-q35-10.0",
    cpu="x86-64-v2",
    disks=(Disk(name="vda", path="/srv/web1.qcow2", format="qcow2"),),
)


def web1(state: VmState = VmState.RUNNING) -> Vm:
    return Vm(config=CONFIG, state=state, host="host1", reason="a\x1bb")


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    def missing(_: Empty, vm: str) -> Any:
        if vm == "gone":
            raise NotFound("there is no VM 'gone'")
        return web1()

    monkeypatch.setenv("LIMOSA_SOCKET", str(tmp_path / "s"))
    monkeypatch.chdir(tmp_path)
    answers: Answers = {
        endpoints.LIST_VMS: lambda _: VmList(vms=(web1(),)),
        endpoints.CREATE_VM: lambda _: web1(VmState.STOPPED),
        endpoints.DELETE_VM: lambda _, vm: Empty(),
        endpoints.SETTINGS: lambda _: SettingsPage(settings=HostSettings(peers={"host2": "10.0.0.2"})),
    }
    shown = (endpoints.SHOW_VM, endpoints.START_VM, endpoints.STOP_VM, endpoints.SHUTDOWN_VM, endpoints.PAUSE_VM)
    with StandIn(
        tmp_path / "s", answers | dict.fromkeys([*shown, endpoints.RESUME_VM, endpoints.RESET_VM], missing)
    ) as host:
        yield host


def parse(*words: str) -> NewVm:
    return vm_options.new_vm(build_parser(["vm"]).parse_args(["vm", "create", *words]))


def test_create_with_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user-data").write_text("#cloud-config\n")
    new = parse(
        *("web1", "--memory", "2G", "--cpus", "2", "--disk", "web1.qcow2", "--disk", "/srv/b,size=10G,format=raw"),
        *(
            "--switch",
            "lan",
            "--switch",
            "dmz,mac=52:54:00:AA:bb:cc",
            "--cloud-init",
            "user-data",
            "--on-crash",
            "restart",
        ),
        *("--device", "usb:0951:1666", "--disk", "ro.img,read-only", "--cpu", "x86-64-v3"),
    )
    assert msgspec.to_builtins(new, str_keys=True) == msgspec.to_builtins(
        msgspec.convert(
            {
                "name": "web1",
                "memory_mib": 2048,
                "cpus": 2,
                "cpu": "x86-64-v3",
                "disks": [
                    {"path": f"{tmp_path}/web1.qcow2"},
                    {"path": "/srv/b", "format": "raw", "size_mib": 10240},
                    {"path": f"{tmp_path}/ro.img", "read_only": True},
                ],
                "nics": [{"switch": "lan"}, {"switch": "dmz", "mac": "52:54:00:aa:bb:cc"}],
                "cloud_init": {"user_data": "#cloud-config\n"},
                "host_devices": [{"kind": "usb", "address": "0951:1666"}],
                "on_crash": "restart",
            },
            NewVm,
        )
    )


def test_create_with_a_kernel() -> None:
    new = parse("tiny", "--memory", "256", "--kernel", "/boot/vmlinuz", "--append", "console=ttyS0 a=b,c")
    assert new.memory_mib == 256
    assert new.boot is not None
    assert (new.boot.kernel, new.boot.initrd, new.boot.command_line) == ("/boot/vmlinuz", None, "console=ttyS0 a=b,c")


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["web1"],
        ["--memory", "1G"],
        ["../web1", "--memory", "1G"],
        ["web1", "--memory", "lots"],
        ["web1", "--memory", "1.0001M"],
        ["web1", "--memory", "1M"],
        ["web1", "--memory", "1G", "--disk", "a,colour=red"],
        ["web1", "--memory", "1G", "--disk", ""],
        ["web1", "--memory", "1G", "--disk", "a,name=sda"],
        ["web1", "--memory", "1G", "--switch", "a,b=c"],
        ["web1", "--memory", "1G", "--switch", "lan,mac=01:00:00:00:00:00"],
        ["web1", "--memory", "1G", "--device", "pci"],
        ["web1", "--memory", "1G", "--initrd", "a"],
        ["web1", "--memory", "1G", "--network-config", "a"],
        ["web1", "--memory", "1G", "--cloud-init", "/nowhere"],
        ["web1", "--memory", "1G", "--cpus", "0"],
        ["--file", "/nowhere"],
        ["--file", "a.toml", "--memory", "1G"],
    ],
)
def test_bad_descriptions_of_a_vm(words: list[str]) -> None:
    with pytest.raises(InvalidInput):
        parse(*words)


@given(text=st.text(max_size=40))
def test_any_text_as_an_option_is_a_vm_or_invalid_input(text: str) -> None:
    for option in ("--memory", "--disk", "--switch", "--device", "--kernel"):
        with contextlib.suppress(InvalidInput):
            parse("web1", "--memory=1G", f"{option}={text}")


def test_a_file_as_shown_can_be_created_from(host: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["vm", "show", "web1", "--toml"]) == 0
    (tmp_path / "web1.toml").write_text(capsys.readouterr().out)
    assert main(["vm", "create", "--file", "web1.toml"]) == 0
    sent = msgspec.json.decode(host.seen[-1][2], type=NewVm)
    assert (sent.uuid, sent.machine, sent.disks[0].path) == (CONFIG.uuid, CONFIG.machine, CONFIG.disks[0].path)


def test_paths_in_a_file_are_relative_to_it(tmp_path: Path) -> None:
    (tmp_path / "web1.toml").write_text(
        'name = "web1"\nmemory_mib = 64\n[boot]\nkernel = "vmlinuz"\n[[disks]]\npath = "../web1.qcow2"\n'
    )
    new = parse("--file", str(tmp_path / "web1.toml"))
    assert new.boot is not None
    assert (new.boot.kernel, new.disks[0].path) == (f"{tmp_path}/vmlinuz", f"{tmp_path.parent}/web1.qcow2")


@pytest.mark.parametrize("text", ["name = ", "a = 1", "\x00", 'name = "web1"\nmemory_mib = 64\ndisks = 1', "[" * 5000])
def test_bad_files(tmp_path: Path, text: str) -> None:
    (tmp_path / "f.toml").write_text(text)
    with pytest.raises(InvalidInput, match=r"f\.toml"):
        parse("--file", str(tmp_path / "f.toml"))


def test_create_and_start(host: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["vm", "create", "web1", "--memory", "64M", "--start"]) == 0
    assert [endpoint for endpoint, _, _ in host.seen] == [endpoints.CREATE_VM, endpoints.START_VM]
    assert capsys.readouterr().out == "web1: running on host1\n"


def test_what_is_created_but_cannot_be_started_is_said_to_be_there(
    host: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_memory(_: object, vm: str) -> Vm:
        raise Conflict(f"VM '{vm}' needs more memory")

    host.answers[endpoints.START_VM] = no_memory
    assert main(["vm", "create", "web1", "--memory", "64M", "--start"]) == 5
    assert capsys.readouterr().err.startswith("web1: created, but not started")


def test_a_shutdown_is_only_asked_for(host: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["vm", "shutdown", "web1", "gone"]) == 4
    assert capsys.readouterr().out == "web1: power button pressed; the guest is asked to shut down\n"
    assert main(["vm", "shutdown", "web1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "running"
    assert {endpoint for endpoint, _, _ in host.seen} == {endpoints.SHUTDOWN_VM}


def test_a_reset(host: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["vm", "reset", "web1"]) == 0
    assert capsys.readouterr().out == "web1: reset, running on host1\n"
    assert main(["vm", "reset", "web1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "running"
    assert {endpoint for endpoint, _, _ in host.seen} == {endpoints.RESET_VM}


@pytest.mark.parametrize("verb", ["start", "stop", "pause", "resume"])
def test_an_action_on_several(host: StandIn, verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["vm", verb, "web1", "gone", "web1"]) == 4
    assert capsys.readouterr().out.count("web1: running") == 2
    assert {endpoint.path.rsplit("/")[-1] for endpoint, _, _ in host.seen} == {verb}


def test_list_show_delete(host: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["vm", "list"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == [
        "web1",
        "running",
        "64",
        "MiB",
        "1",
        "a\N{REPLACEMENT CHARACTER}b",
    ]
    assert main(["vm", "list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["config"]["name"] == "web1"
    assert main(["vm", "show", "web1"]) == 0
    assert "/srv/web1.qcow2 (qcow2)" in capsys.readouterr().out
    assert main(["vm", "delete", "web1"]) == 0


def test_console_of_a_vm_that_does_not_run(host: StandIn) -> None:
    host.answers[endpoints.SHOW_VM] = lambda _, vm: web1(VmState.STOPPED)
    assert main(["vm", "console", "web1"]) == 5


def test_host_status(host: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    status = HostStatus(
        name="host1",
        limosa="0.1.0",
        protocol=(1, 1),
        qemu="10.0.2",
        accelerator="tcg",
        cpus=2,
        memory_total_mib=100,
        memory_available_mib=50,
        switches=("lan",),
        addresses=(),
        vms=1,
        outgoing=0,
        incoming=0,
        time=0,
    )
    host.answers[endpoints.HOST] = lambda _: status
    assert main(["host", "status"]) == 0
    shown = capsys.readouterr().out
    assert "10.0.2, tcg" in shown
    assert "certificate:     none\n" in shown
    host.answers[endpoints.HOST] = lambda _: msgspec.structs.replace(status, certificate_until=1_800_000_000.0)
    assert main(["host", "status"]) == 0
    assert "certificate:     until 2027-01-15\n" in capsys.readouterr().out
    assert main(["host", "status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["certificate_until"] == 1_800_000_000.0


def test_the_settings_page_shows_every_option_with_its_help(host: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["host", "settings"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for key in settings_page.options():
        index = next(number for number, line in enumerate(lines) if line.startswith((f"{key} =", f"{key}.")))
        assert len(lines[index + 1].strip()) > 10
    assert "peers.host2 = 10.0.0.2" in lines


def test_settings_are_sent_with_their_types(host: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    host.answers[endpoints.CHANGE_SETTINGS] = lambda _: SettingsPage(settings=HostSettings(max_outgoing=4))
    words = ["max_outgoing", "=", "4", "convergence.post_copy=on", "migration_networks=10.0.0.0/24, 10.1.0.0/24"]
    words += ["migration_ports", "50000,50010", "peers.host2=a:1", "transport=tcp", "convergence.patience_s=1.5"]
    assert main(["host", "settings", *words, "--reset", "encrypt"]) == 0
    assert msgspec.json.decode(host.seen[-1][2], type=SettingsChange).values == {
        "max_outgoing": 4,
        "convergence.post_copy": True,
        "migration_networks": ["10.0.0.0/24", "10.1.0.0/24"],
        "migration_ports": [50000, 50010],
        "peers.host2": "a:1",
        "transport": "tcp",
        "convergence.patience_s": 1.5,
        "encrypt": None,
    }
    assert "max_outgoing = 4" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        ["nope=1"],
        ["max_outgoing"],
        ["max_outgoing=x"],
        ["encrypt=maybe"],
        ["peers=x"],
        ["a.b=1"],
        ["migration_ports=1"],
        ["migration_ports=1,2,3"],
        ["locations.fast=/srv/fast,shard"],
        ["--reset", "nope"],
        ["--reset", "convergence.nope"],
    ],
)
def test_bad_settings_never_reach_the_host(host: StandIn, words: list[str]) -> None:
    assert main(["host", "settings", *words]) == 2
    assert host.seen == []


TABLES = ("network_bandwidth_mbit_per_s", "peers", "locations")
WITH_TABLES = HostSettings(
    convergence=ConvergencePolicy(patience_s=1234.5678),
    network_bandwidth_mbit_per_s={"10.0.0.0/24": 500, "fd00::/64": 7},
    peers={"host2": "10.0.0.2", "host3.example.org": "[fd00::3]:7411"},
    locations={
        "fast": Place(path="/srv/fast"),
        "nas.1": Place(path="/mnt/nas", shared=True),
        "odd": Place(path="/srv/a, b,shared"),
        "odd-nas": Place(path="/mnt/a, b", shared=True),
        "bulk": Place(lvm="vg0"),
        "thin": Place(lvm="vg0-2/thin"),
    },
)


@pytest.mark.parametrize("settings", [HostSettings(), WITH_TABLES], ids=["the defaults", "with tables"])
def test_settings_shown_are_settings_read(
    settings: HostSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings_page.say_page(settings)
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]
    shown = {key: value for key, _, value in (line.partition(" =") for line in lines)}
    assert {key for key in settings_page.options() if key not in shown} == set(shown_by_entry(settings))
    assert all(settings_page.value_text(settings, key) == value.strip() for key, value in shown.items())
    typed = [(key, value.strip()) for key, value in shown.items() if key not in TABLES]
    page = Page(tmp_path / "settings.toml")
    assert asyncio.run(page.change(settings_page.parse_changes(typed))) == settings


def shown_by_entry(settings: HostSettings) -> list[str]:
    return [table for table in TABLES if getattr(settings, table)]


def test_certificates_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = ["--folder", str(tmp_path / "ca")]
    assert main(["ca", "init", *folder]) == 0
    assert main(["ca", "init", *folder]) == 5
    assert main(["ca", "issue", "host1", "--address", "10.0.0.1", "--out", str(tmp_path / "h"), *folder]) == 0
    assert main(["ca", "issue", "alice", "--role", "viewer", "--out", str(tmp_path / "a"), *folder]) == 0
    assert main(["ca", "issue", "bob", "--role", "viewer", "--address", "10.0.0.1", *folder]) == 2
    assert main(["ca", "issue", "bob", "--role", "viewer", "--days", "0", *folder]) == 2
    capsys.readouterr()
    assert main(["ca", "list", "--json", *folder]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(one["name"], one["role"]) for one in found] == [("host1", "host"), ("alice", "viewer")]
    assert {path.name for path in (tmp_path / "h").iterdir()} == {"ca.pem", "host.pem", "host.key"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    assert "migration" in capsys.readouterr().out


@given(text=st.text(max_size=20) | st.sampled_from(["1e999", "nan", "9" * 5000]))
def test_any_text_as_a_setting_is_a_value_or_invalid_input(text: str) -> None:
    for key in settings_page.options():
        with contextlib.suppress(InvalidInput):
            msgspec.json.encode(settings_page.parse_changes([(key, text)]))


def test_a_file_without_what_is_for_operators_says_so(host: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    told = msgspec.structs.replace(CONFIG, cloud_init=CloudInit(user_data="#cloud-config"))
    whole = Vm(config=told, state=VmState.STOPPED, host="host1")
    host.answers[endpoints.SHOW_VM] = lambda _, vm: whole
    assert main(["vm", "show", "web1", "--toml"]) == 0
    shown = capsys.readouterr()
    assert (toml.decode(shown.out, VmConfig, where="it"), shown.err) == (told, "")
    host.answers[endpoints.SHOW_VM] = lambda _, vm: whole.for_viewers()
    assert main(["vm", "show", "web1", "--toml"]) == 0
    assert "'cloud_init' is empty here" in capsys.readouterr().err
    assert main(["vm", "show", "web1"]) == 0
    assert "only operators may see its contents" in capsys.readouterr().out
