"""QEMUs that a test starts itself, without a daemon."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from limosa.model.vm import VmConfig
from limosa.qemu.arguments import Launch
from limosa.qemu.machine import Machine

QEMU = Path("/usr/bin/qemu-system-x86_64")


async def launch(folder: Path, config: VmConfig, *, incoming: bool = False, buffered: Collection[str] = ()) -> Machine:
    """One whose files are in ``folder``, which there need not be yet; it emulates, and is not connected to anything.

    ``buffered``: images that go through the page cache.
    """
    folder.mkdir(exist_ok=True)

    def make(qmp_fd: int, console_fd: int) -> Launch:
        return Launch(
            config=config,
            accelerator="tcg",
            incoming=incoming,
            tap_fds=(),
            qmp_fd=qmp_fd,
            console_fd=console_fd,
            console_log=folder / "console",
            vnc_socket=folder / "run" / "vnc.sock",
            firmware_code=None,
            firmware_vars=None,
            seed=None,
            buffered=frozenset(buffered),
        )

    return await Machine.launch(QEMU, make, folder / "run", folder / "log", None)
