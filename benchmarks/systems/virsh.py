"""``virsh migrate --live`` between two libvirt daemons, with libvirt's own defaults, and ``virsh blockcopy`` on one.

The source's daemon is spoken to on its Unix socket and reaches the destination's over TCP, both without TLS; QEMU's
stream, and that of a disk that is copied, goes over the migration NIC. When the guest stopped and ran again, and how
long the transfer took, is taken from the time stamps of QEMU's events, which ``virsh qemu-monitor-event`` shows on both
hosts.
"""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

from benchmarks import disk
from benchmarks.ground import HOSTS, Ground, run
from benchmarks.guest import BOOT_WITHIN_S, Guest
from benchmarks.libvirt import IMAGES, Daemon
from benchmarks.systems import Moved, other
from limosa.lab.plan import SWITCH
from limosa.qemu import cpu

NAME = "virsh"
FIRST_CONSOLE_PORT = 4555
# Not with --timestamp, which shows when virsh got to know of an event instead of QEMU's own time stamp.
_EVENT = re.compile(r"^event (\S+) at (\d+\.\d+) for domain '[^']*': (.*)$", re.MULTILINE)
_EVENTS_WITHIN_S = 5.0


def start_daemons(ground: Ground) -> dict[str, Daemon]:
    """libvirt on both hosts; ends with the lab."""
    return {host: Daemon(ground, host, NAME) for host in HOSTS}


class Virsh:
    """A guest moved by ``virsh migrate --live``."""

    def __init__(self, ground: Ground, guest: Guest, daemons: Mapping[str, Daemon] | None = None) -> None:
        """``daemons`` are those of :func:`start_daemons`; the guest gets its own if there are none."""
        self.name = NAME
        self.host = HOSTS[0]
        self._ground = ground
        self._guest = guest
        self._daemons = daemons or start_daemons(ground)
        self._console_port = FIRST_CONSOLE_PORT + guest.number
        self._image = "disk-0.qcow2"

    def boot(self) -> None:
        """Start the guest on the first host; returns when its memory is filled."""
        if self._guest.disk is not None:
            disk.copy(self._guest.disk, self._daemons[self.host].images / self._image)
        path = self._ground.folder / f"{self._guest.name}.xml"
        path.write_text(self._domain())
        run(self._daemons[self.host].command("create", str(path)))
        self._ground.inside(self.host, lambda: _wait_for_console(self._console_port, self._guest.loaded))

    def pause(self) -> None:
        """Stop the guest."""
        run(self._daemons[self.host].command("suspend", self._guest.name))

    def wake(self) -> None:
        """Let it run again."""
        run(self._daemons[self.host].command("resume", self._guest.name))

    def move(self, *, encrypted: bool) -> Moved:
        """Move the guest to the other host."""
        if encrypted:
            raise ValueError("virsh is compared as it is by default, without TLS")
        there = other(self.host)
        words, begins = self._prepare_disk(there)
        with self._events() as files:
            uri = f"qemu+tcp://{there}/system"
            migrate = self._daemons[self.host].command("migrate", "--live", *words, self._guest.name, uri)
            _, wall_s, cpu_s = run(migrate)
            source, destination = files[self.host], files[there]
            stopped, resumed = _times_of(source, "STOP", "")[-1], _times_of(destination, "RESUME", "")[-1]
            began, ended = _times_of(source, *begins)[0], _times_of(source, "MIGRATION", '"completed"')[-1]
        (self._daemons[self.host].images / self._image).unlink(missing_ok=True)
        self.host = there
        return Moved(
            wall_s=wall_s,
            transfer_s=ended - began,
            blackout_ms=(resumed - stopped) * 1000,
            command_cpu_s=cpu_s,
            stopped_at=stopped,
        )

    def migrate(self) -> float:
        """Move the guest, which has no disk, with nobody who watches. Returns the command's processor time."""
        there = other(self.host)
        words = ("migrate", "--live", self._guest.name, f"qemu+tcp://{there}/system")
        _, _, cpu_s = run(self._daemons[self.host].command(*words))
        self.host = there
        return cpu_s

    def _prepare_disk(self, there: str) -> tuple[Sequence[str], tuple[str, str]]:
        """Make an empty image where libvirt is to copy the disk to, if there is one. Returns the options for that, and
        the event with which the transfer begins."""
        if self._guest.disk is None:
            return (), ("MIGRATION", '"setup"')
        disk.create(self._daemons[there].images / self._image)
        return ("--copy-storage-all",), ("JOB_STATUS_CHANGE", '"created"')

    def move_disk(self) -> float:
        """Move the guest's disk to another image of its host. Returns the wall time."""
        daemon, left = self._daemons[self.host], self._image
        self._image = "disk-1.qcow2" if left == "disk-0.qcow2" else "disk-0.qcow2"
        words = ("--dest", f"{IMAGES}/{self._image}", "--format", "qcow2", "--transient-job", "--wait", "--pivot")
        _, wall_s, _ = run(daemon.command("blockcopy", self._guest.name, "vda", *words))
        (daemon.images / left).unlink()
        return wall_s

    @contextmanager
    def _events(self) -> Iterator[dict[str, Path]]:
        """For each host, the file in which the events of its QEMUs appear."""
        files = {host: self._ground.folder / f"events-{host}" for host in HOSTS}
        watchers = [self._watch(host, file) for host, file in files.items()]
        try:
            time.sleep(0.2)  # virsh does not tell when it has subscribed
            yield files
        finally:
            for watcher in watchers:
                watcher.terminate()
                watcher.wait()

    def _watch(self, host: str, file: Path) -> subprocess.Popen[bytes]:
        command = self._daemons[host].command("qemu-monitor-event", "--loop")
        unbuffered = [shutil.which("stdbuf") or "stdbuf", "-oL"]
        at = command.index("virsh")
        with file.open("wb") as output:
            return subprocess.Popen([*command[:at], *unbuffered, *command[at:]], stdout=output)

    def _domain(self) -> str:
        """The same machine and devices, at the same places, as Limosa's and the script's."""
        guest = self._guest
        return f"""
<domain type='qemu'>
  <name>{guest.name}</name>
  <memory unit='MiB'>{guest.load.memory_mib}</memory>
  <vcpu>1</vcpu>
  <os>
    <type arch='x86_64' machine={quoteattr(guest.machine)}>hvm</type>
    <kernel>{escape(self._reachable(guest.kernel))}</kernel>
    <initrd>{escape(self._reachable(guest.initrd))}</initrd>
    <cmdline>{escape(guest.command_line)}</cmdline>
  </os>
  <features><acpi/><apic/></features>
  {_cpu_xml(guest.cpu)}
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <controller type='usb' model='none'/>
    <serial type='tcp'>
      <source mode='bind' host='127.0.0.1' service='{self._console_port}'/><protocol type='raw'/>
      <target type='isa-serial'/>
    </serial>
    <interface type='bridge'>
      <mac address='{guest.mac}'/><source bridge='{SWITCH}'/><model type='virtio-non-transitional'/><rom enabled='no'/>
      {_address(0x02)}
    </interface>
    {self._disk()}
    <video><model type='vga'/>{_address(0x01)}</video>
    <memballoon model='none'/>
  </devices>
</domain>
"""

    def _disk(self) -> str:
        if self._guest.disk is None:
            return ""
        return f"""
    <disk type='file' device='disk' model='virtio-non-transitional'>
      <driver name='qemu' type='qcow2' cache='none' discard='unmap'/><source file='{IMAGES}/{self._image}'/>
      <target dev='vda' bus='virtio'/>{_address(0x0A)}
    </disk>"""

    def _reachable(self, file: str) -> str:
        """A copy where libvirt's QEMU sees it: the cache is out of its sight."""
        copy = self._ground.folder / Path(file).name
        if not copy.exists():
            part = copy.with_suffix(f".{self._guest.name}")  # several guests may boot at once
            shutil.copyfile(file, part)
            part.rename(copy)
        return str(copy)


