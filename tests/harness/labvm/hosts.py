"""Limosa on lab VMs: a host daemon in each, used by its own command line, and a guest whose memory can be compared.

The guest is a program of a few bytes that fills its memory with numbers that look like chance and halts. So it runs, to
Limosa and QEMU, and its memory is the same whenever it is looked at.
"""

from __future__ import annotations

import json
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec

import limosa
from harness.labvm.vm import LabVm, running_vms
from limosa.client.route import TlsRoute
from limosa.model.migration import Migration, Outcome, Side
from limosa.network.taps import Tap
from limosa.security import ca
from limosa.settings import toml
from limosa.settings.daemon import DEFAULT_PORT, DaemonSettings
from limosa.settings.host import HostSettings
from limosa.wire.endpoints import Role

#: The command, which is to use the package these tests use.
LIMOSA = str(Path(sys.executable).with_name("limosa"))
#: By which the daemons know each other.
ADDRESSES = {"host1": "10.7.0.1", "host2": "10.7.0.2"}
READY_WITHIN_S = 300
MOVED_WITHIN_S = 240.0
FILLED_WITHIN_S = 120.0
#: Where the guest's program lies, and from where on it fills its memory.
_CODE_AT, _FILL_FROM = 0x100000, 0x200000
_SEED = 0x12345678


class VmHost:
    """A host daemon in a lab VM."""

    def __init__(self, vm: LabVm, folder: Path) -> None:
        self.vm = vm
        self.name = vm.name
        self._folder = folder
        self.state = folder / "state"

    @property
    def route(self) -> TlsRoute:
        """The way to the daemon from outside, where there is one."""
        return TlsRoute(self.name, ADDRESSES[self.name], DEFAULT_PORT, self._folder.parent / "operator", "client")

    def console(self, name: str) -> str:
        """The last words of a guest on its console."""
        return self.vm.run(f"tail -c 64 {self.state}/vms/{name}/console.log")

    def limosa(self, *words: str) -> str:
        """What the command line prints, inside. Raises :class:`harness.labvm.vm.CommandFailed`."""
        source = Path(limosa.__file__).parents[1]
        socket = self._folder / "run" / "api.sock"
        return self.vm.run("env", f"PYTHONPATH={source}", f"LIMOSA_SOCKET={socket}", LIMOSA, *words)

    def ask(self, *words: str) -> list[Any]:
        """The same, as plain data: the objects it prints."""
        return [json.loads(line) for line in self.limosa(*words, "--json").splitlines()]

    def start(self) -> None:
        """Start the daemon; :meth:`wait` says when it answers."""
        source, log = Path(limosa.__file__).parents[1], self._folder / "daemon.log"
        serve = f"{LIMOSA} host serve --settings {self._folder}/host.toml"
        self.vm.run(f"PYTHONPATH={source} setsid {serve} >{log} 2>&1 </dev/null & echo $! >{self._folder}/pid")

    def wait(self) -> None:
        """Return when the daemon answers."""
        socket = self._folder / "run" / "api.sock"
        over = f"[ -S {socket} ] || ! kill -0 $(cat {self._folder}/pid)"
        self.vm.run(
            f"for i in $(seq {READY_WITHIN_S}0); do if {over}; then break; fi; sleep 0.1; done; "
            f"[ -S {socket} ] || {{ cat {self._folder}/daemon.log; false; }}",
            within_s=READY_WITHIN_S + 30,
        )

    def kill(self) -> None:
        """End the daemon as a crash does. Its QEMUs go on."""
        pid = f"$(cat {self._folder}/pid)"
        # What it left of its socket would be taken for the next one's.
        socket = self._folder / "run" / "api.sock"
        self.vm.run(f"kill -9 {pid}; while kill -0 {pid} 2>/dev/null; do sleep 0.1; done; rm -f {socket}")

    def create(self, name: str, memory_mib: int) -> None:
        """A guest, when it has filled its memory."""
        kernel = self._folder.parent / "filler"
        self.limosa(
            "vm",
            "create",
            name,
            "--memory",
            f"{memory_mib}M",
            "--kernel",
            str(kernel),
            "--accelerator",
            "tcg",
            "--start",
        )
        console = self._folder / "state" / "vms" / name / "console.log"
        count = int(FILLED_WITHIN_S * 10)
        self.vm.run(
            f"for i in $(seq {count}); do grep -q FILLED {console} && exit; sleep 0.1; done; cat {console}; false"
        )

    def memory(self, memory_mib: int) -> str:
        """Digest of the memory of the one guest here."""
        head, first_word = filler(1)[:32], struct.pack("<I", _next_word(_SEED))
        return self.vm.run(sys.executable, "-c", _DIGEST, str(memory_mib), head.hex(), first_word.hex()).strip()

    def begin(self, name: str, to: VmHost, *options: str) -> None:
        """Have a move begin; :meth:`migration` tells of it."""
        self.limosa("move", name, "--to", to.name, "--detach", *options)

    def migration(self) -> Migration:
        """The newest move from here."""
        found = [msgspec.convert(one, Migration) for one in self.ask("migration", "list")]
        return next(one for one in found if one.side is Side.SOURCE)

    def until(self, what: Callable[[Migration], bool], within_s: float = MOVED_WITHIN_S) -> Migration:
        """The newest move as soon as that is so."""
        deadline = time.monotonic() + within_s
        while not what(migration := self.migration()):
            assert migration.outcome is Outcome.UNDER_WAY, migration
            assert time.monotonic() < deadline, migration
        return migration

    def moved(self) -> Migration:
        """The newest move when it has arrived."""
        migration = self.until(lambda view: view.outcome is not Outcome.UNDER_WAY)
        assert migration.outcome is Outcome.COMPLETED, migration
        return migration

    def sent(self, *nics: str) -> dict[str, int]:
        """Bytes that each NIC has sent since the VM was started."""
        return {nic: int(self.vm.run(f"cat /sys/class/net/{nic}/statistics/tx_bytes")) for nic in nics}

    def until_sent(self, nic: str, total: int) -> None:
        """Return as soon as a NIC has sent so many bytes since the VM was started: sooner than a move can be asked."""
        self.vm.run(f"while [ $(cat /sys/class/net/{nic}/statistics/tx_bytes) -lt {total} ]; do sleep 0.05; done")


