"""What a QEMU program on this host can do, asked of the program itself and remembered.

Three short-lived QEMUs are asked: one without a machine for machine types and emulated processors, one that runs a
tiny guest under KVM (a ``/dev/kvm`` that opens is no proof that guests run), and, if that guest ran,
one for the processors KVM offers. That takes a few tenths of a second, so the answer is kept in a file and used again
while program, kernel session, KVM device and user are the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec

from limosa.errors import QemuError, StateError
from limosa.model import reading
from limosa.model.base import Model
from limosa.model.vm import Accelerator
from limosa.qemu import cpu as cpu_models
from limosa.qemu import process
from limosa.qemu.monitor import Monitor
from limosa.settings import toml

_ANSWER_WITHIN_S = 20.0
_GUEST_WITHIN_S = 2.0
#: A guest that has to work for its living: from real mode it goes straight to long mode with paging, counts down from
#: 20 000 000 there and writes 0x10 to port 0xf4. That takes KVM milliseconds where it works, and for ever where a
#: ``/dev/kvm`` only pretends: four instructions in real mode, and even a BIOS, run there too.
_GUEST = bytes.fromhex(
    "fa"  # cli
    "31c0 8ed8"  # ds = 0
    "66c706 0010 03200000"  # page map 0x1000 -> directory pointers 0x2000
    "66c706 0020 03300000"  # -> directory 0x3000
    "66c706 0030 83000000"  # -> one page of 2 MiB, where it stands
    "66b8 00100000 0f22d8"  # cr3 = 0x1000
    "0f20e0 0c20 0f22e0"  # cr4: physical address extension
    "66b9 800000c0 0f32 80cc01 0f30"  # EFER: long mode
    "2e660f0116 6900"  # load the table of segments below
    "0f20c0 660d 01000080 0f22c0"  # cr0: protection, paging
    "66ea 6f000f00 0800"  # jump to 64-bit code
    "0000000000000000 00000000009b2000"  # segments: none, 64-bit code
    "0f00 59000f00"  # where they are
    "b9 002d3101"  # ecx = 20 000 000
    "ffc9 75fc"  # count down
    "b010 e6f4"  # write 0x10 to port 0xf4
    "f4"  # hlt
)
#: The last 64 KiB below 1 MiB; a processor begins 16 bytes before its end, here with a jump to its start.
_GUEST_ROM = _GUEST.ljust(0xFFF0, b"\0") + bytes.fromhex("ea 0000 00f0").ljust(16, b"\0")
#: ``isa-debug-exit`` ends QEMU with twice what was written, plus one.
_GUEST_RAN = 0x10 * 2 + 1
_BARE = ("-nodefaults", "-no-user-config", "-display", "none")


class CpuOffer(Model, frozen=True):
    """The processors one accelerator offers. Feature names have ``-`` where QEMU sometimes has ``_``."""

    #: by model, the features it has and this host cannot give
    models: dict[str, tuple[str, ...]]
    #: all that can be switched on
    features: tuple[str, ...]
    #: those of them that a guest sees; the others are second names, and ways of QEMU's
    seen: tuple[str, ...]


class QemuCapabilities(Model, frozen=True):
    """What one QEMU program can do on this host."""

    #: what the answers depend on
    key: str
    version: tuple[int, int, int]
    #: with the distribution's words, e.g. ``10.0.2 (Debian 1:10.0.2+ds-2)``
    text: str
    #: all machine types, true where deprecated
    machines: dict[str, bool]
    #: the newest versioned q35
    default_machine: str
    #: those that really run a guest, best first
    accelerators: tuple[Accelerator, ...]
    cpus: dict[Accelerator, CpuOffer]
    #: whether it may receive a VM by post-copy
    post_copy: bool
    #: why not, in QEMU's words
    post_copy_reason: str

    def knows_machine(self, machine: str) -> bool:
        """Whether a VM pinned to this machine type can run here."""
        return machine in self.machines

    def supports(self, cpu: str, accelerator: Accelerator | None = None) -> tuple[bool, tuple[str, ...]]:
        """Whether the CPU model is known, and the features it needs and this host lacks.

        Without ``accelerator`` the host's best one is meant. With one the host has not, there is nothing to say against
        the model.
        """
        offer = self.cpus.get(accelerator or self.accelerators[0])
        if offer is None:
            return True, ()
        model, switches = cpu_models.parse(cpu)
        if model not in offer.models:
            return False, ()
        wanted = {_feature(name): on for name, on in switches.items()}
        needed = {name for name, on in wanted.items() if on} - set(offer.features)
        lacking = set(offer.models[model]) - {name for name, on in wanted.items() if not on}
        return True, tuple(sorted(needed | lacking))

    def features_seen(self, cpu: str, accelerator: Accelerator) -> tuple[str, ...]:
        """The features a guest with this CPU model sees here, of models that leave it to the host; none of others.

        Also none if this host does not offer the accelerator.
        """
        offer = self.cpus.get(accelerator)
        if offer is None or not cpu_models.is_the_hosts(cpu):
            return ()
        off = {_feature(name) for name, on in cpu_models.parse(cpu)[1].items() if not on}
        return tuple(name for name in offer.seen if name not in off)


async def probe(program: Path, cache: Path, user: str | None = None) -> QemuCapabilities:
    """What ``program`` can do when run as ``user``, from ``cache`` if that still holds.

    Raises :class:`QemuError` if it does not run. A cache that cannot be read or written costs time, nothing else.
    """
    key = _key(program, user)
    with contextlib.suppress(OSError, msgspec.DecodeError):
        known = reading.decode(cache.read_bytes(), QemuCapabilities)
        if known.key == key:
            return known
    found = await _Probe(program, user).run(key)
    with contextlib.suppress(StateError):
        toml.write_atomically(cache, msgspec.json.encode(found))
    return found


class _Probe:
    """Asks one program. QEMU and we meet in a temporary folder that holds nothing secret."""

    def __init__(self, program: Path, user: str | None) -> None:
        self._program = program
        self._user = user

    async def run(self, key: str) -> QemuCapabilities:
        kvm, facts = await asyncio.gather(self._kvm_runs_a_guest(), self._ask("tcg", self._facts))
        cpus: dict[Accelerator, CpuOffer] = {"tcg": facts.pop("cpus")}
        if kvm:
            cpus = {"kvm": await self._ask("kvm", _cpus), **cpus}
        return QemuCapabilities(key=key, accelerators=tuple(cpus), cpus=cpus, **facts)

    async def _facts(self, monitor: Monitor) -> dict[str, Any]:
        version = await monitor.execute("query-version")
        machines = await monitor.execute("query-machines")
        number = version["qemu"]
        reason = await _post_copy_hindrance(monitor)
        numbers = (number["major"], number["minor"], number["micro"])
        package = f" ({version['package']})" if version["package"] else ""
        return {
            "version": numbers,
            "text": ".".join(map(str, numbers)) + package,
            "machines": {machine["name"]: machine["deprecated"] for machine in machines},
            "default_machine": _newest_q35(machines),
            "cpus": await _cpus(monitor),
            "post_copy": not reason,
            "post_copy_reason": reason,
        }

    async def _ask(self, accelerator: Accelerator, question: Callable[[Monitor], Any]) -> Any:
        async with self._machineless(accelerator) as monitor, asyncio.timeout(_ANSWER_WITHIN_S):
            return await question(monitor)

    @asynccontextmanager
    async def _machineless(self, accelerator: Accelerator) -> AsyncIterator[Monitor]:
        """A QEMU with no machine. It claims to wait for a VM, because only then it tells whether post-copy works.

        Its monitor is given a connection, no socket to listen on: QEMU's main loop and the monitor's own thread would
        both look for whoever had connected before there was a machine, and one of them wait for ever (seen once in
        fifty starts of QEMU 10.0; a machine takes longer to build than that thread to begin).
        """
        with self._room() as room:
            ours, theirs = socket.socketpair()
            with theirs:
                qmp = f"socket,id=qmp,fd={theirs.fileno()}"
                arguments = ("-machine", "none", "-accel", accelerator, "-S", "-incoming", "defer", "-chardev", qmp)
                qemu = await self._spawn((*arguments, "-mon", "chardev=qmp,mode=control"), room, (theirs.fileno(),))
            try:
                async with asyncio.timeout(_ANSWER_WITHIN_S):
                    monitor = await Monitor.over(ours, str(self._program))
                try:
                    yield monitor
                finally:
                    await monitor.close()
            except (QemuError, TimeoutError) as error:
                await qemu.kill()
                raise QemuError(
                    f"{self._program} cannot be asked what it can do",
                    why=process.last_words(room / "log") or str(error),
                    todo="check the setting 'qemu', and that the program runs",
                ) from error
            finally:
                await qemu.kill()

    async def _kvm_runs_a_guest(self) -> bool:
        if not Path("/dev/kvm").exists() or not _processor_virtualises():
            return False
        with self._room() as room:
            rom = room / "rom"
            rom.write_bytes(_GUEST_ROM)
            rom.chmod(0o644)
            guest = ("-machine", "q35", "-accel", "kvm", "-cpu", cpu_models.argument("x86-64-v2"), "-m", "16")
            stage = ("-bios", str(rom), "-device", "isa-debug-exit,iobase=0xf4,iosize=0x04")
            qemu = await self._spawn((*guest, *stage), room, ())
            try:
                async with asyncio.timeout(_GUEST_WITHIN_S):
                    await qemu.gone.wait()
            except TimeoutError:
                return False
            finally:
                await qemu.kill()
            return qemu.exit_code == _GUEST_RAN

    async def _spawn(self, arguments: Sequence[str], room: Path, pass_fds: Sequence[int]) -> process.QemuProcess:
        command = [str(self._program), *_BARE, *arguments]
        return await process.spawn(command, pass_fds=pass_fds, log=room / "log", user=self._user, kvm=True)

    @contextlib.contextmanager
    def _room(self) -> Any:
        with tempfile.TemporaryDirectory(prefix="limosa-probe-") as name:
            Path(name).chmod(0o755)
            yield Path(name)


def _processor_virtualises() -> bool:
    """Whether the processor has VMX or SVM. There are machines whose ``/dev/kvm`` runs a ROM in real mode without
    either, and then no operating system."""
    flags = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), "")
    return not {"vmx", "svm"}.isdisjoint(flags.split())


async def _cpus(monitor: Monitor) -> CpuOffer:
    definitions = await monitor.execute("query-cpu-definitions")
    return CpuOffer(
        models={model["name"]: tuple(map(_feature, model["unavailable-features"])) for model in definitions},
        features=await _features(monitor, "full"),
        seen=await _features(monitor, "static"),
    )


async def _features(monitor: Monitor, expansion: str) -> tuple[str, ...]:
    """What the model ``max`` has: every property that is on, or of those only what makes up a processor (``static``,
    ``x86_cpu_static_props`` in target/i386/cpu.c)."""
    expanded = await monitor.execute("query-cpu-model-expansion", {"type": expansion, "model": {"name": "max"}})
    properties: dict[str, Any] = expanded["model"]["props"]
    return tuple(sorted({_feature(name) for name, value in properties.items() if value is True}))


async def _post_copy_hindrance(monitor: Monitor) -> str:
    """Why this QEMU cannot receive a VM by post-copy; empty if it can. It tries ``userfaultfd`` when it is asked to."""
    try:
        await monitor.execute(
            "migrate-set-capabilities", {"capabilities": [{"capability": "postcopy-ram", "state": True}]}
        )
    except QemuError as error:
        return error.why
    return ""


def _newest_q35(machines: Sequence[dict[str, Any]]) -> str:
    for machine in machines:
        if machine.get("alias") == "q35":
            return str(machine["name"])
    raise QemuError("this QEMU has no q35 machine", todo="install qemu-system-x86")


def _feature(name: str) -> str:
    return name.replace("_", "-")


def _key(program: Path, user: str | None) -> str:
    """Changes whenever an answer might: another program, kernel session, KVM module, rights or user."""
    try:
        status = program.stat()
    except OSError as error:
        raise QemuError(
            f"the QEMU program {program} cannot be used", why=error.strerror or "", todo="install qemu-system-x86"
        ) from error
    devices = [_stamp(Path(name)) for name in ("/dev/kvm", "/dev/userfaultfd")]
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"1 {program} {status.st_mtime_ns} {status.st_size} {boot} {devices} {user} {os.geteuid()}"


def _stamp(device: Path) -> int:
    try:
        return device.stat().st_ctime_ns
    except OSError:
        return 0
