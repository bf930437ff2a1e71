"""The one process of a lab VM: does what it is told over a virtio serial port, one command after another.

A line of JSON comes in, one goes out: ``{"command": [...], "input": "..."}`` and ``{"status": 0, "out": "...",
"err": "..."}``. It uses the machine's own Python and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

PORT = "agent"
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LC_ALL": "C.UTF-8",
    "PYTHONDONTWRITEBYTECODE": "1",
}


def main() -> None:
    """Serve until the VM ends, which it does with this process."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    with open(device(), "r+b", buffering=0) as port:
        say(port, {"ready": True})
        for line in lines(port):
            say(port, do(json.loads(line)))


def device() -> str:
    """The serial port's device; its name is a file in sysfs, since nobody makes links to it here."""
    for path in Path("/sys/class/virtio-ports").iterdir():
        with contextlib.suppress(OSError):
            if (path / "name").read_text().strip() == PORT:
                return f"/dev/{path.name}"
    sys.exit("there is no serial port for the agent")


def lines(port: BinaryIO) -> Iterator[bytes]:
    """What comes, line by line."""
    rest = b""
    while True:
        data = port.read(65536)
        if not data:
            time.sleep(0.1)  # nobody has connected to the other end yet
            continue
        *whole, rest = (rest + data).split(b"\n")
        yield from whole


def say(port: BinaryIO, answer: dict[str, Any]) -> None:
    """Send one answer, however long."""
    data = json.dumps(answer).encode() + b"\n"
    while data:
        data = data[port.write(data) :]


def do(asked: dict[str, Any]) -> dict[str, Any]:
    """Run one command to its end."""
    try:
        done = subprocess.run(
            asked["command"],
            input=asked["input"].encode(),
            capture_output=True,
            env=ENVIRONMENT,
            start_new_session=True,
            timeout=asked["within_s"],
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"status": -1, "out": "", "err": f"not done within {asked['within_s']} s"}
    except OSError as error:
        return {"status": -1, "out": "", "err": str(error)}
    out, err = (data.decode(errors="replace") for data in (done.stdout, done.stderr))
    return {"status": done.returncode, "out": out, "err": err}


if __name__ == "__main__":
    main()
