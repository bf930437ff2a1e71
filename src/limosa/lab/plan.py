"""What a lab consists of and where its things are: pure, everything else in this package follows it.

::

    namespace LAB-host1                     namespace LAB-wire
      bridge lan  10.77.0.11 ── uplink ────── lan-host1  ─┐
      (VMs are plugged in here)                           ├─ bridge lan
      mig0        10.78.0.11 ──────┐          lan-client ─┘
      mig1        10.79.0.11 ──┐   └───────── mig0-host1 ─── bridge mig0
                               └───────────── mig1-host1 ─── bridge mig1
    namespace LAB-client
      eth0        10.77.0.2 ───────────────── lan-client

    /var/lib/limosa-lab/LAB/lab.json         this plan; written before anything is made
                            ca/              the authority of the lab
                            client/          an operator's certificate
                            host1/host.toml, pki/, state/, daemon.log, daemon.json
    /run/limosa-lab/LAB/host1/api.sock       and whatever else a host daemon keeps in its run folder

Interfaces are named the same in every host, as on real hosts that are set up alike. The addresses are the same in every
lab: labs cannot reach each other or the machine's own network.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from msgspec import Meta

from limosa.errors import InvalidInput
from limosa.lab.hosts import API_SOCKET, RUN, STATE
from limosa.model.base import Model

NAME_PATTERN = r"\A[a-z0-9]{1,10}\Z"
LabName = Annotated[str, Meta(pattern=NAME_PATTERN, description="at most 10 lower-case letters and digits")]
Speed = Annotated[int, Meta(ge=0, le=25_000)]

SWITCH = "lan"
UPLINK = "uplink"
CLIENT_ADDRESS = "10.77.0.2"
#: VMs may use the addresses of the LAN from this one on.
FIRST_GUEST_ADDRESS = "10.77.0.101"


class Lab(Model, frozen=True):
    """A lab. ``speed_mbit_per_s`` is that of all migration NICs, or one for each; 0 is not limited."""

    name: LabName
    hosts: Annotated[int, Meta(ge=1, le=50)]
    nics: Annotated[int, Meta(ge=0, le=4)] = 1
    speed_mbit_per_s: Speed | tuple[Speed, ...] = 1000

    def __post_init__(self) -> None:
        if isinstance(self.speed_mbit_per_s, tuple) and len(self.speed_mbit_per_s) != self.nics:
            raise ValueError(f"{len(self.speed_mbit_per_s)} speeds for {self.nics} migration NICs")

    @property
    def speeds(self) -> tuple[int, ...]:
        """That of each migration NIC, in order."""
        speed = self.speed_mbit_per_s
        return speed if isinstance(speed, tuple) else (speed,) * self.nics

    @property
    def host_names(self) -> tuple[str, ...]:
        """``host1`` and so on."""
        return tuple(f"host{number}" for number in range(1, self.hosts + 1))

    @property
    def nic_names(self) -> tuple[str, ...]:
        """``mig0`` and so on."""
        return tuple(f"mig{number}" for number in range(self.nics))

    @property
    def migration_networks(self) -> tuple[str, ...]:
        """The networks of the migration NICs, in order."""
        return tuple(f"10.{78 + number}.0.0/24" for number in range(self.nics))

    @property
    def state(self) -> Path:
        """What must survive the daemons."""
        return STATE / self.name

    @property
    def run(self) -> Path:
        """Sockets."""
        return RUN / self.name

    @property
    def wire(self) -> str:
        """The namespace of the bridges between the hosts."""
        return f"{self.name}-wire"

    @property
    def client(self) -> str:
        """The namespace of clients on the LAN."""
        return f"{self.name}-client"

    @property
    def namespaces(self) -> tuple[str, ...]:
        """All of them."""
        return (self.wire, self.client, *(self.namespace(host) for host in self.host_names))

    def namespace(self, host: str) -> str:
        """The namespace that is this host."""
        return f"{self.name}-{host}"

    def address(self, host: str) -> str:
        """The host's address on the LAN."""
        return f"10.77.0.{10 + _number(host)}"

    def migration_addresses(self, host: str) -> tuple[str, ...]:
        """The host's address on each migration NIC."""
        return tuple(f"10.{78 + number}.0.{10 + _number(host)}" for number in range(self.nics))

    def addresses(self, host: str) -> tuple[str, ...]:
        """All addresses of the host."""
        return (self.address(host), *self.migration_addresses(host))

    def host_state(self, host: str) -> Path:
        """The host's settings, certificates, state and log."""
        return self.state / host

    def host_run(self, host: str) -> Path:
        """The host's run folder."""
        return self.run / host

    def socket(self, host: str) -> Path:
        """The API of the host for people on it."""
        return self.host_run(host) / API_SOCKET


def check_name(name: str) -> None:
    """Raises :class:`InvalidInput` if no lab can be called so."""
    if re.match(NAME_PATTERN, name) is None:
        raise InvalidInput(f"'{name[:80]}' is not a name for a lab", why="1 to 10 lower-case letters and digits")


def _number(host: str) -> int:
    return int(host.removeprefix("host"))
