"""VMs on a host of a lab, as a person handles them: made, started, looked at, sat at, stopped, crashed, restarted."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from math import inf
from pathlib import Path

import msgspec
import pytest

from harness.commands import limosa
from harness.guests import BOOT_WITHIN_S, ECHO_PORT, LanClient, address_of, linux, wait_until_it_serves
from harness.hosts import tiny, wait_until
from harness.labs import LabHost, running_lab
from harness.steering import does_not_fit, move, remove
from limosa.client.console import open_console
from limosa.client.route import UnixRoute
from limosa.errors import Conflict
from limosa.lab import daemons
from limosa.model.vm import CloudInit, VmState
from limosa.wire import endpoints

pytestmark = [pytest.mark.qemu, pytest.mark.lab]

FIRMWARE_VARS = Path("/usr/share/OVMF/OVMF_VARS_4M.fd")
USER_DATA = "#cloud-config\nhostname: web1\n"


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[LabHost]]:
    with running_lab() as made:
        yield made


@pytest.fixture
def host(hosts: list[LabHost]) -> Iterator[LabHost]:
    """A host that has no VM before or after."""
    yield hosts[0]
    for one in hosts:
        for vm in one.client.call(endpoints.LIST_VMS).vms:
            if vm.state in (VmState.RUNNING, VmState.PAUSED):
                one.client.call(endpoints.STOP_VM, vm=vm.config.name)
            one.client.call(endpoints.DELETE_VM, vm=vm.config.name)
        assert one.bystanders() == []


def qemu(host: LabHost, vm: str = "vm") -> int:
    """Pid of the VM's QEMU."""
    pid = host.show(vm).pid
    assert pid is not None, f"{vm} has no QEMU"
    return pid


def state(host: LabHost, vm: str) -> VmState | None:
    view = host.vm(vm)
    return view.state if view is not None else None


