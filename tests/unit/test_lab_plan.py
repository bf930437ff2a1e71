"""What a lab consists of, and how its hosts are found by name."""

from __future__ import annotations

import argparse
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from limosa.cli.connection import route_of
from limosa.cli.main import main
from limosa.client.route import UnixRoute
from limosa.errors import InvalidInput
from limosa.lab import hosts, lifecycle, namespaces
from limosa.lab.plan import Lab
from limosa.lab.wiring import bucket


def test_everything_of_a_lab_follows_from_its_plan() -> None:
    lab = Lab(name="t1", hosts=2, nics=2)
    assert lab.speeds == (1000, 1000)
    assert Lab(name="t1", hosts=2, nics=2, speed_mbit_per_s=(500, 100)).speeds == (500, 100)
    assert lab.namespaces == ("t1-wire", "t1-client", "t1-host1", "t1-host2")
    assert lab.migration_networks == ("10.78.0.0/24", "10.79.0.0/24")
    assert lab.addresses("host2") == ("10.77.0.12", "10.78.0.12", "10.79.0.12")


def test_the_longest_names_fit_into_sockets_and_interfaces() -> None:
    lab = Lab(name="x" * 10, hosts=50, nics=4)
    assert len(str(lab.host_run("host50"))) <= 56  # the limit of DaemonSettings.run_dir
    assert max(len(f"{bridge}-host50") for bridge in (*lab.nic_names, "lan")) < 16


@pytest.mark.parametrize(
    ("name", "count", "nics", "speed"),
    [
        ("", 1, 1, 1),
        ("Lab", 1, 1, 1),
        ("a/b", 1, 1, 1),
        ("../x", 1, 1, 1),
        ("a-b", 1, 1, 1),
        ("x" * 11, 1, 1, 1),
        ("x\n", 1, 1, 1),
        ("x", 0, 1, 1),
        ("x", 51, 1, 1),
        ("x", 1, 5, 1),
        ("x", 1, 1, -1),
        ("x", 1, 1, 25_001),
        ("x", 1, 2, [500]),
        ("x", 1, 2, [500, -1]),
    ],
)
def test_a_lab_that_cannot_be_is_refused(name: str, count: int, nics: int, speed: int | list[int]) -> None:
    with pytest.raises(InvalidInput):
        lifecycle.plan(name, count, nics, speed)


@pytest.mark.parametrize("words", [["exec", "host1"], ["exec", "host1", "--"], ["up", "--speed", "fast"]])
def test_what_a_person_left_out_or_misspelt_is_invalid_input(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["lab", *words]) == 2
    assert "_speeds" not in capsys.readouterr().err


def test_a_labs_daemon_that_is_down_is_started_by_the_lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "RUN", tmp_path)
    (tmp_path / "t1" / "host1").mkdir(parents=True)
    route = route_of(argparse.Namespace(host="t1-host1"))
    assert "'limosa lab restart host1 --name t1'" in route.explain(FileNotFoundError(errno.ENOENT, "")).todo


@pytest.mark.parametrize("name", ["", "..", "x/../y", "UPPER", "x" * 11])
def test_no_name_leads_out_of_the_labs_folder(name: str) -> None:
    with pytest.raises(InvalidInput):
        lifecycle.load(name)


def test_a_bucket_holds_a_packet_as_tcp_hands_it_over_and_two_milliseconds() -> None:
    assert bucket(10) > 65536
    assert bucket(10_000) == 2_500_000


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(hosts, "RUN", tmp_path)
    return tmp_path


def test_a_host_is_found_in_the_only_lab_in_the_default_lab_and_by_its_full_name(run: Path) -> None:
    (run / "t1" / "host1").mkdir(parents=True)
    assert hosts.socket_of("host1") == run / "t1" / "host1" / "api.sock"
    (run / "t2" / "host1").mkdir(parents=True)
    with pytest.raises(InvalidInput, match="several labs"):
        hosts.socket_of("host1")
    assert hosts.socket_of("t2-host1") == run / "t2" / "host1" / "api.sock"
    (run / "limosa" / "host1").mkdir(parents=True)
    assert hosts.socket_of("host1") == run / "limosa" / "host1" / "api.sock"


def test_inside_a_host_of_a_lab_names_are_those_of_that_lab(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for lab in ("t1", "t2"):
        (run / lab / "host1").mkdir(parents=True)
    monkeypatch.setenv("LIMOSA_SOCKET", str(run / "t2" / "host2" / "api.sock"))
    assert route_of(argparse.Namespace(host="host1")) == UnixRoute(
        str(run / "t2" / "host1" / "api.sock"), start="limosa lab restart host1 --name t2"
    )
    monkeypatch.setenv("LIMOSA_SOCKET", "/run/limosa/api.sock")
    with pytest.raises(InvalidInput, match="several labs"):
        route_of(argparse.Namespace(host="host1"))


@pytest.mark.parametrize(
    ("words", "where"),
    [
        (["host1", "--", "ip", "-br"], ("limosa", "host1")),
        (["--name", "t1", "host1", "--", "ip", "-br"], ("t1", "host1")),
        (["host1", "--name", "t1", "--", "ip", "-br"], ("t1", "host1")),
        (["t1-host1", "ip", "-br"], ("t1", "host1")),
        (["t1-client", "--", "ip", "-br"], ("t1", "client")),
    ],
)
def test_where_a_command_is_run(
    words: list[str], where: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    places: list[tuple[str, str]] = []

    def place(lab: str, name: str) -> tuple[str, dict[str, str]]:
        places.append((lab, name))
        return "", {}

    def run_it(_: str, command: list[str], __: object) -> None:
        raise OSError(errno.ENOENT, f"not {command}")

    monkeypatch.setattr(lifecycle, "load", lambda name: name)
    monkeypatch.setattr(lifecycle, "place", place)
    monkeypatch.setattr(namespaces, "enter", lambda _: None)
    monkeypatch.setattr(os, "execvpe", run_it)
    assert main(["lab", "exec", *words]) == 4
    assert "cannot run 'ip': not ['ip', '-br']" in capsys.readouterr().err
    assert places == [where]


def test_a_host_that_is_written_down_goes_before_a_labs(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run / "t1" / "host1").mkdir(parents=True)
    folder = tmp_path / "limosa"
    folder.mkdir()
    (folder / "client.key").touch()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert route_of(argparse.Namespace(host="host1")).authority == "localhost"
    (folder / "hosts.toml").write_text('[hosts]\nhost1 = "10.9.9.9"\n')
    assert route_of(argparse.Namespace(host="host1")).authority == "host1:7411"


@pytest.mark.parametrize("name", ["host1", "t1-host1", "host0", "web1", "10.0.0.1", "../host1", "a/b-host1", "host1\n"])
def test_what_no_lab_has_is_not_found(run: Path, name: str) -> None:
    assert hosts.socket_of(name) is None


def test_finding_a_host_costs_a_command_next_to_nothing() -> None:
    program = "import limosa.lab.hosts, sys; print(sorted({'pyroute2', 'cryptography', 'rich'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "[]"
