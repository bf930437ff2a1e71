"""The shipped unit gives the daemon what it needs of root's rights."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

UNIT = Path(__file__).parents[2] / "packaging" / "limosa-host.service"
#: Somebody who is not root, and has nothing.
NOBODY = 65534

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root has rights that can be taken away")


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
import os, sys; from limosa.storage import openers
print(openers.everywhere().get(openers.key(os.stat(sys.argv[1])), "nobody"))
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


def test_an_image_of_qemus_user_can_be_had_alone(image: Path) -> None:
    assert as_the_unit(ALONE, str(image)).returncode == 0
    assert "somebody has it open" in as_the_unit(ALONE, str(image), without="CAP_LEASE").stderr


def test_who_has_a_file_open_is_seen(image: Path, other: int) -> None:
    assert as_the_unit(SEEN, str(image)).stdout == f"process {other} has it open\n"
    assert as_the_unit(SEEN, str(image), without="CAP_SYS_PTRACE").stdout == "nobody\n"


def test_the_log_of_a_qemu_that_runs_already_is_found(image: Path, other: int) -> None:
    assert as_the_unit(LOG, str(other)).stdout == f"{image.with_name('qemu.log')}\n"


@pytest.mark.parametrize(("own", "childrens"), [("-900", "0"), ("300", "300")])
def test_of_what_short_memory_ends_only_the_daemon_is_spared(tmp_path: Path, own: str, childrens: str) -> None:
    (tmp_path / "own").write_text(f"{own}\n")
    done = as_the_unit(SPARED, str(tmp_path / "log"), str(tmp_path / "own"), str(NOBODY))
    assert done.stdout.split() == [childrens] * 2, done.stderr
