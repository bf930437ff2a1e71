"""What only a real QEMU process can show: how it starts, what is left when it does not, who finds it again."""

from __future__ import annotations

import asyncio
import dataclasses
import grp
import os
import pwd
import re
import shutil
import signal
import socket
import stat
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import uvloop

from limosa.errors import OutcomeUnknown, QemuError, QemuGone
from limosa.model.vm import CloudInit, Disk, VmConfig
from limosa.qemu import process
from limosa.qemu.arguments import Launch
from limosa.qemu.machine import Machine
from limosa.qemu.protocol import RunState, StreamParameters
from limosa.security.stream import make_credentials
from limosa.storage import seed

pytestmark = pytest.mark.qemu

QEMU = Path("/usr/bin/qemu-system-x86_64")
ROOT = os.geteuid() == 0


class Place:
    """A folder for one VM, and its launches."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run_dir = folder / "run"
        self.log = folder / "log"
        self.vm = VmConfig(
            name="tiny",
            uuid="5c7a2b9e-0f0e-4c06-8a0b-6d4b7b6f2a11",
            memory_mib=32,
            cpus=1,
            machine="q35",
            cpu="x86-64-v2",
        )

    def launch(self, *, program: Path = QEMU, user: str | None = None, **changes: Any) -> Awaitable[Machine]:
        def make(qmp_fd: int, console_fd: int) -> Launch:
            plain = Launch(
                config=self.vm,
                accelerator="tcg",
                incoming=False,
                tap_fds=(),
                qmp_fd=qmp_fd,
                console_fd=console_fd,
                console_log=self.folder / "console",
                vnc_socket=self.run_dir / "vnc.sock",
                firmware_code=None,
                firmware_vars=None,
                seed=None,
            )
            return dataclasses.replace(plain, **changes)

        return Machine.launch(program, make, self.run_dir, self.log, user)


@pytest.fixture
def place() -> Iterator[Place]:
    with tempfile.TemporaryDirectory(prefix="limosa-") as folder:
        Path(folder).chmod(0o711)
        yield Place(Path(folder))


Runner = Callable[..., None]


@pytest.fixture(params=["asyncio", "uvloop"])
def play(request: pytest.FixtureRequest) -> Runner:
    """Runs a coroutine with each of the event loops."""
    runner: Runner = asyncio.run if request.param == "asyncio" else uvloop.run
    return runner


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def alive(pid: int) -> bool:
    return process.start_time_of(pid) is not None


def test_its_logs_may_be_cut_while_it_writes_them(place: Place, play: Runner) -> None:
    """What is written to a file that was opened to append goes to its end, wherever that is by then."""

    async def scenario() -> None:
        machine = await place.launch()
        appended = {
            os.readlink(f"/proc/{machine.pid}/fd/{info.name}")
            for info in Path(f"/proc/{machine.pid}/fdinfo").iterdir()
            if int(re.findall(r"^flags:\s+([0-7]+)$", info.read_text(), re.MULTILINE)[0], 8) & os.O_APPEND
        }
        await machine.kill()
        assert appended == {str(place.folder / "console"), str(place.log)}

    play(scenario())


def test_sockets_are_ours_alone_and_go_with_it(place: Place, play: Runner) -> None:
    async def scenario() -> None:
        machine = await place.launch()
        assert mode(place.run_dir) == 0o700
        assert {path.name: mode(path) for path in place.run_dir.iterdir()} == {
            "qmp.sock": 0o600,
            "console.sock": 0o600,
            "vnc.sock": 0o700,
        }
        assert mode(place.log) == mode(place.folder / "console") == 0o600
        assert os.getsid(machine.pid) == machine.pid != os.getsid(0)
        await machine.quit()
        assert not place.run_dir.exists()
        assert not alive(machine.pid)

    play(scenario())


def test_it_inherits_nothing_but_what_it_is_given(place: Place) -> None:
    secret = os.open("/etc/hostname", os.O_RDONLY)
    os.set_inheritable(secret, True)

    async def scenario() -> None:
        machine = await place.launch()
        held = {os.readlink(link) for link in Path(f"/proc/{machine.pid}/fd").iterdir()}
        assert "/etc/hostname" not in held
        await machine.quit()

    try:
        asyncio.run(scenario())
    finally:
        os.close(secret)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"machine": "pc-q35-99.0"}, "unsupported machine type"),
        ({"cpu": "Skylake-Client"}, "TCG doesn't support"),
        ({"disks": (Disk(name="vda", path="/nowhere/at.all", format="raw"),)}, "No such file"),
    ],
)
def test_a_launch_that_fails_tells_why_and_leaves_nothing(place: Place, changes: dict[str, Any], words: str) -> None:
    place.vm = VmConfig(**{field: getattr(place.vm, field) for field in place.vm.__struct_fields__} | changes)
    with pytest.raises(QemuError, match=words):
        asyncio.run(wait_for(place.launch()))
    assert not place.run_dir.exists()


async def wait_for(machine: Awaitable[Machine]) -> Machine:
    return await machine


def test_a_program_that_is_none(place: Place) -> None:
    with pytest.raises(QemuError, match="cannot start"):
        asyncio.run(wait_for(place.launch(program=Path("/nowhere/qemu"))))
    with pytest.raises(QemuError, match="did not start"):
        asyncio.run(wait_for(place.launch(program=Path("/bin/true"))))
    assert not place.run_dir.exists()


def test_words_of_an_earlier_run_are_not_taken_for_this_ones(place: Place) -> None:
    place.log.write_text("qemu-system-x86_64: the old trouble\n")

    async def scenario() -> None:
        machine = await place.launch()
        os.kill(machine.pid, signal.SIGKILL)
        await machine.gone.wait()
        assert machine.exit_text() == "ended by SIGKILL"
        await machine.quit()

    asyncio.run(scenario())
    assert "old trouble" in place.log.with_name("log.old").read_text()


@pytest.mark.parametrize("moment", ["spawn", "connect"])
def test_a_launch_that_is_cancelled_leaves_nothing(place: Place, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    async def scenario() -> None:
        reached = asyncio.Event()

        async def connect(*_: object) -> None:
            reached.set()
            await asyncio.Event().wait()

        def start(*arguments: Any) -> Any:
            loop.call_soon_threadsafe(reached.set)
            return real_start(*arguments)

        loop, real_start = asyncio.get_running_loop(), process._start
        if moment == "connect":
            monkeypatch.setattr("limosa.qemu.monitor.Monitor.connect", connect)
        else:
            monkeypatch.setattr(process, "_start", start)
        launch = asyncio.ensure_future(wait_for(place.launch()))
        await reached.wait()
        launch.cancel()
        with pytest.raises(asyncio.CancelledError):
            await launch
        assert place.log.exists()  # it was started
        assert not place.run_dir.exists()
        assert str(place.folder) not in commands()

    asyncio.run(scenario())


def test_one_that_nobody_recorded_is_ended_unless_its_guest_ran(place: Place) -> None:
    async def scenario() -> None:
        first = await place.launch()
        await first._monitor.close()
        second = await place.launch()
        assert first.gone.is_set()
        await second.resume()
        await second._monitor.close()
        with pytest.raises(QemuError, match="another QEMU"):
            await place.launch()
        again = await Machine.attach(place.run_dir, second.pid, second.process.start_time)
        assert await again.status() is RunState.RUNNING
        await again.quit()

    asyncio.run(scenario())


def commands() -> str:
    """The command lines of all processes."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes().decode("utf-8", "replace"))
        except OSError:
            continue
    return "\n".join(found)


