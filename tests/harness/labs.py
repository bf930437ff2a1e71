"""Hosts of a lab, with the same handles as hosts on loopback."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from pyroute2 import IPRoute

from harness.hosts import Host
from limosa.lab import daemons, namespaces
from limosa.lab.plan import UPLINK, Lab
from limosa.model.vm import VmState
from limosa.wire import endpoints


class LabHost(Host):
    """A host of a lab. Its daemon is restarted with a plan for ``daemon.py`` in its environment."""

    def __init__(self, lab: Lab, name: str) -> None:
        super().__init__(lab.host_state(name), name, lab.address(name))
        self.lab = lab

    @property
    def run(self) -> Path:
        return self.lab.host_run(self.name)

    def restart(self, environment: dict[str, str]) -> None:
        """End the daemon and start one with these variables."""
        daemons.stop(self.lab, self.name)
        self._start(environment)

    def start(self, plan: str = "") -> None:
        """Have a daemon without a plan."""
        self.restart({})

    def _start(self, environment: dict[str, str]) -> None:
        before = dict(os.environ)
        os.environ.update(environment)
        try:
            command = [sys.executable, str(Path(__file__).with_name("daemon.py"))]
            daemons.start(self.lab, [self.name], command)
        finally:
            os.environ.clear()
            os.environ.update(before)

    def is_cut(self) -> bool:
        """Whether the host's uplink is down."""

        def look() -> bool:
            with IPRoute() as netlink:
                return not netlink.link("get", ifname=UPLINK)[0]["flags"] & 1

        return namespaces.inside(self.lab.namespace(self.name), look)

    def clean(self) -> None:
        """Leave the host without the VM ``vm``."""
        view = self.vm("vm")
        if view is None:
            return
        if view.state in (VmState.RUNNING, VmState.PAUSED):
            self.client.call(endpoints.STOP_VM, vm="vm")
        self.client.call(endpoints.DELETE_VM, vm="vm")
