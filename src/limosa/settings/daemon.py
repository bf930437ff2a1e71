"""What a host daemon is told at start: who it is and where its things are."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from limosa.model.base import AbsolutePath, Model, Name
from limosa.settings.address import parse_address

DEFAULT_PORT = 7411
DEFAULT_FILE = "/etc/limosa/host.toml"
DEFAULT_SOCKET = "/run/limosa/api.sock"


class DaemonSettings(Model, frozen=True):
    """The file ``/etc/limosa/host.toml``."""

    name: Annotated[Name, Meta(description="this host's name, as in its certificate")]
    listen: Annotated[
        tuple[str, ...],
        Meta(description="addresses of the mutual-TLS API as ADDRESS or ADDRESS:PORT; empty: only the Unix socket"),
    ] = ()
    certificates: Annotated[
        AbsolutePath, Meta(description="folder with ca.pem, host.pem and host.key, made by 'limosa ca issue'")
    ] = "/etc/limosa/pki"
    state_dir: Annotated[AbsolutePath, Meta(description="VMs, journals, settings; must survive a reboot")] = (
        "/var/lib/limosa"
    )
    run_dir: Annotated[
        AbsolutePath, Meta(description="sockets; gone after a reboot; short, since a Unix socket's path is")
    ] = "/run/limosa"
    qemu: Annotated[AbsolutePath, Meta(description="the QEMU program")] = "/usr/bin/qemu-system-x86_64"
    qemu_user: Annotated[
        str,
        Meta(
            pattern=r"\A[a-z_][a-z0-9_-]{0,31}\Z",
            description="unprivileged user QEMU runs as; must exist if the daemon is root",
        ),
    ] = "limosa-qemu"
    firmware_code: Annotated[AbsolutePath, Meta(description="UEFI code image")] = "/usr/share/OVMF/OVMF_CODE_4M.fd"
    firmware_vars: Annotated[AbsolutePath, Meta(description="template of UEFI variables")] = (
        "/usr/share/OVMF/OVMF_VARS_4M.fd"
    )

    def __post_init__(self) -> None:
        if len(self.run_dir) > 56:
            raise ValueError("run_dir: at most 56 characters, or the paths of sockets in it become too long")
        for address in self.listen:
            try:
                parse_address(address)
            except ValueError as error:
                raise ValueError(f"listen: '{address[:80]}': {error}") from None