def test_its_end_is_noticed_at_once(place: Place, play: Runner) -> None:
    async def scenario() -> None:
        machine = await place.launch()
        os.kill(machine.pid, signal.SIGKILL)
        async with asyncio.timeout(1):
            await machine.gone.wait()
        assert not alive(machine.pid)  # reaped
        with pytest.raises(QemuGone):
            await machine.status()
        await machine.quit()

    play(scenario())


def test_a_command_under_way_when_it_ends(place: Place) -> None:
    async def scenario() -> None:
        machine = await place.launch()
        os.kill(machine.pid, signal.SIGSTOP)
        question = asyncio.ensure_future(machine.status())
        await asyncio.sleep(0)
        os.kill(machine.pid, signal.SIGKILL)
        with pytest.raises((QemuGone, OutcomeUnknown)):
            await question
        await machine.quit()

    asyncio.run(scenario())


def test_it_survives_us_and_is_found_again(place: Place, play: Runner) -> None:
    async def scenario() -> None:
        first = await place.launch()
        await first.resume()
        pid, start_time = first.pid, first.process.start_time
        await first.detach()
        second = await Machine.attach(place.run_dir, pid, start_time)
        assert await second.status() is RunState.RUNNING
        with pytest.raises(QemuGone):
            await Machine.attach(place.run_dir, pid, start_time + 1)
        os.kill(pid, signal.SIGTERM)
        await second.gone.wait()
        assert "terminating on signal 15" in second.exit_text()
        with pytest.raises(QemuGone):
            await Machine.attach(place.run_dir, pid, start_time)
        await second.quit()

    play(scenario())


