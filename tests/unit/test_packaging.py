"""The shipped unit is one that systemd takes, starts the command as it is, and gives it what it needs of root's."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from limosa.cli.program import parse
from limosa.settings import toml
from limosa.settings.daemon import DEFAULT_FILE, DaemonSettings

PACKAGING = Path(__file__).parents[2] / "packaging"
UNIT = PACKAGING / "limosa-host.service"
#: Somebody who is not root, and has nothing.
NOBODY = 65534

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root has rights that can be taken away")


def as_the_unit(code: str, *arguments: str, without: str = "") -> subprocess.CompletedProcess[str]:
    """Run some Python with the capabilities of the unit, less one."""
    listed = " ".join(re.findall(r"^CapabilityBoundingSet=(.*)$", UNIT.read_text(), re.MULTILINE))
    names = [name.removeprefix("CAP_").lower() for name in listed.split() if name != without]
    rights = ",".join(["-all", *(f"+{name}" for name in names)])
    limited = ["setpriv", "--bounding-set", rights, "--no-new-privs", sys.executable, "-c", code, *arguments]
    return subprocess.run(limited, capture_output=True, text=True, check=False, timeout=60)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(4096))
    os.chown(path, NOBODY, NOBODY)
    return path


@pytest.fixture
def other(image: Path) -> Iterator[int]:
    """A process of somebody else's that has the image open, and writes its words to a log beside it."""
    with (
        image.open("rb") as held,
        image.with_name("qemu.log").open("wb") as log,
        subprocess.Popen(["sleep", "60"], user=NOBODY, stderr=log, pass_fds=(held.fileno(),)) as process,
    ):
        held.close()
        yield process.pid
        process.kill()


ALONE = """
import sys; from pathlib import Path; from limosa.storage import openers
with openers.alone(Path(sys.argv[1])):
    pass
"""
SEEN = """
import sys; from pathlib import Path; from limosa.storage import openers
print(openers.use_of(Path(sys.argv[1]), openers.everywhere()) or "nobody")
"""
SPARED = """
import pwd, socket, sys; from pathlib import Path
from limosa.qemu import process; from limosa.transport.relay import client
Path("/proc/self/oom_score_adj").write_text("300")  # to have less takes a right that a container may lack
process._OWN_SCORE = Path(sys.argv[2])
user = pwd.getpwuid(int(sys.argv[3])).pw_name
ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
children = [
    process._start(["sleep", "60"], (), Path(sys.argv[1]), user, False), client._spawn(theirs.fileno(), user)
]
for child in children:
    print(Path(f"/proc/{child.pid}/oom_score_adj").read_text().strip())
    child.kill()
    child.wait()
"""
LOG = """
import sys; from limosa.qemu import process
print(process._log_of(int(sys.argv[1])))
"""


def directives(name: str) -> list[str]:
    """All values the unit has for a directive."""
    return re.findall(rf"^{name}=(.*)$", UNIT.read_text(), re.MULTILINE)


def complaints(folder: Path) -> str:
    """What systemd says against the unit in a folder, and the drop-ins beside it."""
    command = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(folder / UNIT.name)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return done.stderr + (f"exit code {done.returncode}" if done.returncode else "")


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder with the unit and its drop-in as they are installed, but for where the program is on this machine."""
    program = str(Path(sys.executable).with_name("limosa"))
    text = UNIT.read_text()
    assert text.count("ExecStart=/usr/local/bin/limosa ") == 1
    (tmp_path / UNIT.name).write_text(text.replace("/usr/local/bin/limosa", program))
    drop_ins = tmp_path / f"{UNIT.name}.d"
    drop_ins.mkdir()
    shutil.copy(PACKAGING / "limosa-host-lvm.conf", drop_ins / "lvm.conf")
    return tmp_path


def test_systemd_takes_the_unit_and_the_drop_in(installed: Path) -> None:
    assert complaints(installed) == ""


@pytest.mark.parametrize("name", [UNIT.name, f"{UNIT.name}.d/lvm.conf"])
def test_systemd_would_say_what_it_does_not_know(installed: Path, name: str) -> None:
    with (installed / name).open("a") as unit:
        unit.write("[Service]\nRestrictEverything=yes\n")
    assert "RestrictEverything" in complaints(installed)


def test_it_starts_the_command_with_what_that_takes() -> None:
    (start,) = directives("ExecStart")
    program, *words = start.split()
    assert Path(program).name == "limosa"
    parsed = parse(words)
    assert str(parsed.settings) == DEFAULT_FILE
    assert parsed.run.__module__ == "limosa.cli.host"


def test_it_makes_the_folders_that_the_daemon_uses() -> None:
    shipped = toml.read(PACKAGING / "host.toml.example", DaemonSettings)
    for settings in (shipped, DaemonSettings(name="host1")):
        assert [settings.state_dir] == [f"/var/lib/{name}" for name in directives("StateDirectory")]
        assert [settings.run_dir] == [f"/run/{name}" for name in directives("RuntimeDirectory")]
    assert directives("RuntimeDirectoryPreserve") == ["yes"], "VMs that outlive the daemon have their sockets there"


def test_it_comes_after_shares_and_does_without_those_that_cannot_be_mounted() -> None:
    assert {"network-online.target", "remote-fs.target"} <= set(" ".join(directives("After")).split())
    assert [directives(name) for name in ("Requires", "Requisite", "BindsTo", "RequiresMountsFor")] == [[]] * 4


@needs_root
def test_an_image_of_qemus_user_can_be_had_alone(image: Path) -> None:
    assert as_the_unit(ALONE, str(image)).returncode == 0
    assert "somebody has it open" in as_the_unit(ALONE, str(image), without="CAP_LEASE").stderr


@needs_root
def test_who_has_a_file_open_is_seen(image: Path, other: int) -> None:
    assert as_the_unit(SEEN, str(image)).stdout == f"process {other} has it open\n"
    assert as_the_unit(SEEN, str(image), without="CAP_SYS_PTRACE").stdout == "nobody\n"


@needs_root
def test_the_log_of_a_qemu_that_runs_already_is_found(image: Path, other: int) -> None:
    assert as_the_unit(LOG, str(other)).stdout == f"{image.with_name('qemu.log')}\n"


@needs_root
@pytest.mark.parametrize(("own", "childrens"), [("-900", "0"), ("300", "300")])
def test_of_what_short_memory_ends_only_the_daemon_is_spared(tmp_path: Path, own: str, childrens: str) -> None:
    (tmp_path / "own").write_text(f"{own}\n")
    done = as_the_unit(SPARED, str(tmp_path / "log"), str(tmp_path / "own"), str(NOBODY))
    assert done.stdout.split() == [childrens] * 2, done.stderr
