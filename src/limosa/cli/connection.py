"""Which host a command speaks with."""

from __future__ import annotations

import argparse
import os

from limosa.client.host import HostClient
from limosa.client.route import Route, UnixRoute, configuration_folders, find_route, is_known, local_route


def client_of(arguments: argparse.Namespace) -> HostClient:
    """A client of the host that ``--host`` or the environment names. Nothing is connected yet."""
    return HostClient(route_of(arguments))


def route_of(arguments: argparse.Namespace) -> Route:
    """The way to the host; see :mod:`limosa.client.route` for the order in which it is looked for."""
    environment = os.environ
    if arguments.host is None and environment.get("LIMOSA_SOCKET"):
        return local_route(environment)
    name = arguments.host or environment.get("LIMOSA_HOST")
    if not name:
        return local_route(environment)
    folders = configuration_folders(environment)
    # What somebody wrote down of a name goes before a lab that happens to have it.
    lab = _lab_route(name) if not is_known(name, folders) else None
    return lab or find_route(name, folders)


def _lab_route(name: str) -> UnixRoute | None:
    from limosa.lab.hosts import socket_of  # noqa: PLC0415 - only for commands with --host

    path = socket_of(name)
    if path is None:
        return None
    *_, lab, host, _ = path.parts
    return UnixRoute(str(path), start=f"limosa lab restart {host} --name {lab}")