def _cpu_xml(model: str) -> str:
    base, features = cpu.parse(model)
    switches = [
        f"<feature policy='{'require' if on else 'disable'}' name='{name.replace('-', '_')}'/>"
        for name, on in features.items()
    ]
    return f"<cpu mode='custom' match='exact' check='none'><model>{base}</model>{''.join(switches)}</cpu>"


def _address(slot: int) -> str:
    return f"<address type='pci' bus='0' slot='{slot:#x}' function='0'/>"


def _wait_for_console(port: int, words: bytes) -> None:
    """Return when the guest's console has these words. Raises ``OSError``."""
    said = b""
    with socket.create_connection(("127.0.0.1", port), timeout=BOOT_WITHIN_S) as console:
        while words not in said:
            if not (more := console.recv(4096)):
                raise ConnectionResetError("the guest ended")
            said += more


def event_stamps(said: str, name: str, words: str) -> list[float]:
    """QEMU's time stamps of the events of that name with these words in their data, in seconds since the epoch."""
    return [float(at) for event, at, data in _EVENT.findall(said) if event == name and words in data]


def _times_of(file: Path, name: str, words: str) -> list[float]:
    """The time stamps of such events; waits a moment for the first, since ``virsh`` shows events a little later."""
    deadline = time.monotonic() + _EVENTS_WITHIN_S
    while not (stamps := event_stamps(file.read_text(), name, words)):
        if time.monotonic() > deadline:
            raise RuntimeError(f"virsh did not show the event {name} {words}: {file.read_text()}")
        time.sleep(0.05)
    return stamps