class TestMaking:
    """From options, from a file, and from what another VM shows."""

    def test_from_options(self, host: LabHost) -> None:
        disk = host.lab.state / "made.qcow2"
        said = limosa(
            host, "vm", "create", "made", "--memory", "64M", "--cpus", "2", "--disk", f"{disk},size=8M",
            "--switch", "lan", "--accelerator", "tcg", "--on-crash", "restart", "--start", "--json",
        )  # fmt: skip
        assert said.code == 0, said.error
        view = host.show("made")
        config = view.config
        assert (view.state, config.memory_mib, config.cpus, config.on_crash) == (VmState.RUNNING, 64, 2, "restart")
        assert re.fullmatch(r"pc-q35-\d+\.\d+", config.machine), "pinned to a version"
        assert (config.disks[0].path, config.disks[0].format, config.nics[0].switch) == (str(disk), "qcow2", "lan")
        assert disk.stat().st_size > 0
        remove(host, "made")
        assert disk.exists(), "disks are kept"

    def test_with_a_disk_that_is_in_use(self, host: LabHost) -> None:
        disk = host.lab.state / "shared.qcow2"
        create = ("vm", "create", "--memory", "64M", "--start")
        assert limosa(host, *create, "first", "--disk", f"{disk},size=8M").code == 0
        said = limosa(host, *create, "second", "--disk", str(disk))
        assert said.code == Conflict.exit_code, said.error
        assert f"image {disk} is in use: VM 'first' has it as a disk" in said.error
        remove(host, "first")
        with subprocess.Popen(["qemu-io", str(disk)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as user:
            assert user.stdout is not None
            user.stdout.read(len("qemu-io> "))  # it has opened the image
            said = limosa(host, "vm", "start", "second")
            user.terminate()
        assert said.code == Conflict.exit_code, said.error
        assert "a VM of another host, or another program, has it open" in said.error
        assert limosa(host, "vm", "start", "second").code == 0

    def test_from_what_was_shown(self, host: LabHost, tmp_path: Path) -> None:
        (tmp_path / "short.toml").write_text('name = "filed"\nmemory_mib = 48\naccelerator = "tcg"\n')
        assert limosa(host, "vm", "create", "--file", str(tmp_path / "short.toml")).code == 0
        shown = limosa(host, "vm", "show", "filed", "--toml").out
        assert limosa(host, "vm", "delete", "filed").code == 0
        (tmp_path / "long.toml").write_text(shown)
        assert limosa(host, "vm", "create", "--file", str(tmp_path / "long.toml")).code == 0
        assert limosa(host, "vm", "show", "filed", "--toml").out == shown

    def test_what_cannot_be_leaves_nothing(self, host: LabHost) -> None:
        said = limosa(host, "vm", "create", "odd", "--memory", "64M", "--machine", "pc-q35-0.1", "--json")
        assert (said.code, said.object["error"]["code"]) == (2, "invalid-input")
        assert state(host, "odd") is None


class TestRunning:
    """Through the states of a VM's life, with a guest that heeds the power button."""

    def test_a_life(self, host: LabHost) -> None:
        client = LanClient(host.lab, address_of(1))
        host.client.call(endpoints.CREATE_VM, linux("web"))
        assert state(host, "web") is VmState.STOPPED
        limosa(host, "vm", "start", "web")
        wait_until_it_serves(client)
        self._pause_and_resume(host, client)
        self._sit_at_the_console(host)
        self._outlive_the_daemon(host, client)
        self._reset(host, client)
        self._shut_down(host)

    def _pause_and_resume(self, host: LabHost, client: LanClient) -> None:
        with client.connect(ECHO_PORT) as stream:
            assert limosa(host, "vm", "pause", "web").code == 0
            assert state(host, "web") is VmState.PAUSED
            stream.sendall(b"are you there?")
            stream.settimeout(0.5)
            with pytest.raises(TimeoutError):
                stream.recv(64)
            assert limosa(host, "vm", "resume", "web").code == 0
            assert state(host, "web") is VmState.RUNNING
            stream.settimeout(10)
            assert stream.recv(64) == b"are you there?"

    def _sit_at_the_console(self, host: LabHost) -> None:
        for word in ("first", "again"):  # detached, and attached once more
            asyncio.run(echo(host, word))

    def _outlive_the_daemon(self, host: LabHost, client: LanClient) -> None:
        before, pid = client.uptime(), qemu(host, "web")
        for end in (signal.SIGTERM, signal.SIGKILL):
            end_daemon(host, end)
            assert client.sees_it_run(), "nobody needs the daemon to run"
            host.start()
            assert (state(host, "web"), qemu(host, "web")) == (VmState.RUNNING, pid)
        assert client.uptime() > before
        asyncio.run(echo(host, "still"))

    def _reset(self, host: LabHost, client: LanClient) -> None:
        before, pid = max(visits(client) for _ in range(20)), qemu(host, "web")
        assert limosa(host, "vm", "reset", "web").code == 0
        wait_until(lambda: visits(client) < before, "the guest booted again", BOOT_WITHIN_S)
        assert (state(host, "web"), qemu(host, "web")) == (VmState.RUNNING, pid)

    def _shut_down(self, host: LabHost) -> None:
        assert limosa(host, "vm", "shutdown", "web").code == 0
        wait_until(lambda: state(host, "web") is VmState.STOPPED, "the guest shut down")
        assert host.show("web").reason == "its guest shut down"
        assert host.qemus() == []

    def test_what_does_not_fit_the_state_is_refused(self, host: LabHost) -> None:
        host.client.call(endpoints.CREATE_VM, tiny("still"))
        does_not_fit(host, "still", endpoints.STOP_VM, endpoints.PAUSE_VM, endpoints.SHUTDOWN_VM, endpoints.RESET_VM)
        does_not_fit(host, "still", endpoints.RESUME_VM)
        host.client.call(endpoints.START_VM, vm="still")
        does_not_fit(host, "still", endpoints.START_VM, endpoints.DELETE_VM)
        assert state(host, "still") is VmState.RUNNING


def visits(client: LanClient) -> float:
    """How often the guest was asked since it booted; endless while it does not answer."""
    with suppress(OSError):
        return int(client.facts()["visits"])
    return inf


async def echo(host: LabHost, word: str) -> None:
    """Have the guest's shell say a word on the console; the test's own time limit ends a silence."""
    said = b""
    async with open_console(UnixRoute(str(host.run / "api.sock")), "web") as session:
        await session.send(f"echo {word}-$((6 * 7))\n".encode())
        while f"{word}-42".encode() not in said:
            message = await session.recv()
            said += message if isinstance(message, bytes) else message.encode()


def end_daemon(host: LabHost, number: signal.Signals) -> None:
    """End the host's daemon by a signal and wait until it is gone."""
    pid = daemons.pid_of(host.lab, host.name)
    assert pid is not None
    os.kill(pid, number)
    wait_until(lambda: daemons.pid_of(host.lab, host.name) is None, "the daemon has ended")


def test_a_vm_taken_up_by_a_new_daemon_can_move(hosts: list[LabHost], host: LabHost) -> None:
    host.create(tiny("vm"))
    end_daemon(host, signal.SIGKILL)
    host.start()
    move(host, "vm", hosts[1])
    end_daemon(hosts[1], signal.SIGKILL)
    hosts[1].start()
    move(hosts[1], "vm", host)
    assert state(host, "vm") is VmState.RUNNING


def runs_in_another(host: LabHost, pid: int) -> bool:
    """Whether ``vm`` runs, in another QEMU than that."""
    view = host.show("vm")
    return view.state is VmState.RUNNING and view.pid != pid


class TestCrashing:
    """QEMU is killed."""

    def test_it_is_crashed_and_says_why(self, host: LabHost) -> None:
        host.create(tiny("vm"))
        os.kill(qemu(host), signal.SIGKILL)
        wait_until(lambda: state(host, "vm") is VmState.CRASHED, "it has crashed")
        assert host.show("vm").reason == "ended by SIGKILL"
        host.client.call(endpoints.START_VM, vm="vm")
        assert state(host, "vm") is VmState.RUNNING

    def test_it_is_restarted_if_it_had_run_long_enough(self, host: LabHost) -> None:
        host.create(msgspec.structs.replace(tiny("vm"), on_crash="restart"))
        os.kill(qemu(host), signal.SIGKILL)
        wait_until(lambda: state(host, "vm") is VmState.CRASHED, "it crashed at once, which would go on for ever")
        host.restart({"LIMOSA_TEST_CRASH_LOOP_S": "0"})
        try:
            host.client.call(endpoints.START_VM, vm="vm")
            pid = qemu(host)
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda: runs_in_another(host, pid), "it runs again")
        finally:
            host.start()

    def test_it_is_restarted_by_a_daemon_that_finds_it_dead(self, host: LabHost) -> None:
        host.create(msgspec.structs.replace(tiny("vm"), on_crash="restart"))
        pid = qemu(host)
        end_daemon(host, signal.SIGKILL)
        os.kill(pid, signal.SIGKILL)
        host.restart({"LIMOSA_TEST_CRASH_LOOP_S": "0"})
        try:
            wait_until(lambda: runs_in_another(host, pid), "it runs again")
        finally:
            host.start()


class TestConfinement:
    """What a QEMU may do on its host."""

    def test_it_is_unprivileged_and_sandboxed(self, host: LabHost) -> None:
        host.create(tiny("vm"))
        pid = qemu(host)
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        uid = subprocess.check_output(["id", "-u", "limosa-qemu"], text=True).strip()
        assert set(status["Uid"].split()) == {uid}
        assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
        opened = {os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()}
        assert not any("/pki/" in path for path in opened)
        for key in (host.folder / "pki").iterdir():
            refused = subprocess.run(["cat", str(key)], user=int(uid), group=int(uid), capture_output=True, check=False)
            assert refused.returncode != 0, key

    def test_vnc_is_a_socket_for_the_host_only(self, host: LabHost) -> None:
        host.create(tiny("vm"))
        path = host.show("vm").vnc_socket
        assert path is not None
        with socket.socket(socket.AF_UNIX) as stream:
            stream.settimeout(10)
            stream.connect(path)
            assert stream.recv(12).startswith(b"RFB 003.")
        listening = subprocess.check_output(["ip", "netns", "exec", host.namespace, "ss", "-Hltnp"], text=True)
        assert "qemu" not in listening


class TestFirmwareAndSeed:
    """What lies beside a VM comes along when it moves."""

    def test_uefi_variables_are_the_same_there(self, hosts: list[LabHost], host: LabHost) -> None:
        host.create(msgspec.structs.replace(tiny("efi"), firmware="uefi", memory_mib=128))
        wait_until(lambda: variables(host, "efi") != FIRMWARE_VARS.read_bytes(), "the firmware wrote some")
        host.client.call(endpoints.PAUSE_VM, vm="efi")
        written = variables(host, "efi")
        move(host, "efi", hosts[1])
        # QEMU writes them into the file when the guest goes on. The firmware may write more, but a flash memory only
        # loses bits until it is erased.
        assert not contains(variables(hosts[1], "efi"), written)
        hosts[1].client.call(endpoints.RESUME_VM, vm="efi")
        wait_until(lambda: contains(variables(hosts[1], "efi"), written), "they are there")
        assert state(hosts[1], "efi") is VmState.RUNNING

    def test_the_seed_is_the_same_bit_by_bit(self, hosts: list[LabHost], host: LabHost) -> None:
        host.create(msgspec.structs.replace(tiny("seeded"), cloud_init=CloudInit(user_data=USER_DATA)))
        seed = (host.state / "vms" / "seeded" / "seed.iso").read_bytes()
        assert USER_DATA.encode() in seed
        assert b"cidata" in seed
        move(host, "seeded", hosts[1])
        moved = hosts[1].state / "vms" / "seeded" / "seed.iso"
        assert moved.read_bytes() == seed
        (pid,) = hosts[1].qemus()
        assert str(moved) in {os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()}, "it is in the drive"


def contains(now: bytes, written: bytes) -> bool:
    """Whether everything that was written into a flash memory is still there."""
    return int.from_bytes(now) | int.from_bytes(written) == int.from_bytes(written)


def variables(host: LabHost, vm: str) -> bytes:
    return (host.state / "vms" / vm / "nvram.fd").read_bytes()