def test_one_that_hung_is_taken_up_when_it_wakes(place: Place, play: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asked in vain has left no connection: QEMU would serve the first of them alone."""

    async def scenario() -> None:
        hung = await place.launch()
        await hung.resume()
        await hung.detach()
        os.kill(hung.pid, signal.SIGSTOP)
        kept = []  # as a daemon does that shows why
        with monkeypatch.context() as patience:
            patience.setattr("limosa.qemu.machine.ATTACH_WITHIN_S", 0.1)
            patience.setattr("limosa.qemu.machine.DYING_S", 0.0)
            for _ in range(4):  # more than can wait at its socket
                with pytest.raises(QemuError, match="does not answer") as refused:
                    await Machine.attach(place.run_dir, hung.pid, hung.process.start_time)
                kept.append(refused)
        os.kill(hung.pid, signal.SIGCONT)
        async with asyncio.timeout(10):
            machine = None
            while machine is None:
                with suppress(QemuError):  # it has not got rid of the others yet
                    machine = await Machine.attach(place.run_dir, hung.pid, hung.process.start_time)
            assert await machine.status() is RunState.RUNNING
        await machine.quit()

    play(scenario())


def test_one_that_does_not_listen_is_ended_by_force(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("limosa.qemu.session.QUIT_WITHIN_S", 0.05)

    async def scenario() -> None:
        machine = await place.launch()
        os.kill(machine.pid, signal.SIGSTOP)
        await machine.quit()
        assert not alive(machine.pid)

    asyncio.run(scenario())


def test_the_console_can_be_attached_to_more_than_once(place: Place) -> None:
    async def scenario() -> None:
        machine = await place.launch()
        for _ in range(2):
            with socket.socket(socket.AF_UNIX) as console:
                console.connect(str(place.run_dir / "console.sock"))
        await machine.quit()

    asyncio.run(scenario())


def test_credentials_are_on_the_disk_for_a_moment_only(place: Place) -> None:
    async def scenario() -> None:
        server, _ = make_credentials()
        machine = await place.launch(incoming=True)
        await machine.prepare_incoming(StreamParameters(credentials=server))
        assert not (place.run_dir / "stream").exists()
        broken = type(server)(authority=server.authority, certificate=server.certificate, key="nonsense")
        with pytest.raises(QemuError, match="key"):
            await machine.prepare_incoming(StreamParameters(credentials=broken))
        assert not (place.run_dir / "stream").exists()
        await machine.quit()

    asyncio.run(scenario())


def test_devices_of_every_kind_start(place: Place) -> None:
    image = place.folder / "vda.raw"
    image.write_bytes(bytes(1024 * 1024))
    iso = place.folder / "seed.iso"
    cloud_init = CloudInit(user_data="#cloud-config\n")
    iso.write_bytes(seed.make(cloud_init, instance="i", host_name="h"))
    place.vm = VmConfig(
        **{field: getattr(place.vm, field) for field in place.vm.__struct_fields__}
        | {"disks": (Disk(name="vda", path=str(image), format="raw"),), "cloud_init": cloud_init}
    )

    async def scenario() -> None:
        machine = await place.launch(seed=iso)
        await machine.resume()
        await machine.press_power_button()
        await machine.quit()

    asyncio.run(scenario())


def test_a_machine_that_is_reset_stays_as_it_was(place: Place) -> None:
    async def scenario() -> None:
        machine = await place.launch()
        begun = asyncio.Event()
        machine.on_event(lambda event: begun.set() if event.name == "RESET" else None)
        await machine.resume()
        for state in (RunState.RUNNING, RunState.PRELAUNCH):
            begun.clear()
            await machine.reset()
            await begun.wait()
            assert await machine.status() is state
            await machine.pause()
        await machine.resume()
        assert await machine.status() is RunState.RUNNING
        await machine.quit()

    asyncio.run(scenario())


OVMF = Path("/usr/share/OVMF")


@pytest.mark.skipif(not OVMF.exists(), reason="needs the package ovmf")
def test_a_machine_with_uefi_moves(place: Place) -> None:
    """Its variables are in a file of its own on each host, which QEMU brings up to date."""
    places = [Place(place.folder / name) for name in ("here", "there")]
    for each in places:
        each.folder.mkdir()
        shutil.copy(OVMF / "OVMF_VARS_4M.fd", each.folder / "vars")
        each.vm = VmConfig(
            **{field: getattr(place.vm, field) for field in place.vm.__struct_fields__}
            | {"firmware": "uefi", "memory_mib": 64}
        )

    def launch(each: Place, *, incoming: bool) -> Awaitable[Machine]:
        code, own = OVMF / "OVMF_CODE_4M.fd", each.folder / "vars"
        return each.launch(incoming=incoming, firmware_code=code, firmware_vars=own)

    async def scenario() -> None:
        source, destination = [await launch(each, incoming=each is places[1]) for each in places]
        completed = asyncio.Event()
        source.on_event(lambda event: completed.set() if event.data.get("status") == "completed" else None)
        await source.resume()
        await destination.prepare_incoming(StreamParameters())
        await source.prepare_outgoing(StreamParameters())
        ours, theirs = socket.socketpair()
        with ours, theirs:
            await destination.receive(theirs)
            await source.migrate(ours)
        async with asyncio.timeout(30):
            await completed.wait()
        await destination.resume()
        assert await destination.status() is RunState.RUNNING
        for machine in (source, destination):
            await machine.quit()
        assert (places[0].folder / "vars").read_bytes() == (places[1].folder / "vars").read_bytes()

    asyncio.run(scenario())


@pytest.fixture
def nobody() -> str:
    if not ROOT:
        pytest.skip("needs root")
    return "nobody"


def test_as_an_unprivileged_user(place: Place, nobody: str) -> None:
    async def scenario() -> None:
        server, _ = make_credentials()
        machine = await place.launch(user=nobody, incoming=True)
        status = Path(f"/proc/{machine.pid}/status").read_text()
        entry = pwd.getpwnam(nobody)
        assert f"\nUid:\t{entry.pw_uid}\t{entry.pw_uid}\t{entry.pw_uid}\t{entry.pw_uid}\n" in status
        assert "\nGroups:\t \n" in status
        assert mode(place.run_dir) == 0o1770
        assert place.run_dir.stat().st_uid == 0
        assert grp.getgrgid(place.run_dir.stat().st_gid).gr_gid == entry.pw_gid
        await machine.prepare_incoming(StreamParameters(credentials=server))
        await machine.detach()
        again = await Machine.attach(place.run_dir, machine.pid, machine.process.start_time)
        await again.prepare_incoming(StreamParameters(credentials=server))
        await again.quit()
        assert not place.run_dir.exists()

    asyncio.run(scenario())


def test_a_user_that_is_none(place: Place) -> None:
    with pytest.raises(QemuError, match="no user"):
        asyncio.run(wait_for(place.launch(user="nobody-of-that-name")))
