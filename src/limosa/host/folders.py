"""The folders of a host's VMs: which VMs belong to it, durably.

A VM belongs to this host from when its ``vm.toml`` is written until it is removed; both survive a crash at any moment.
A ``vm.toml`` that cannot be used is left for a person, and nobody else is given its name until then. A folder without
one is what a crash left; nothing in it passes for another VM's.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from limosa.errors import LimosaError, StateError
from limosa.host.files import Files, passable
from limosa.model.vm import VmConfig
from limosa.settings import toml


class Folders:
    """All of them. ``damaged`` says, by folder, which VMs cannot be read and why."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self.damaged: dict[str, LimosaError] = {}

    def read(self) -> list[VmConfig]:
        """The VMs of this host, by name; those that cannot be read are in ``damaged`` afterwards."""
        found: dict[str, VmConfig] = {}
        for folder in sorted(self._files.vms.iterdir(), key=self._order):
            path = folder / "vm.toml"
            if not path.exists():
                continue
            try:
                config = toml.read(path, VmConfig, error=StateError)
                _check(path, config, found)
                found[config.uuid] = config
            except LimosaError as error:
                self.damaged[folder.name] = error
        return sorted(found.values(), key=lambda config: config.name)

    def make(self, config: VmConfig) -> None:
        """A new, empty folder. Raises :class:`StateError`; nothing that a VM needs was touched then."""
        folder = self._files.vm(config.name)
        try:
            for path in (folder / "vm.toml", self._files.process_record(config.name)):
                if path.exists():
                    raise StateError(
                        f"{path} belongs to a VM that this daemon does not know",
                        todo="restart the daemon so that it finds the VM, or move the folder away",
                        vm=config.name,
                    )
            if folder.exists():
                shutil.rmtree(folder)
            passable(folder)
        except OSError as error:
            raise StateError(f"cannot make {folder}", why=error.strerror or str(error), vm=config.name) from error

    def keep(self, config: VmConfig) -> None:
        """Make the VM this host's, durably. Raises :class:`StateError`; it is not then."""
        toml.write(self._files.vm(config.name) / "vm.toml", config)

    def keep_still(self, config: VmConfig) -> None:
        """After :meth:`keep` of a change to it has failed: have the VM's file say this, as before, durably. Needs no
        space if it does. Raises :class:`StateError`."""
        path = self._files.vm(config.name) / "vm.toml"
        try:
            if toml.read(path, VmConfig, error=StateError) != config:
                toml.write(path, config)
            toml.sync_folder(path.parent)
        except OSError as error:
            raise StateError(f"cannot write {path}", why=error.strerror or str(error), vm=config.name) from error

    def remove(self, config: VmConfig) -> None:
        """Make the VM nobody's. Raises :class:`StateError`; it is still this host's then."""
        folder = self._files.vm(config.name)
        # The file that makes the VM ours goes first and durably: a crash halfway leaves rubbish, not half a VM.
        try:
            if (folder / "vm.toml").exists():
                os.unlink(folder / "vm.toml")
                toml.sync_folder(folder)
        except OSError as error:
            raise StateError(f"cannot remove {folder}", why=error.strerror or str(error), vm=config.name) from error
        shutil.rmtree(folder, ignore_errors=True)

    def _order(self, folder: Path) -> tuple[bool, str]:
        """Where two claim to be one VM, the one whose QEMU runs is it."""
        return not self._files.process_record(folder.name).exists(), folder.name


def _check(path: Path, config: VmConfig, found: dict[str, VmConfig]) -> None:
    """A file copied from another VM's folder must not make two VMs of one: they would share their sockets."""
    if config.name != path.parent.name:
        raise StateError(f"{path} belongs to another VM", why=f"it names '{config.name}'", todo="fix the name in it")
    if config.uuid in found:
        other = found[config.uuid].name
        raise StateError(f"{path} has the UUID of VM '{other}'", todo="give one of them another UUID", vm=config.name)
