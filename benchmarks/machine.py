"""What was measured on, and with which versions."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path

from benchmarks import libvirt
from benchmarks.systems.bare import PROGRAM
from limosa import __version__


def machine() -> dict[str, str | int]:
    """The machine."""
    memory = re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return {
        "processor": model[1] if model else platform.machine(),
        "cores": os.cpu_count() or 0,
        "memory_gib": round(int(memory[1]) / 1024**2) if memory else 0,
        "guests": "emulated (TCG)",
        "hosts": "network namespaces of this machine",
    }


def versions(*packages: str) -> dict[str, str]:
    """The versions of everything that takes part, and of further Debian packages."""
    qemu = subprocess.run([PROGRAM, "--version"], capture_output=True, text=True, check=True).stdout
    return {
        "limosa": f"{__version__} ({_commit()})",
        "qemu": qemu.splitlines()[0].removeprefix("QEMU emulator version "),
        "libvirt": libvirt.version(),
        "kernel": platform.release(),
        "system": platform.freedesktop_os_release()["PRETTY_NAME"],
        "python": platform.python_version(),
        **{package: libvirt.version(package) for package in packages},
    }


def _commit() -> str:
    folder = Path(__file__).parent
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=folder, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "no repository"
