"""The stage: a lab of two hosts and a Linux VM that serves HTTP, all taken away again whatever happens.

Whatever a person could type is run as the ``limosa`` command and shown before its output. One demo runs at a time: a
lock file says so, and a lock file nobody holds says that an earlier demo was killed and what it left may be taken away.
A lab of that name that is not a demo's is never touched.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.text import Text
from websockets.exceptions import ConnectionClosed

from limosa.cli.output import clean
from limosa.client.console import Session, open_console
from limosa.client.host import HostClient
from limosa.client.route import UnixRoute
from limosa.lab import lifecycle
from limosa.lab.image import GuestImage, command_line, guest_image
from limosa.lab.plan import FIRST_GUEST_ADDRESS, SWITCH, Lab
from limosa.model.units import format_seconds
from limosa.model.vm import DirectBoot
from limosa.settings import toml
from limosa.wire.api import HostStatus, NewNic, NewVm
from limosa.wire.endpoints import HOST

LAB = Lab(name="demo", hosts=2, nics=1, speed_mbit_per_s=1000)
VM = "web1"
ADDRESS = FIRST_GUEST_ADDRESS
MEMORY_MIB = 384
FILLED_MIB = 192
RANDOM_MIB = 64
REWRITTEN_MIB_PER_S = 16
SUBJECT = f"{VM}, a Linux guest of {MEMORY_MIB} MiB; TLS over {LAB.speeds[0]} Mbit/s"

LOCK = Path("/run/limosa-demo.lock")
UP_WITHIN_S = 180.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class DemoFailed(Exception):
    """What failed, in a sentence. Everything is taken away nevertheless."""


@contextmanager
def lab(screen: Console) -> Iterator[None]:
    """A lab that exists while the block runs. Raises :class:`DemoFailed`, ``LimosaError`` and ``OSError``."""
    with _only_one() as first:
        if not first:
            screen.print("an earlier demo was killed; what it left is taken away", style="dim")
            lifecycle.down(LAB.name)
        try:
            command = ["lab", "up", "--name", LAB.name, "--hosts", str(LAB.hosts)]
            limosa(screen, *command, "--speed", str(LAB.speeds[0]))
            yield
        finally:
            with _undisturbed():
                limosa(screen, "lab", "down", "--name", LAB.name)
                LOCK.unlink()


def boot(screen: Console, folder: Path) -> HostStatus:
    """Have the VM boot on the first host and wait until it serves; ``folder`` gets the file that describes it.

    Returns what the first host says of itself. Raises as :func:`lab` does.
    """
    with screen.status("building the guest's image (only the first time)"):
        image = guest_image()
    file = folder / f"{VM}.toml"
    toml.write(file, _description(image))
    limosa(screen, *on("host1"), "vm", "create", "--file", os.path.relpath(file), "--start")
    asyncio.run(_watch_it_boot(screen))
    screen.print(
        f"{FILLED_MIB} MiB of its {MEMORY_MIB} MiB are filled; it goes on rewriting {REWRITTEN_MIB_PER_S} MiB/s"
    )
    return HostClient(str(LAB.socket("host1"))).call(HOST)


def _description(image: GuestImage) -> NewVm:
    line = command_line(
        name=VM,
        address=f"{ADDRESS}/24",
        fill_mib=FILLED_MIB,
        random_mib=RANDOM_MIB,
        rewrite_mib_per_s=REWRITTEN_MIB_PER_S,
    )
    boot = DirectBoot(kernel=str(image.kernel), initrd=str(image.initrd), command_line=line)
    return NewVm(name=VM, memory_mib=MEMORY_MIB, boot=boot, nics=(NewNic(switch=SWITCH),))


def on(host: str) -> tuple[str, str]:
    """The option that names a host of the lab."""
    return "--host", LAB.namespace(host)


def limosa(screen: Console, *arguments: str) -> None:
    """Show a command and run it in this terminal. Raises :class:`DemoFailed`; the command has said why by then."""
    screen.print(Text.assemble(("\n$ ", "dim"), ("limosa " + " ".join(arguments), "bold")), soft_wrap=True)
    screen.file.flush()
    done = subprocess.run([Path(sys.executable).with_name("limosa"), *arguments], check=False)
    if done.returncode:
        raise DemoFailed(f"'limosa {' '.join(arguments)}' failed with exit code {done.returncode}, see above")


async def _watch_it_boot(screen: Console) -> None:
    began = time.monotonic()
    async with open_console(UnixRoute(str(LAB.socket("host1"))), VM) as session:
        console = _SerialConsole(session)
        with screen.status("Linux boots"):
            await console.wait_for("LIMOSA READY")
            screen.print(f"Linux is up after {format_seconds(time.monotonic() - began)}, HTTP at http://{ADDRESS}/")
        with screen.status("it fills its memory"):
            await console.wait_for("LIMOSA FILLED")


class _SerialConsole:
    """What the guest says on its serial console."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._heard = ""

    async def wait_for(self, word: str, within_s: float = UP_WITHIN_S) -> None:
        """Return when the guest has said ``word``. Raises :class:`DemoFailed`."""
        try:
            async with asyncio.timeout(within_s):
                while word not in self._heard:
                    said = await self._session.recv()
                    self._heard += said if isinstance(said, str) else said.decode(errors="replace")
        except (ConnectionClosed, TimeoutError) as fault:
            late = isinstance(fault, TimeoutError)
            why = f"it took more than {within_s:.0f} s" if late else "its console was closed"
            heard = clean(" ".join(self._heard.split())[-200:])
            raise DemoFailed(f"the guest did not come to say '{word}': {why}; its last words are '{heard}'") from fault


@contextmanager
def _only_one() -> Iterator[bool]:
    """Hold the lock file; whether it is new. Who holds it unlinks it when nothing is left to be taken away."""
    new = not LOCK.exists()
    if new and LAB.state.exists():
        todo = f"'limosa lab down --name {LAB.name}' takes it away"
        raise DemoFailed(f"there is a lab '{LAB.name}' that is not the demo's; {todo}")
    with LOCK.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DemoFailed("another demo runs on this machine") from None
        yield new


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Ignore the signals that end a program; commands started meanwhile do so too."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
