"""``scripts/setup`` installs QEMU only where there is none that will do: 7.2 or newer for a host, 9.0 for tests."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SETUP = Path(__file__).parents[2] / "scripts" / "setup"
#: Programs that the script asks, as on Debian 12. An installation is written down and fails, which ends the script; one
#: that needs none goes on to the files of the repository, which are not there.
PROGRAMS = {
    "dpkg-query": 'case " $MISSING " in *" ${@: -1} "*) exit 1 ;; esac; echo installed',
    "qemu-system-x86_64": '[ -n "$QEMU" ] && echo "QEMU emulator version $QEMU (Debian 1:$QEMU)"',
    "apt-cache": 'echo "qemu-system-x86 | 1:7.2+dfsg-7+deb12u15 | http://mirror bookworm/main"',
    "apt-get": """case $1 in
        indextargets) echo 'http://mirror|bookworm-backports' ;;
        install) echo "$*" >>"$INSTALLED" && exit 1 ;;
        esac""",
    "id": "echo 0",
    "getent": '[ "$1" = passwd ]',
}
BACKPORTS = "--target-release bookworm-backports "


def installed(tmp_path: Path, qemu: str, *options: str, missing: str = "") -> str:
    """What the script would have installed, with the release it would have taken it from; empty if nothing."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(SETUP, tmp_path / "scripts")
    for name, body in PROGRAMS.items():
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/bash\n{body}\n")
        program.chmod(0o755)
    log = tmp_path / "installed"
    environment = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "QEMU": qemu, "MISSING": missing, "INSTALLED": str(log)}
    ended = subprocess.run(
        [tmp_path / "scripts" / "setup", *options], env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode != 0
    if not log.exists():
        assert "requirements.lock" in ended.stderr, ended.stderr
        return ""
    words = log.read_text().split("Timeout=300 ")[-1]
    return words.strip()


@pytest.mark.parametrize(
    ("qemu", "options", "taken"),
    [
        ("", ["--host"], "qemu-system-x86 qemu-utils"),
        ("7.1.0", ["--host"], "qemu-system-x86 qemu-utils"),
        ("7.2.9", ["--host"], ""),
        ("7.10.0", ["--host"], ""),
        ("10.0.2", ["--host"], ""),
        ("7.2.9", [], f"{BACKPORTS}qemu-system-x86 qemu-utils"),
        ("8.2.1", [], f"{BACKPORTS}qemu-system-x86 qemu-utils"),
        ("9.0.0", [], ""),
        ("10.0.2", [], ""),
        ("7.2.9", ["--host", "--lab-vms"], f"{BACKPORTS}qemu-system-x86 qemu-utils"),
    ],
)
def test_a_qemu_that_will_do_is_left_alone(tmp_path: Path, qemu: str, options: list[str], taken: str) -> None:
    assert installed(tmp_path, qemu, *options) == taken


def test_qemu_itself_is_not_installed_again_for_its_tools(tmp_path: Path) -> None:
    assert installed(tmp_path, "10.0.2", "--host", missing="qemu-utils") == "qemu-utils"