@contextmanager
def running_vm_hosts(
    wire: Callable[[LabVm, int], dict[str, Any]],
    *,
    cables: int = 2,
    fill_mib: int = 48,
    tap: Callable[[], Tap] | None = None,
) -> Iterator[tuple[VmHost, VmHost]]:
    """Two lab VMs, ``host1`` and ``host2``, with daemons.

    ``wire`` sets up the network of a VM, the first or second, and gives its settings. It has to give them the
    addresses by which the daemons know each other. ``tap`` is that of :func:`running_vms`.
    """
    with ExitStack() as held:
        folder = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="labhosts-")))
        vms = held.enter_context(running_vms(*ADDRESSES, cables=cables, tap=tap))
        folder.chmod(0o755)
        (folder / "filler").write_bytes(filler(fill_mib))
        ca.create_authority(folder / "ca")
        ca.issue_person(folder / "ca", "operator", Role.OPERATOR, folder / "operator")
        hosts = []
        for number, vm in enumerate(vms, 1):
            hosts.append(_furnish(folder, vm, wire(vm, number)))
        for host in hosts:
            host.start()
        for host in hosts:
            host.wait()
        yield hosts[0], hosts[1]


def _furnish(folder: Path, vm: LabVm, settings: dict[str, Any]) -> VmHost:
    own, address = folder / vm.name, ADDRESSES[vm.name]
    for path in (own, own / "state", own / "run"):
        path.mkdir(mode=0o711)
    ca.issue_host(folder / "ca", vm.name, [address], own / "pki")
    daemon = DaemonSettings(
        name=vm.name,
        listen=(address,),
        certificates=str(own / "pki"),
        state_dir=str(own / "state"),
        run_dir=str(own / "run"),
    )
    toml.write(own / "host.toml", daemon)
    page = {"peers": ADDRESSES, "reserved_memory_mib": 0, **settings}
    toml.write(own / "state" / "settings.toml", msgspec.convert(page, HostSettings))
    return VmHost(vm, own)


def filler(fill_mib: int) -> bytes:
    """The guest: a multiboot kernel (flags bit 16: its addresses are in the header)."""
    count = fill_mib * 1024 * 1024 // 4
    code = bytes.fromhex(
        f"bf {struct.pack('<I', _FILL_FROM).hex()}"  # edi = where to fill
        f"b9 {struct.pack('<I', count).hex()}"  # ecx = how many words
        f"b8 {struct.pack('<I', _SEED).hex()}"  # eax = seed
        "89c2 c1e20d 31d0  89c2 c1ea11 31d0  89c2 c1e205 31d0"  # eax = the next one (xorshift)
        "ab e2e8"  # store it, repeat
        "66baf803"  # dx = the serial port
        + "".join(f"b0{letter:02x}ee" for letter in b"FILLED\n")  # say so
        + "fa f4 ebfd"  # halt for ever
    )
    magic, flags = 0x1BADB002, 1 << 16
    end = _CODE_AT + 32 + len(code)
    addresses = (_CODE_AT, _CODE_AT, end, end, _CODE_AT + 32)
    return struct.pack("<8I", magic, flags, -(magic + flags) & 0xFFFFFFFF, *addresses) + code


def _next_word(word: int) -> int:
    """What the guest's xorshift makes of a word."""
    word ^= word << 13 & 0xFFFFFFFF
    word ^= word >> 17
    return word ^ (word << 5 & 0xFFFFFFFF)


#: The guest's memory is the stretch of QEMU's own, aligned to 2 MiB, that has the guest's program where that was loaded
#: and is filled from where the filling begins. What lies beside it, and how the kernel splits it up, is chance.
_DIGEST = """
import hashlib, pathlib, sys
wanted = int(sys.argv[1]) << 20
head, first_word = bytes.fromhex(sys.argv[2]), bytes.fromhex(sys.argv[3])
(qemu,) = [p for p in pathlib.Path("/proc").glob("[0-9]*") if (p / "cmdline").read_bytes().startswith(b"/usr/bin/qemu")]
runs = []
for line in (qemu / "maps").read_text().splitlines():
    start, end = (int(one, 16) for one in line.split()[0].split("-"))
    if line.split()[1] != "rw-p":
        continue
    if runs and runs[-1][1] == start:
        runs[-1][1] = end
    else:
        runs.append([start, end])
with open(qemu / "mem", "rb", buffering=0) as memory:
    def at(address, count):
        memory.seek(address)
        return memory.read(count)
    big = 0x200000
    places = [place for start, end in runs for place in range(-(-start // big) * big, end - wanted + 1, big)]
    (place,) = [p for p in places if at(p + 0x100000, len(head)) == head and at(p + 0x200000, 4) == first_word]
    data = at(place, wanted)
assert len(data) == wanted
print(hashlib.sha256(data).hexdigest())
"""
