"""Two hosts and one VM ``vm`` after something has died: where the VM is, what else is left, and a clean slate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness.hosts import Host, runners, settled, wait_until
from limosa.errors import LimosaError
from limosa.model.vm import DiskFormat, VmState
from limosa.storage import chains
from limosa.wire import endpoints


@contextmanager
def broken_move(hosts: list[Host], plan: str, expected: str, *, away: Host | None = None) -> Iterator[Host]:
    """Move ``vm`` from the first host to the second with a plan of what breaks, until all has come to its end.

    ``away`` has a plan of its own by which it dies, and is back only when the VM is as expected and can be operated.
    Yields the host that has the VM, which is ``expected``: one place, or several with ``or`` between them. The VM is
    deleted afterwards.
    """
    source, destination = hosts
    broken = source if plan.startswith("source") else destination
    broken.kill()
    broken.start(plan)
    try:
        try:
            source.move("vm", destination.name)
        except LimosaError:
            assert ":begin:" in plan  # the daemon may die before it has answered
        if plan.endswith(("daemon", "both")):
            broken.wait_for_death()
            broken.start()
        if away is not None:
            away.wait_for_death()
            wait_until(lambda: place(hosts[:1]) in expected.split(" or ") and is_free(source), expected)
            away.start()
        wait_until(lambda: settled(hosts), "every move has ended")
        wait_until(lambda: place(hosts) in expected.split(" or "), expected)
        wait_until(lambda: nothing_else_is_left(hosts), "nothing is left elsewhere")
        found = place(hosts)
        yield next(host for host in hosts if found.endswith(host.name))
    finally:
        clean(hosts)


def is_free(host: Host) -> bool:
    """Whether the VM is on the host and in no move."""
    view = host.vm("vm")
    return view is not None and view.migration is None


def place(hosts: list[Host]) -> str:
    """Where the VM is: ``running at``, ``crashed at`` or another state and host."""
    running = runners(hosts, "vm")
    if running:
        return "running at " + " and ".join(running)
    views = [(host.name, view) for host in hosts if (view := host.vm("vm")) is not None]
    return " and ".join(f"{view.state} at {name}" for name, view in views) or "nowhere"


def nothing_else_is_left(hosts: list[Host]) -> bool:
    """No QEMU, run folder, VM folder or image but those of VMs that are on the host, and what lies below them; and no
    mark of an unfinished copy."""
    for host in hosts:
        view = host.vm("vm")
        runs = view is not None and view.state is VmState.RUNNING
        if len(host.qemus()) != int(runs) or len(list((host.run / "vm").iterdir())) != int(runs):
            return False
        if len(list((host.state / "vms").iterdir())) != int(view is not None):
            return False
        own = {path for disk in disks_of(host, "vm") for path in whole_chain(disk)} if view is not None else set()
        if not set(images(host)) <= own or list(host.state.rglob(".*.limosa-copy")):
            return False
    return True


def whole_chain(disk: Path) -> list[Path]:
    """An image and all files below it."""
    image_format: DiskFormat = "qcow2" if disk.suffix == ".qcow2" else "raw"
    return [disk, *(Path(path) for path, _ in chains.below(str(disk), image_format))]


def images(host: Host) -> list[Path]:
    """Every image below the host's state."""
    return sorted(host.state.rglob("*.qcow2")) + sorted(host.state.rglob("*.raw"))


def disks_of(host: Host, vm: str) -> list[Path]:
    """The images the VM's description names."""
    return [Path(disk.path) for disk in host.show(vm).config.disks]


def clean(hosts: list[Host]) -> None:
    """Leave both hosts without VMs and images, whatever the case did to them."""
    for host in hosts:
        if host.process is None or host.process.poll() is not None:
            host.start()
        view = host.vm("vm")
        if view is not None:
            if view.state in (VmState.RUNNING, VmState.PAUSED):
                host.client.call(endpoints.STOP_VM, vm="vm")
            host.client.call(endpoints.DELETE_VM, vm="vm")
    for host in hosts:
        for image in images(host):
            image.unlink()
