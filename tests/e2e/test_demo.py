"""The demo as a person runs it: once, with both files; and interrupted in the middle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from demo import stage
from limosa.lab import hosts, namespaces

pytestmark = [
    pytest.mark.lab,
    pytest.mark.qemu,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]

ROOT = Path(__file__).parents[2]
DEMO = [sys.executable, "-m", "demo"]
FIELDS = {
    "vm": str,
    "source": str,
    "destination": str,
    "transport": str,
    "total_s": float,
    "phases": dict,
    "blackout_ms": float,
    "client_gap_ms": float,
    "client_errors": int,
    "bytes": int,
}


def assert_nothing_is_left() -> None:
    left = [path for path in (stage.LOCK, hosts.STATE / stage.LAB.name, hosts.RUN / stage.LAB.name) if path.exists()]
    assert left == []
    assert [name for name in stage.LAB.namespaces if namespaces.inode(name) is not None] == []


def test_a_vm_moves_there_and_back_and_no_request_fails(tmp_path: Path) -> None:
    figures, picture = tmp_path / "demo.json", tmp_path / "demo.svg"
    command = [*DEMO, "--json", str(figures), "--picture", str(picture)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(figures.read_text())
    assert found.keys() == {"qemu", "moves"}
    assert int(found["qemu"].split(".")[0]) >= 9
    assert [(move["source"], move["destination"]) for move in found["moves"]] == [
        ("host1", "host2"),
        ("host2", "host1"),
    ]
    for move in found["moves"]:
        assert {name: type(value) for name, value in move.items()} == FIELDS
        assert list(move["phases"]) == ["build-up", "copy", "synchronise", "switchover", "tear-down"]
        # Phases follow each other without a gap, so they make up the whole move.
        assert sum(move["phases"].values()) == pytest.approx(move["total_s"], abs=0.01)
        assert 0 < move["blackout_ms"] < 1000 * move["total_s"]
        assert move["bytes"] > stage.FILLED_MIB * 1024 * 1024
        assert move["client_errors"] == 0
    assert ElementTree.parse(picture).getroot().tag.endswith("svg")
    for words in ("total time", "blackout, by QEMU's events", "failed requests", str(picture.name)):
        assert words in done.stdout
    assert_nothing_is_left()


def test_ctrl_c_in_the_middle_leaves_nothing() -> None:
    # Whoever runs the tests in the background has it ignored, and children inherit that.
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        started = subprocess.Popen(DEMO, cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    with started as demo:
        assert demo.stdout is not None
        said = ""
        while "web1: running on host1" not in said:
            line = demo.stdout.readline()
            assert line, said
            said += line
        # A terminal sends it to all that run in it.
        os.killpg(demo.pid, signal.SIGINT)
        demo.stdout.read()
        assert demo.wait(60) == 130
    assert_nothing_is_left()
