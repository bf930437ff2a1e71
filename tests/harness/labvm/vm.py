"""One lab VM: its QEMU, the agent inside, and the cables between VMs.

A cable is a pair of datagram sockets in the file system, one for each end, and is pulled out as QEMU does it (QMP
``set_link``), so that the kernel inside sees its NIC lose the link. Everything lies in one folder that goes with the
VMs; a QEMU dies with the thread that started it, should that never come to end it. A VM may have one more NIC, into a
network of the machine the tests run on.
"""

from __future__ import annotations

import json
import secrets
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.labvm.image import image
from limosa.network.taps import Tap

QEMU = "/usr/bin/qemu-system-x86_64"
MEMORY_MIB = 768
BOOT_WITHIN_S = 300.0
#: A command in a VM that is emulated, on a machine that may do other things too.
DONE_WITHIN_S = 120.0
#: Soft-RoCE is seven times faster with it than with 1500 (measured).
MTU = 9000


class CommandFailed(AssertionError):
    """A command in a VM failed, or was not done in time."""


@dataclass(frozen=True)
class Plug:
    """One end of a cable: the sockets of both ends, by path, and the MAC address of the NIC at this one."""

    ours: Path
    theirs: Path
    mac: str


class LabVm:
    """A VM that runs. Made by :func:`running_vms`."""

    def __init__(self, name: str, folder: Path, plugs: Sequence[Plug], tap: Tap | None) -> None:
        self.name = name
        self._folder = folder
        self._console = folder / "console"
        self._process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", QEMU, *_arguments(folder, plugs, tap)],
            pass_fds=[] if tap is None else [tap.fd],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=(folder / "qemu.log").open("wb"),
        )
        self._qmp: socket.socket | None = None
        self._agent: socket.socket | None = None

    def boot(self) -> None:
        """Return when the agent inside answers."""
        deadline = time.monotonic() + BOOT_WITHIN_S
        self._qmp = self._connect("qmp", deadline)
        self._order("qmp_capabilities")
        self._agent = self._connect("agent", deadline)
        try:
            assert _line(self._agent, deadline - time.monotonic()) == {"ready": True}
        except TimeoutError:
            raise CommandFailed(f"{self.name} has not booted: {self._console.read_text(errors='replace')}") from None

    def run(self, *command: str, input: str = "", within_s: float = DONE_WITHIN_S) -> str:  # noqa: A002
        """What a command writes. A single string is given to a shell. Raises :class:`CommandFailed`."""
        assert self._agent is not None
        words = ["sh", "-ec", *command] if len(command) == 1 else list(command)
        asked = {"command": words, "input": input, "within_s": within_s}
        self._agent.sendall(json.dumps(asked).encode() + b"\n")
        answer = _line(self._agent, within_s + 10)
        if answer["status"] != 0:
            raise CommandFailed(f"{self.name}: {command} failed ({answer['status']}): {answer['out']}{answer['err']}")
        return str(answer["out"])

    def plug(self, nic: str, *, in_: bool) -> None:
        """Pull the cable out of a NIC, or put it in again."""
        self._order("set_link", name=nic, up=in_)

    def end(self) -> None:
        """The VM is gone, as if somebody had cut its power."""
        self._process.kill()
        self._process.wait()
        for connection in (self._qmp, self._agent):
            if connection is not None:
                connection.close()

    def _connect(self, name: str, deadline: float) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        while True:
            try:
                connection.connect(str(self._folder / name))
                return connection
            except OSError:
                assert self._process.poll() is None, (self._folder / "qemu.log").read_text()
                assert time.monotonic() < deadline, f"QEMU of {self.name} does not start"
                time.sleep(0.02)

    def _order(self, command: str, **arguments: Any) -> None:
        assert self._qmp is not None
        self._qmp.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        while "return" not in (answer := _line(self._qmp, 10)):
            assert "error" not in answer, answer


@contextmanager
def running_vms(*names: str, cables: int, tap: Callable[[], Tap] | None = None) -> Iterator[tuple[LabVm, ...]]:
    """VMs that have booted, gone afterwards. Two of them are joined by cables, ``eth0`` to ``eth0`` and so on.

    ``tap`` makes what the last NIC of each is plugged into, if it is to have one more.
    """
    assert len(names) <= 2, "a cable has two ends"
    image()
    with tempfile.TemporaryDirectory(prefix="labvm-") as place, ExitStack() as ended:
        vms = []
        for number, name in enumerate(names):
            folder = Path(place) / name
            folder.mkdir()
            vms.append(_started(folder, [_plug(Path(place), number, cable) for cable in range(cables)], tap))
            ended.callback(vms[-1].end)
        for vm in vms:
            vm.boot()
        yield tuple(vms)


def _started(folder: Path, plugs: Sequence[Plug], make_tap: Callable[[], Tap] | None) -> LabVm:
    tap = make_tap() if make_tap is not None else None
    try:
        return LabVm(folder.name, folder, plugs, tap)
    finally:
        if tap is not None:
            tap.close()  # the VM's QEMU has it now


def _plug(place: Path, end: int, cable: int) -> Plug:
    mac = f"52:54:00:00:{cable:02x}:{end + 1:02x}"
    return Plug(place / f"cable{cable}-{end}", place / f"cable{cable}-{1 - end}", mac)


def _arguments(folder: Path, plugs: Sequence[Plug], tap: Tap | None) -> Iterator[str]:
    boot = image()
    line = "console=ttyS0 quiet mitigations=off nokaslr panic=-1 net.ifnames=0 random.trust_cpu=on no_timer_check"
    yield from ("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-M", "q35", "-name", folder.name)
    yield from ("-accel", "tcg,thread=multi", "-cpu", "max,la57=off", "-m", str(MEMORY_MIB), "-smp", "2")
    yield from ("-kernel", str(boot.kernel), "-initrd", str(boot.initrd), "-append", line)
    yield from ("-serial", f"file:{folder / 'console'}")
    yield from ("-qmp", f"unix:{folder / 'qmp'},server=on,wait=off")
    yield from ("-fsdev", "local,id=root,path=/,security_model=none,readonly=on,multidevs=remap")
    yield from ("-device", "virtio-9p-pci,fsdev=root,mount_tag=root")
    yield from ("-chardev", f"socket,id=agent,path={folder / 'agent'},server=on,wait=off")
    yield from ("-device", "virtio-serial-pci", "-device", "virtserialport,chardev=agent,name=agent")
    yield from ("-device", "virtio-rng-pci")
    for number, plug in enumerate(plugs):
        ends = f"local.type=unix,local.path={plug.ours},remote.type=unix,remote.path={plug.theirs}"
        yield from ("-netdev", f"dgram,id=net{number},{ends}")
        nic = f"virtio-net-pci,id=eth{number},netdev=net{number},mac={plug.mac}"
        yield from ("-device", f"{nic},speed=1000,duplex=full,host_mtu={MTU},romfile=")
    if tap is not None:
        number, mac = len(plugs), secrets.token_bytes(3).hex(":")
        yield from ("-netdev", f"tap,id=net{number},fd={tap.fd}")
        yield from ("-device", f"virtio-net-pci,id=eth{number},netdev=net{number},mac=52:54:00:{mac},romfile=")


def _line(connection: socket.socket, within_s: float) -> Any:
    """The next line of JSON. Raises ``TimeoutError``."""
    deadline = time.monotonic() + within_s
    data = b""
    while not data.endswith(b"\n"):
        connection.settimeout(max(0.1, deadline - time.monotonic()))
        piece = connection.recv(1)
        assert piece, "QEMU has ended"
        data += piece
    return json.loads(data)
